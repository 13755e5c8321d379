"Pairs of teacher and student that users bring, recipes, and what a run's student keeps"
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from moi.detector import DetectorSpec, build_detector, load_detector, weights_hash
from moi.distill import RECIPES, Distilling, check_pair, distill
from moi.experiment import read_parameters, run
from moi.pseudo_targets import sample_targets

SIZE = (64, 96)
PLAIN = {"num_classes": 3, "min_size": 64, "max_size": 96}


def small(width, **fields):
    "An untrained detector of two classes, with torchvision's anchors"
    return build_detector(DetectorSpec(["a", "b"], SIZE, width=width, fpn_channels=16, head_channels=32, **fields))


class Images(Dataset):
    "Four random images with pseudo-targets"
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (4, 3, *SIZE), generator=g, dtype=torch.uint8)
        self.targets = sample_targets(4, SIZE, [1, 2], generator=g)
    def __len__(self): return 4
    def __getitem__(self, i): return self.images[i], self.targets[i]


def learns(student, teacher, recipe="moi", **more):
    "Two steps: finite losses, a changed student, an unchanged teacher; what the history holds"
    before, started = weights_hash(teacher), weights_hash(student)
    history = distill(student, teacher, Images(), Distilling(recipe, steps=2, batch=4), progress="", **more)
    assert all(torch.tensor(v).isfinite().all() for v in history.values())
    assert weights_hash(teacher) == before and weights_hash(student) != started
    return history


@pytest.fixture(scope="module")
def users():
    "A detector of torchvision's own parts, with moments that cannot move, as its pretrained ones have"
    torch.manual_seed(0)
    detector = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), **PLAIN)
    for p in detector.backbone.parameters(): p.data.mul_(.5) # without moments of its own an untrained body would overflow
    return detector.eval()


def test_a_detector_that_torchvision_built_teaches_a_narrower_pyramid(users):
    assert any(isinstance(m, FrozenBatchNorm2d) for m in users.modules())
    learns(small(.125), users)


def test_a_mobilenet_learns_from_a_resnet50(users):
    learns(small(.5, backbone="mobilenet_v3_large"), users, held_out=Images(), every=1)


def test_other_levels_are_refused_in_a_sentence(users):
    other = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, **PLAIN)
    with pytest.raises(ValueError, match=r"this teacher can't teach this student: pyramid levels \(height, width\)"):
        check_pair(small(.125), other, SIZE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(recipe):
    torch.manual_seed(0)
    teacher = small(.25)
    history = learns(small(.125), teacher, recipe)
    assert ("hint" in history) == (recipe == "chen2017") and ("loss_classifier" in history) == (recipe == "supervised")


def test_the_student_is_the_one_that_agrees_best(monkeypatch):
    "Of the second half of the looks; the history tells which"
    seen = []
    def judge_of(teacher, held_out):
        def judge(student):
            seen.append(weights_hash(student))
            return {"agreement": [.9, .2, .4, .3][len(seen) - 1]} # the first look is best, and too early to count
        return judge
    monkeypatch.setattr("moi.distill.agreement_judge", judge_of)
    nets = [small(.125), small(.25)]
    distill(*nets, Images(), Distilling(steps=4, batch=4), Images(), every=1, progress="")
    assert len(set(seen)) == 4 and weights_hash(nets[0]) == seen[2]


@pytest.mark.parametrize("ema", [0., .9])
def test_held_moments_stay_held_when_the_student_is_judged(ema):
    nets = [small(.125), small(.25)]
    moments = lambda: [b.clone() for k, b in nets[0].named_buffers() if "running" in k]
    before = moments()
    distill(*nets, Images(), Distilling(steps=3, batch=4, ema=ema), Images(), hold_moments=True, every=1, progress="")
    assert before and all(torch.equal(a, b) for a, b in zip(before, moments()))


def test_heads_that_are_frozen_stay_the_teachers(tmp_path):
    "In a run, and in bfloat16"
    tiny = read_parameters(Path(__file__).parents[1] / "nbs/experiments/params/tiny.yaml")
    result = run(tiny | {"device": "cpu", "baselines": [], "precision": "bf16"}, tmp_path)
    assert result["switches"]["frozen_heads"]
    teacher, student = (load_detector(tmp_path / "tiny" / f"{n}.safetensors").state_dict() for n in ("teacher", "student"))
    heads = [k for k in student if k.startswith(("rpn", "roi_heads"))]
    assert heads and all(torch.equal(student[k], teacher[k]) for k in heads)
    assert all(v.isfinite().all() for v in student.values())


def test_compiled_backbones_give_the_same_run(tmp_path):
    "Up to the order of sums, which a few steps of AdamW enlarge; aot_eager, which needs no compiler of C++"
    tiny = read_parameters(Path(__file__).parents[1] / "nbs/experiments/params/tiny.yaml")
    tiny |= {"device": "cpu", "baselines": [], "teacher_lr": 1e-4, "distill_lr": 1e-4} # small steps, which enlarge little
    plain, compiled = (run(tiny | {"compile": c}, tmp_path / (c or "plain"))["history"] for c in ("", "aot_eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3 # teacher in training, teacher asked, student in training
    for who, losses in plain.items():
        for name, values in losses.items(): assert compiled[who][name] == pytest.approx(values, rel=1e-2, abs=1e-4), (who, name)


@pytest.mark.parametrize("recipe, places", [("moi", 12), ("supervised", 20), ("chen2017", 20)])
def test_a_recipe_that_learns_from_labels_leaves_none_out(recipe, places, monkeypatch):
    crowded = Images()
    crowded.targets[0] = {"boxes": torch.tensor([[4., 4., 30., 30.]]).repeat(20, 1), "labels": torch.ones(20, dtype=torch.int64)}
    asked = []
    def remember(images, boxes, labels, *more, **options):
        asked.append(boxes.shape[1])
        return images, boxes, labels
    monkeypatch.setattr("moi.distill.random_views", remember)
    nets = [small(.125), small(.25)]
    distill(*nets, crowded, Distilling(recipe, steps=1, batch=4), progress="")
    assert asked == [places]
