"What the street's notebook does not hold: fresh processes, a killed write, many scenes"
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moi import street
from moi.detector import DetectorSpec, build_detector
from moi.evaluate import predict, voc_ap
from moi.layouts import open_dataset
from moi.street import CLASSES, write_street
from moi.train import Training, train_detector

ROOT = Path(__file__).parents[1]
SIZES = [(96, 96), (64, 160), (160, 64), (37, 53)]


def digest(scene):
    image, target = scene
    parts = [image.numpy().tobytes(), *(target[k].numpy().tobytes() for k in sorted(target))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_targets_keep_the_contract(size):
    h, w = size
    for seed in range(60):
        image, t = street.draw_scene(size, seed)
        assert image.shape == (3, h, w) and image.dtype == torch.uint8 and image.is_contiguous()
        b, n = t["boxes"], len(t["labels"])
        assert b.shape == (n, 4) and b.dtype == torch.float32 and (b == b.round()).all()
        assert (b >= 0).all() and (b[:, 2] <= w).all() and (b[:, 3] <= h).all() and (b[:, :2] < b[:, 2:]).all()
        assert ((t["labels"] >= 1) & (t["labels"] <= len(street.CLASSES))).all() and t["labels"].dtype == torch.int64
        assert ((t["truncation"] >= 0) & (t["truncation"] <= 1)).all() and t["truncation"].dtype == torch.float32
        assert ((t["occlusion"] >= 0) & (t["occlusion"] <= 2)).all() and t["occlusion"].dtype == torch.int64


def test_only_objects_at_the_border_are_truncated():
    for seed in range(100):
        _, t = street.draw_scene((96, 96), seed)
        touches = (t["boxes"] == 0).any(1) | (t["boxes"] == 96).any(1)
        assert (touches | (t["truncation"] == 0) | (t["occlusion"] > 0)).all(), seed


def test_same_scene_in_a_fresh_process():
    code = "import test_street as t; print(t.digest(t.street.draw_scene((96, 96), 7)))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    fresh = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert fresh.stdout.split()[-1] == digest(street.draw_scene((96, 96), 7))


def test_global_random_state_plays_no_part():
    np.random.seed(0), torch.manual_seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    a = digest(street.draw_scene((64, 64), 3))
    assert torch.equal(torch.random.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    np.random.seed(1), torch.manual_seed(1)
    assert a == digest(street.draw_scene((64, 64), 3))


def test_streams_are_disjoint():
    seeds = [street.scene_seed(s, k, i) for s in range(4) for k in range(3) for i in range(500)]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="seed is -1"):
        street.scene_seed(-1, 0, 0)


def test_a_split_does_not_depend_on_the_size_of_another(tmp_path):
    small = street.write_street(tmp_path / "small", (64, 64), train=2, val=1, test=3)
    large = street.write_street(tmp_path / "large", (64, 64), train=5, val=2, test=4)
    for split, n in (("train", 2), ("val", 1), ("test", 3)):
        a, b = (open_dataset(r, split=split, classes=street.CLASSES) for r in (small, large))
        for i in range(n):
            assert torch.equal(a.image(i), b.image(i)) and torch.equal(a.target(i)["boxes"], b.target(i)["boxes"])


def test_the_seed_changes_every_split_and_nothing_else_does(tmp_path):
    sizes = dict(size=(64, 64), train=3, val=2, test=3)
    a, b, c = (files(street.write_street(tmp_path / n, seed=s, **sizes)) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b and a.keys() == c.keys()
    images = [n for n in a if n.endswith(".png")]
    assert len(images) == 8 and all(a[n] != c[n] for n in images)
    assert len({a[n] for n in images} | {c[n] for n in images}) == 16


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    draw = street.draw_scene

    def die(size, seed, **kw):
        if seed >= 2:
            raise KeyboardInterrupt
        return draw(size, seed, **kw)

    monkeypatch.setattr(street, "draw_scene", die)
    with pytest.raises(KeyboardInterrupt):
        street.write_street(tmp_path / "world", (64, 64), train=5, val=1, test=1)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_world_and_can_be_repeated(tmp_path):
    code = (
        "import os, sys; from moi import street; draw = street.draw_scene\n"
        "street.draw_scene = lambda size, seed: os._exit(9) if seed == 2 else draw(size, seed)\n"
        "street.write_street(sys.argv[1], (64, 64), train=5, val=1, test=1)"
    )
    world = tmp_path / "world"
    done = subprocess.run([sys.executable, "-c", code, str(world)], cwd=ROOT, capture_output=True)
    assert done.returncode == 9 and not world.exists()
    assert street.write_street(world, (64, 64), train=2, val=1, test=1) == world
    assert len(open_dataset(world, split="train", classes=street.CLASSES)) == 2


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        street.write_street(tmp_path, (64, 64), train=1, val=1, test=1)
    assert (tmp_path / "kept").read_text() == "mine"
    with pytest.raises(ValueError, match="layout is 'yolo'"):
        street.write_street(tmp_path / "new", (64, 64), train=1, val=1, test=1, layout="yolo")
    assert not (tmp_path / "new").exists()


def test_one_detector_scores_the_same_in_every_layout(tmp_path):
    torch.manual_seed(0)
    size, scores = (64, 64), {}
    for layout in ("kitti", "voc", "coco"):
        write_street(tmp_path / layout, size, train=24, val=2, test=12, layout=layout)
    detector = build_detector(DetectorSpec(CLASSES, size, width=.125, fpn_channels=16, head_channels=32,
                                           anchors=(12, 24, 48, 96, 192), roi_samples=32))
    train_detector(detector, open_dataset(tmp_path / "kitti", "train", CLASSES), Training(steps=60, batch=8, lr=5e-3), progress="")
    detector.roi_heads.score_thresh = .01
    for layout in ("kitti", "voc", "coco"):
        test = open_dataset(tmp_path / layout, "test", CLASSES)
        targets = [test.target(i) for i in range(len(test))]
        scores[layout] = voc_ap(targets, predict(detector, test, progress=False), CLASSES, iou=.3).as_dict()
    assert scores["kitti"]["summary"]["AP"] > 0  # the detector finds something, so that the scores could differ
    assert scores["kitti"] == scores["voc"] == scores["coco"]
