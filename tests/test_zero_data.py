"Zero data: from a teacher on, nothing up to the student can ask for the images that the teacher learnt from, or can have them"
import ast
import collections.abc
import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

import moi
from moi import compress, distill, impressions, inherit, pseudo_targets, teachers, textures, transfer_set
from moi.data import Resized
from moi.detector import DetectorSpec, Spec, build_detector, detector_hash, load_detector, save_detector
from moi.layouts import open_dataset
from moi.street import write_street
from moi.train import Engine, Training, train_detector

# Signatures: what a function between a teacher and its student may be given

PLAIN = {int, float, bool, None, type(None), torch.Tensor, torch.Generator, torch.device, nn.Module, FasterRCNN, Engine, Ellipsis}
HOLDERS = {tuple, list, dict, typing.Union, types.UnionType, collections.abc.Sequence, collections.abc.Mapping} # of allowed things alone
WORDS = { # What a text may be: a choice, a class's name, a layer's, a name for people to read; none is opened
    "act", "backbone", "box_prior", "channels", "classes", "into", "kind", "name", "names", "out", "precision", "progress", "recipe",
    "painter", "source",
    "texture_kind", "widths"}
FOLDERS = { # The only places on disk: transfer sets, and where a function writes to and resumes
    "moi.compress.begin": {"folder"},
    "moi.compress.paint_transfer_set": {"folder"},
    "moi.compress.make_student": {"transfer_sets", "folder"},
    "moi.compress.student_key": {"transfer_sets"},
    "moi.distill.distill": {"checkpoint"},
    "moi.transfer_set.write_shard": {"folder"},
    "moi.transfer_set.shards_done": {"folder"},
    "moi.transfer_set.join_shards": {"folder"},
    "moi.transfer_set.open_transfer_set": {"folder"},
    "moi.transfer_set.is_whole": {"folder"},
    "moi.transfer_set.joined_checksum": {"folder"},
    "moi.transfer_set.read_annotations": {"folder"},
    "moi.compress.history_of": {"folder"},
    "moi.transfer_set.asked_targets": {"folder"},
    "moi.transfer_set.set_hash": {"folder"},
}
TRANSFER_SETS = { # The only objects without a type, or of an open one, that give images: a transfer set that was opened
    "moi.distill.distill": {"dataset", "held_out"},
    "moi.distill.agreement_judge": {"held_out"},
    "moi.compress.hold_out": {"images"},
    "moi.compress.calibration": {"images"},
    "moi.compress.fewest_proposals": {"images"},
    "moi.inherit.inherit": {"images"},
    "moi.inherit.Route": {"images"},
    "moi.inherit.covariances": {"images"},
    "moi.inherit.measured_channels": {"images"},
    "moi.inherit.reconstruct": {"images"},
    "moi.inherit.solve_adaptation": {"images"},
}
FIELDS = { # Any name at all, but refused unless it is a field of a spec
    "moi.teachers.adopt": {"fields"},
    "moi.compress.paint_transfer_set": {"fields"},
    "moi.compress.make_student": {"fields"},
}
LOOSE = { # Dicts and mappings of plain values and tensors whose annotation leaves open what they hold
    "moi.compress.begin": {"key"},
    "moi.distill.Distilling": {"recipe"},
    "moi.impressions.adapt_targets": {"target", "detections"},
    "moi.impressions.synthesise": {"targets"},
    "moi.inherit.StudentSpec": {"widths"},
    "moi.transfer_set.write_shard": {"targets", "provenance", "asked"},
    "moi.transfer_set.joined_checksum": {"annotations"},
}


def between():
    "Every public function and spec from `adopt` to `make_student`, by name"
    found = {"moi.teachers.adopt": teachers.adopt}
    for module in (pseudo_targets, textures, impressions, transfer_set, inherit, distill, compress):
        found |= {f"{module.__name__}.{n}": thing for n in module.__all__ if callable(thing := getattr(module, n))}
    return found


def objections(name, function):
    "What a signature may not ask for, as `parameter: why`; and each entry of a table that its parameters used"
    why, used = [], set()
    def excused(table, p):
        if p not in table.get(name, ()): return False
        used.add((id(table), name, p))
        return True
    def judge(p, kind): # why a type is not allowed, or nothing
        origin, inside = typing.get_origin(kind), typing.get_args(kind)
        if kind in PLAIN or inspect.isclass(kind) and issubclass(kind, Spec): return
        if inspect.isclass(kind) and hasattr(kind, "_fields"): # a named tuple is what it holds
            return next(filter(None, (judge(f, k) for f, k in typing.get_type_hints(kind).items())), None)
        if kind is str: return None if p in WORDS else "a text that is not on the list of words"
        if inspect.isclass(kind) and issubclass(kind, os.PathLike): return "a path"
        if kind in HOLDERS: return None if excused(LOOSE, p) else "it may hold anything"
        if origin is collections.abc.Callable: return next(filter(None, (judge(p, k) for k in [*inside[0], inside[1]])), None)
        if origin in (dict, collections.abc.Mapping) and inside[0] is str: inside = inside[1:] # its keys are names
        if origin in HOLDERS: return next(filter(None, (judge(p, k) for k in inside)), None)
        return f"{kind} is not on the list of types"
    for p, parameter in inspect.signature(function).parameters.items():
        if excused(FOLDERS, p) or excused(TRANSFER_SETS, p) or excused(FIELDS, p): continue
        if parameter.annotation is inspect.Parameter.empty: why.append(f"{p}: no type is given")
        elif problem := judge(p, parameter.annotation): why.append(f"{p}: {problem}")
    return why, used


def test_no_signature_between_teacher_and_student_asks_for_data():
    found = {name: objections(name, function) for name, function in between().items()}
    assert len(found) > 50 and not {name: why for name, (why, _) in found.items() if why}
    used = set().union(*(u for _, u in found.values())) # and no table allows more than there is
    assert used == {(id(t), name, p) for t in (FOLDERS, TRANSFER_SETS, FIELDS, LOOSE) for name, ps in t.items() for p in ps}


def test_the_transfer_sets_are_the_only_places():
    "And a path is a path: what the table excuses is annotated as one, so that nothing else hides behind it"
    functions = between()
    for name, ps in FOLDERS.items():
        for p in ps: assert "Path" in str(inspect.signature(functions[name]).parameters[p].annotation), (name, p)


class Photographs: "A dataset, as anybody may have one"


@pytest.mark.parametrize("planted, why", [
    (lambda teacher, steps: None, "teacher: no type is given"),
    (lambda *images: None, "images: no type is given"),
    (lambda **options: None, "options: no type is given"),
    ({"data_root": Path}, "data_root: a path"),
    ({"data_root": str}, "data_root: a text that is not on the list of words"),
    ({"file": str | os.PathLike}, "file: a text"),
    ({"roots": collections.abc.Sequence[Path]}, "roots: a path"),
    ({"folder": Path}, "folder: a path"),
    ({"images": Photographs}, "images: .*Photographs"),
    ({"images": torch.utils.data.Dataset}, "images: .*Dataset"),
    ({"images": Resized}, "images: .*Resized"),
    ({"loader": torch.utils.data.DataLoader | None}, "loader: .*DataLoader"),
    ({"images": collections.abc.Iterable[torch.Tensor]}, "images: .*Iterable"),
    ({"read": collections.abc.Callable[[Path], torch.Tensor]}, "read: a path"),
    ({"params": dict}, "params: it may hold anything"),
    ({"params": dict[str, object]}, "params: .*object"),
    ({"folders": collections.abc.Mapping[str, Path]}, "folders: a path"),
    ({"places": dict[str, str]}, "places: a text"),
    ({"place": typing.NamedTuple("Place", [("n", int), ("root", Path)])}, "place: a path"),
    ({"images": collections.abc.Sequence}, "images: it may hold anything"),
    ({"anything": object}, "anything: .*object"),
    ({"anything": typing.Any}, "anything: .*Any"),
])
def test_a_planted_parameter_is_found(planted, why):
    if isinstance(planted, dict): # the same parameter in a function that is fine otherwise
        p = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a) for n, a in planted.items()]
        planted, asked = lambda: None, inspect.signature(textures.make_textures)
        planted.__signature__ = asked.replace(parameters=[*asked.parameters.values(), *p])
    found, _ = objections("moi.textures.make_textures", planted)
    assert found and re.match(why, found[0])


def test_what_goes_by_any_name_is_refused_unless_a_spec_has_it(tmp_path):
    teacher = build_detector(DetectorSpec(["a"], (64, 64), width=.125, fpn_channels=16, head_channels=32))
    for word in ("data_root", "dataset", "images", "root"):
        for ask in (lambda **f: teachers.adopt(teacher, **f), lambda **f: compress.paint_transfer_set(teacher, tmp_path / "set", **f),
                    lambda **f: compress.make_student(teacher, tmp_path / "set", tmp_path / "student", **f)):
            with pytest.raises(TypeError, match=f"no parameter '{word}'"): ask(**{word: "anywhere"})
    assert list(tmp_path.iterdir()) == []


# One place for each parameter

MODULES = [importlib.import_module(f"moi.{m.name}") for m in pkgutil.iter_modules(moi.__path__) if not m.name.startswith("_")]
SPECS = {n: c for m in MODULES for n, c in vars(m).items() if inspect.isclass(c) and issubclass(c, Spec) and dataclasses.is_dataclass(c)}


def functions(module):
    "Every function of a module, its methods among them, as syntax"
    return [n for n in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(n, ast.FunctionDef)]


def test_no_function_takes_a_dict_of_parameters_but_the_experiments():
    assert {"moi.experiment", "moi.compress", "moi.train", "moi.explore"} <= {m.__name__ for m in MODULES}
    for module in MODULES:
        if module.__name__ == "moi.experiment": continue
        for f in functions(module):
            if f.name.startswith("_"): continue
            named = {a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)}
            assert not named & {"p", "params", "parameters"}, f"{module.__name__}.{f.name}"


def repeated(f):
    "Parameters of a function that bear the name of a field of a spec that it also takes, and a default of their own"
    args = [*f.args.posonlyargs, *f.args.args]
    defaults = dict(zip([a.arg for a in args[::-1]], f.args.defaults[::-1]))
    defaults |= {a.arg: d for a, d in zip(f.args.kwonlyargs, f.args.kw_defaults) if d is not None}
    types = [n.id for a in (*args, *f.args.kwonlyargs) if a.annotation for n in ast.walk(a.annotation) if isinstance(n, ast.Name)]
    fields = {field.name for t in types if t in SPECS for field in dataclasses.fields(SPECS[t])}
    nothing = lambda d: ast.unparse(d) in ("None", "()") # something else of the same name, of which there may be none
    return {name for name, d in defaults.items() if name in fields and not nothing(d)}


def test_no_default_of_a_spec_is_repeated_in_a_signature():
    assert {"Laws", "Painting", "TransferSpec", "StudentSpec", "Distilling", "Training", "Engine", "DetectorSpec", "Rules"} <= set(SPECS)
    takes = 0
    for module in MODULES:
        for f in functions(module):
            assert not repeated(f), f"{module.__name__}.{f.name}"
            takes += any(isinstance(n, ast.Name) and n.id in SPECS for a in f.args.args if a.annotation for n in ast.walk(a.annotation))
    assert takes > 20
    planted = ast.parse("def f(detector:nn.Module, painting:Painting=Painting(), tv:float=2., *, l2=0., adapt=None): pass").body[0]
    assert repeated(planted) == {"tv", "l2"}


# A process of its own, the data out of reach

WATCH = """
import os, sys
from pathlib import Path

place, kept, *forbidden = sys.argv[1:]
asked = []
def watch(event, args):
    "Refuse to open, list or look for anything of the data, at its old place or its new one"
    if event not in ("open", "os.listdir", "os.scandir") or not isinstance(args[0], (str, bytes, os.PathLike)): return
    path = os.path.realpath(os.fsdecode(args[0]))
    if any(path == f or path.startswith(f + os.sep) for f in forbidden):
        asked.append(path)
        raise PermissionError(f"the data is not to be had: {path}")
sys.addaudithook(watch)

for f in forbidden: # the watch is awake
    try: open(f"{f}/training/image_2/000000.png")
    except PermissionError: continue
    sys.exit(f"{f} could be asked for")
assert len(asked) == 2
asked.clear()
place = Path(place)
"""
COMPRESS = WATCH + """
from moi.compress import make_student, paint_transfer_set
from moi.detector import load_detector
from moi.teachers import adopt
from moi.train import Engine

teacher, cpu = adopt(load_detector(kept)), Engine(device="cpu")
images = paint_transfer_set(teacher, place/"transfer_set", impressions=4, textures=4, shard=4, steps=3, soft_labels=True, engine=cpu)
student = make_student(teacher, images, place/"student", width=.125, steps=3, batch=4, engine=cpu)
more = paint_transfer_set(teacher, place/"second", impressions=2, textures=0, steps=3, box_prior="teacher", student=student, engine=cpu)
make_student(teacher, [images, more], place/"again", width=.125, steps=3, batch=4, before=student, engine=cpu)
assert not asked, asked
assert not [m for m in ("moi.street", "moi.experiment") if m in sys.modules] # nor does it know where such data comes from
"""
EXPERIMENT = WATCH + """
import json
from moi import experiment
for name in ("open_dataset", "KITTIDataset", "VOCDataset", "COCODataset", "photograph_set", "find_folder", "folder_and_split", "street",
             "check_images", "usable"):
    delattr(experiment, name) # what knows the data
result = experiment.run({"name": "mine", "dataset": "none", "teacher": kept, "impressions": 2, "textures": 2, "synthesis_steps": 2,
    "agreement": 2, "baselines": ["textures"], "student_width": .125, "distill_steps": 2, "batch": 4, "device": "cpu"}, place)
assert not asked, asked
print(json.dumps({k: result[k] for k in ("metrics", "weights", "stages")}))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "A teacher's file; the world that it was trained on has been moved away since"
    root = tmp_path_factory.mktemp("zero")
    write_street(root / "world", (64, 64), 8, 1, 1)
    images = Resized(open_dataset(root / "world", split="train"), (64, 64))
    torch.manual_seed(0)
    detector = build_detector(DetectorSpec(images.classes, (64, 64), width=.25, fpn_channels=16, head_channels=32,
        anchors=(8, 16, 32, 64, 128), roi_samples=16))
    train_detector(detector, images, Training(steps=3, batch=4), progress="")
    save_detector(detector, root / "teacher.safetensors")
    (root / "away").mkdir()
    (root / "world").rename(root / "away/world")
    return root / "teacher.safetensors"


@pytest.fixture
def forbidden(teacher):
    "Where the data was, and where it is"
    old, new = (os.path.realpath(teacher.parent / f) for f in ("world", "away/world"))
    assert not os.path.exists(old) and os.path.isdir(new)
    return old, new


def run_fresh(code, *args):
    "A process that knows nothing but what it is told; what it printed"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=args[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_student_is_made_with_the_data_out_of_reach(teacher, forbidden, tmp_path):
    before = teacher.read_bytes()
    run_fresh(COMPRESS, tmp_path, teacher, *forbidden)
    for name in ("student", "again"):
        student = load_detector(tmp_path / name / "student.safetensors")
        assert student.spec.width == .125 and all(v.isfinite().all() for v in student.state_dict().values())
    assert len(transfer_set.open_transfer_set(tmp_path / "transfer_set")) == 8
    assert len(transfer_set.open_transfer_set(tmp_path / "second")) == 2
    assert teacher.read_bytes() == before


def test_an_experiment_makes_one_without_its_readers(teacher, forbidden, tmp_path):
    before = teacher.read_bytes()
    result = json.loads(run_fresh(EXPERIMENT, tmp_path, teacher, *forbidden).splitlines()[-1])
    assert set(result["metrics"]) == {"agreement", "textures"} and set(result["metrics"]["agreement"]) == {"AP", "AP50"}
    assert not any(result["stages"][k]["reused"] for k in ("teacher", "transfer_set", "student"))
    student = load_detector(tmp_path / "mine/student.safetensors")
    assert detector_hash(student) == result["weights"]["student"] != result["weights"]["teacher"]
    assert result["weights"]["teacher"] == detector_hash(load_detector(teacher)) and teacher.read_bytes() == before
