"moi.importers and moi.teachers against torchvision: what is adopted or loaded detects what the original detects, or is refused by name"
import copy
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import detection, resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from moi.detector import DetectorSpec, Rules, build_detector, detector_hash, load_detector, plain, save_detector
from moi.importers import BUILDERS
from moi.teachers import adopt, load

NAMES = ("scratch", "dent", "stain")
SMALL = dict(min_size=64, max_size=96, rpn_post_nms_top_n_test=16, box_score_thresh=0.,
    rpn_post_nms_top_n_train=30, box_batch_size_per_image=8)
FACTS = dict(size=(64, 96), test_proposals=16, rules={"score": 0.}) # the same, of a file


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def settled(detector):
    "Norms that saw a few images, some of weak channels, so that eps and kind matter; and scores that differ"
    images = [torch.rand(3, 64, 96) for _ in range(2)]
    conv, targets = None, [{"boxes": torch.tensor([[10., 10, 50, 40]]), "labels": torch.tensor([1])}] * 2
    for m in detector.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.weight.data.uniform_(.3, 1)
    with torch.no_grad():
        detector.train()(images, targets)
        for m in detector.modules():
            if isinstance(m, nn.BatchNorm2d): # it stands behind its convolution
                for v, factor in ((conv.weight, .003), (m.running_mean, .003), (m.running_var, 9e-6)):
                    v[::10] *= factor
            conv = m if isinstance(m, nn.Conv2d) else conv
        detector.roi_heads.box_predictor.cls_score.weight.mul_(5)
    return detector.eval()


def build(name, outputs=4):
    return settled(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=outputs, **SMALL))


def freeze(detector, eps):
    "The same with FrozenBatchNorm2d in its body, as torchvision builds it around pretrained weights"
    for parent in list(detector.backbone.body.modules()):
        for name, m in parent.named_children():
            if isinstance(m, nn.BatchNorm2d):
                still = FrozenBatchNorm2d(m.num_features, eps)
                still.load_state_dict(m.state_dict())
                setattr(parent, name, still)
    return detector


def light(backbone=None, **fields):
    "A Faster R-CNN over resnet_fpn_backbone, whose norms are frozen, with a narrow box head"
    backbone = backbone or resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    heads = dict(box_head=TwoMLPHead(256 * 49, 64), box_predictor=FastRCNNPredictor(64, 4))
    return FasterRCNN(backbone, **SMALL | heads | fields).eval()


def alike(*detectors):
    "The same specs and tensors"
    first, states = detectors[0].spec, [d.state_dict() for d in detectors]
    assert all(d.spec == first for d in detectors)
    assert all(s.keys() == states[0].keys() and all(torch.equal(v, states[0][k]) for k, v in s.items()) for s in states)


def same(ours, theirs, dtype=torch.float32):
    "The same detections; in float64 where an untrained body is so deep that it magnifies rounding"
    images = [torch.rand(3, 64, 96).to(dtype), torch.rand(3, 150, 110).to(dtype)]
    eps = dict(boxes=1e-3, scores=1e-5) if dtype is torch.float32 else dict(boxes=1e-7, scores=1e-9)
    with torch.inference_mode():
        for a, b in zip(*(copy.deepcopy(d).to(dtype)(images) for d in (ours, theirs))):
            assert len(b["boxes"]) > 5 and torch.equal(a["labels"], b["labels"])
            for k in eps:
                assert (a[k] - b[k]).abs().max() <= eps[k], k


@pytest.mark.parametrize("name", BUILDERS)
def test_builders(name, tmp_path):
    "Adopted, loaded from both kinds of files, saved and loaded again: one detector, and torchvision's detections"
    theirs, builder = build(name), name if "320" in name else None
    before, rng = copy.deepcopy(theirs.state_dict()), torch.get_rng_state()
    adopted = adopt(theirs, NAMES)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items()) and theirs.rpn.head.cls_logits.weight.requires_grad
    assert not any(m.training for m in adopted.modules()) and not any(p.requires_grad for p in adopted.parameters())
    torch.save(theirs.state_dict(), tmp_path/"a.pth")
    save_file(theirs.state_dict(), tmp_path/"b.safetensors")
    save_detector(adopted, tmp_path/"c.safetensors")
    loaded = [load(tmp_path/f, NAMES, builder=builder, **FACTS) for f in ("a.pth", "b.safetensors")]
    alike(adopted, *loaded, load(tmp_path/"c.safetensors"), load_detector(tmp_path/"c.safetensors"))
    same(adopted, theirs, torch.float64)
    theirs = freeze(theirs, 1e-5)
    torch.save(theirs.state_dict(), tmp_path/"d.pth")
    adopted = adopt(theirs, NAMES)
    assert adopted.spec.rules.norm == "frozen"
    alike(adopted, load(tmp_path/"d.pth", NAMES, builder=builder, **FACTS))
    same(adopted, theirs, torch.float64)


def test_eps_of_coco(tmp_path):
    "torchvision sets the eps of one file to 0; without that its detections are others"
    theirs = freeze(build("fasterrcnn_resnet50_fpn", 91), 0.)
    torch.save(theirs.state_dict(), tmp_path/"a.pth")
    adopted, loaded = adopt(theirs), load(tmp_path/"a.pth", **FACTS)
    assert adopted.spec == loaded.spec and loaded.spec.rules.eps == 0 and loaded.spec.classes[11] is None
    dead = [i for i, n in enumerate(loaded.spec.classes, 1) if n is None]
    image = [torch.rand(3, 64, 96)]
    with torch.no_grad():
        theirs.roi_heads.box_predictor.cls_score.bias[dead] = -1e4 # ours are silent there
        same(adopted, theirs, torch.float64)
        same(loaded, theirs, torch.float64)
        theirs.roi_heads.box_predictor.cls_score.bias[dead] = 1e3
        assert set(theirs(image)[0]["labels"].tolist()) <= set(dead)
        assert not set(adopt(theirs)(image)[0]["labels"].tolist()) & set(dead)
    wrong = load(tmp_path/"a.pth", **FACTS | {"rules": {"score": 0., "eps": 1e-5}})
    with torch.inference_mode():
        assert not torch.allclose(wrong.backbone(image[0][None])["0"], loaded.backbone(image[0][None])["0"], rtol=1e-3)


@pytest.mark.parametrize("backbone,layers,sides", [("resnet18", None, None), ("resnet34", [2, 3, 4], 4), ("resnet101", [4], 2)])
def test_resnets(backbone, layers, sides, tmp_path):
    "Any ResNet with any of its layers, over frozen norms; anchors that torchvision has no default for are given"
    anchors = tuple((16. * 2**i, 24. * 2**i) for i in range(sides or 5))
    generator = AnchorGenerator(anchors, ((.4, 1., 2.2),) * len(anchors))
    theirs = light(resnet_fpn_backbone(backbone_name=backbone, weights=None, returned_layers=layers), rpn_anchor_generator=generator)
    with torch.no_grad():
        for m in theirs.modules():
            if isinstance(m, FrozenBatchNorm2d): # an untrained body must not run away
                m.weight.fill_(.5)
    adopted = adopt(theirs, NAMES)
    torch.save(theirs.state_dict(), tmp_path/"a.pth")
    facts = FACTS | dict(anchors=anchors, rules=dict(score=0., ratios=(.4, 1., 2.2)))
    assert adopted.spec == load(tmp_path/"a.pth", NAMES, **facts).spec
    same(adopted, theirs)
    with pytest.raises(ValueError, match="anchors apart at each place.* Give anchors="):
        load(tmp_path/"a.pth", NAMES)


def test_mobilenet_v2():
    backbone = mobilenet_backbone(backbone_name="mobilenet_v2", weights=None, fpn=True)
    theirs = light(backbone, rpn_anchor_generator=AnchorGenerator(((32, 64),) * 3, ((.5, 1., 2.),) * 3))
    assert adopt(theirs, NAMES).spec.strides == (32, 32)
    same(adopt(theirs, NAMES), theirs)


@pytest.mark.parametrize("fields", [
    dict(backbone="resnet50", width=.25, rpn_channels=16), dict(backbone="mobilenet_v2", width=.35, fpn_norm=True),
    dict(backbone="mobilenet_v3_large", width=.5, box_convs=2, box_channels=24, rpn_convs=2),
    dict(rules=Rules(norm="frozen", eps=1e-3, score=.01, sampling=1, mean=(0., 0., 0.), std=(1., 1., 1.)), resize="keep"),
    dict(backbone="mobilenet_v3_large", strides=(32, 32), anchors=(16, 32, 64), rules=Rules(candidates=200))])
def test_ours(fields, tmp_path):
    "Our own architectures: as they are, as modules without a spec, and as a state_dict"
    spec = DetectorSpec(NAMES, **dict(size=(64, 96), fpn_channels=32, head_channels=48, anchors=(8, 16, 32, 64, 128)) | fields)
    mine = build_detector(spec).eval()
    stranger = plain(mine)
    del stranger.spec
    assert adopt(mine).spec == adopt(plain(mine)).spec == adopt(stranger, NAMES).spec == spec
    torch.save(mine.state_dict(), tmp_path/"a.pth")
    given = dict(size=spec.size, resize=spec.resize, anchors=spec.anchors, rules=spec.rules)
    assert load(tmp_path/"a.pth", NAMES, **given).spec == spec
    alike(load(tmp_path/"a.pth", NAMES, **given), adopt(mine))


def test_older_names_and_wrappers(tmp_path):
    theirs = light()
    inner = r"^(backbone\.fpn\.\w+_blocks\.\d+|rpn\.head\.conv)((?:\.0)+)\.(\w+)$"
    old = {re.sub(inner, r"\1.\3", k): v for k, v in theirs.state_dict().items()}
    assert "rpn.head.conv.weight" in old
    for found in (old, {"model": old, "optimizer": {"lr": 1.}}, {"state_dict": {f"model.{k}": v.half() for k, v in old.items()}}):
        torch.save(found, tmp_path/"a.pth")
        loaded = load(tmp_path/"a.pth", NAMES, **FACTS)
        assert loaded.rpn.head.cls_logits.weight.dtype == torch.float32
        assert torch.allclose(loaded.rpn.head.conv[0][0].weight, theirs.rpn.head.conv[0][0].weight, atol=1e-4)


def test_squeeze_and_sizes():
    "A fixed size, several training sizes, and a smallest size beyond the largest"
    for fields, size, resize in ((dict(fixed_size=(96, 64)), (64, 96), "squeeze"), (dict(min_size=(48, 64)), (64, 96), "keep"),
                                 (dict(min_size=160, max_size=96), (96, 96), "keep")):
        theirs = light(**fields)
        adopted = adopt(theirs, NAMES)
        assert (adopted.spec.size, adopted.spec.resize) == (size, resize)
        same(adopted, theirs)


def test_other_types():
    "Half precision, a training module and one that saw a tiny image first are adopted as they are meant"
    theirs = light()
    with torch.inference_mode():
        theirs([torch.rand(3, 64, 65)])
    expected = adopt(theirs, NAMES)
    got = adopt(copy.deepcopy(theirs).half().train(), NAMES)
    assert got.spec == expected.spec and got.rpn.head.cls_logits.weight.dtype == torch.float32


def test_version_01(tmp_path):
    "A file from version 0.1: one anchor side a level, under its older name"
    mine = build_detector(DetectorSpec(NAMES, size=(64, 96), fpn_channels=32, head_channels=48, anchors=(8, 16, 32, 64, 128))).eval()
    spec = dict(anchor_sizes=[8, 16, 32, 64, 128], classes=NAMES, size=[64, 96], fpn_channels=32, head_channels=48, backbone="resnet18",
        width=1., proposals=300, roi_samples=64, rpn_samples=64)
    save_file({k: v.contiguous() for k, v in mine.state_dict().items()}, tmp_path/"a.safetensors", metadata={"moi": json.dumps(spec)})
    loaded = load(tmp_path/"a.safetensors", NAMES, (64, 96))
    assert detector_hash(loaded) == detector_hash(mine)
    assert load(tmp_path/"a.safetensors", rules={"score": .3}).spec.rules.score == .3
    wrongs = {"classes": dict(classes=[*NAMES[:2], "rust"]), "size": dict(size=(96, 96)),
        "says itself": dict(builder="fasterrcnn_resnet50_fpn")}
    for about, wrong in wrongs.items():
        with pytest.raises(ValueError, match=about):
            load(tmp_path/"a.safetensors", **wrong)


class Shifted(TwoMLPHead):
    def forward(self, x):
        return super().forward(x) + .1


class OwnHeads(RoIHeads):
    pass


class OwnForward(FasterRCNN):
    def forward(self, images, targets=None):
        return super().forward([i * 2 for i in images], targets)


class Cosine(nn.Module):
    def forward(self, x):
        return x


def fpn(extra=None, norm_layer=None, **fields):
    body = resnet.ResNet(resnet.BasicBlock if not fields else resnet.Bottleneck, [2, 2, 2, 2] if not fields else [3, 4, 6, 3], **fields)
    expansion = 4 if fields else 1
    return BackboneWithFPN(body, {f"layer{i+1}": str(i) for i in range(4)}, [64 * expansion * 2**i for i in range(4)], 256,
        extra or LastLevelMaxPool(), norm_layer)


def group_norm(channels):
    return nn.GroupNorm(8, channels)


def modules():
    "Modules that are not served, and what is said of them"
    none = dict(weights=None, weights_backbone=None)
    with torch.device("meta"):
        yield detection.retinanet_resnet50_fpn(**none), "a RetinaNet; a torchvision FasterRCNN is served"
        yield detection.maskrcnn_resnet50_fpn(**none), "a mask head"
        yield detection.keypointrcnn_resnet50_fpn(**none), "a keypoint head"
        yield OwnForward(fpn(), 4), "class OwnForward has a forward of its own"
        yield nn.DataParallel(light()), "a DataParallel; a torchvision FasterRCNN is served"
        yield light(fpn(groups=32, width_per_group=4)), "ResNeXt and wide ResNets are not served"
        yield light(fpn(width_per_group=128)), "ResNeXt and wide ResNets are not served"
        yield light(fpn(norm_layer=group_norm)), "GroupNorm; BatchNorm2d and FrozenBatchNorm2d are served"
        yield light(fpn(LastLevelP6P7(256, 256))), "extra_blocks is a LastLevelP6P7; LastLevelMaxPool is served"
        fine, small = dict(backbone_name="mobilenet_v3_large", returned_layers=[1, 2, 3]), dict(backbone_name="mobilenet_v3_small")
        yield light(mobilenet_backbone(**fine, weights=None, fpn=True)), "from the layers 2, 4, 7"
        yield light(mobilenet_backbone(**small, weights=None, fpn=True)), "shapes of neither mobilenet_v2 nor"
        yield light(bbox_reg_weights=(1., 1., 1., 1.)), "roi_heads.box_coder.weights"
        yield light(box_roi_pool=MultiScaleRoIAlign(list("0123"), 14, 2)), r"output_size is \(14, 14\)"
        yield light(box_roi_pool=MultiScaleRoIAlign(list("0123"), 7, 2, canonical_scale=112)), "canonical_scale is 112"
        yield light(box_predictor=Cosine()), "box_predictor is a Cosine; FastRCNNPredictor is served"
        yield light(rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128, 200)), ((1.,),) * 5)), "the same ratios at each"
    d = light()
    d.roi_heads.__class__ = OwnHeads
    yield d, "roi_heads is a OwnHeads; RoIHeads is served"
    d = light()
    d.backbone.body.bn1.eps = .1
    yield d, "norms of 2 kinds"
    d = light()
    d.rpn.anchor_generator.cell_anchors[0] += 1
    yield d, "its anchors cannot be built again"
    yield light(box_head=Shifted(256 * 49, 64)), "box head cannot be built again"
    d = freeze(light(fpn(replace_stride_with_dilation=[False, False, True])), 1e-5) # the same names and shapes
    yield d, "body or pyramid cannot be built again"
    d = light()
    d.roi_heads.box_predictor.bbox_pred = nn.Linear(64, 4)
    yield d, r"bbox_pred.bias: \(4,\), \(16,\) is needed"
    d = light()
    d.backbone.fpn.inner_blocks[1][0].weight.data[0] = float("inf")
    yield d, "'backbone.fpn.inner_blocks.1.0.weight' has a NaN or an infinite number"


def test_refused_modules():
    for module, about in modules():
        with pytest.raises(ValueError, match=about):
            adopt(module, NAMES)


def test_refused_arguments(tmp_path):
    theirs = light()
    wrongs = {"its 4 outputs have no names; give classes": None,
        "4 names for 4 outputs; 3 are needed, the background": ("background", *NAMES),
        "'a' is no name": ("a", "a", "b"), "at least one name": (None,) * 3, "a list of names": "abc"}
    for about, classes in wrongs.items():
        with pytest.raises(ValueError, match=about):
            adopt(theirs, classes)
    with pytest.raises(TypeError, match="did you mean 'anchors'"):
        adopt(theirs, NAMES, anchor=3)
    with pytest.raises(TypeError, match="did you mean 'score'"):
        adopt(theirs, NAMES, rules={"scores": 3})
    with pytest.raises(ValueError, match="DetectorSpec.size is"):
        adopt(theirs, NAMES, (3, 4))


def files():
    "What a file may hold that is not served, and what is said of it"
    with torch.device("meta"):
        state = light().state_dict()
        mask = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        retina = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    state, mask, retina = ({k: torch.zeros(v.shape, dtype=v.dtype) for k, v in s.items()} for s in (state, mask, retina))
    one = torch.zeros(1)
    yield {"backbone.bottom_up.stem.conv1.weight": one}, "it is a checkpoint of Detectron2 .* give config="
    yield ({"state_dict": {"backbone.conv1.weight": one, "neck.fpn_convs.0.conv.weight": one}, "meta": {}},
        "it is a checkpoint of MMDetection .* give config=")
    yield mask, "it is a Mask R-CNN"
    yield retina, "it is a one-stage detector"
    yield {"fc.weight": one}, "it has no 'backbone.body.'"
    yield {0: one}, "it has no 'backbone.body.'"
    yield [one], "it holds a list; a state_dict is needed"
    yield {"net": state, "epoch": 3}, "'net' is a "
    yield state | {"extra": one}, r"1 tensors do not fit its spec; extra: \(1,\), nothing is needed"
    yield {k: v for k, v in state.items() if k != "rpn.head.bbox_pred.bias"}, "rpn.head.bbox_pred.bias: missing"
    yield state | {"rpn.head.cls_logits.bias": torch.full((3,), torch.nan)}, "'rpn.head.cls_logits.bias' has a NaN"


def test_refused_files(tmp_path):
    for i, (found, about) in enumerate(files()):
        torch.save(found, tmp_path/f"{i}.pth")
        with pytest.raises(ValueError, match=about) as e:
            load(tmp_path/f"{i}.pth", NAMES)
        assert f"{i}.pth" in str(e.value)
    torch.save(light(), tmp_path/"whole.pt")
    with pytest.raises(ValueError, match="convert it once"):
        load(tmp_path/"whole.pt", NAMES)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load(tmp_path/"nowhere.pth", NAMES)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load(tmp_path, NAMES)
    torch.save(light().state_dict(), tmp_path/"right.pth")
    with pytest.raises(ValueError, match="config is 'config.yaml', and it is a file of torchvision's"):
        load(tmp_path/"right.pth", NAMES, config="config.yaml")
    with pytest.raises(ValueError, match="did you mean 'fasterrcnn_resnet50_fpn'"):
        load(tmp_path/"right.pth", NAMES, builder="fasterrcnn_resnet_fpn")
    with pytest.raises(ValueError, match="backbone is 'resnet18', 'resnet50' is needed"):
        load(tmp_path/"right.pth", NAMES, builder="fasterrcnn_resnet50_fpn")
