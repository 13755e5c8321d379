"A transfer set says what was asked for and what was confirmed, for ourselves and for others, and is known by the name it always had"
import contextlib
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch

from moi import impressions, pseudo_targets
from moi.augment import step_seed
from moi.compress import invent, paint_transfer_set, painting_key
from moi.detector import DetectorSpec, build_detector
from moi.impressions import Painting, adapt_targets
from moi.pseudo_targets import Laws
from moi.train import Engine
from moi.transfer_set import NOTHING, TransferSpec, asked_targets, join_shards, open_transfer_set, set_hash, write_shard

CLASSES = ("Car", "Pedestrian", "Cyclist")
CPU = Engine(device="cpu")


def target(boxes, labels): return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}


@pytest.fixture(scope="module")
def teacher():
    "A teacher that has learnt nothing and is sure to see the second class, wherever it looks"
    torch.manual_seed(0)
    spec = DetectorSpec(["a", "b"], (64, 64), width=.125, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128))
    detector = build_detector(spec).eval()
    with torch.no_grad(): detector.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([0., 0., 9.]))
    return detector


@pytest.fixture(scope="module")
def painted(teacher, tmp_path_factory):
    "Two impressions and two textures, without and with labels on the textures"
    root = tmp_path_factory.mktemp("painted")
    few = dict(impressions=2, textures=2, shard=2, steps=1, seed=3, engine=CPU, progress=False)
    for name, labels in ("plain", False), ("labelled", True): paint_transfer_set(teacher, root / name, texture_labels=labels, **few)
    return root


@pytest.mark.parametrize("prior", ["teacher", "uniform"])
@pytest.mark.parametrize("changed", [{"objects": (2, 3)}, {"area": (.3, .6)}, {"max_aspect": 1.}, {"overlap": 1.}, {"soft_labels": True}])
def test_every_law_has_a_say_under_either_prior(teacher, prior, changed):
    drawn, others = (invent(teacher, 16, Laws(box_prior=prior, **laws), 0) for laws in ({}, changed))
    same = all(t.keys() == u.keys() and all(torch.equal(t[k], u[k]) for k in t) for t, u in zip(drawn, others))
    assert same == (prior == "teacher" and "max_aspect" in changed) # which the teacher's boxes have as they have it


def test_what_was_asked_is_kept_beside_what_was_confirmed(teacher, painted):
    images, asked = open_transfer_set(painted / "plain"), asked_targets(painted / "plain")
    drawn = invent(teacher, 2, Laws(), step_seed(3, 0))
    for i in range(2):
        for k in ("boxes", "labels"): assert torch.equal(asked[i][k], drawn[i][k]) and asked[i][k].dtype == drawn[i][k].dtype
        assert len(images.target(i)["labels"]) > len(asked[i]["labels"]) # this teacher sees more than it was asked for
    assert [len(t["labels"]) for t in (asked[2], asked[3], images.target(2))] == [0, 0, 0]


def test_textures_carry_what_the_teacher_sees_where_that_is_asked_for(teacher, painted):
    plain, labelled = (open_transfer_set(painted / n) for n in ("plain", "labelled"))
    for i in range(4): assert torch.equal(plain.image(i), labelled.image(i)) # the images are the same
    for i in range(2): assert torch.equal(plain.target(i)["boxes"], labelled.target(i)["boxes"])
    for i in range(2, 4): assert not len(plain.target(i)["labels"]) and set(labelled.target(i)["labels"].tolist()) == {2}
    keys = [painting_key(teacher, TransferSpec(0, 8, texture_labels=on), Laws(), Painting(), 0, "no") for on in (False, True)]
    assert "teacher" not in keys[0] and {k for k in keys[1] if keys[0].get(k) != keys[1][k]} == {"teacher", "transfer"}


def test_pycocotools_reads_it_and_loads_detections_beside_it(painted, tmp_path):
    coco_api = pytest.importorskip("pycocotools.coco").COCO
    content = json.loads((painted / "plain/annotations.json").read_text())
    assert content["info"]["contributor"] == "moi" and set(content["info"]) >= {"description", "version"}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_api(painted / "plain/annotations.json")
        results = coco.loadRes([{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": .5}])
    assert len(coco.imgs) == 4 and len(results.anns) == 1 and results.dataset["info"] == content["info"]


def old_set(folder, asked):
    "A set as a run writes it, and the three files that version 0.2 would have written"
    t = target([[2, 3, 20, 30], [0, 0, 9, 7]], [1, 3])
    soft = {"soft": torch.tensor([[0, .5, .25, .25], [.5, 0, .25, .25]])}
    black = torch.zeros(2, 3, 32, 40, dtype=torch.uint8)
    write_shard(folder, 0, 0, black, [t | soft] * 2, "impression", {"seed": 1, "losses": {"tv": .1}}, [t] * 2 if asked else ())
    write_shard(folder, 1, 2, black[:1], [NOTHING], "texture", {"seed": 2})
    return join_shards(folder, 2, CLASSES)


def test_a_set_is_known_by_the_name_that_version_0_2_gave_it(tmp_path):
    for asked in (False, True):
        file = old_set(tmp_path / str(asked), asked)
        assert set_hash(file.parent) == "962321b0bc78"
        content = json.loads(file.read_text())
        del content["info"]
        file.write_text(json.dumps(content))
        (file.parent / "asked.json").unlink()
        assert set_hash(file.parent) == "962321b0bc78" and asked_targets(file.parent) is None # as it lies on users' disks
        assert len(open_transfer_set(file.parent)) == 3
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content | {"info": {}}))
    assert set_hash(file.parent) != "962321b0bc78"


@pytest.mark.parametrize("spec, key", [(TransferSpec(64, 32), "fd5f77dc97f1"), (TransferSpec(0, 32), "f523643b9c23"),
                                       (TransferSpec(64, 0), "46552774ca3b")])
def test_stages_are_known_by_the_keys_that_version_0_2_gave_them(spec, key, monkeypatch):
    "But for impressions and targets, which have been painted and drawn otherwise since, and for other defaults"
    before = {"laws": Laws(box_prior="uniform", area=(.01, .3)), "painting": Painting(bn_prior=10.)}
    for room, version in ((impressions, 2), (pseudo_targets, 3)):
        assert room.VERSION == version
        monkeypatch.setattr(room, "VERSION", 1)
    torch.manual_seed(0)
    detector = build_detector(DetectorSpec(["a", "b"], (64, 64), width=.125, fpn_channels=16, head_channels=32))
    found = painting_key(detector, spec, before["laws"], before["painting"], 0, "no")
    found.pop("teacher", None) # its weights depend on the machine
    assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12] == key
    adapting = painting_key(detector, spec, Laws(), Painting(adapt=5), 0, "no")
    assert ("moi.impressions.adapt_targets" in adapting["versions"]) == (spec.impressions > 0) # whose images are others now
    softened = painting_key(detector, spec, Laws(soft_labels=True), Painting(), 0, "no")
    assert ("moi.pseudo_targets.soft_labels" in softened["versions"]) == (spec.impressions > 0) # as are theirs


def test_additions_that_overlap_are_one(tmp_path):
    "The surer one, whatever its class; those apart stay in the order of the detections"
    seen = target([[0, 0, 20, 20], [40, 40, 60, 60], [1, 0, 21, 20], [42, 41, 62, 61], [40, 0, 60, 20]], [1, 1, 2, 2, 2])
    added = adapt_targets(NOTHING, seen | {"scores": torch.tensor([.5, .9, .6, .8, .3])}, (64, 64))
    assert added["boxes"].tolist() == [[40, 40, 60, 60], [1, 0, 21, 20], [40, 0, 60, 20]] and added["labels"].tolist() == [1, 2, 2]
    soft = target([[40, 0, 60, 20]], [2]) | {"soft": torch.tensor([[0., .4, .6]])}
    kept = adapt_targets(soft, seen | {"scores": torch.tensor([.5, .9, .6, .8, .3])}, (64, 64))
    assert kept["labels"].tolist() == [2, 1, 2] and kept["soft"].tolist()[1:] == [[0, 1, 0], [0, 0, 1]]


def test_the_notebook_shows_asked_beside_confirmed():
    "Of the run's own set, not of targets drawn anew"
    notebook = json.loads((Path(__file__).parents[1] / "nbs/experiments/zero_shot_kd.ipynb").read_text())
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    assert 'asked_targets(folder/"transfer_set")' in code and "sample_targets" not in code and 'asked | {"confirmed": targets' in code
