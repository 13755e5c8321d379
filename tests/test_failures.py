"The notebook on failures: what is taken from a student, and no more, is what it counts"
import json
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

from moi.detector import DetectorSpec, build_detector, save_detector

NOTEBOOK = Path(__file__).parents[1] / "nbs/experiments/failures.ipynb"
CLASSES = ["Car", "Pedestrian", "Cyclist"]


@pytest.fixture
def runs(tmp_path):
    "Three finished runs of one teacher and one world, whose detectors have never learnt"
    for seed, (name, width) in enumerate({"teacher": .25, "moi": .125, "textures": .2, "real": .3}.items()):
        torch.manual_seed(seed)
        spec = DetectorSpec(CLASSES, (64, 64), width=width, fpn_channels=16, head_channels=32)
        save_detector(build_detector(spec), tmp_path / f"{name}.safetensors")
    for method in ("moi", "textures", "real"):
        at = tmp_path / f"runs/street-half-{method}-s0"
        at.mkdir(parents=True)
        (at / "params.yaml").write_text(yaml.safe_dump({"name": at.name, "scenes": [1, 1, 12], "size": [64, 64]}))
        (at / "result.json").write_text("{}")
        (at / "teacher.safetensors").symlink_to(tmp_path / "teacher.safetensors")
        (at / "student.safetensors").symlink_to(tmp_path / f"{method}.safetensors")
    return tmp_path / "runs"


def pretend(detector, images, **_):
    "The teacher sees all there is; each student, told by its width, makes one kind of mistake in each image"
    def one(target):
        n = 0 if detector.spec.width == .3 else len(target["labels"]) # it is blind
        boxes, labels = target["boxes"][:n].clone(), target["labels"][:n].clone()
        scores = torch.full((n,), .9)
        if detector.spec.width == .125: # the first object's score is too low
            scores[:1] = .3
        if detector.spec.width == .2: # the first has another class, and a box too many is seen where nothing is
            labels[:1] = labels[:1] % 3 + 1
            more = torch.tensor([[0., 0, 3, 3]]), torch.tensor([1]), torch.tensor([.8])
            boxes, labels, scores = map(torch.cat, zip((boxes, labels, scores), more))
        return {"boxes": boxes, "labels": labels, "scores": scores}
    return [one(images.target(i)) for i in range(len(images))]


def execute(**parameters):
    "The cells of the notebook, in this process; what they left"
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    names = {"__annotations__": {}}
    given = [f"{k} = {v!r}" for k, v in parameters.items()]
    exec("\n".join([cells[0], *given, *cells[1:]]).replace("%matplotlib inline", ""), names)
    return names


def test_what_is_taken_from_a_student_is_what_it_loses(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("moi.evaluate.predict", pretend)
    names = execute(folder=str(runs), out=str(tmp_path / "out"), device="cpu", pictures=2)
    found = json.loads((tmp_path / "out/street.json").read_text())
    assert list(found["rows"]) == [f"street-half-{m}-s0" for m in ("moi", "textures", "real")] and found["classes"] == CLASSES
    ours, theirs, blind = found["rows"].values()
    n, first = ours["teacher"]["objects"]["all"][0], ours["kept"]["all"][3]
    assert 0 < first <= 12 and n > first and ours["teacher"]["objects"]["all"] == [n, 0, 0, 0, 0] # all that there is
    assert ours["kept"]["all"] == [n - first, 0, 0, first, 0] and theirs["kept"]["all"] == [n - first, first, 0, 0, 0]
    for part in (CLASSES, ["smallest third", "middle third", "largest third"]):
        assert [sum(k) for k in zip(*(ours["kept"][p] for p in part))] == ours["kept"]["all"]
    assert not ours["called"] and sum(theirs["called"].values()) == first and ours["new"] == theirs["new"] == 0
    assert ours["own alarms"]["all"] == [0, 0, 0] and theirs["own alarms"]["all"] == [0, 0, 12] and theirs["suspected"] == 0
    assert blind["kept"]["all"] == [0, 0, 0, 0, n] and blind["own alarms"]["all"] == [0, 0, 0] and blind["fit"]["all"][0] == 0
    assert ours["fit"]["all"] == [n - first] * 3
    assert f"Of {n} objects that its teacher finds, `half-moi` loses {first}" in names["told"]("half-moi")
    assert (tmp_path / "out/street.png").stat().st_size and [lost for lost, _, _ in names["chosen"]] == [1, 1]


def test_test_images_of_kitti_voc_and_coco_are_not_drawn(runs, monkeypatch):
    monkeypatch.setattr("moi.evaluate.predict", pretend)
    names = execute(folder=str(runs), runs=["street-half-moi-s0"], device="cpu", show=False)
    assert names["chosen"] == []
    p = {"dataset": "voc", "data_root": "data/bccd", "test": ""}
    assert names["may_be_kept"](p) and names["may_be_kept"](p | {"dataset": "street", "data_root": ""})
    roots = [{"data_root": root} for root in ("data/voc3000", "VOCdevkit", "data/kitti101", "coco")]
    for other in (*roots, {"dataset": "kitti"}, {"dataset": "coco"}, {"test": "coco38:val"}):
        assert not names["may_be_kept"](p | other)


def test_a_run_that_is_not_finished_is_named(tmp_path):
    for asked, says in (({"world": "mars"}, "no finished run of 'mars'"), ({"runs": ["street-x"]}, "run 'street-x' is not finished")):
        with pytest.raises(FileNotFoundError, match=says): execute(folder=str(tmp_path), device="cpu", **asked)
