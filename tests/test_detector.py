"Detectors on disk: those that version 0.1 saved, files whose tensors are not what they say; and a body so thin that it crashed"
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moi.detector import DetectorSpec, build_detector, detector_hash, load_detector, save_detector, weights_hash
from moi.teachers import load

SPEC = DetectorSpec(("a", "b"), (64, 96), width=.125, fpn_channels=16, head_channels=32, anchors=(8, 16, 32, 64, 128), roi_samples=48)
OLD = ('{"anchor_sizes": [8, 16, 32, 64, 128], "backbone": "resnet18", "classes": ["a", "b"], "fpn_channels": 16, "head_channels": 32, '
    '"proposals": 300, "roi_samples": 48, "rpn_samples": 64, "size": [64, 96], "width": 0.125}') # as version 0.1 wrote it


@pytest.fixture
def detector():
    "An untrained detector that sees much"
    torch.manual_seed(0)
    detector = build_detector(SPEC).eval()
    torch.nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=.5)
    return detector


def write(file, tensors, about):
    save_file(tensors, file, metadata={"moi": about})
    return file


def test_what_version_0_1_saved_detects_the_same(detector, tmp_path):
    old = write(tmp_path / "old.safetensors", {k: v.contiguous() for k, v in detector.state_dict().items()}, OLD)
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) for size in ((64, 96), (70, 90))]
    with torch.no_grad(): expected = detector(images)
    for loaded in (load_detector(old), load(old)):
        assert loaded.spec == SPEC and not loaded.training and detector_hash(loaded) == detector_hash(detector)
        with torch.no_grad(): seen = loaded(images)
        for a, b in zip(seen, expected):
            assert len(b["scores"]) > 10 and all(torch.equal(a[k], b[k]) for k in ("boxes", "labels", "scores"))


def test_an_old_detector_saved_again_is_the_same_one(detector, tmp_path):
    old = write(tmp_path / "old.safetensors", {k: v.contiguous() for k, v in detector.state_dict().items()}, OLD)
    again = load_detector(save_detector(load_detector(old), tmp_path / "new.safetensors"))
    assert again.spec == SPEC and detector_hash(again) == detector_hash(detector)


@pytest.mark.parametrize("change, message", [
    ({"width": .25}, r"backbone\.body\.bn1\.bias: \(8,\), \(16,\) is needed"),
    ({"fpn_channels": 32}, r"backbone\.fpn\.inner_blocks\.0\.0\.bias: \(16,\), \(32,\) is needed"),
    ({"head_channels": 64}, r"roi_heads\.box_head\.fc6\.bias: \(32,\), \(64,\) is needed"),
    ({"classes": ["a", "b", "c"]}, r"roi_heads\.box_predictor\.bbox_pred\.bias: \(12,\), \(16,\) is needed"),
    ({"backbone": "resnet34"}, r"backbone\.body\.layer1\.2\.bn1\.bias: missing, \(8,\) is needed"),
    ({"anchors": [[8, 12], [16, 24], [32, 48], [64, 96], [128, 192]], "anchor_sizes": None},
        r"rpn\.head\.bbox_pred\.bias: \(12,\), \(24,\) is needed"),
])
def test_tensors_that_do_not_fit_the_spec_are_refused_by_name(change, message, detector, tmp_path):
    about = {k: v for k, v in (json.loads(OLD) | change).items() if v is not None}
    file = write(tmp_path / "wrong.safetensors", load_file(save_detector(detector, tmp_path / "right.safetensors")), json.dumps(about))
    for read in (load_detector, load):
        with pytest.raises(ValueError, match=r"wrong\.safetensors': \d+ tensors do not fit its spec; " + message): read(file)


def test_a_tensor_too_few_or_too_many_is_refused_by_name(detector, tmp_path):
    tensors = load_file(save_detector(detector, tmp_path / "right.safetensors"))
    few = write(tmp_path / "few.safetensors", {k: v for k, v in tensors.items() if k != "rpn.head.cls_logits.bias"}, OLD)
    with pytest.raises(ValueError, match=r"1 tensors do not fit its spec; rpn\.head\.cls_logits\.bias: missing, \(3,\) is needed"):
        load_detector(few)
    many = write(tmp_path / "many.safetensors", tensors | {"mask.weight": torch.zeros(2, 3)}, OLD)
    with pytest.raises(ValueError, match=r"1 tensors do not fit its spec; mask\.weight: \(2, 3\), nothing is needed"): load_detector(many)


@pytest.mark.parametrize("about", ["", "[]", "{", '{"width": 0.125}', '{"classes": ["a", "b"], "colour": "red"}'])
def test_metadata_that_is_no_spec_is_refused_with_the_files_name(about, detector, tmp_path):
    file = write(tmp_path / "odd.safetensors", load_file(save_detector(detector, tmp_path / "right.safetensors")), about)
    with pytest.raises(ValueError, match=r"odd\.safetensors' is not a detector saved by moi"): load_detector(file)


def test_a_detectors_hash_knows_its_thresholds_and_anchors(detector, tmp_path):
    "Weights alone do not tell what a detector sees"
    tensors, seen = load_file(save_detector(detector, tmp_path / "right.safetensors")), {detector_hash(detector)}
    for k, change in enumerate(({"rules": {"score": .3}}, {"rules": {"mean": [0, 0, 0]}}, {"anchor_sizes": [9, 16, 32, 64, 128]})):
        other = load_detector(write(tmp_path / f"{k}.safetensors", tensors, json.dumps(json.loads(OLD) | change)))
        assert weights_hash(other) == weights_hash(detector)
        seen.add(detector_hash(other))
    assert len(seen) == 4


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
def test_a_thin_body_learns_from_large_images(backbone):
    "In a process of its own: with its channels last in memory, oneDNN's gradient of its strided 1x1 layers wrote past their memory"
    code = """
import sys, torch
from moi.detector import DetectorSpec, build_detector
from moi.outputs import features
torch.manual_seed(0)
detector = build_detector(DetectorSpec(["a"], (96, 1248), backbone=sys.argv[1], width=.125, fpn_channels=16, head_channels=32))
for _ in range(4): sum(f.square().mean() for f in features(detector, torch.rand(2, 3, 96, 1248)).values()).backward()
assert all(p.grad.isfinite().all() for p in detector.backbone.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code, backbone], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
