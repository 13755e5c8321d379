"Boxes are float32 whatever else is computed in: a narrow object far to the right, where bfloat16 tells only every eighth pixel apart"
import logging
from collections import defaultdict

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator

from moi import detector, distill, impressions, outputs, pseudo_targets, regions, train
from moi.detector import DetectorSpec, build_detector
from moi.distill import Distilling
from moi.evaluate import predict
from moi.impressions import Painting, synthesise
from moi.pseudo_targets import Laws, preferred_targets
from moi.train import Engine, Training, train_detector

SIZE = (96, 1248)
NARROW = {"boxes": torch.tensor([[1029.25, 40.5, 1035.25, 54.5]]), "labels": torch.tensor([1])}
EVERYWHERE = {"AnchorGenerator.forward", "GatherRoIAlign.forward"} # where boxes go in all that detectors do


class One:
    "A dataset of one image twice, with the narrow object in it"
    def __init__(self):
        self.image = torch.randint(0, 96, (3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        x1, y1, x2, y2 = NARROW["boxes"][0].round().long().tolist()
        self.image[:, y1:y2, x1:x2] = 255
    def __len__(self): return 2
    def __getitem__(self, i):
        if i > 1: raise IndexError(i)
        return self.image, NARROW


def small(width, kinds=None):
    "An untrained detector; what its first convolution gives is noted in `kinds`"
    torch.manual_seed(0)
    made = build_detector(DetectorSpec(["mark"], SIZE, width=width, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128),
        rpn_samples=32, roi_samples=16))
    if kinds is not None: made.backbone.body.conv1.register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
    return made.eval()


@pytest.fixture
def engine(): return Engine(device="cpu", precision="bf16")


@pytest.fixture
def asked(monkeypatch):
    "The types of all boxes that are made as anchors, moved, compared, or asked about, by place"
    types = defaultdict(set)
    def watch(owner, name, boxes=(), gives=True):
        real, place = getattr(owner, name), f"{owner.__name__.removeprefix('moi.')}.{name}"
        def called(*args, **kwargs):
            found = real(*args, **kwargs)
            for v in [args[i] for i in boxes] + [found] * gives:
                types[place] |= {x.dtype for x in (v if isinstance(v, (list, tuple)) else [v])}
            return found
        monkeypatch.setattr(owner, name, called)
    for name in ("decode_single", "encode_single"): watch(BoxCoder, name, (1, 2)) # both what moves and what is moved
    watch(AnchorGenerator, "forward")
    watch(detector.GatherRoIAlign, "forward", (2,), gives=False)
    for module in (regions, impressions): watch(module, "batch_iou", (0, 1))
    for module in (regions, pseudo_targets): watch(module, "decode", (1, 2))
    for module in (regions, impressions, distill): watch(module, "encode", (1, 2))
    for module in (outputs, pseudo_targets, impressions, distill): watch(module, "roi_outputs", (2,))
    for module in (pseudo_targets, impressions, distill): watch(module, "propose", (1, 2, 3))
    return types


def check(asked, *places):
    assert EVERYWHERE | set(places) <= set(asked) and all(found == {torch.float32} for found in asked.values()), dict(asked)


def finite(history): return all(torch.tensor(v).isfinite().all() for v in history.values())


def test_bfloat16_would_lose_the_object():
    x1, _, x2, _ = NARROW["boxes"].bfloat16()[0]
    assert x1 == x2


def test_a_teacher_learns_from_it(asked, engine):
    kinds = set()
    teacher = small(.25, kinds)
    history = train_detector(teacher, One(), Training(steps=3, batch=2), engine=engine, progress="")
    assert kinds == {torch.bfloat16} and finite(history)
    assert max(history["loss_rpn_box_reg"]) > 0 and max(history["loss_box_reg"]) > 0 # anchors and regions stood for it
    check(asked, "BoxCoder.encode_single", "BoxCoder.decode_single")
    assert all(v.isfinite().all() for v in teacher.state_dict().values())


def test_it_is_painted(asked, engine):
    kinds = set()
    images, history = synthesise(small(.25, kinds), [NARROW, NARROW], Painting(steps=4), small(.25), engine=engine, refresh=2, progress="")
    assert torch.bfloat16 in kinds and finite(history) and images.shape == (2, 3, *SIZE)
    assert min(history["rpn_box"]) > 0 and min(history["roi_box"]) > 0
    check(asked, "regions.batch_iou", "regions.decode", "regions.encode", "impressions.encode", "impressions.roi_outputs",
        "impressions.propose")


def test_a_teacher_is_ready_to_see_boxes(asked, engine):
    with engine.autocast(): targets = preferred_targets(small(.25), torch.rand(2, 3, *SIZE), Laws(area=(1e-6, 1.)), 20)
    assert sum(len(t["boxes"]) for t in targets) and all(t["boxes"].isfinite().all() for t in targets)
    check(asked, "pseudo_targets.decode", "pseudo_targets.propose", "pseudo_targets.roi_outputs")


@pytest.mark.parametrize("recipe", ["moi", "chen2017"])
def test_a_student_learns_it_from_its_teacher(recipe, asked, engine):
    kinds = set()
    student, taught = small(.25, kinds), Distilling(recipe, steps=3, batch=2)
    history = distill.distill(student, small(.5), One(), taught, One(), engine=engine, every=2, progress="")
    assert torch.bfloat16 in kinds and finite(history)
    check(asked, "distill.propose", "distill.roi_outputs", *(["distill.encode", "regions.encode"] if recipe == "chen2017" else []))
    if recipe == "chen2017": assert max(history["rpn_box_hard"]) > 0 and max(history["roi_box_hard"]) > 0
    assert all(v.isfinite().all() for v in student.state_dict().values())


def test_it_is_detected(asked, engine):
    "Also inside autocast, where nobody detects today"
    with engine.autocast(): seen = predict(small(.25), One(), progress=False)
    seen += predict(small(.25), One(), progress=False)
    assert all(len(d["boxes"]) and d["boxes"].dtype == torch.float32 and all(v.isfinite().all() for v in d.values()) for d in seen)
    check(asked, "BoxCoder.decode_single")


@pytest.mark.parametrize("slow", [True, False])
def test_who_asks_for_bfloat16_where_it_is_slow_is_told(slow, monkeypatch, caplog):
    monkeypatch.setattr(train, "emulated", lambda device: slow)
    with caplog.at_level(logging.WARNING):
        Engine(device="cpu")
        assert not caplog.records
        Engine(device="cpu", precision="bf16")
    assert ["precision no" in r.message for r in caplog.records] == [True] * slow
