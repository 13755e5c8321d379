"What each method of a comparison is, mirrored views, half of a teacher's steps, and the benchmarks' files in miniature"
import dataclasses
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from moi import augment, experiment, impressions, train
from moi.data import read_record
from moi.detector import key_of, load_detector
from moi.distill import Distilling
from moi.experiment import (
    METHODS,
    Stages,
    as_method,
    check_pair,
    check_parameters,
    compress,
    image_sets,
    make_teacher,
    open_data,
    plan,
    read_parameters,
    run,
    specs_of,
)
from moi.impressions import Painting, synthesise
from moi.train import Engine, Training
from moi.transfer_set import open_transfer_set

PARAMS = Path(__file__).parents[1]/"nbs/experiments/params"
TINY = {k: v for k, v in read_parameters(PARAMS/"tiny.yaml").items() if k != "student_width"} | {"device": "cpu", "baselines": [],
    "timed": 1, "scenes": [12, 4, 4], "synthesis_steps": 2, "distill_steps": 2, "shard": 8, "held_out": 0, "widths": "half"}
ALONE = {"inherit_heads", "inherit_body"}


# What a method changes

@pytest.mark.parametrize("method, changed", [
    ("strict", {"impressions", "textures", "bn_prior"} | ALONE),
    ("textures_strict", {"impressions", "textures", "bn_prior"} | ALONE),
    ("real_strict", {"photographs", "bn_prior"} | ALONE),
    ("real_all", {"photographs"}),
    ("moi_proxy", {"photographs"}),
    ("chen2017_real", {"photographs", "recipe", "freeze_heads"}),
    ("supervised", {"photographs", "teacher_judged"} | ALONE),
    ("diode", {"impressions", "textures", "objects", "box_prior", "painter", "synthesis_lr", "tv", "bn_prior", "synthesis_steps",
        "adapt"})])
def test_what_a_method_changes(method, changed):
    p = check_parameters({"proxy_root": ["anywhere"], "impressions": 96, "textures": 32})
    q = check_parameters(as_method(p, method))
    assert {k for k in p if p[k] != q[k]} == changed
    assert q["impressions"] + q["textures"] == p["impressions"] + p["textures"]
    assert q["distill_steps"] == p["distill_steps"] and q["batch"] == p["batch"]


def test_every_method_is_accepted_on_a_dataset_of_ones_own():
    p = check_parameters({"dataset": "voc", "data_root": "x", "size": [96, 96], "proxy_root": ["y"], "splits": ["train", "test", "test"]})
    for method in METHODS: check_parameters(as_method(p, method))
    assert not as_method(p, "supervised")["teacher_judged"] # what is reported on chooses nothing


def test_diode_has_as_many_steps_of_painting_over_all_its_images():
    p = check_parameters({"impressions": 96, "textures": 32})
    q = as_method(p, "diode")
    assert q["impressions"] * q["synthesis_steps"] == pytest.approx(p["impressions"] * p["synthesis_steps"], rel=.01)


@pytest.mark.parametrize("given, message", [
    ({"baselines": ["moi_proxy"]}, "'moi_proxy' does"),
    ({"photographs": "mixed", "proxy_root": ["x"], "impressions": 1, "textures": 0}, "2 or more are needed"),
    ({"photographs": "mixed", "proxy_root": ["x"], "recipe": "chen2017"}, "learns from labels"),
    ({"dataset": "none", "teacher": "x.pth", "baselines": ["real_all"]}, "learns on training images"),
    ({"dataset": "none", "teacher": "x.pth", "baselines": [], "teacher_half": True}, "'teacher_half' is True")])
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message): check_parameters(given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Parameters of a tiny run, its teacher, data and stages"
    p = check_parameters(TINY)
    stages = Stages(tmp_path_factory.mktemp("runs"), Engine(device="cpu"), progress=False)
    data, _ = open_data(specs_of(p), stages)
    return p | {"proxy_root": [f"{data.root}:val"]}, load_detector(make_teacher(specs_of(p), data, stages)[0]), data, stages


def test_what_students_learn_on(made):
    p, teacher, data, stages = made
    found = {m: image_sets(specs_of(as_method(p, m)), teacher, data, stages) for m in
        ("real_strict", "textures_strict", "real_all", "moi_proxy", "chen2017_real")}
    sets = {m: [open_transfer_set(f) for f in folders] for m, (folders, _) in found.items()}
    assert {m: [len(s) for s in found] for m, found in sets.items()} == {
        "real_strict": [12], "textures_strict": [16], "real_all": [12], "moi_proxy": [8, 4], "chen2017_real": [12]}
    assert [found["moi_proxy"][1][k] for k in ("images", "asked")] == [12, 16] # the folder holds no more
    assert found["real_all"][1]["asked"] == len(data.open(0)) == 12
    labelled = {m: any(len(s.target(i)["labels"]) for s in sets[m] for i in range(len(s))) for m in ("real_all", "chen2017_real")}
    assert labelled == {"real_all": False, "chen2017_real": True}


def test_the_strict_ones_start_alike_and_take_nothing(made):
    p, teacher, data, stages = made
    starts = []
    for m in ("strict", "real_strict", "textures_strict"):
        s = specs_of(as_method(p | {"distill_steps": 0}, m))
        starts.append(load_detector(compress(s, teacher, data, stages)[2]).state_dict())
        assert s.painting.prior(teacher) == 0
    for k, v in starts[0].items():
        assert all(torch.equal(v, other[k]) for other in starts)
        theirs = teacher.state_dict()[k]
        if v.is_floating_point() and v.shape == theirs.shape and v.ndim > 1: assert not torch.equal(v, theirs), k


def test_supervised_learns_as_the_teacher_did_and_is_chosen_on_val(made):
    p, teacher, data, stages = made
    record = read_record(compress(specs_of(as_method(p, "supervised")), teacher, data, stages)[2].parent/"stage.json")
    own = read_record(make_teacher(specs_of(p), data, stages)[0].parent/"stage.json")
    assert {k for k in record["depends"] if record["depends"][k] != own["depends"].get(k)} == {"spec", "val"}
    assert record["depends"]["weights"] == "" and record["depends"]["train"] == data.key(0) and record["depends"]["val"] == data.key(1)
    assert record["depends"]["spec"]["width"] == p["teacher_width"] / 2 and len(record["history"]["val_AP50"]) == 1


def test_diode_paints_pixels_that_stay_in_range_and_begin_as_uniform_noise(made):
    _, teacher, *_ = made
    s, seen = specs_of(as_method(made[0], "diode")).painting, []
    target = [{"boxes": torch.tensor([[8., 8, 40, 40]]), "labels": torch.tensor([1])}] * 2
    spec = dataclasses.replace(s, steps=4, adapt=1)
    _, history = synthesise(teacher, target, spec, progress="", watch=lambda step, x: seen.append(x.clone()))
    assert seen[0].min() < .01 and seen[0].max() > .99 and seen[0].std() == pytest.approx(12**-.5, abs=.02)
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)
    assert s.lr == .2 and (seen[1] - seen[0]).abs().max() <= .2 + 1e-5 # without memory no pixel moves further than the rate
    assert history["tv"][0] == pytest.approx(150 * impressions.absolute_variation(seen[0]).item(), rel=1e-4)


# Half of a teacher's steps

def test_a_run_says_what_half_of_the_steps_reached(made):
    textures = TINY | {"impressions": 0}
    ran, runs = run(textures | {"teacher_half": True}, made[3].runs, progress=False), made[3].runs
    val = ran["metrics"]["val"]
    assert set(val) == {"teacher", "student", "teacher_half_steps"} and set(val["teacher_half_steps"]) == set(val["teacher"])
    steps = {read_record(f)["depends"]["training"]["steps"] for f in runs.glob("stages/teacher-*/stage.json")}
    assert steps == {2, 4} and "teacher_half_steps" in ran["stages"] and ran["stages"]["teacher"]["reused"]
    assert all(f.there for f in plan(textures, runs)) # the switch changes nothing else
    foretold = plan(textures | {"teacher_half": True}, runs)
    assert all(f.there for f in foretold) and foretold[-1].of == "half of the steps"


# Mirrored views

def test_what_mirrors_is_in_a_key_only_where_it_does_not():
    for spec in (Training, Painting, Distilling):
        assert "mirror" not in key_of(spec()) and key_of(spec(mirror=False)) == key_of(spec()) | {"mirror": False}


def test_no_view_is_mirrored_where_none_should_be(made, monkeypatch):
    seen, draw = {}, augment.random_affine
    def drawn(what):
        def remember(*args, **kwargs):
            affine = draw(*args, **kwargs)
            seen.setdefault((what, bool((affine[:, 0] < 0).any())), []).append(affine)
            return affine
        return remember
    for module, what in ((train, "teacher"), (impressions, "painting"), (augment, "distilling")):
        monkeypatch.setattr(module, "random_affine", drawn(what))
    p, _, data, stages = made
    s = specs_of(check_parameters(p | {"teacher_mirror": False, "synthesis_mirror": False, "distill_mirror": False}))
    compress(s, load_detector(make_teacher(s, data, stages)[0]), data, stages)
    assert set(seen) == {("teacher", False), ("painting", False), ("distilling", False)}


@pytest.mark.parametrize("mirrors", [True, False])
def test_the_teacher_decides_whether_views_are_mirrored(mirrors, made, tmp_path, monkeypatch):
    p, teacher, _, _ = made
    told = {"mirrored": .1, "moved": .5, "share": .2, "least": .5, "mirrors": mirrors}
    monkeypatch.setattr(experiment, "mirror_agreement", lambda teacher, images: told)
    s = specs_of(check_parameters(p | {"mirror_by_teacher": True}))
    stages = Stages(tmp_path, Engine(device="cpu"), progress=False)
    assert experiment.ask_mirror(specs_of(p), teacher, stages) == {} and not stages.used # nobody asks
    asked = experiment.ask_mirror(s, teacher, stages)
    decided = experiment.with_mirror(s, asked)
    assert asked == told and decided.painting.mirror == decided.distilling.mirror == mirrors
    assert (decided == s) == mirrors # with mirrors every key is as before


# The benchmarks

SMALL = {"device": "cpu", "impressions": 2, "textures": 2, "shard": 2, "synthesis_steps": 2, "distill_steps": 1, "batch": 2, "timed": 1,
    "held_out": 0, "baselines": []}
TRAINED = SMALL | {"weights": "", "teacher_width": .25, "fpn_channels": 16, "head_channels": 32, "teacher_steps": 2, "teacher_batch": 2,
    "proposals": 100, "teacher_ema": 0.}
SAME = {"widths": 1., "inherit_body": False}
STRICT = {"textures": 0, "bn_prior": 0., "inherit_heads": False, "inherit_body": False}


@pytest.mark.parametrize("file, data, given", [
    ("kitti", "kitti101", TRAINED | {"size": [64, 192], "splits": ["train 0-20%", "val 0-20%", "val 0-20%"]}),
    ("voc", "voc100", TRAINED | {"size": [64, 96], "splits": ["train", "val", "val"]}),
    ("coco", "coco38", SMALL | {"size": [64, 96], "widths": .25})])
def test_a_benchmark_s_file_runs_in_miniature_to_the_official_metric(file, data, given, shared, tmp_path):
    whole = read_parameters(PARAMS/f"{file}.yaml")
    if file == "coco":
        given["teacher"] = str(tmp_path/"teacher.pth")
        torch.save(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), given["teacher"])
    ran = run(whole | given | {"data_root": str(shared(data))}, tmp_path, progress=False)
    teacher = load_detector(tmp_path/file/"teacher.safetensors").spec
    for student in ({}, SAME, {"widths": "half"}, STRICT): check_pair(teacher, specs_of(check_parameters(whole | student)).student)
    assert ran["params"]["name"] == file and ran["stages"]["transfer_set"]["images"] == 4
    for who in ("teacher", "student"): assert ran["metrics"][who]["protocol"]["summary"]
