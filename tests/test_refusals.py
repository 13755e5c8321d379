"First contact: what is wrong with a user's data, parameters or machine is said in two lines, before anything is made"
import json
import logging
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch

from moi import street
from moi.compress import make_student, paint_transfer_set
from moi.data import DataError, write_image
from moi.detector import DetectorSpec, build_detector, load_detector, save_detector
from moi.experiment import Stages, check_parameters, cli, data_of, open_data, plan, read_parameters, read_yaml, run, specs_of
from moi.layouts import write_coco, write_kitti, write_voc
from moi.train import Engine

TINY = Path(__file__).parents[1] / "nbs/experiments/params/tiny.yaml"
WRITERS = {"kitti": write_kitti, "voc": write_voc, "coco": write_coco}
SPLITS = {"train": range(6), "val": range(6, 9), "test": range(9, 12)}


@pytest.fixture(scope="module")
def scenes():
    "Twelve street scenes"
    return [(f"{i:06}", *street.draw_scene((64, 64), i)) for i in range(12)]


@pytest.fixture
def given(scenes, tmp_path):
    "A function from a layout to a run's parameters, whose folder has three splits"
    def write(layout):
        WRITERS[layout](tmp_path / "data", scenes, street.CLASSES, {k: [scenes[i][0] for i in v] for k, v in SPLITS.items()})
        return read_parameters(TINY) | {"device": "cpu", "dataset": layout, "data_root": str(tmp_path / "data"), "baselines": []}
    return write


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "The file of a teacher that has learnt nothing"
    torch.manual_seed(0)
    spec = DetectorSpec(street.CLASSES, (64, 64), width=.25, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128))
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_detector(build_detector(spec), file)
    return str(file)


def refused(parameters, runs, match, kind=(ValueError, FileNotFoundError)):
    "What a run and its plan refuse, with no stage made"
    for ask in (run, plan):
        with pytest.raises(kind, match=match) as e: ask(parameters, runs)
        assert not list(runs.glob("stages/*/stage.json"))
    return str(e.value)


def image_of(root, i):
    "The file of an image"
    return next(root.rglob(f"{i:06}.png"))


# Splits and images

@pytest.mark.parametrize("layout", WRITERS)
def test_a_missing_or_damaged_test_split_is_found_before_anything_is_made(layout, given, tmp_path):
    p = given(layout)
    said = refused(p | {"splits": ["train", "val", "tset"]}, tmp_path / "runs", "no split 'tset'")
    assert "did you mean 'test'" in said and str(tmp_path / "data") in said
    image = image_of(tmp_path / "data", 10)
    whole = image.read_bytes()
    image.write_bytes(whole[:-50])
    said = refused(p, tmp_path / "runs", "split test: 1 of 3 images cannot be used.*\n.*000010.png: cannot be decoded", DataError)
    assert "skip_damaged: true" in said and said.count("\n") == 1
    shutil.copyfile(image_of(tmp_path / "data", 0), image)
    write_image(image, torch.zeros(3, 32, 64, dtype=torch.uint8))
    if layout != "kitti": # where the header is all that says how large it is
        refused(p, tmp_path / "runs", "000010.png: the image is 64x32 pixels, its annotation says 64x64", DataError)


def test_a_missing_val_split_is_one_too_unless_it_is_named_none(given, tmp_path):
    p = given("voc")
    (tmp_path / "data/ImageSets/Main/val.txt").unlink()
    refused(p, tmp_path / "runs", "no split 'val'")
    refused(p | {"splits": ["", "", "test"]}, tmp_path / "runs", "a split to train on is needed")
    refused(p | {"splits": ["train", "", ""]}, tmp_path / "runs", "a split to report on is needed")
    with pytest.raises(ValueError, match="'teacher_judged' is True"):
        check_parameters({"teacher_judged": True, "splits": ["train", "", "test"]})
    assert data_of(p | {"splits": ["train", "", "test"]}, tmp_path / "runs").open(1) is None


def test_a_given_teacher_and_a_test_set_are_enough(given, teacher, tmp_path, caplog):
    "The other splits are not there, an image is cut short, and a class that the teacher knows is in none"
    p = given("voc") | {"teacher": teacher, "size": [64, 64], "impressions": 1, "textures": 3, "distill_steps": 1}
    for name in "train", "val": (tmp_path / f"data/ImageSets/Main/{name}.txt").unlink()
    def rename(old, new):
        for file in (tmp_path / "data/Annotations").iterdir(): file.write_text(file.read_text().replace(f"<name>{old}<", f"<name>{new}<"))
    rename("Cyclist", "tram")
    image = image_of(tmp_path / "data", 10)
    image.write_bytes(image.read_bytes()[:-50])
    refused(p, tmp_path / "runs", "split test: 1 of 3 images cannot be used", DataError)
    with caplog.at_level(logging.WARNING):
        result = run(p | {"skip_damaged": True}, tmp_path / "runs")
    assert set(result["metrics"]) == {"teacher", "student", "retention"}
    (where, lost), = result["skipped"].items()
    assert where.endswith("split test") and len(lost) == 1 and "000010.png: cannot be decoded" in lost[0]
    assert json.loads((tmp_path / "runs/tiny/result.json").read_text())["skipped"] == result["skipped"]
    assert "no split 'val'" in caplog.text and "has no object of Cyclist, which cannot be scored" in caplog.text
    rename("tram", "cyclist") # which is not how the teacher spells it
    with pytest.raises(ValueError, match="no object of class 'Cyclist' .*did you mean 'cyclist'"):
        run(p | {"skip_damaged": True, "name": "other", "classes": list(street.CLASSES)}, tmp_path / "runs")
    data_of(p | {"skip_damaged": True}, tmp_path / "runs").open(2) # as the teacher's file says, nobody here can write it otherwise
    assert "is 'Cyclist' written otherwise?" in caplog.text


def test_a_set_without_lists_is_split_by_shares(given, tmp_path):
    p = given("voc") | {"splits": ["0-50%", "50-75%", "75-100%"]}
    shutil.rmtree(tmp_path / "data/ImageSets")
    data = data_of(p, tmp_path / "runs")
    assert [len(data.open(k)) for k in range(3)] == [6, 3, 3] and len({i for k in range(3) for i in data.open(k).ids}) == 12
    refused(given("voc") | {"splits": ["0-50%", "50-75%", "70-100%"]}, tmp_path / "runs", "'50-75%' and '70-100%' share images")


@pytest.mark.parametrize("layout, key", [("kitti", "415028218e77"), ("voc", "57733955c45f"), ("coco", "efef78ea8ee7")])
def test_keys_are_those_of_version_0_2(layout, key, tmp_path):
    "What a stage depends on is the same for the same content, whether or not damaged images may be left out"
    target = {"boxes": torch.tensor([[2., 3, 20, 30], [0, 0, 9, 7]]), "labels": torch.tensor([1, 3])}
    samples = [(f"{i:06}", torch.full((3, 32, 40), i, dtype=torch.uint8), target) for i in range(3)]
    WRITERS[layout](tmp_path / "data", samples, street.CLASSES, {"test": ["000002", "000000"]})
    p = read_parameters(TINY) | {"device": "cpu", "dataset": layout, "data_root": str(tmp_path / "data")}
    keys = [data_of(p | {"skip_damaged": skip}, tmp_path / "runs").key(2) for skip in (False, True)]
    assert keys == [{"dataset": layout, "annotations": key}] * 2


# Classes

@pytest.mark.parametrize("layout", WRITERS)
def test_a_class_without_a_box_is_refused_with_what_there_is(layout, given, tmp_path):
    p = given(layout)
    said = refused(p | {"classes": ["Car", "Pedestrain"]}, tmp_path / "runs", "class 'Pedestrain'")
    assert "Car, Cyclist, Pedestrian (did you mean 'Pedestrian'?)" in said
    with pytest.raises(ValueError, match="class 'Car' is named twice"): check_parameters(p | {"classes": ["Car", "Car"]})


def test_a_split_without_any_object_is_refused(given, tmp_path):
    p = given("kitti")
    for i in SPLITS["test"]: (tmp_path / f"data/training/label_2/{i:06}.txt").write_text("")
    refused(p, tmp_path / "runs", "no object of the classes Car, Pedestrian, Cyclist is in test of .*; there are none")


# Folders

def test_folders_of_photographs_are_opened_first(given, teacher, tmp_path):
    p = given("voc") | {"baselines": ["proxy"], "proxy_root": [str(tmp_path / "photos")]}
    refused(p, tmp_path / "runs", "'proxy_root' is .*photos'; no such folder", FileNotFoundError)
    write_voc(tmp_path / "photos", [("a", *street.draw_scene((64, 64), 99))], street.CLASSES)
    image = tmp_path / "photos/JPEGImages/a.png"
    image.write_bytes(image.read_bytes()[:-50])
    refused(p, tmp_path / "runs", "photos, split all: 1 of 1 images cannot be used", DataError)
    own = {"dataset": "none", "teacher": teacher, "device": "cpu", "name": "own"}
    refused(own | {"look": str(tmp_path / "nowhere")}, tmp_path / "runs", "'look' is .*nowhere'; no such folder", FileNotFoundError)
    refused(own | {"test": str(tmp_path / "runs")}, tmp_path / "runs", "no layout recognised", FileNotFoundError)
    refused(own | {"test": f"{tmp_path / 'data'}:tset"}, tmp_path / "runs", "no split 'tset'", FileNotFoundError)


def test_a_student_of_another_family_is_made(teacher, tmp_path, caplog):
    "With everything else as it is by default; its body starts from nothing, which is said"
    check_parameters({"student_backbone": "resnet50"})
    with pytest.raises(ValueError, match="has other layers than one of width 0.25"): # for its widths are rounded
        check_parameters({"backbone": "mobilenet_v3_large", "teacher_width": .25, "widths": "half"})
    cpu, teacher = Engine(device="cpu"), load_detector(teacher)
    images = paint_transfer_set(teacher, tmp_path / "set", impressions=0, textures=4, engine=cpu, progress=False)
    student = make_student(teacher, images, tmp_path / "student", backbone="resnet50", steps=1, batch=2, engine=cpu, progress=False)
    assert student.spec.backbone == "resnet50" and "a resnet50 has no part of a resnet18" in caplog.text


# Machines

def moi(capsys, *words):
    "The exit code of `moi words` and what it complained of"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli([str(w) for w in words])
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") <= 2, said
    return e.value.code, said


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to work in"
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", ["[64, 64", "{a: b: c}", "\x01", "[" * 5000, "2001-99-99", "@x"])
def test_a_value_that_is_no_yaml(value, here, capsys):
    code, said = moi(capsys, "run", "-p", "size", value)
    assert code == 2 and "parameter 'size': " in said and "is no YAML that can be read" in said and len(said) < 400


def test_a_file_that_is_no_yaml(here, capsys):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{k}: &{k} [{', '.join([f'*{j}'] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi")) # 387 million times x
    for text, message in {"seed: 1\nsize: [64, 64\n": "line 3, column 1: ", "\xff": "", bomb: "line 2, column 8: an alias"}.items():
        (here / "p.yaml").write_text(text, encoding="latin1")
        code, said = moi(capsys, "run", "-f", "p.yaml")
        assert code == 2 and f"p.yaml is no YAML that can be read: {message}" in said and len(said) < 400
    assert read_yaml("a: &a .5\nb: *a", "x") == {"a": .5, "b": .5}
    (here / "p.yaml").unlink()
    assert moi(capsys, "run", "-f", "p.yaml")[0] == moi(capsys, "run", "-f", ".")[0] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "gpu"])
def test_a_device_that_is_not_here(device, here, capsys):
    code, said = moi(capsys, "run", "-p", "device", device)
    assert code == 2 and f"parameter 'device' is '{device}', and it is not to be had here" in said and not list(here.glob("runs/*"))
    with pytest.raises(ValueError, match="parameter 'device' is"): run({"device": device}, here / "runs")


def test_runs_that_cannot_be_written(here, capsys, monkeypatch):
    (here / "runs").mkdir()
    (here / "runs/tiny").write_text("in the way")
    code, said = moi(capsys, "run", "-f", TINY, "-p", "device", "cpu")
    assert code == 2 and "runs/tiny cannot be written: File exists" in said
    (here / "runs/tiny").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False) # as it is for whoever may not write there
    code, said = moi(capsys, "run", "-f", TINY, "-p", "device", "cpu")
    assert code == 2 and "runs/tiny cannot be written: Permission denied" in said and not list(here.glob("runs/stages/*"))
    shutil.rmtree(here / "runs")
    def refuse(self, *args, **options): raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    code, said = moi(capsys, "run", "-f", TINY, "-p", "device", "cpu")
    assert code == 2 and "Permission denied" in said and "runs" in said


def test_weights_without_a_network(given, tmp_path, monkeypatch, capsys, here):
    def offline(*args, **options): raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    p = given("voc") | {"weights": "imagenet", "teacher_width": 1, "student_width": .5}
    with pytest.raises(ValueError, match="parameter 'weights' is 'imagenet', and they are not to be had.*Name or service"):
        run(p, tmp_path / "runs")
    code, said = moi(capsys, "run", "-f", TINY, *(str(w) for k in ("dataset", "data_root") for w in ("-p", k, p[k])),
        "-p", "device", "cpu", "-p", "weights", "nowhere.pth")
    assert code == 2 and "parameter 'weights' is 'nowhere.pth', and they are not to be had" in said


# Photographs

def test_fewer_photographs_than_asked_for_are_said(given, tmp_path, caplog):
    from moi.experiment import photograph_set
    s = specs_of(check_parameters(given("voc") | {"photographs": "real", "impressions": 5, "textures": 5}))
    stages = Stages(tmp_path / "runs", Engine(device="cpu"))
    data, _ = open_data(s, stages)
    spec = s.teacher.detector(street.CLASSES, (64, 64))
    for _ in range(2): # the second time it is there
        caplog.clear()
        with caplog.at_level(logging.WARNING): _, record = photograph_set(s, spec, data, stages)
        assert (record["images"], record["asked"]) == (6, 10) and "there are 6 photographs (real), and 10 were asked for" in caplog.text
