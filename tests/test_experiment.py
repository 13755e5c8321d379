"The experiment as its user meets it: parameters, papermill, a killed run, folders of one's own, a teacher of one's own"
import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from tqdm import tqdm

from moi import compress, distill, evaluate, experiment, impressions, layouts, street, train
from moi.data import read_record, write_record
from moi.detector import DetectorSpec, build_detector, check_value, detector_hash, load_detector
from moi.experiment import (
    KINDS,
    PARAMETERS,
    Planner,
    Stages,
    ahead,
    check_parameters,
    default,
    describe_plan,
    find_runs,
    make_teacher,
    methods_of,
    open_data,
    pace,
    read_parameters,
    run,
    score,
    specs_of,
)
from moi.layouts import write_kitti, write_voc
from moi.pseudo_targets import sample_targets
from moi.train import Engine
from moi.transfer_set import open_transfer_set

ROOT = Path(__file__).parents[1]
NOTEBOOK = Path("nbs/experiments/zero_shot_kd.ipynb")
PARAMS = Path("nbs/experiments/params")
FILES = sorted((ROOT / PARAMS).glob("*.yaml"))
DATA = {"name", "seed", "dataset", "data_root", "splits", "skip_damaged", "classes", "scenes", "size"}
TEACHER = {"teacher_steps", "teacher_lr", "teacher_views", "teacher_batch", "teacher_ema", "teacher_judged", "teacher_mirror",
    "backbone", "weights", "teacher_width", "precision", "mirror_by_teacher"}
SAMPLING = {"objects", "area", "max_aspect", "box_prior", "overlap", "soft_labels", "beta"}
SYNTHESIS = {"synthesis_steps", "synthesis_lr", "tv", "bn_prior", "frozen_bn_prior", "l2", "adapt", "rounds", "compete", "pixels",
    "painter", "synthesis_mirror"}
KILLED = """
import itertools, os, signal, sys
from moi import compress, distill, experiment, train

def dies(function, n):
    "As `function`, but its `n`-th call is the last thing that the process does"
    count = itertools.count(1)
    def called(*args, **kwargs):
        if next(count) == n: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return called

module, name, n, *arguments = sys.argv[1:]
module = {"compress": compress, "distill": distill, "train": train}[module]
setattr(module, name, dies(getattr(module, name), int(n)))
experiment.main(arguments)
"""


def layout(root):
    "What a checkout has of folders: `runs/` and, beside it, settings.ini and the experiment"
    (root / "runs").mkdir()
    shutil.copyfile(ROOT / "settings.ini", root / "settings.ini")
    shutil.copytree(ROOT / PARAMS, root / PARAMS)
    shutil.copyfile(ROOT / NOTEBOOK, root / NOTEBOOK)
    return root


def python(*args, cwd):
    "Run Python with `args`; its return code and what it printed are for the caller to judge"
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def papermill_run(root, *args, cwd="."):
    "The experiment at miniature scale, through papermill's command line"
    paths = [os.path.relpath(root / p, root / cwd) for p in (NOTEBOOK, "runs/out.ipynb", PARAMS / "tiny.yaml")]
    options = ("--start-timeout", "600", "-f", paths[2], "-p", "device", "cpu") # a cold machine may be slow to start a kernel
    return python("-m", "papermill", *paths[:2], *options, *args, cwd=root / cwd)


def contents(folder, but=()):
    "Every file's bytes, as hashes, by path"
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in but)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pixels(image): return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def result_of(root): return json.loads((root / "runs/tiny/result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder in which papermill has run the experiment once"
    root = layout(tmp_path_factory.mktemp("finished"))
    done = papermill_run(root)
    assert done.returncode == 0, done.stderr
    return root


# Parameters

def annotation(name):
    "What a notebook says of a parameter's type: that of its default, and of a list's entries"
    field = PARAMETERS[name][1]
    if not isinstance(field.default, tuple): return type(field.default).__name__
    return f"list[{(type(field.default[0]) if field.default else field.metadata['of']).__name__}]"


def test_the_notebook_spells_out_the_defaults():
    cell = papermill.inspect_notebook(str(ROOT / NOTEBOOK))
    assert list(cell) == list(PARAMETERS)
    for name, (_, field) in PARAMETERS.items():
        value = ast.literal_eval(cell[name]["default"])
        assert (value, type(value)) == (default(name), type(default(name))), name
        assert (cell[name]["inferred_type_name"], cell[name]["help"]) == (annotation(name), field.metadata["help"]), name
    for name, kind in {"size": "list[int]", "anchors": "list[float]", "classes": "list[str]", "widths": "str"}.items():
        assert (default(name), cell[name]["inferred_type_name"]) == ("" if kind == "str" else [], kind)


def test_a_parameter_is_a_field_of_one_spec():
    "With a help, and with bounds or choices that its default keeps"
    assert len(PARAMETERS) == sum(len(dataclasses.fields(kind)) for kind in KINDS.values())
    for name, (kind, field) in PARAMETERS.items():
        assert field in dataclasses.fields(KINDS[kind]) and name == (field.metadata["flat"] or field.name)
        assert field.metadata["help"] and check_value(name, field.default, field) == field.default
    specs = specs_of(check_parameters({}))
    for kind, spec in KINDS.items():
        if kind != "engine": assert getattr(specs, kind) == spec()
    assert specs.engine == {f.name: f.default for f in dataclasses.fields(Engine)}


def test_street_spells_out_the_defaults():
    given = read_parameters(ROOT / PARAMS / "street.yaml")
    assert list(given) == list(PARAMETERS) and given | {"name": "quickstart"} == {k: default(k) for k in PARAMETERS}
    assert all(type(given[k]) is type(default(k)) for k in PARAMETERS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_of_parameters_is_accepted(file):
    given = read_parameters(file)
    dataset = given.get("dataset", "street")
    where = {"street": {}, "none": {"teacher": "somewhere"}}.get(dataset, {"data_root": "somewhere"})
    assert check_parameters(where | given)["name"] == file.stem


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "tiny"], ids=lambda f: f.stem)
def test_what_is_painted_is_the_same_for_every_dataset(file):
    changed = {k for k, v in read_parameters(file).items() if v != default(k)}
    assert not changed & (SAMPLING | SYNTHESIS)


def test_worlds_differ_in_data_and_teacher_alone():
    "And the teacher of each says itself whether a mirrored sign is another one"
    worlds = {f: read_parameters(ROOT / PARAMS / f"{f}.yaml") for f in ("converged", "bccd", "chess12", "signs20", "voc3000", "kitti101")}
    told = [{k: v for k, v in w.items() if k not in DATA | TEACHER} for w in worlds.values()]
    assert told[0]["reconstruct"] and all(t == told[0] for t in told)
    assert all(w["mirror_by_teacher"] for w in worlds.values())


def test_papermill_stops_at_a_bad_parameter(tmp_path):
    given = {
        ("distil_steps", "4"): "no parameter 'distil_steps'; did you mean 'distill_steps'?",
        ("synthesis_lr", "fast"): "parameter 'synthesis_lr' is 'fast': 'fast' is a str, float is needed",
        ("teacher_width", "9"): "parameter 'teacher_width' is 9; allowed is 0.125 to 4",
    }
    for (name, value), message in given.items(): # one after another: kernels that start together may pick the same port
        (tmp_path / name).mkdir()
        done = papermill_run(layout(tmp_path / name), "-p", name, value)
        assert done.returncode != 0 and message in done.stderr
        assert [p.name for p in (tmp_path / name / "runs").iterdir()] == ["out.ipynb"]  # nothing was begun


# A run

class Bars:
    "Every progress bar of moi that is shown: in the order they came, and how many there were at once"
    def __init__(self, patch):
        self.all, self.open, self.most = [], set(), 0
        bars = self
        class Bar(tqdm):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs | {"file": io.StringIO()})
                if self.disable or kwargs.get("delay"): return # some come only where a look takes long
                bars.all.append(self)
                bars.open.add(self)
                bars.most = max(bars.most, len(bars.open))
            def close(self):
                bars.open.discard(self)
                super().close()
        for module in (compress, distill, evaluate, experiment, impressions, layouts, street, train):
            if hasattr(module, "tqdm"): patch.setattr(module, "tqdm", Bar)

    def names(self): return [b.desc.removesuffix(": ") for b in self.all]


def test_a_run_shows_one_bar_for_itself_and_one_for_its_stage(tmp_path, monkeypatch):
    "The stage's has the name of its method; and it counts stages as they come, with and without data"
    few = {"scenes": [4, 2, 2], "impressions": 4, "textures": 2, "shard": 2, "batch": 2, "timed": 1}
    tiny = read_parameters(ROOT / PARAMS / "tiny.yaml") | few | {"device": "cpu", "baselines": ["textures", "real"]}
    bars = Bars(monkeypatch)
    run(tiny, tmp_path)
    made = ["transfer set", "student", "transfer set of textures", "student of textures", "student of real"] # what is real is only copied
    scored = ["scores of teacher", "scores", "scores of textures", "scores of real", "scores of teacher", "scores"]
    assert bars.names()[1:] == ["street", "teacher", *made, *scored] and bars.most == 2 and not bars.open
    assert all(b.n == b.total for b in bars.all) and bars.all[0].total == len(ahead(methods_of(check_parameters(tiny))))
    given = {"dataset": "none", "teacher": str(next(tmp_path.glob("stages/teacher-*/teacher.safetensors"))), "agreement": 2}
    own, bars = tiny | given | {"name": "own", "baselines": [], "synthesis_steps": 3}, Bars(monkeypatch)
    run(own, tmp_path)
    assert bars.names()[1:] == ["transfer set", "student", "transfer set of fresh impressions"] and bars.most == 2
    teacher = load_detector(Path(given["teacher"])).spec
    assert bars.all[0].n == bars.all[0].total == len(ahead(methods_of(check_parameters(own)), teacher))
    assert bars.all[0].postfix == "about 0 min left"


def test_whoever_calls_a_stage_alone_sees_its_bar_too(tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = build_detector(DetectorSpec(["a"], (64, 64), width=.25, fpn_channels=16, head_channels=32))
    bars, cpu = Bars(monkeypatch), Engine(device="cpu")
    few = dict(impressions=3, textures=2, shard=2, steps=3, engine=cpu)
    images = compress.paint_transfer_set(teacher, tmp_path / "set", **few)
    compress.make_student(teacher, images, tmp_path / "student", widths="half", steps=2, batch=2, engine=cpu)
    compress.paint_transfer_set(teacher, tmp_path / "other", progress="mine", **few)
    impressions.synthesise(teacher, sample_targets(1, (64, 64), (1,)), impressions.Painting(steps=2))
    evaluate.predict(teacher, [torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert bars.names() == ["transfer set", "student", "mine", "impressions", "predict"] and bars.most == 1
    assert [b.total for b in bars.all] == [5 * 3, 2, 5 * 3, 2, 1] and all(b.n == b.total for b in bars.all)
    assert "| 5/5 images" in str(bars.all[0])
    compress.paint_transfer_set(teacher, tmp_path / "quiet", progress=False, **few)
    assert len(bars.all) == 5


@pytest.mark.parametrize("records, seconds", [
    ([], None),
    ([(1., 5.)], 5e3),
    ([(1., 5.)] * 9 + [(1e3, 60.)], 60.),
    ([(1., 5.), (2., 5.), (500., 40.), (1e3, 60.), (1e3, 100.)], 80.),  # rates of .08, .06 and .1
    ([(499., 400.), (1e3, 60.)], 60.)])
def test_how_long_a_stage_takes_is_told_by_the_largest_like_it(records, seconds, tmp_path):
    like = [{"amount": amount, "seconds": s} for amount, s in records]
    found = pace(like)
    assert (found and 1e3 * found) == (seconds and pytest.approx(seconds))
    for i, r in enumerate(like):
        (tmp_path / f"stages/student-{i:012}").mkdir(parents=True)
        write_record(tmp_path / f"stages/student-{i:012}/stage.json", r | {"memory": i})
    planner = Planner(tmp_path)
    for kind in ("student", "teacher"): planner.guess(kind, 1e3)
    assert [f.seconds for f in planner.found] == [seconds and pytest.approx(seconds), None]
    assert "?" in describe_plan(planner.found)


def test_the_result_says_how_it_came_about(finished):
    result = result_of(finished)
    assert set(result) == {"params", "seed", "device", "versions", "commit", "stages", "metrics", "capacity", "latency", "switches",
        "not_inherited", "weights"}
    assert result["params"] == check_parameters(read_parameters(ROOT / PARAMS / "tiny.yaml") | {"device": "cpu"})
    assert result["device"]["type"] == "cpu" and result["versions"]["torch"] == importlib.metadata.version("torch")
    metrics = result["metrics"]
    assert set(metrics) == {"teacher", "student", "textures", "noise", "retention", "val"}
    for name in ("teacher", "student", "textures", "noise"):
        assert all(0 <= metrics[name][k] <= 1 for k in ("AP", "AP50"))
    for k in ("AP", "AP50"):
        kept = metrics["student"][k] / metrics["teacher"][k] if metrics["teacher"][k] else None
        assert metrics["retention"][k] == kept
    assert all(s["seconds"] >= 0 for s in result["stages"].values())
    assert result["stages"]["transfer_set"]["images"] == 16
    assert set(result["switches"]) == {
        "bn_prior", "box_prior", "inherited_heads", "frozen_heads", "inherited_body", "textures", "photographs", "recipe"}
    capacity = result["capacity"]
    assert set(capacity) == {"teacher", "student", "ratio"}
    for who in ("teacher", "student"): assert set(capacity[who]) == {"body", "fpn", "rpn", "heads", "total"}
    teacher, student = (capacity[who]["total"] for who in ("teacher", "student"))
    assert capacity["ratio"] == {k: student[k] / teacher[k] for k in ("parameters", "flops")} # both propose as much here
    took = result["latency"]
    assert set(took) == {"teacher", "student", "teacher_same_proposals"} and all(v["torch"] > 0 for v in took.values())
    assert result["not_inherited"] == [] and set(result["weights"]) == {"teacher", "student"}


def test_the_run_folder_holds_what_was_made(finished):
    folder = finished / "runs/tiny"
    for name in ("teacher", "student"):
        assert detector_hash(load_detector(folder / f"{name}.safetensors")) == result_of(finished)["weights"][name]
    assert len(open_transfer_set(folder / "transfer_set")) == 16 and not (folder / "transfer_set_2").exists()
    assert not list((finished / "runs").rglob("*.part"))


def test_the_run_folder_lists_its_stages(finished):
    names = json.loads((finished / "runs/tiny/stages.json").read_text())
    assert len(names) == len(set(names)) and set(names) == {f.name for f in (finished / "runs/stages").iterdir()}
    kinds = Counter(n.rpartition("-")[0] for n in names)
    assert kinds == {"world": 1, "teacher": 1, "transfer_set": 3, "student": 3, "scores": 6} # four on test, two on val
    for name in names:
        record = json.loads((finished / "runs/stages" / name / "stage.json").read_text())
        assert record["kind"] == name.rpartition("-")[0] and record["seconds"] >= 0 and record["commits"], name


def test_a_students_stage_holds_how_it_learnt(finished):
    for folder in (finished / "runs/stages").glob("student-*"):
        assert sorted(f.name for f in folder.iterdir()) == ["history.json", "made_from.json", "stage.json", "student.safetensors"]
        record, made_from, history = (read_record(folder / f"{n}.json") for n in ("stage", "made_from", "history"))
        mark = hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()
        assert history.pop("student.safetensors") == mark and record["history"] == history and record["depends"] == made_from
        assert len(history["feat"]) == 4 and made_from["teacher"] == result_of(finished)["weights"]["teacher"]


def test_the_executed_notebook_shows_pictures_and_no_error(finished):
    nb = nbformat.read(finished / "runs/out.ipynb", 4)
    nbformat.validate(nb)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code")
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6
    assert (finished / "runs/out.ipynb").stat().st_size < 2e6


def test_no_bar_is_left_in_it_and_the_result_stands_first(finished):
    nb = nbformat.read(finished / "runs/out.ipynb", 4)
    assert "widgets" not in nb.metadata and not [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if "it/s" in str(o)]
    first, *_, last = [c.outputs for c in nb.cells if c.cell_type == "code" and c.outputs]
    assert "| teacher |" in first[0].data["text/markdown"] and "image/png" in first[1].data
    listed = last[0].text.splitlines()
    assert {line.partition(":")[0] for line in listed} >= set(PARAMETERS) and listed[-1].startswith("everything is in runs/tiny/: ")


def test_from_its_own_folder_it_takes_what_is_there(finished, monkeypatch):
    monkeypatch.chdir(finished / NOTEBOOK.parent)
    assert find_runs() == finished / "runs"
    before = result_of(finished)
    again = run(before["params"])
    assert not Path("runs").exists()
    assert all(s.get("reused", True) for s in again["stages"].values())
    assert (again["weights"], again["metrics"]) == (before["weights"], before["metrics"])


def test_killed_three_times_it_ends_as_if_never_killed(finished, tmp_path):
    "Killed from a shell in training, between shards and in distillation; finished from the notebook's own folder"
    root = layout(tmp_path)
    stages, arguments = root / "runs/stages", ("-f", PARAMS / "tiny.yaml", "-p", "device", "cpu")
    complete = lambda: {f.parent.name.split("-")[0] for f in stages.glob("*/stage.json")}
    seen = {}
    def check_kept():  # no file of what was complete has been written again
        for path, written in seen.items(): assert path.stat().st_mtime_ns == written, path
        whole = [*stages.glob("*/stage.json"), *stages.glob("*/*.safetensors"), *stages.glob("transfer_set-*/shards/*.json")]
        seen.update({p: p.stat().st_mtime_ns for p in whole})

    for place, expected in ((("train", "supervised_losses", 3), {"world"}),
                            (("compress", "paint_shard", 2), {"world", "teacher"}),
                            (("distill", "distill_losses", 3), {"world", "teacher", "transfer_set"})):
        done = python("-c", KILLED, *place, *arguments, cwd=root)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert complete() == expected
        if place[1] == "paint_shard": assert [p.name for p in stages.glob("transfer_set-*/shards/*")] == ["0000.json"]
        check_kept()
    done = papermill_run(root, cwd=NOTEBOOK.parent)
    assert done.returncode == 0, done.stderr
    check_kept()
    ours, theirs = result_of(root), result_of(finished)
    assert {k for k, s in ours["stages"].items() if s.get("reused")} >= {"world", "teacher", "transfer_set"}
    sets = [contents(r / "runs/tiny/transfer_set", but=["stage.json"]) for r in (root, finished)]
    assert sets[0] == sets[1] and len([f for f in sets[0] if f.endswith(".png")]) == 16
    assert (ours["weights"], ours["metrics"]) == (theirs["weights"], theirs["metrics"])


def test_the_fidelity_notebook_fills_its_table(tmp_path):
    root, notebook = layout(tmp_path), Path("nbs/experiments/fidelity.ipynb")
    given = {"params": "tiny", "world": "tiny", "students": ["half", "same"], "methods": ["moi", "strict", "textures", "real"],
        "seeds": [0], "impressions": 4, "textures": 4, "distill_steps": 2, "device": "cpu", "out": "results"}
    done = python("-m", "papermill", "--start-timeout", "600", ROOT / notebook, "runs/out.ipynb", "-y", json.dumps(given), cwd=root)
    assert done.returncode == 0, done.stderr
    results = {f.parent.name: json.loads(f.read_text()) for f in (root / "results").glob("*/result.json")}
    assert set(results) == {f"tiny-{s}-{m}-s0" for s in given["students"] for m in given["methods"]}
    assert len({r["weights"]["teacher"] for r in results.values()}) == 1
    assert {r["stages"]["transfer_set"]["images"] for r in results.values()} == {8}
    assert results["tiny-half-strict-s0"]["switches"] == {
        "bn_prior": False, "box_prior": "teacher", "inherited_heads": False, "frozen_heads": False, "inherited_body": False,
        "textures": False, "photographs": "", "recipe": "moi"}
    assert results["tiny-half-real-s0"]["switches"]["photographs"] == "real"
    cell = results["tiny-same-moi-s0"]
    assert cell["capacity"]["student"] == cell["capacity"]["teacher"] and not cell["switches"]["inherited_body"]
    outputs = [o.get("data", {}) for c in nbformat.read(root / "runs/out.ipynb", 4).cells for o in c.get("outputs", [])]
    table = next(d["text/markdown"] for d in outputs if "text/markdown" in d)
    assert all(f"| {s} | `{m}` |" in table for s in given["students"] for m in given["methods"])
    differences = json.loads((root / "results/tiny-half-same-differences.json").read_text())
    assert set(differences) == {f"{s}, moi − {m}, seed 0" for s in given["students"] for m in given["methods"] if m != "moi"}
    assert {ap: set(d) for v in differences.values() for ap, d in v.items()} == dict.fromkeys(("AP", "AP50"), {"difference", "low", "high"})
    for key, d in differences.items():
        s, m = key.partition(",")[0], key.split()[3].strip(",")
        ap = [results[f"tiny-{s}-{k}-s0"]["metrics"]["student"]["AP"] for k in ("moi", m)]
        assert d["AP"]["difference"] == pytest.approx(ap[0] - ap[1], abs=1e-9)
    shares = json.loads((root / "results/tiny-half-same-privacy.json").read_text())
    assert all(0 <= shares[k]["impressions nearer than 99 % of held-out images"] <= 1 for k in ("features", "pixels"))


def test_a_judged_teacher_is_the_best_on_val_of_the_second_half_of_the_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", functools.partial(train.fit, every=50))
    tiny = read_parameters(ROOT / PARAMS / "tiny.yaml")
    s = specs_of(check_parameters(tiny | {"device": "cpu", "teacher_judged": True, "teacher_steps": 250, "teacher_ema": .9}))
    stages = Stages(tmp_path, Engine(**s.engine))
    data, _ = open_data(s, stages)
    file, record = make_teacher(s, data, stages)
    looks = record["history"]["val_AP50"]
    assert len(looks) == 5 and max(looks[2:]) > 0
    teacher = load_detector(file)
    assert max(looks[2:]) == score(teacher, detector_hash(teacher), data, stages, split=1)["AP50_voc"]


def test_what_a_round_holds_out_no_later_round_learns_from(tmp_path, monkeypatch):
    "Neither its places nor its pixels; each round's own images lie in a folder of their own"
    parts, learn = [], distill.distill
    def remember(student, teacher, dataset, distilling, held_out, *more, **options):
        assert dataset.dataset is held_out.dataset
        parts.append([(set(d.indices), {pixels(image) for image, _ in d}) for d in (dataset, held_out)])
        return learn(student, teacher, dataset, distilling, held_out, *more, **options)
    monkeypatch.setattr(distill, "distill", remember)
    run(read_parameters(ROOT / PARAMS / "tiny.yaml") | {"device": "cpu", "baselines": [], "rounds": 2}, tmp_path)
    (first, held), (second, still) = parts
    for k in range(2): # by place, by content
        assert held[k] and held[k] == still[k] and first[k] < second[k] and not held[k] & second[k]
        assert len(first[k] | held[k]) == 12 and len(second[k] | held[k]) == 16
    assert second[0] | held[0] == set(range(16))
    sets = [open_transfer_set(tmp_path / "tiny" / n) for n in ("transfer_set", "transfer_set_2")]
    painted = [{pixels(images.image(i)) for i in range(len(images))} for images in sets]
    assert [len(p) for p in painted] == [12, 4] and held[1] < painted[0] and painted[0] | painted[1] == second[1] | held[1]


@pytest.mark.parametrize("given", [{"recipe": "chen2017", "baselines": ["proxy"]}, {"photographs": "proxy", "baselines": ["chen2017"]}])
def test_unrelated_photographs_are_no_labels(given):
    with pytest.raises(ValueError, match="'recipe' is 'chen2017', which learns from labels"):
        check_parameters(given | {"proxy_root": ["anywhere"]})


@pytest.mark.parametrize("recipe, labelled", [("moi", False), ("chen2017", True)])
def test_real_images_carry_labels_where_the_recipe_learns_from_them(recipe, labelled, tmp_path):
    tiny = read_parameters(ROOT / PARAMS / "tiny.yaml")
    real = {"name": "real", "device": "cpu", "baselines": [], "photographs": "real", "recipe": recipe, "freeze_heads": False}
    told = run(tiny | real, tmp_path)["stages"]["transfer_set"]
    assert (told["images"], told["asked"]) == (12, 16) # the world has no more
    images = open_transfer_set(tmp_path / "real/transfer_set")
    assert any(len(images.target(i)["boxes"]) for i in range(len(images))) == labelled


# Folders and teachers of one's own

@pytest.mark.parametrize("dataset, write", [("voc", write_voc), ("kitti", write_kitti)])
def test_a_folder_of_ones_own_and_a_teacher_of_ones_own(dataset, write, tmp_path):
    samples = [(f"{i:06}", *street.draw_scene((72, 100), i)) for i in range(12)]
    ids = [s[0] for s in samples]
    write(tmp_path / "data", samples, street.CLASSES, {"train": ids[:6], "val": ids[6:9], "test": ids[9:]})
    given = read_parameters(ROOT / PARAMS / "tiny.yaml") | {
        "name": "own", "device": "cpu", "dataset": dataset, "data_root": str(tmp_path / "data"), "size": [64, 96],
        "classes": list(street.CLASSES), "impressions": 2, "textures": 2, "baselines": []}
    first = run(given | {"baselines": ["supervised"]}, tmp_path)
    assert set(first["metrics"]) == {"teacher", "student", "supervised", "retention", "val"}
    from_labels = json.loads((tmp_path / "own/stages.json").read_text())
    records = [json.loads((tmp_path / "stages" / n / "stage.json").read_text()) for n in from_labels if n.startswith("teacher-")]
    assert [r["depends"]["spec"]["width"] for r in records] == [.25, .125]  # the student's size, trained as the teacher was
    del first["metrics"]["supervised"]
    assert records[0]["depends"]["training"] == records[1]["depends"]["training"] and "transfer_set_supervised" not in first["stages"]
    assert open_transfer_set(tmp_path / "own/transfer_set").image(0).shape == (3, 64, 96)

    teacher = shutil.copyfile(tmp_path / "own/teacher.safetensors", tmp_path / "mine.safetensors")
    labelled = given | {"name": "labelled", "photographs": "real", "recipe": "supervised", "freeze_heads": False}
    assert run(labelled, tmp_path)["switches"]["recipe"] == "supervised"
    images = open_transfer_set(tmp_path / "labelled/transfer_set")
    assert sum(len(images.target(i)["labels"]) for i in range(len(images))) > 0

    trained = {f: f.stat().st_mtime_ns for f in (tmp_path / "stages").glob("teacher-*/*")}
    second = run(given | {"name": "again", "teacher": str(teacher)}, tmp_path)
    assert second["history"]["teacher"] == {} and all(f.stat().st_mtime_ns == t for f, t in trained.items())
    assert json.loads((tmp_path / "again/teacher.safetensors").resolve().with_name("stage.json").read_text())["depends"] == {
        "given": first["weights"]["teacher"]}
    assert second["stages"]["student"]["reused"]  # the same teacher, hence the same impressions and student
    assert (second["weights"], second["metrics"]) == (first["weights"], first["metrics"])
    third = run(given | {"name": "wider", "teacher": str(teacher), "student_width": .25, "inherit_body": False}, tmp_path)
    assert not third["stages"]["student"]["reused"] and third["weights"]["teacher"] == first["weights"]["teacher"]
    assert teacher.is_file()


def test_a_corrected_label_makes_anew_what_read_it_and_no_more(tmp_path):
    "One of the test split the scores on test, one of the training split the teacher and all that came of it"
    samples = [(f"{i:06}", *street.draw_scene((64, 64), i)) for i in range(14)]
    ids = [s[0] for s in samples]
    splits = {"train": ids[:6], "val": ids[6:10], "test": ids[10:]}
    write_kitti(tmp_path / "data", samples, street.CLASSES, splits)
    given = read_parameters(ROOT / PARAMS / "tiny.yaml") | {"device": "cpu", "dataset": "kitti", "data_root": str(tmp_path / "data"),
        "classes": list(street.CLASSES), "impressions": 4, "textures": 4, "distill_steps": 2, "baselines": []}
    def correct(split):
        "The first object of a split is a little narrower than was said"
        files = [tmp_path / "data/training/label_2" / f"{i}.txt" for i in splits[split]]
        file = next(f for f in files if f.read_text())
        first, *others = file.read_text().splitlines(keepends=True)
        words = first.split(" ")
        words[4] = f"{float(words[4]) + 1.5:.2f}"
        file.write_text("".join([" ".join(words), *others]))
    def scores(): return {f: json.loads(f.read_text())["depends"]["images"] for f in (tmp_path / "stages").glob("scores-*/stage.json")}
    def reused(result): return {k: result["stages"][k]["reused"] for k in ("teacher", "transfer_set", "student")}

    first, before = run(given, tmp_path), scores()
    assert len(before) == 4 and not any(reused(first).values()) # teacher and student, on test and on val
    assert all(reused(run(given, tmp_path)).values()) and scores() == before

    correct("test")
    second, after = run(given, tmp_path), scores()
    assert all(reused(second).values()) and second["weights"] == first["weights"]
    new = {f: after[f] for f in after.keys() - before.keys()}
    assert len(new) == 2 and len({v["annotations"] for v in new.values()}) == 1 # teacher and student, on the corrected test split
    assert not {v["annotations"] for v in new.values()} & {v["annotations"] for v in before.values()}
    assert second["metrics"]["val"] == first["metrics"]["val"]

    correct("val") # of the split to tune on, which nobody is tuned on here
    assert all(reused(run(given, tmp_path)).values()) and len(scores()) == len(after) + 2

    correct("train")
    third = run(given, tmp_path)
    assert not any(reused(third).values())
    assert third["weights"]["teacher"] != first["weights"]["teacher"] and third["weights"]["student"] != first["weights"]["student"]

    judged = given | {"name": "judged", "teacher_judged": True}
    assert reused(run(judged, tmp_path)) == {"teacher": False, "transfer_set": True, "student": True} # one look: the same teacher again
    correct("val") # which chose that teacher
    assert not reused(run(judged, tmp_path))["teacher"] and reused(run(given, tmp_path))["teacher"]


def test_the_ablation_notebook_compares_levers_on_val(tmp_path):
    root, notebook = layout(tmp_path), Path("nbs/experiments/ablation.ipynb")
    given = {"params": "tiny", "levers": ["default", "pixels", "views are not mixed"], "seeds": [0], "impressions": 4, "textures": 4,
        "distill_steps": 2, "numbers": [4, 8], "lengths": [1, 2], "device": "cpu", "out": "results"}
    done = python("-m", "papermill", "--start-timeout", "600", ROOT / notebook, "runs/out.ipynb", "-y", json.dumps(given), cwd=root)
    assert done.returncode == 0, done.stderr
    result = json.loads((root / "results/ablation.json").read_text())
    assert set(result["rows"]) == set(given["levers"])
    assert {k: list(v) for k, v in result["growth"].items()} == {"images": ["4", "8"], "steps": ["1", "2"]}
    assert {k: len(v) for k, v in result["agreement and AP"].items()} == {"levers": 3, "images": 2, "steps": 2}
    assert (root / "results/growth.png").stat().st_size > 1000
    run = json.loads((root / "runs/tiny-ablation-default-s0/result.json").read_text())
    assert result["rows"]["default"][0]["AP"] == run["metrics"]["val"]["student"]["AP"]
    assert len({rows[0]["teacher"] for rows in result["rows"].values()}) == 1
    assert result["rows"]["default"][0]["commits"] == sorted({c for s in run["stages"].values() for c in s.get("commits", [])})
