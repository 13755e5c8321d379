"Whoever has only a teacher: torchvision's builders from a file to a student, the README's ten lines, the notebook, a pair that can't be"
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from moi.compress import make_student, paint_transfer_set
from moi.detector import DetectorSpec, build_detector, detector_hash, load_detector, save_detector
from moi.distill import check_pair
from moi.experiment import OWN_TEACHER, PARAMETERS, check_parameters, default, run
from moi.inherit import StudentSpec, plan_inheritance, student_spec
from moi.teachers import adopt, load
from moi.train import Engine
from moi.transfer_set import open_transfer_set

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/experiments/own_teacher.ipynb"
PLAIN = {"num_classes": 4, "min_size": 64, "max_size": 96}
NAMES = ["scratch", "dent", "stain"]
FEW = {"impressions": 2, "textures": 2, "shard": 2}
BUILDERS = {name: lambda name=name: getattr(detection, name)(weights=None, weights_backbone=None, **PLAIN) for name in (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn")}
BUILDERS["resnet18, frozen norms"] = lambda: FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), **PLAIN)
BUILDERS["mobilenet_v2, ours"] = lambda: build_detector(
    DetectorSpec(NAMES, (64, 96), backbone="mobilenet_v2", fpn_channels=32, head_channels=64))


def calm(detector):
    "Untrained bodies without moments of their own overflow"
    for p in detector.backbone.parameters(): p.data.mul_(.7)
    return detector.eval()


@pytest.fixture(scope="module")
def inspector(tmp_path_factory):
    "A teacher's file as torchvision's users keep it"
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("own") / "inspector.pth"
    torch.save(calm(BUILDERS["resnet18, frozen norms"]()).state_dict(), file)
    return file


@pytest.mark.parametrize("name", BUILDERS)
def test_from_a_file_to_a_student(name, tmp_path):
    torch.manual_seed(0)
    built = calm(BUILDERS[name]())
    torch.save(built.state_dict(), tmp_path / "teacher.pth")
    more = {"builder": name} if name in ("fasterrcnn_mobilenet_v3_large_320_fpn",) else {}
    teacher = load(tmp_path / "teacher.pth", NAMES, (64, 96), **more)
    before, cpu = detector_hash(teacher), Engine(device="cpu")
    images = paint_transfer_set(teacher, tmp_path / "set", steps=2, engine=cpu, **FEW)
    student = make_student(teacher, images, tmp_path / "student", steps=2, batch=2, engine=cpu)
    assert detector_hash(teacher) == before and student.spec.width == teacher.spec.width / 2
    assert len(open_transfer_set(images)) == 4
    again = load_detector(save_detector(student, tmp_path / "student.safetensors"))
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(): found, same = (d([image])[0] for d in (student, again))
    assert all(torch.equal(found[k], same[k]) for k in found) and found["boxes"].isfinite().all()
    assert adopt(built, NAMES, (64, 96)).spec.backbone == teacher.spec.backbone


def test_the_readmes_ten_lines(inspector, tmp_path):
    "As they stand, but for the sizes and numbers"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    block = next(b for b in blocks if "make_student" in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    small = {"(480, 640)": "(64, 96)", "impressions=256": "impressions=2", "steps=3000": "steps=2"}
    for old, new in small.items():
        assert old in block
        block = block.replace(old, new)
    (tmp_path / "inspector.pth").write_bytes(inspector.read_bytes())
    brief = "import moi.compress as c; paint = c.paint_transfer_set; c.paint_transfer_set = lambda *a, **k: paint(*a, **k, steps=2)\n"
    done = subprocess.run([sys.executable, "-c", brief + block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_detector(tmp_path / "mine/student.safetensors").spec.classes == tuple(NAMES)


def test_the_notebook_spells_out_how_its_run_differs():
    cell = next(c for c in nbformat.read(NOTEBOOK, 4).cells if c.metadata.get("tags") == ["parameters"])
    given = {}
    exec(cell.source, given)
    given = {k: v for k, v in given.items() if not k.startswith("__")}
    assert set(given) <= set(PARAMETERS)
    assert given == {k: OWN_TEACHER.get(k, default(k)) for k in given} and set(OWN_TEACHER) - {"dataset"} <= set(given)
    for line in cell.source.splitlines(): assert line.partition("  # ")[2] == PARAMETERS[line.partition(":")[0]][1].metadata["help"]


def test_the_notebook_goes_from_a_file_to_a_result(inspector, tmp_path):
    (tmp_path / "runs").mkdir()
    given = {"teacher": str(inspector), "classes": NAMES, "size": [64, 96], "agreement": 2, "synthesis_steps": 2, "distill_steps": 2,
        "batch": 2, "device": "cpu", **FEW}
    papermill = [sys.executable, "-m", "papermill", "--start-timeout", "600"]
    done = subprocess.run([*papermill, NOTEBOOK, "runs/mine.ipynb", "-y", json.dumps(given)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/mine/result.json").read_text())
    assert set(result["metrics"]) == {"agreement"} and set(result["metrics"]["agreement"]) == {"AP", "AP50"}
    assert all(result["latency"][k]["torch"] > 0 for k in ("teacher", "student")) and 0 < result["capacity"]["ratio"]["flops"] < 1
    assert not result["switches"]["bn_prior"]                                                       # frozen norms
    assert load_detector(tmp_path / "runs/mine/student.safetensors").spec.classes == tuple(NAMES)
    assert len(open_transfer_set(tmp_path / "runs/mine/transfer_set")) == 4


def test_a_pair_that_cannot_be_is_refused_before_painting(tmp_path):
    torch.manual_seed(0)
    torch.save(calm(BUILDERS["fasterrcnn_mobilenet_v3_large_fpn"]()).state_dict(), tmp_path / "mobile.pth")
    given = {"dataset": "none", "teacher": str(tmp_path / "mobile.pth"), "classes": NAMES, "size": [64, 96], "student_backbone": "resnet18",
        "device": "cpu", "baselines": []}
    message = r"a resnet18 can't be this teacher's student.*strides \(32, 32\).*student_backbone"
    with pytest.raises(ValueError, match=message): run(given, tmp_path)
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize("theirs", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "torchvision's mobile"])
@pytest.mark.parametrize("ours", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"])
def test_any_family_teaches_any_other_or_says_why_not(theirs, ours):
    base = DetectorSpec(NAMES, (64, 96), width=.5, fpn_channels=16, head_channels=32)
    if theirs == "torchvision's mobile": teacher = replace(base, backbone="mobilenet_v3_large", strides=(32, 32), anchors=((32, 64),) * 3)
    else: teacher = replace(base, backbone=theirs)
    if theirs == "torchvision's mobile" and ours.startswith("resnet"):
        with pytest.raises(ValueError, match="change student_backbone"): student_spec(teacher, StudentSpec(ours))
        return
    plan, why = plan_inheritance(teacher, StudentSpec(ours))
    assert plan.inherit_heads and (plan.inherit_body or "the body starts from nothing" in why[0])
    student = build_detector(student_spec(teacher, plan))
    check_pair(student, build_detector(teacher), teacher.size)


def test_what_the_teacher_says_is_not_asked_again():
    assert check_parameters({"dataset": "none", "teacher": "x.safetensors"})["size"] == []
    with pytest.raises(ValueError, match="'teacher' is empty; dataset 'none' needs one"): check_parameters({"dataset": "none"})
