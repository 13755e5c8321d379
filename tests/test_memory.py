"Where memory runs out a sentence says what to lower, a shard is painted in parts, and work done beside a GPU's gives the same bytes"
import argparse
import functools
import hashlib
import json
import logging

import pytest
import torch

from moi import compress, distill, experiment, train
from moi.compress import paint_transfer_set
from moi.detector import DetectorSpec, build_detector
from moi.distill import Distilling
from moi.textures import make_textures
from moi.train import Engine, Training, step_loader, train_detector

CPU = Engine(device="cpu")
SPEC = DetectorSpec(["a", "b"], (64, 64), width=.125, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128), roi_samples=16)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return build_detector(SPEC).eval()


@pytest.fixture(scope="module")
def labelled():
    "Eight textures, each with another number of objects"
    def target(n): return {"boxes": torch.tensor([[4., 4, 30, 40]]).repeat(n, 1), "labels": torch.ones(n, dtype=torch.int64)}
    return [(image, target(i % 3)) for i, image in enumerate(make_textures(8, (64, 64), "noise"))]


def only(room, work, images):
    "The same work, with room for so many images; `images` says where among its arguments they are"
    @functools.wraps(work)
    def limited(*args, **kwargs):
        if len(args[images]) > room: raise FULL
        return work(*args, **kwargs)
    return limited


def contents(folder, *kinds):
    files = [p for kind in kinds for p in sorted(folder.rglob(kind))]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def paint(teacher, folder, impressions, **more):
    return paint_transfer_set(teacher, folder, impressions=impressions, steps=2, seed=3, engine=CPU, progress=False, **more)


def test_a_shard_that_does_not_fit_is_painted_in_parts(teacher, tmp_path, monkeypatch, caplog):
    "To the bytes of a smaller shard; the record says so, and the next shard begins with what fitted"
    smaller = paint(teacher, tmp_path / "smaller", 10, shard=2, textures=0)
    asked = []
    synthesise = only(2, compress.synthesise, 1)
    monkeypatch.setattr(compress, "synthesise", lambda *a, **k: (asked.append(len(a[1])), synthesise(*a, **k))[1])
    with caplog.at_level(logging.WARNING): halved = paint(teacher, tmp_path / "halved", 10, shard=8, textures=0)
    assert asked == [8, 4, 2, 2, 2, 2, 2]
    assert [r.message.partition("; ")[0] for r in caplog.records] == [
        f"shard is 8, and memory runs out with {n} impressions painted together" for n in (8, 4)]
    assert contents(halved, "*.png", "asked.json") == contents(smaller, "*.png", "asked.json")
    told, wanted = (json.loads((folder / "annotations.json").read_text()) for folder in (halved, smaller))
    assert told | {"info": {}} == wanted | {"info": {}} # which holds a checksum of all the set's files
    provenance = json.loads((halved / "provenance.json").read_text())
    assert [provenance[str(i)].get("painted_together") for i in range(10)] == [2] * 8 + [None] * 2 # the last two are a shard of their own
    assert compress.set_hash(halved) != compress.set_hash(smaller)


def test_without_room_for_one_impression_it_stops(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "synthesise", only(0, compress.synthesise, 1))
    with pytest.raises(MemoryError, match="^shard is 2, and memory runs out even with impressions painted one by one$"):
        paint(teacher, tmp_path / "set", 2, shard=2, textures=0)


def test_a_batch_that_does_not_fit_is_named_with_one_that_does(teacher, labelled, monkeypatch):
    monkeypatch.setattr(train, "supervised_losses", only(3, train.supervised_losses, 1))
    monkeypatch.setattr(distill, "distill_losses", only(1, distill.distill_losses, 2))
    says = "^{} is 8, and memory runs out; a step with {} was seen to fit$"
    with pytest.raises(MemoryError, match=says.format("teacher_batch", 2)):
        train_detector(build_detector(SPEC), labelled, Training(steps=2, batch=8), progress="")
    with pytest.raises(MemoryError, match=says.format("batch", 1)):
        distill.distill(build_detector(SPEC), teacher, labelled, Distilling(steps=2, batch=8), progress="")


@pytest.mark.parametrize("error, said", [
    (MemoryError("batch is 8, and memory runs out; a step with 4 was seen to fit"), "moi run: batch is 8, and memory runs out; a step"),
    (RuntimeError("CUDA error: out of memory\nmore"), "memory runs out; lower shard, batch, teacher_batch or size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "moi run: memory runs out")])
def test_the_command_says_it_without_a_traceback(error, said, monkeypatch, capsys):
    def fails(p): raise error
    monkeypatch.setattr(experiment, "run", fails)
    parser = experiment.add_run_options(argparse.ArgumentParser("moi run"))
    with pytest.raises(SystemExit) as e: experiment.run_command(parser, parser.parse_args([]))
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_what_is_written_beside_the_painting_is_the_same(teacher, tmp_path, monkeypatch):
    "As on a GPU, where a thread writes shards and another draws textures; what goes wrong in one is raised"
    few = dict(impressions=5, textures=3, shard=2)
    plain, beside = paint(teacher, tmp_path / "plain", **few), compress.beside
    monkeypatch.setattr(compress, "beside", lambda apart, *waiting: beside(True, *waiting))
    assert contents(paint(teacher, tmp_path / "apart", **few), "*.png", "*.json") == contents(plain, "*.png", "*.json")
    def full(*given): raise OSError(28, "No space left on device")
    monkeypatch.setattr(compress, "write_shard", full)
    with pytest.raises(OSError, match="No space left"): paint(teacher, tmp_path / "full", **few)


@pytest.mark.parametrize("objects", [None, 1])
def test_batches_are_the_same_however_they_are_read(labelled, objects):
    "Kept where they are needed, or read batch by batch, by workers or not"
    def read(workers, memory): return list(step_loader(labelled, 4, 5, 7, objects, Engine(device="cpu", workers=workers), memory=memory)(1))
    kept, *ways = read(0, 10**6), read(2, 10**6), read(2, 0)
    assert len(kept) == 4 and kept[0][0].dtype == torch.uint8
    for way in ways:
        for ours, theirs in zip(kept, way, strict=True):
            n = theirs[2].shape[1]
            for a, b in zip(ours, theirs): assert torch.equal(a if a.dim() == 4 else a[:, :n], b)
            assert not ours[2][:, n:].any()
