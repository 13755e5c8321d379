"Several processes do the work of one, and a killed distillation goes on where it stood"
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moi.detector import detector_hash, load_detector
from moi.transfer_set import set_hash

ROOT = Path(__file__).parents[1]
TINY = ROOT / "nbs/experiments/params/tiny.yaml"
MORE = ("-p", "device", "cpu", "-p", "distill_steps", "8", "-p", "baselines", "[]")
KILLED = """
import itertools, os, signal, sys
from moi import distill, experiment
count, losses = itertools.count(1), distill.distill_losses
def dies(*args, **kwargs):
    if next(count) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
    return losses(*args, **kwargs)
distill.distill_losses = dies
experiment.main(sys.argv[2:])
"""
LEARNS = """
import json, sys
import torch
from torch import nn
from moi.detector import DetectorSpec, build_detector
from moi.distill import Distilling, distill
from moi.pseudo_targets import sample_targets
from moi.textures import make_textures
from moi.train import Engine
engine, size = Engine(device="cpu"), (64, 64)
spec = DetectorSpec(["a", "b"], size, width=.125, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128), roi_samples=16)
targets = sample_targets(8, size, spec.labels, generator=torch.Generator().manual_seed(0))
images = list(zip(make_textures(8, size), targets))
def learnt(recipe, hold=False, batch=4, **more):
    torch.manual_seed(1)
    teacher, student = build_detector(spec).eval(), build_detector(spec)
    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_var.mul_(1.5)
    history = distill(student, teacher, images, Distilling(recipe=recipe, steps=3, batch=batch, **more), hold_moments=hold,
        engine=engine, progress="")
    weights, moments = (torch.cat([v.detach().flatten() for v in vs]).double() for vs in (student.parameters(), student.buffers()))
    return history | {"state": [weights.std().item(), moments.mean().item(), moments.std().item()]}
found = {"same": learnt("moi", True), "strict": learnt("moi"), "chen2017": learnt("chen2017"), "features": learnt({"feat": 1.})}
try: learnt("moi", batch=2)
except ValueError as e: found["odd"] = str(e)
if engine.is_main: json.dump(found, open(sys.argv[1], "w"))
if engine.accelerator: engine.accelerator.end_training()
"""


def layout(root, *, of=None, kinds=()):
    "A folder to run in; of a finished one it takes some kinds of stages"
    (root / "runs/stages").mkdir(parents=True)
    shutil.copyfile(ROOT / "settings.ini", root / "settings.ini")
    for kind in kinds:
        for folder in (of / "runs/stages").glob(f"{kind}-*"): shutil.copytree(folder, root / "runs/stages" / folder.name)
    return root


def start(root, *words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=root, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr


def on_two(root, *more):
    "The experiment on two processes"
    code, said = start(root, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
        "-m", "moi.experiment", "-f", TINY, *MORE, *more)
    assert code == 0, said
    result = json.loads((root / "runs/tiny/result.json").read_text())
    assert result["device"]["processes"] == 2
    return result


def stage(root, kind):
    "The only stage of a kind"
    [folder] = (root / "runs/stages").glob(f"{kind}-*")
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "stage.json"}


def history(root, kind): return json.loads((stage(root, kind) / "stage.json").read_text())["history"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "What one process makes of it"
    root = layout(tmp_path_factory.mktemp("alone"))
    code, said = start(root, "-m", "moi.experiment", "-f", TINY, *MORE)
    assert code == 0, said
    return root


def test_two_processes_paint_the_same_images_and_teach_the_same_student(alone, tmp_path):
    root = layout(tmp_path, of=alone, kinds=["world", "teacher"])
    on_two(root)
    assert contents(stage(root, "transfer_set")) == contents(stage(alone, "transfer_set"))
    written = sorted(p.name for p in stage(root, "student").iterdir())
    assert written == ["history.json", "made_from.json", "stage.json", "student.safetensors"]
    ours, theirs = history(root, "student"), history(alone, "student")
    assert list(ours) == list(theirs) and len(ours["feat"]) == 8
    for name in ("feat", "rpn_cls", "rpn_box", "roi_cls", "roi_box", "distance"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_two_processes_learn_what_one_learns(tmp_path, monkeypatch):
    "Where moments are held, where BatchNorm learns, where pseudo-targets are labels, and where a part of the detector learns nothing"
    (tmp_path / "learns.py").write_text(LEARNS)
    monkeypatch.setattr(sys, "argv", ["learns.py", str(tmp_path / "1.json")])
    runpy.run_path(tmp_path / "learns.py")
    code, said = start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "learns.py", "2.json")
    assert code == 0, said
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert two.pop("odd") == "batch is 2; with mix, each of 2 processes needs an even number of its images"
    assert list(one) == list(two) == ["same", "strict", "chen2017", "features"]
    for what, curves in one.items():
        assert curves.keys() == two[what].keys() and len(curves) > 1
        for name, values in curves.items(): assert two[what][name] == pytest.approx(values, rel=1e-4, abs=1e-6), (what, name)


def test_two_processes_train_a_teacher_and_one_writes_it(alone, tmp_path):
    result = on_two(layout(tmp_path), "-p", "teacher_steps", "3")
    assert not result["stages"]["teacher"]["reused"]
    assert len(history(tmp_path, "teacher")["loss_classifier"]) == 3
    assert sorted(p.name for p in stage(tmp_path, "teacher").iterdir()) == ["stage.json", "teacher.safetensors"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_batch_that_cannot_be_shared_is_refused(alone, tmp_path):
    root = layout(tmp_path, of=alone, kinds=["world", "teacher", "transfer_set"])
    code, said = start(root, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
        "-m", "moi.experiment", "-f", TINY, *MORE, "-p", "batch", 3)
    assert code != 0 and "batch is 3; 2 processes can't share it" in said


@pytest.mark.parametrize("call", [4, 7])
def test_killed_in_distillation_it_ends_with_the_same_bits(call, alone, tmp_path):
    root = layout(tmp_path, of=alone, kinds=["world", "teacher", "transfer_set"])
    code, said = start(root, "-c", KILLED, call, "-f", TINY, *MORE)
    assert code == -signal.SIGKILL, said
    assert (stage(root, "student") / "training.pt").is_file()
    code, said = start(root, "-m", "moi.experiment", "-f", TINY, *MORE)
    assert code == 0, said
    assert contents(stage(root, "student")) == contents(stage(alone, "student"))
    assert history(root, "student") == history(alone, "student")


def test_rounds_paint_more_after_a_first_student(alone, tmp_path):
    "Into a folder of their own each; the student goes on from the first round's, on the images of both"
    root = layout(tmp_path, of=alone, kinds=["world", "teacher"])
    code, said = start(root, "-m", "moi.experiment", "-f", TINY, *MORE, "-p", "rounds", 2)
    assert code == 0, said
    sets = {json.loads((f / "made_from.json").read_text())["transfer"]["round"]: f for f in (root / "runs/stages").glob("transfer_set-*")}
    numbers = {k: {p.name for p in (f / "images").iterdir()} for k, f in sets.items()}
    assert set(numbers) == {0, 1} and len(numbers[0]) == 12 and len(numbers[1]) == 4 and not numbers[0] & numbers[1]
    shards = {k: [json.loads(s.read_text()) for s in (f / "shards").iterdir()] for k, f in sets.items()}
    assert {k: {s["kind"] for s in v} for k, v in shards.items()} == {0: {"impression", "texture"}, 1: {"impression"}}
    seek = {k: {"compete" in s["provenance"]["losses"] for s in v if s["kind"] == "impression"} for k, v in shards.items()}
    assert seek == {0: {False}, 1: {True}} # only the second round's seek what a student does not know
    links = {n: (root / "runs/tiny" / n).resolve() for n in ("transfer_set", "transfer_set_2")}
    assert links == {"transfer_set": sets[0].resolve(), "transfer_set_2": sets[1].resolve()}
    made_from = [json.loads(f.read_text()) for f in (root / "runs/stages").glob("student-*/made_from.json")]
    first, second = sorted(made_from, key=lambda m: len(m["transfer_sets"]))
    assert first["transfer_sets"] == [set_hash(sets[0])] and second["transfer_sets"] == [set_hash(sets[0]), set_hash(sets[1])]
    students = {detector_hash(load_detector(f)) for f in (root / "runs/stages").glob("student-*/student.safetensors")}
    assert "before" not in first and second["before"] in students
    assert json.loads((sets[1] / "made_from.json").read_text())["student"] == second["before"]
