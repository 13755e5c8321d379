"A student for some of its teacher's classes: what the others were is background"
import math

import pytest
import torch

from moi.compress import make_student, paint_transfer_set
from moi.detector import DetectorSpec, build_detector, load_detector, save_detector
from moi.experiment import OWN_TEACHER, run
from moi.export import OnnxDetector, export_onnx
from moi.outputs import features, roi_outputs
from moi.teachers import adopt, load, only
from moi.train import Engine

SPEC = DetectorSpec(("car", None, "cyclist", "sign", "person"), (64, 96), width=.25, fpn_channels=16, head_channels=32,
    anchors=(8, 16, 32, 64, 128))
BOXES = torch.tensor([[[4., 4, 40, 40], [30, 20, 90, 60], [10, 30, 60, 50]]])


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    detector = build_detector(SPEC).eval()
    alive = [0, *SPEC.labels]
    detector.roi_heads.box_predictor.cls_score.weight.data[alive] = 3 * torch.randn(5, SPEC.head_channels)
    return adopt(detector)


def answers(detector, images):
    with torch.no_grad(): return roi_outputs(detector, features(detector, images), BOXES, SPEC.size)


def test_scores_and_boxes_of_the_kept_classes_are_what_they_were(whole):
    images = torch.rand(1, 3, *SPEC.size)
    some = only(whole, ["person", "car"])
    (all_logits, all_deltas), (logits, deltas) = answers(whole, images), answers(some, images)
    torch.testing.assert_close(logits.softmax(-1)[..., 1:], all_logits.softmax(-1)[..., [5, 1]])
    torch.testing.assert_close(deltas[..., 1:, :], all_deltas[..., [5, 1], :])
    assert some.spec.classes == ("person", "car") and some.spec.folded == 2
    last = only(some, ["car"]) # folding twice is folding once
    torch.testing.assert_close(answers(last, images)[0].softmax(-1)[..., 1], all_logits.softmax(-1)[..., 1])
    with torch.inference_mode():
        seen, kept = whole([images[0]])[0], some([images[0]])[0]
    label = {5: 1, 1: 2}
    first = {(label[k], round(s, 4)) for k, s in zip(seen["labels"].tolist(), seen["scores"].tolist()) if k in label}
    assert first and first <= {(k, round(s, 4)) for k, s in zip(kept["labels"].tolist(), kept["scores"].tolist())}


def test_files_name_some_of_their_classes(whole, tmp_path):
    save_detector(whole, tmp_path / "whole.safetensors")
    some = load(tmp_path / "whole.safetensors", ["sign", "person"])
    assert some.spec.classes == ("sign", "person") and some.spec.folded == 2
    save_detector(some, tmp_path / "some.safetensors")
    again, images = load_detector(tmp_path / "some.safetensors"), torch.rand(1, 3, *SPEC.size)
    torch.testing.assert_close(answers(again, images), answers(some, images))
    with pytest.raises(ValueError, match="has the classes"): load(tmp_path / "whole.safetensors", ["sign", "dog"])
    with pytest.raises(ValueError, match="no class 'persn'; did you mean 'person'"): only(whole, ["persn"])
    export_onnx(some, tmp_path / "some.onnx")
    with torch.inference_mode(): a, b = some([images[0]])[0], OnnxDetector(tmp_path / "some.onnx")([images[0]])[0]
    torch.testing.assert_close(a["scores"], b["scores"].to(a["scores"]), atol=1e-4, rtol=0)
    assert len(a["labels"]) and a["labels"].tolist() == b["labels"].tolist()


@pytest.mark.parametrize("widths", ["half", "slim"])
def test_a_student_of_fewer_classes(whole, tmp_path, widths):
    some, cpu = only(whole, ["car", "person"]), Engine(device="cpu")
    images = paint_transfer_set(some, tmp_path / "set", impressions=4, textures=2, shard=4, steps=3, engine=cpu)
    student = make_student(some, images, tmp_path / "student", widths=widths, reconstruct=True, steps=2, batch=2, held_out=1, engine=cpu)
    assert student.spec.classes == ("car", "person") and student.spec.folded == 0
    assert student.roi_heads.box_predictor.cls_score.weight.shape[0] == 3


def test_a_run_for_some_classes(whole, tmp_path):
    save_detector(whole, tmp_path / "whole.safetensors")
    (tmp_path / "runs").mkdir()
    few = {"impressions": 4, "textures": 2, "shard": 4, "synthesis_steps": 2, "distill_steps": 2, "batch": 2, "held_out": 1,
        "agreement": 4, "device": "cpu"}
    parameters = {**OWN_TEACHER, **few, "teacher": str(tmp_path / "whole.safetensors"), "classes": ["person"]}
    result = run(parameters, tmp_path / "runs", progress=False)
    assert load_detector(tmp_path / "runs/mine/student.safetensors").spec.classes == ("person",)
    assert math.isfinite(result["capacity"]["ratio"]["flops"])
