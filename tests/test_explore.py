"What pictures are made from: errors by kind against a slow count, and what is found in a run's folder"
import json

import pytest
import torch
import yaml
from torchvision.ops import box_iou

from moi.detector import DetectorSpec, build_detector, save_detector
from moi.explore import KINDS, count_errors, differences, open_run, pages_of, sort_errors
from moi.street import write_street


def boxes(n, g):
    "Boxes in a small image, so that many overlap"
    corner = 20 * torch.rand(n, 2, generator=g)
    return torch.cat([corner, corner + 5 + 15 * torch.rand(n, 2, generator=g)], 1)


def slowly(target, found, threshold):
    "The kinds of one image's detections, one after another, the best first"
    iou, taken = box_iou(found["boxes"], target["boxes"]), set()
    kinds = [-1] * len(found["labels"])
    for d in found["scores"].argsort(descending=True, stable=True).tolist():
        if found["scores"][d] < threshold: continue
        same = target["labels"] == found["labels"][d]
        own = torch.where(same, iou[d], -1)
        best = int(own.argmax())
        if own[best] >= .5 and best not in taken:
            taken.add(best)
            kinds[d] = 0
        elif (own >= .5).any(): kinds[d] = 2 # found twice
        elif (torch.where(same, -1, iou[d]) >= .5).any(): kinds[d] = 4
        elif (own >= .1).any(): kinds[d] = 3
        else: kinds[d] = 2
    return kinds, taken


def test_kinds_are_those_of_a_slow_count():
    g, targets, found = torch.Generator().manual_seed(0), [], []
    for _ in range(60):
        n, m = (int(torch.randint(1, 7, (), generator=g)) for _ in range(2))
        targets.append({"boxes": boxes(n, g), "labels": torch.randint(1, 3, (n,), generator=g)})
        near = targets[-1]["boxes"][torch.randint(n, (m,), generator=g)] + 4 * torch.randn(m, 4, generator=g)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        found.append({"boxes": near, "labels": torch.randint(1, 3, (m,), generator=g), "scores": torch.rand(m, generator=g)})
    told = sort_errors(targets, found, 2, threshold=.3)
    for t, f, k in zip(targets, found, told):
        kinds, taken = slowly(t, f, .3)
        assert k["detections"].tolist() == kinds
        assert {i for i, kind in enumerate(k["objects"].tolist()) if kind == 0} == taken
    assert (count_errors(told).sum(0) > 0).all() # each kind was there
    perfect = [t | {"scores": torch.ones(len(t["labels"]))} for t in targets]
    assert not differences(perfect, perfect, 2)[:, KINDS.index("missed")].any()


def test_what_is_to_be_ignored_is_neither_asked_for_nor_punished():
    box = torch.tensor([[0., 0, 10, 10]])
    target = {"boxes": box, "labels": torch.tensor([1]), "ignore": torch.tensor([True])}
    found = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([.9])}
    for seen in (found, {k: v[:0] for k, v in found.items()}): assert not count_errors(sort_errors([target], [seen], 1)).any()


@pytest.fixture
def mine(tmp_path):
    "A run's folder without a transfer set"
    write_street(tmp_path/"runs/stages/world-1/world", (64, 64), 1, 1, 3, progress=False)
    folder = tmp_path/"runs/mine"
    folder.mkdir()
    spec = DetectorSpec(["Car", "Pedestrian", "Cyclist"], (64, 64), width=.125, fpn_channels=16, head_channels=32)
    for name in ("teacher", "student"): save_detector(build_detector(spec), folder/f"{name}.safetensors")
    (folder/"params.yaml").write_text(yaml.safe_dump({"dataset": "street", "splits": ["train", "val", "test"]}))
    (folder/"stages.json").write_text(json.dumps(["world-1"]))
    scores = {"AP": .5, "AP50": .7}
    (folder/"result.json").write_text(json.dumps({"params": {"objects": [2, 3], "synthesis_steps": 7}, "metrics": {"student": scores},
        "latency": {"student": {"torch": 3.}}}))
    return folder


def test_a_run_shows_what_its_folder_holds(mine):
    held = open_run(mine)
    assert len(held.test) == 3 and held.transfer is None
    pages = pages_of(held, progress=False)
    assert list(pages) == ["Pseudo-targets", "Painting", "Errors", "Differences", "Price"]
    assert pages["Pseudo-targets"].children[0].value == (2, 3)
    (mine.parent/"stages/world-1").rename(mine.parent/"elsewhere")
    (mine/"student.safetensors").unlink()
    assert list(pages_of(open_run(mine), progress=False)) == ["Pseudo-targets", "Painting", "Price"]
