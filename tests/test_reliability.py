"What is damaged or lost is named and made again, to the same bytes; what two runs want is made once"
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moi.compress import make_student, paint_transfer_set
from moi.data import write_record
from moi.detector import DetectorSpec, build_detector
from moi.experiment import Stages, claim
from moi.teachers import adopt
from moi.train import Engine, fit, refuse_infinite, within_memory
from moi.transfer_set import TransferSpec

SPEC = DetectorSpec(("a", "b"), (64, 64), width=.25, fpn_channels=8, head_channels=16, anchors=(8, 16, 32, 64, 128))
CPU = Engine(device="cpu")
DAMAGE = {
    "lost": lambda content: None, "empty": lambda content: b"", "cut": lambda content: content[:len(content) // 2],
    "flipped": lambda content: content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:],
}


def harm(file, how):
    content = DAMAGE[how](file.read_bytes())
    file.unlink()
    if content is not None: file.write_bytes(content)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and ".damaged" not in str(f)}


def made(runs, calls):
    def make(folder):
        calls.append(folder)
        (folder / "images").mkdir(exist_ok=True)
        for name in ("weights.bin", "images/0.png"): (folder / name).write_bytes(name.encode() * 50)
        return {"history": [1, 2]}
    return Stages(runs).make("thing", {"seed": 0}, make)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["stage.json", "weights.bin", "images/0.png"])
def test_a_stage_that_is_not_as_its_record_says_is_made_again(name, how, tmp_path, caplog):
    if (name, how) == ("images/0.png", "flipped"): return  # a PNG tells that itself, when it is decoded
    calls = []
    folder, first = made(tmp_path, calls)
    assert made(tmp_path, calls)[1]["reused"] and len(calls) == 1
    harm(folder / name, how)
    with caplog.at_level(logging.WARNING): again = made(tmp_path, calls)[1]
    assert len(calls) == 2 and not again["reused"] and again["files"] == first["files"]
    assert how == "lost" and name == "stage.json" or f"{folder / name} is damaged" in caplog.text
    assert made(tmp_path, calls)[1]["reused"] and len(calls) == 2


def test_a_stage_that_was_begun_is_taken_up_whatever_lies_there(tmp_path):
    calls = []
    folder, _ = made(tmp_path, calls)
    for f in ("stage.json", "images/0.png"): (folder / f).unlink()
    for leftover in ("commits.json", ".lock", "weights.bin.4711.part"): (folder / leftover).write_bytes(b"")
    made(tmp_path, calls)
    assert len(calls) == 2
    left = {f.name for f in folder.rglob("*") if f.is_file()}
    assert left == {"stage.json", "weights.bin", "0.png", "commits.json.damaged"}


def test_a_stage_that_was_just_complete_keeps_nothing_of_its_making(tmp_path):
    calls = []
    folder, _ = made(tmp_path, calls)
    whole = contents(folder)
    for leftover in ("commits.json", "training.pt", ".lock"): (folder / leftover).write_bytes(b"")
    assert made(tmp_path, calls)[1]["reused"] and contents(folder) == whole


def test_a_full_disk_is_named(tmp_path):
    def make(folder): raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left on device: .*stages/thing-"): Stages(tmp_path).make("thing", {}, make)


def test_two_processes_that_want_one_stage_make_it_once(tmp_path):
    code = ("import sys, time; from pathlib import Path; from moi.experiment import Stages\n"
        "def make(folder):\n    open(folder / 'calls', 'a').write('x'); time.sleep(2)\n"
        "print(Stages(Path(sys.argv[1])).make('thing', {'seed': 0}, make)[1]['reused'])")
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(p.communicate(timeout=120)[0].strip() for p in both) == ["False", "True"]
    assert [f.read_text() for f in tmp_path.rglob("calls")] == ["x"] and not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_changes_no_student(how, tmp_path, caplog):
    batches = torch.randn(12, 8, 4, generator=torch.Generator().manual_seed(0))
    def train(most, checkpoint):
        torch.manual_seed(0)
        model, steps = nn.Linear(4, 1), []
        def losses(batch, generator):
            if len(steps) == most: raise KeyboardInterrupt
            steps.append(batch)
            return {"loss": model(batch).square().mean()}
        try: fit(model, losses, lambda first: list(batches[first:]), 12, .1, every=4, checkpoint=checkpoint, progress="")
        except KeyboardInterrupt: pass
        return model.weight.detach().clone(), len(steps)
    whole, _ = train(12, None)
    train(6, tmp_path / "training.pt")
    harm(tmp_path / "training.pt", how)
    weights, steps = train(12, tmp_path / "training.pt")
    assert torch.equal(weights, whole) and steps == 12
    assert how == "lost" or "training.pt is damaged" in caplog.text


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    torch.manual_seed(0)
    teacher, folder = adopt(build_detector(SPEC).eval()), tmp_path_factory.mktemp("painted")
    def paint(): return paint_transfer_set(teacher, folder / "set", impressions=4, textures=2, shard=2, steps=2, engine=CPU, progress=False)
    def learn(): return make_student(teacher, folder / "set", folder / "student", steps=2, batch=2, held_out=1, engine=CPU, progress=False)
    paint(), learn()
    return paint, learn, folder


@pytest.mark.parametrize("name", ["images/000001.png", "shards/0000.json", "annotations.json", "soft_labels.json", "provenance.json",
                                  "asked.json", "made_from.json"])
def test_a_transfer_set_is_painted_again_where_it_is_damaged(name, painted):
    paint, learn, folder = painted
    before = contents(folder / "set")
    for how in ("lost", "cut", "flipped"):
        if (name, how) == ("images/000001.png", "flipped"): continue # as above
        harm(folder / "set" / name, how)
        if name in ("annotations.json", "soft_labels.json", "provenance.json", "asked.json") and how != "lost": # who only learns is told
            with pytest.raises(ValueError, match="annotations.json is damaged, or a file beside it is"): learn()
        paint()
        assert contents(folder / "set") == before, how


def test_a_teacher_that_sees_nothing_is_told_of(tmp_path, caplog):
    teacher = adopt(build_detector(SPEC).eval())
    teacher.roi_heads.box_predictor.cls_score.bias[0] = 100.
    paint_transfer_set(teacher, tmp_path, impressions=2, textures=0, steps=1, engine=CPU, progress=False)
    assert "the teacher sees nothing in the 2 images" in caplog.text


def test_what_learns_nothing_says_what_to_change(tmp_path):
    with pytest.raises(ValueError, match="rounds is 3, and 4 impressions in shards of 2 give 2 of them"): TransferSpec(4, shard=2, rounds=3)
    with pytest.raises(FloatingPointError, match="step 7: the loss is inf: box inf, class 1; a lower rate may help"):
        refuse_infinite(7, {"box": float("inf"), "class": 1.}, "rate")
    def work(): nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1))
    with pytest.raises(ValueError, match="batch is 1, and a BatchNorm layer that learns .* give batch 2 or more"):
        within_memory(work, "batch", 1)


@pytest.mark.parametrize("name", ["history.json", "student.safetensors"])
def test_a_student_is_made_again_where_it_is_damaged(name, painted, caplog):
    _, learn, folder = painted
    before = contents(folder / "student")
    harm(folder / "student" / name, "flipped")
    learn()
    assert contents(folder / "student") == before and f"{name} is damaged" in caplog.text


def test_records_of_older_versions_are_read(tmp_path):
    calls = []
    folder, record = made(tmp_path, calls)
    (folder / "stage.json").write_text('{"kind": "thing", "seconds": 1.0, "commits": [null]}')
    assert made(tmp_path, calls)[1]["reused"] and len(calls) == 1
    write_record(folder / "stage.json", record)
    assert made(tmp_path, calls)[1]["reused"]


def test_a_finished_stage_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    calls = []
    made(tmp_path, calls)
    def refuse(*args, **kwargs): raise OSError(30, "Read-only file system")
    for name in ("replace", "unlink"): monkeypatch.setattr(f"os.{name}", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert made(tmp_path, calls)[1]["reused"]


def test_a_run_that_another_process_works_on_is_refused_and_what_nobody_made_is_not_replaced(tmp_path):
    with claim(tmp_path / "mine", b"{}") as writes:
        assert writes
        with pytest.raises(ValueError, match="another process is at work here"), claim(tmp_path / "mine", b"{}"): pass
    assert sorted(f.name for f in (tmp_path / "mine").iterdir()) == ["params.yaml"]
    (tmp_path / "mine/teacher.safetensors").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="none of a run's links"), claim(tmp_path / "mine", b"{}"): pass
    assert (tmp_path / "mine/teacher.safetensors").read_bytes() == b"somebody's"


def test_a_finished_run_is_told_again_where_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written"), claim(tmp_path / "mine", b"{}"): pass
    (tmp_path / "mine/result.json").write_text("{}")
    with claim(tmp_path / "mine", b"{}") as writes: assert not writes
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["result.json"] and "told, and not kept" in caplog.text


def test_the_harness_finds_no_fault(tmp_path):
    "A little of what `python -m tests.reliability` does at full size"
    command = [sys.executable, "-m", "tests.reliability", "--work", tmp_path / "work", "--out", tmp_path, "--parts", "mutations"]
    done = subprocess.run([*command, "--most", "40"], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    found = json.loads((tmp_path / "result.json").read_text())["parts"]["mutations"]
    assert not done.returncode, done.stdout + done.stderr
    assert found["done"] == 40 and found["refused"] and found["planned"] > 2000
