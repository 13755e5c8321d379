"Zero data: once the teacher is trained, nothing up to the student needs the images that it learnt from, or can have them"
import inspect
import os
import subprocess
import sys

import pytest
import torch

from moi import distill, impressions, pseudo_targets, textures, transfer_set
from moi.data import Resized, open_dataset
from moi.detector import build_detector, load_detector, save_detector, weights_hash
from moi.street import write_street
from moi.train import train_detector

DETECTOR = dict(size=(64, 64), fpn_channels=16, head_channels=32, anchor_sizes=(8, 16, 32, 64, 128))
COMPRESS = """
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

import torch
from moi.detector import build_detector, load_detector, save_detector
from moi.distill import distill
from moi.impressions import adapt_targets, synthesise
from moi.evaluate import predict
from moi.pseudo_targets import class_similarity, sample_targets
from moi.textures import make_textures
from moi.transfer_set import join_shards, open_transfer_set, write_shard

place, teacher = Path(place), load_detector(kept)
size, classes = tuple(teacher.config["size"]), teacher.config["classes"]
targets = sample_targets(4, size, len(classes), similarity=class_similarity(teacher), generator=torch.Generator().manual_seed(0))
images, history = synthesise(teacher, targets, size, steps=3, bn_prior=.1, progress="")
seen = [adapt_targets(t, d, size) for t, d in zip(targets, predict(teacher, images, progress=False))]
nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
write_shard(place/"transfer_set", 0, 0, images, seen, "impression", {"seed": 0})
write_shard(place/"transfer_set", 1, 4, make_textures(4, size), [nothing] * 4, "texture", {"seed": 0})
join_shards(place/"transfer_set", 2, classes)

torch.manual_seed(1)
student = build_detector(**(teacher.config | {"width": .125}))
distill(student, teacher, open_transfer_set(place/"transfer_set"), steps=3, batch=4, progress="")
save_detector(student, place/"student.safetensors")
assert not asked, asked
"""
EXPERIMENT = """
import sys
from pathlib import Path
from moi import experiment
for name in ("open_split", "make_world", "take_photographs", "open_dataset", "KITTIDataset", "VOCDataset"): # what knows the data
    delattr(experiment, name)
parameters = experiment.check_parameters({"size": [64, 64], "impressions": 2, "textures": 2, "synthesis_steps": 2,
    "fpn_channels": 16, "head_channels": 32, "student_width": .125, "distill_steps": 2, "batch": 4, "device": "cpu"})
runs, teacher = Path(sys.argv[1]), Path(sys.argv[2])
transfer = experiment.make_transfer_set(parameters, runs, teacher)
student, record = experiment.make_student(parameters, runs, teacher, transfer)
print(student, record["reused"])
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "A teacher's file; the world that it was trained on has been moved away since"
    root = tmp_path_factory.mktemp("zero")
    write_street(root / "world", (64, 64), 8, 1, 1)
    images = Resized(open_dataset(root / "world", split="train"), (64, 64))
    torch.manual_seed(0)
    detector = build_detector(images.classes, width=.25, roi_samples=16, **DETECTOR)
    train_detector(detector, images, steps=3, batch=4, progress="")
    save_detector(detector, root / "teacher.safetensors")
    (root / "away").mkdir()
    (root / "world").rename(root / "away/world")
    return root / "teacher.safetensors"


def run_fresh(code, *args):
    "A process that knows nothing but what it is told; what it printed"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=args[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_student_is_made_with_the_data_out_of_reach(teacher, tmp_path):
    before = teacher.read_bytes()
    old, new = (os.path.realpath(teacher.parent / f) for f in ("world", "away/world"))
    assert not os.path.exists(old) and os.path.isdir(new)
    run_fresh(COMPRESS, tmp_path, teacher, old, new)
    student = load_detector(tmp_path / "student.safetensors")
    assert student.config["width"] == .125 and all(v.isfinite().all() for v in student.state_dict().values())
    assert len(transfer_set.open_transfer_set(tmp_path / "transfer_set")) == 8
    assert teacher.read_bytes() == before


def test_the_experiments_stages_make_one_without_its_readers(teacher, tmp_path):
    printed, reused = run_fresh(EXPERIMENT, tmp_path, teacher).split()
    assert reused == "False"
    assert weights_hash(load_detector(printed)) != weights_hash(load_detector(teacher))


def parameters(*modules):
    "Every parameter of what the modules' notebooks export, as (function, name)"
    for module in modules:
        for name in module.__all__:
            if callable(thing := getattr(module, name)):
                yield from ((f"{module.__name__}.{name}", p) for p in inspect.signature(thing).parameters)


def test_no_signature_asks_for_data():
    made = list(parameters(pseudo_targets, textures, impressions, transfer_set))
    assert len({f for f, _ in made}) > 15
    words = {"dataset", "data", "root", "data_root", "loader", "dataloader", "path", "images_path", "split", "splits"}
    allowed = {("moi.transfer_set.write_whole", "path"), ("moi.transfer_set.write_whole", "data")}  # bytes to write
    assert not {p for p in made if p[1] in words} - allowed


def test_only_the_loop_takes_a_dataset_and_it_is_the_transfer_set():
    asking = {f for f, name in parameters(distill) if name in ("dataset", "data", "root", "path", "loader")}
    assert asking == {"moi.distill.distill"}
