"Which channels belong together: what was written down by hand against what torch-pruning traces"
import pytest
import torch
import torch_pruning
from torch import nn

from moi.detector import DetectorSpec, build_detector, plain
from moi.inherit import wires_of

SPEC = {"classes": ("a", "b"), "size": (64, 64), "width": .25, "fpn_channels": 24, "rpn_channels": 20, "head_channels": 36,
    "anchors": (8, 16, 32, 64, 128)}
FAMILIES = {
    "resnet18": {}, "resnet50": {"backbone": "resnet50"},
    "mobilenet_v2": {"backbone": "mobilenet_v2", "width": .5}, "mobilenet_v3_large": {"backbone": "mobilenet_v3_large", "width": .5},
    "torchvision's v2": {"backbone": "resnet50", "fpn_norm": True, "rpn_convs": 2, "box_convs": 4, "box_channels": 28},
    "torchvision's mobile": {"backbone": "mobilenet_v3_large", "width": .5, "strides": (32, 32), "anchors": ((32, 64),) * 3},
}


class Traced(nn.Module):
    "A detector as one graph: its boxes are fixed, as proposals are detached"
    def __init__(self, detector):
        super().__init__()
        self.detector = detector.requires_grad_(True)

    def forward(self, x):
        d = self.detector
        view = d.backbone(x)
        regions = d.roi_heads.box_roi_pool(view, [torch.tensor([[0., 0, 60, 60], [8, 8, 30, 40]])] * len(x), [x.shape[-2:]] * len(x))
        return d.rpn.head(list(view.values())), d.roi_heads.box_predictor(d.roi_heads.box_head(regions))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_by_hand_are_the_traced_ones(family):
    torch.manual_seed(0)
    traced = Traced(plain(build_detector(DetectorSpec(**(SPEC | FAMILIES[family])))))
    wires, ends = wires_of(traced.detector), ("cls_logits", "bbox_pred", "cls_score")
    graph = torch_pruning.DependencyGraph().build_dependency(traced, torch.rand(2, 3, 64, 64))
    names = {m: n.removeprefix("detector.") for n, m in traced.named_modules()}
    ignored = [m for m, n in names.items() if n.endswith(ends)]
    depthwise = {n for m, n in names.items() if isinstance(m, nn.Conv2d) and m.groups > 1}
    side = lambda name, out: (name, "both" if name in depthwise else "out" if out else "in")
    found = set()
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]):
        leaves = [(d.target.module, graph.is_out_channel_pruning_fn(d.handler)) for d, _ in group]
        found.add(frozenset(side(names[m], out) for m, out in leaves if m in names))
    ours = {}
    for w in wires:
        for g, out in ((w.out, True), (w.into, False)):
            if g: ours.setdefault(g, set()).add(side(w.name, out or isinstance(traced.detector.get_submodule(w.name), nn.BatchNorm2d)))
    assert {frozenset(g) for g in ours.values()} == found
