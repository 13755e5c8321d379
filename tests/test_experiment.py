"The experiment as its user meets it: parameters, papermill, a killed run, folders of one's own, a teacher of one's own"
import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from moi import experiment, street, train
from moi.data import write_kitti, write_voc
from moi.detector import load_detector, weights_hash
from moi.experiment import PARAMETERS, check_parameters, find_runs, make_teacher, make_world, read_parameters, run, score
from moi.transfer_set import open_transfer_set

ROOT = Path(__file__).parents[1]
NOTEBOOK = Path("nbs/experiments/zero_shot_kd.ipynb")
PARAMS = Path("nbs/experiments/params")
FILES = sorted((ROOT / PARAMS).glob("*.yaml"))
DATA = {"name", "seed", "dataset", "data_root", "splits", "classes", "scenes", "size"}
SCHEDULE = {"teacher_steps", "teacher_lr", "teacher_views", "teacher_batch", "teacher_ema", "teacher_judged",
    "distill_steps", "distill_lr", "batch", "shard"}
SAMPLING = {"objects", "area", "max_aspect", "box_prior", "overlap", "soft_labels", "beta"}
SYNTHESIS = {"synthesis_steps", "synthesis_lr", "tv", "bn_prior", "l2", "adapt", "rounds", "compete", "pixels"}
KILLED = """
import itertools, os, signal, sys
from moi import distill, experiment, train

def dies(function, n):
    "As `function`, but its `n`-th call is the last thing that the process does"
    count = itertools.count(1)
    def called(*args, **kwargs):
        if next(count) == n: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return called

module, name, n, *arguments = sys.argv[1:]
module = {"distill": distill, "experiment": experiment, "train": train}[module]
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


def result_of(root): return json.loads((root / "runs/tiny/result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder in which papermill has run the experiment once"
    root = layout(tmp_path_factory.mktemp("finished"))
    done = papermill_run(root)
    assert done.returncode == 0, done.stderr
    return root


# Parameters

def test_the_notebook_spells_out_the_defaults():
    cell = papermill.inspect_notebook(str(ROOT / NOTEBOOK))
    assert list(cell) == list(PARAMETERS)
    for name, p in PARAMETERS.items():
        kind, value = type(p.default).__name__, ast.literal_eval(cell[name]["default"])
        if kind == "list": kind = f"list[{type(p.default[0]).__name__ if p.default else 'str'}]"
        assert (value, type(value)) == (p.default, type(p.default)), name
        assert (cell[name]["inferred_type_name"], cell[name]["help"]) == (kind, p.help), name


def test_street_spells_out_the_defaults():
    given = read_parameters(ROOT / PARAMS / "street.yaml")
    assert given | {"name": "quickstart"} == {k: p.default for k, p in PARAMETERS.items()}
    assert all(type(given[k]) is type(p.default) for k, p in PARAMETERS.items())


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_of_parameters_is_accepted(file):
    given = read_parameters(file)
    where = {} if given.get("dataset", "street") == "street" else {"data_root": "somewhere"}
    assert check_parameters(where | given)["name"] == file.stem


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "tiny"], ids=lambda f: f.stem)
def test_what_is_painted_is_the_same_for_every_dataset(file):
    changed = {k for k, v in read_parameters(file).items() if v != PARAMETERS[k].default}
    assert not changed & (SAMPLING | SYNTHESIS)
    if file.stem == "bccd": assert changed <= DATA | SCHEDULE


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

def test_the_result_says_how_it_came_about(finished):
    result = result_of(finished)
    assert {"params", "seed", "device", "versions", "commit", "stages", "metrics", "capacity", "switches"} <= set(result)
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
    assert set(result["switches"]) == {"bn_prior", "inherited_heads", "frozen_heads", "inherited_body", "textures", "photographs", "recipe"}
    for part in result["capacity"].values():
        assert set(part) == {"body", "fpn", "rpn", "heads", "total"}


def test_the_run_folder_holds_what_was_made(finished):
    folder = finished / "runs/tiny"
    for name in ("teacher", "student"):
        assert weights_hash(load_detector(folder / f"{name}.safetensors")) == result_of(finished)["weights"][name]
    assert len(open_transfer_set(folder / "transfer_set")) == 16
    assert not list((finished / "runs").rglob("*.part"))


def test_the_executed_notebook_shows_pictures_and_no_error(finished):
    nb = nbformat.read(finished / "runs/out.ipynb", 4)
    nbformat.validate(nb)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code")
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6
    assert (finished / "runs/out.ipynb").stat().st_size < 2e6


def test_its_widgets_can_be_shown_again(finished):
    nb = nbformat.read(finished / "runs/out.ipynb", 4)
    kind = "application/vnd.jupyter.widget-{}+json"
    views = [o.data[kind.format("view")]["model_id"] for c in nb.cells if c.cell_type == "code"
             for o in c.outputs if kind.format("view") in o.get("data", {})]
    state = nb.metadata.widgets[kind.format("state")]["state"]
    assert views and set(views) <= set(state)
    used = [v for s in state.values() for v in s["state"].values() if isinstance(v, str) and v.startswith("IPY_MODEL_")]
    assert {v.removeprefix("IPY_MODEL_") for v in used} <= set(state)
    assert not [s for s in state.values() if s["state"].get("bar_style") == "danger"]  # tqdm's for a bar cut short


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
                            (("experiment", "paint_shard", 2), {"world", "teacher"}),
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
    given = {"params": "tiny", "students": ["half", "same"], "methods": ["moi", "strict", "textures", "real"], "seeds": [0],
        "impressions": 4, "textures": 4, "distill_steps": 2, "device": "cpu", "out": "results"}
    done = python("-m", "papermill", "--start-timeout", "600", ROOT / notebook, "runs/out.ipynb", "-y", json.dumps(given), cwd=root)
    assert done.returncode == 0, done.stderr
    results = {f.parent.name: json.loads(f.read_text()) for f in (root / "results").glob("*/result.json")}
    assert set(results) == {f"tiny-{s}-{m}-s0" for s in given["students"] for m in given["methods"]}
    assert len({r["weights"]["teacher"] for r in results.values()}) == 1
    assert {r["stages"]["transfer_set"]["images"] for r in results.values()} == {8}
    assert results["tiny-half-strict-s0"]["switches"] == {
        "bn_prior": False, "inherited_heads": False, "frozen_heads": False, "inherited_body": False, "textures": False,
        "photographs": "", "recipe": "moi"}
    assert results["tiny-half-real-s0"]["switches"]["photographs"] == "real"
    cell = results["tiny-same-moi-s0"]
    assert cell["capacity"]["student"] == cell["capacity"]["teacher"] and not cell["switches"]["inherited_body"]
    outputs = [o.get("data", {}) for c in nbformat.read(root / "runs/out.ipynb", 4).cells for o in c.get("outputs", [])]
    table = next(d["text/markdown"] for d in outputs if "text/markdown" in d)
    assert all(f"| {s} | `{m}` |" in table for s in given["students"] for m in given["methods"])
    shares = json.loads((root / "results/tiny-half-same-privacy.json").read_text())
    assert all(0 <= shares[k]["impressions nearer than 99 % of held-out images"] <= 1 for k in ("features", "pixels"))


def test_a_judged_teacher_is_the_best_on_val_of_the_second_half_of_the_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", functools.partial(train.fit, every=50))
    tiny = read_parameters(ROOT / PARAMS / "tiny.yaml")
    p = check_parameters(tiny | {"device": "cpu", "teacher_judged": True, "teacher_steps": 250, "teacher_ema": .9})
    world = make_world(p, tmp_path)
    file, record = make_teacher(p, tmp_path, world)
    looks = record["history"]["val_AP50"]
    assert len(looks) == 5 and max(looks[2:]) > 0
    assert max(looks[2:]) == score(p, tmp_path, file, world, 1)["AP50_voc"]


def test_what_a_round_holds_out_no_later_round_learns_from(tmp_path, monkeypatch):
    parts, learn = [], experiment.distill
    def remember(student, teacher, dataset, *more, held_out, **options):
        parts.append((set(dataset.indices), set(held_out.indices)))
        return learn(student, teacher, dataset, *more, held_out=held_out, **options)
    monkeypatch.setattr(experiment, "distill", remember)
    run(read_parameters(ROOT / PARAMS / "tiny.yaml") | {"device": "cpu", "baselines": [], "rounds": 2}, tmp_path)
    (first, held), (second, still) = parts
    assert held and held == still and first < second and not held & second
    assert second | held == set(range(16))


@pytest.mark.parametrize("given", [{"recipe": "chen2017", "baselines": ["proxy"]}, {"photographs": "proxy", "baselines": ["chen2017"]}])
def test_unrelated_photographs_are_no_labels(given):
    with pytest.raises(ValueError, match="'recipe' is 'chen2017', which learns from labels"):
        check_parameters(given | {"proxy_root": ["anywhere"]})


@pytest.mark.parametrize("recipe, labelled", [("moi", False), ("chen2017", True)])
def test_real_images_carry_labels_where_the_recipe_learns_from_them(recipe, labelled, tmp_path):
    tiny = read_parameters(ROOT / PARAMS / "tiny.yaml")
    run(tiny | {"name": "real", "device": "cpu", "baselines": [], "photographs": "real", "recipe": recipe, "freeze_heads": False}, tmp_path)
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
    first = run(given, tmp_path)
    assert set(first["metrics"]) == {"teacher", "student", "retention", "val"}
    assert open_transfer_set(tmp_path / "own/transfer_set").image(0).shape == (3, 64, 96)

    teacher = shutil.copyfile(tmp_path / "own/teacher.safetensors", tmp_path / "mine.safetensors")
    labelled = given | {"name": "labelled", "photographs": "real", "recipe": "supervised", "freeze_heads": False}
    assert run(labelled, tmp_path)["switches"]["recipe"] == "supervised"
    images = open_transfer_set(tmp_path / "labelled/transfer_set")
    assert sum(len(images.target(i)["labels"]) for i in range(len(images))) > 0

    second = run(given | {"name": "again", "teacher": str(teacher)}, tmp_path)
    assert second["stages"]["teacher"]["seconds"] == 0 and second["history"]["teacher"] == {}
    assert second["stages"]["student"]["reused"]  # the same teacher, hence the same impressions and student
    assert (second["weights"], second["metrics"]) == (first["weights"], first["metrics"])
    third = run(given | {"name": "wider", "teacher": str(teacher), "student_width": .25, "inherit_body": False}, tmp_path)
    assert not third["stages"]["student"]["reused"] and third["weights"]["teacher"] == first["weights"]["teacher"]
    assert teacher.is_file()


def test_the_ablation_notebook_compares_levers_on_val(tmp_path):
    root, notebook = layout(tmp_path), Path("nbs/experiments/ablation.ipynb")
    given = {"params": "tiny", "levers": ["default", "pixels", "two rounds"], "seeds": [0], "impressions": 4, "textures": 4,
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
