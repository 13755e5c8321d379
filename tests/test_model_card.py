"The card beside every student: a head that model hubs read, and the same numbers as result.json"
import json
from pathlib import Path

import pytest
import yaml

from moi.detector import DetectorSpec
from moi.experiment import card_head, default, model_card

ROOT = Path(__file__).parents[1]
OWN = ROOT / "results/own-teacher/result.json"
SPEC = DetectorSpec(("Car", None, "Cyclist"), (96, 128))


@pytest.fixture
def result():
    return json.loads(OWN.read_text(encoding="utf-8"))


def head_of(card):
    "The YAML between the first two lines of dashes, as hubs find it"
    begin, head, text = card.split("---\n", 2)
    assert not begin and text.startswith("# ")
    return yaml.safe_load(head), text


def test_the_head_says_what_hubs_ask_for(result):
    head, text = head_of(model_card(result, SPEC))
    assert head == card_head(result, SPEC)                                                          # plain values: they survive YAML
    assert head["pipeline_tag"] == "object-detection" and head["library_name"] == "moi"
    assert head["classes"] == ["Car", "Cyclist"] and head["size"] == [96, 128] and "finds Car, Cyclist:" in text
    assert head["switches"] == result["switches"] and head["milliseconds"] == result["latency"]["student"]
    assert head["parameters"] == result["capacity"]["student"]["total"]["parameters"]
    (entry,) = head["model-index"]
    assert entry["name"] == result["params"]["name"]
    for found in entry["results"]:
        assert found["task"] == {"type": "object-detection"} and set(found["dataset"]) == {"name", "type"}
    labelled, fresh = ({m["name"]: m["value"] for m in found["metrics"]} for found in entry["results"])
    scores = result["metrics"]
    assert labelled == {k: pytest.approx(v, abs=5e-5) for k, v in {"AP": scores["student"]["AP"], "AP50": scores["student"]["AP50"],
        "retention": scores["retention"]["AP"]}.items()}
    assert fresh == {"agreement with the teacher": pytest.approx(scores["agreement"]["AP"], abs=5e-5)}
    assert str(Path.cwd()) not in text and "load_detector(\"student.safetensors\")" in text


def test_what_a_run_cannot_know_is_absent(result):
    result["metrics"] = {"agreement": {"AP": .5, "AP50": None}}
    head, text = head_of(model_card(result, SPEC))
    assert [r["dataset"]["name"] for r in head["model-index"][0]["results"]] == ["fresh impressions"]
    assert "| agreement | 0.5 | – |" in text and "| student |" not in text.partition("## What it costs")[0]
    result["metrics"] = {}
    head, text = head_of(model_card(result, SPEC))
    assert head["model-index"][0]["results"] == [] and "student.onnx" not in text


def test_a_card_names_what_left_and_what_was_learnt_on(result):
    result["params"] |= {"export": ["onnx", "int8"], "photographs": "real"}
    result["metrics"]["student_int8"] = {"AP": .25, "AP50": .5}
    text = model_card(result, SPEC)
    assert "`student.onnx`" in text and "`student_int8.onnx`" in text and "| student in INT8 | 0.25 | 0.5 |" in text
    assert "real images without their labels" in text and default("photographs") == ""
