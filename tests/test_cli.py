"The command `moi`: plans, runs, checks of folders, a teacher compressed, and what is cleaned away"
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from moi import street
from moi.detector import DetectorSpec, build_detector, detector_hash, load_detector, save_detector
from moi.experiment import PARAMETERS, cli, plan, read_parameters
from moi.layouts import write_kitti, write_voc

ROOT = Path(__file__).parents[1]
TINY = ROOT / "nbs/experiments/params/tiny.yaml"
RUN = ("run", "-f", str(TINY), "-p", "device", "cpu", "-p", "baselines", "[textures]")


def moi(capsys, *words):
    "The exit code of `moi words`, what it printed and what it complained of"
    capsys.readouterr()
    try: code = cli([str(w) for w in words])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to work in, with nothing run yet"
    (tmp_path / "runs").mkdir()
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder with a run, and what it was before: what `--plan` said, and what it left on disk"
    root = tmp_path_factory.mktemp("finished")
    (root / "runs").mkdir()
    shutil.copyfile(ROOT / "settings.ini", root / "settings.ini")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        parameters = read_parameters(TINY) | {"device": "cpu", "baselines": ["textures"]}
        before = plan(parameters), [p.name for p in (root / "runs").iterdir()]
        assert cli(list(RUN)) == 0
    return root, before


@pytest.fixture
def copied(finished, here):
    "The same folder, to do with as one likes"
    shutil.rmtree(here / "runs")
    shutil.copytree(finished[0] / "runs", here / "runs", symlinks=True)
    return here / "runs"


def listed(text):
    "What a printed plan says of each stage"
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines()[:-1])


def stages(runs): return {f.name for f in (runs / "stages").iterdir()}


# moi run

@pytest.mark.parametrize("words, message", [
    (("-p", "distil_steps", "4"), "no parameter 'distil_steps'; did you mean 'distill_steps'?"),
    (("-p", "synthesis_lr", "fast"), "parameter 'synthesis_lr' is 'fast': 'fast' is a str, float is needed"),
    (("-p", "teacher_width", "9"), "parameter 'teacher_width' is 9; allowed is 0.125 to 4"),
    (("-p", "size", "[64]"), "parameter 'size' is [64]; 2 entries are needed"),
    (("-p", "dataset", "none"), "parameter 'teacher' is empty; dataset 'none' needs one"),
    (("-p", "dataset", "coco", "-p", "size", "[64, 64]"), "parameter 'data_root' is empty; dataset 'coco' needs a folder"),
    (("-f", "nowhere.yaml"), "no parameter file 'nowhere.yaml'"),
])
@pytest.mark.parametrize("more", [(), ("--plan",)], ids=["run", "plan"])
def test_a_run_that_cannot_be_ends_with_2_and_a_sentence(words, message, more, capsys, here):
    code, out, said = moi(capsys, "run", *words, *more)
    assert code == 2 and message in said and "Traceback" not in said and not out
    assert not list((here / "runs").iterdir())


def test_help_names_every_parameter(capsys):
    code, out, _ = moi(capsys, "run", "--help")
    said = " ".join(out.split())
    assert code == 0 and all(f"{name} (" in said for name in PARAMETERS)
    code, out, _ = moi(capsys, "--help")
    assert code == 0 and all(word in out for word in ("run", "compress", "check", "clean"))
    assert moi(capsys)[0] == 2 and moi(capsys, "run", "--plans")[0] == 2


def test_a_plan_before_a_run_names_every_stage_and_makes_none(finished, capsys, here):
    (planned, there), everything = finished[1], {"world", "teacher", "transfer set", "student"}
    of = {(f.kind, f.of) for f in planned}
    assert of == {("world", ""), ("teacher", "")} | {(k, w) for k in ("transfer_set", "student") for w in ("student", "textures")}
    assert len(planned) == 6 and not any(f.there for f in planned) and there == []
    code, out, _ = moi(capsys, *RUN, "--plan")
    assert code == 0 and out.splitlines()[-1].startswith("6 of 6 stages to be made")
    assert set(listed(out)) == everything | {"transfer set of textures", "student of textures"}
    assert all("to be made" in v for v in listed(out).values()) and not list((here / "runs").iterdir())


def test_a_plan_after_a_run_has_nothing_to_make(copied, capsys):
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    code, out, _ = moi(capsys, *RUN, "--plan")
    assert code == 0 and out.splitlines()[-1].startswith("0 of 6 stages to be made")
    assert set(listed(out).values()) == {"is there"}
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


def test_a_plan_foretells_what_a_run_makes(copied, capsys):
    "Other students, then another teacher; its estimates come from what was made before"
    longer = (*RUN, "-p", "distill_steps", "6", "-p", "name", "longer")
    _, out, _ = moi(capsys, *longer, "--plan")
    found = listed(out)
    assert {k for k, v in found.items() if "to be made" in v} == {"student", "student of textures"}
    assert re.search(r"\d min", found["student"]) and "?" not in out
    before = stages(copied)
    assert moi(capsys, *longer)[0] == 0
    assert sorted(n.rpartition("-")[0] for n in stages(copied) - before if not n.startswith("scores")) == ["student", "student"]
    _, out, _ = moi(capsys, *longer, "-p", "teacher_steps", "5", "--plan")
    assert listed(out)["world"] == "is there" and all("to be made" in listed(out)[k] for k in ("teacher", "transfer set", "student"))


# moi check

@pytest.mark.parametrize("write, label, sound, wrong", [
    (write_kitti, "training/label_2/000001.txt", r"^(\w+ \S+ \S+ \S+) \S+ ", r"\1 9999 "),
    (write_voc, "Annotations/000001.xml", r"<xmin>[^<]*<", "<xmin>9999<"),
])
def test_check_says_0_for_a_sound_folder_and_1_for_a_bad_label(write, label, sound, wrong, capsys, tmp_path):
    write(tmp_path / "data", [(f"{i:06}", *street.draw_scene((64, 64), i + 1)) for i in range(3)], street.CLASSES)
    code, out, _ = moi(capsys, "check", tmp_path / "data")
    assert code == 0 and "3 images" in out
    file = tmp_path / "data" / label
    bad, n = re.subn(sound, wrong, file.read_text(), count=1)
    assert n == 1
    file.write_text(bad)
    code, out, _ = moi(capsys, "check", tmp_path / "data")
    assert code == 1 and Path(label).name in out


def test_check_of_no_dataset_says_1(capsys, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        code, _, said = moi(capsys, "check", folder)
        assert code == 1 and str(folder) in said and "Traceback" not in said


# moi clean

def test_clean_deletes_nothing_that_a_run_uses(copied, capsys):
    before = stages(copied)
    code, out, _ = moi(capsys, "clean", "--yes")
    assert code == 0 and stages(copied) == before and "0 of them" in out and "deleted" not in out
    assert all(name in out for name in before) and len(re.findall(r"\btiny$", out, re.M)) == len(before)


def test_clean_without_a_terminal_deletes_nothing_and_with_yes_what_no_run_uses(copied, capsys, monkeypatch):
    kept = stages(copied)
    assert moi(capsys, *RUN, "-p", "distill_steps", "6", "-p", "name", "longer")[0] == 0
    new = stages(copied) - kept
    assert {n.rpartition("-")[0] for n in new} == {"student", "scores"}
    shutil.rmtree(copied / "longer") # a run is forgotten with its folder
    (copied / "stages" / "teacher-0123456789ab").mkdir() # and of another there is only a beginning
    new |= {"teacher-0123456789ab"}
    assert not sys.stdin.isatty()
    for answer in (None, "", "n", "no!"):
        if answer is not None:
            monkeypatch.setattr("sys.stdin.isatty", lambda: True)
            monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer)
        code, out, _ = moi(capsys, "clean")
        assert code == 0 and "nothing was deleted" in out and stages(copied) == kept | new
    unused = {line.split()[2] for line in out.splitlines() if line.endswith(" -")}
    assert unused == new and f"{len(new)} of them" in out
    code, out, _ = moi(capsys, "clean", "--yes")
    assert code == 0 and f"{len(new)} stages deleted" in out and stages(copied) == kept
    code, out, _ = moi(capsys, *RUN, "--plan")
    assert out.splitlines()[-1].startswith("0 of 6 stages to be made")
    load_detector(copied / "tiny/student.safetensors")


def test_clean_asks_where_somebody_can_answer(copied, capsys, monkeypatch):
    (copied / "stages" / "student-0123456789ab").mkdir()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    code, out, _ = moi(capsys, "clean")
    assert code == 0 and "1 stages deleted" in out and "student-0123456789ab" not in stages(copied)


def test_clean_knows_runs_of_version_0_1_by_their_links(copied, capsys):
    "Those have no list of their stages"
    used = {f.resolve().parent.name for f in (copied / "tiny").iterdir() if f.name.endswith(".safetensors")}
    used |= {(copied / "tiny/transfer_set").resolve().name}
    (copied / "tiny/stages.json").unlink()
    code, out, _ = moi(capsys, "clean")
    assert len(used) == 3 and {line.split()[2] for line in out.splitlines() if re.search(r"\btiny$", line)} == used


# moi compress

def test_compress_makes_a_student_of_a_teachers_file(capsys, here):
    torch.manual_seed(0)
    teacher = build_detector(DetectorSpec(["a", "b"], (64, 96), width=.25, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128)))
    save_detector(teacher, here / "teacher.safetensors")
    few = ("impressions", "textures", "shard", "synthesis_steps", "agreement", "distill_steps", "batch")
    small = ["-p", "device", "cpu", *(w for name in few for w in ("-p", name, 2))]
    code, out, _ = moi(capsys, "compress", "teacher.safetensors", *small, "--plan")
    assert code == 0 and out.splitlines()[-1].startswith("4 of 4 stages to be made") and not list((here / "runs").iterdir())
    code, out, _ = moi(capsys, "compress", "teacher.safetensors", *small)
    assert code == 0 and "runs/mine: " in out.splitlines()[-1] and "student.safetensors" in out.splitlines()[-1]
    student, result = load_detector(here / "runs/mine/student.safetensors"), json.loads((here / "runs/mine/result.json").read_text())
    assert student.spec.width == .125 and student.spec.classes == ("a", "b") and student.spec.size == (64, 96)
    assert result["weights"] == {"teacher": detector_hash(teacher), "student": detector_hash(student)}
    assert set(result["metrics"]) == {"agreement"} and result["params"]["dataset"] == "none"
    assert moi(capsys, "compress", "teacher.safetensors", *small, "--plan")[1].splitlines()[-1].startswith("0 of 4")
    code, out, _ = moi(capsys, "compress", "teacher.safetensors", *small, "-p", "widths", ".6", "--name", "wider", "--plan")
    assert all(listed(out)[k] == "is there" for k in ("teacher", "transfer set", "transfer set of fresh impressions"))
    assert "to be made" in listed(out)["student"]


def test_compress_refuses_in_a_sentence(capsys, here):
    detector = build_detector(DetectorSpec(["a", "b"], (64, 96), width=.25, fpn_channels=16, head_channels=32))
    save_detector(detector, here / "teacher.safetensors")
    for words, message in {
        ("nowhere.pth",): "no file 'nowhere.pth'",
        ("teacher.safetensors", "--classes", "a", "c"): "has the classes ('a', 'b'), and ('a', 'c') was given",
        ("teacher.safetensors", "-p", "impression", "4"): "no parameter 'impression'; did you mean 'impressions'?",
        ("teacher.safetensors", "-p", "widths", "{body: 1.0}"): "a student of that width would be the teacher itself",
    }.items():
        code, _, said = moi(capsys, "compress", *words)
        assert code == 2 and message in said and "Traceback" not in said, words
    assert not list((here / "runs").iterdir())


def test_what_exporting_needs_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None) # as if it were not installed
    with pytest.raises(SystemExit) as left: cli(["run", "-p", "export", "[onnx]"])
    assert left.value.code == 2 and "pip install 'moi[export]'" in capsys.readouterr().err
    assert not (tmp_path / "runs/stages").exists()
