"Results worth citing stay readable: those of version 0.1 have fewer keys, and none that was renamed"
import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "results").rglob("result.json"))
RUNS = [f for f in FILES if not {"benchmark", "reliability"} & set(f.parts)]  # whose results are seconds and counts


def read(file): return json.loads(file.read_text(encoding="utf-8"))


def test_there_are_results_of_every_kind():
    kinds = {f.relative_to(ROOT / "results").parts[0].partition("-s")[0] for f in FILES}
    assert kinds >= {"fidelity", "compression", "quickstart", "benchmark", "reliability"} and len(RUNS) > 25


def test_impressions_stand_beside_all_that_they_are_compared_with_and_no_table_mixes_commits():
    tables = {}
    for file in FILES:
        if found := re.fullmatch(r"(\w+-\w+)-(\w+)-s\d+", file.parent.name):
            if file.parent.parent.name == "fidelity": tables.setdefault(found[1], []).append((found[2], read(file)["commit"]))
    assert {"street-half", "bccd-half"} <= set(tables)
    for methods, commits in (map(set, zip(*rows)) for rows in tables.values()):
        assert {"moi", "textures", "real", "proxy"} <= methods or all("strict" in m for m in methods)
        assert len(commits) == 1


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f.parent.relative_to(ROOT / "results").as_posix())
def test_a_result_says_what_came_out_and_how(file):
    result = read(file)
    for name in ("teacher", "student"):
        for k in ("AP", "AP50"):
            assert type(result["metrics"][name][k]) is float and 0 <= result["metrics"][name][k] <= 1
        total = result["capacity"][name]["total"]
        assert total["parameters"] > 0 and total["flops"] > 0 and len(result["weights"][name]) == 12
    kept = result["metrics"]["retention"]["AP"]
    assert math.isclose(kept, result["metrics"]["student"]["AP"] / result["metrics"]["teacher"]["AP"])
    assert {"params", "seed", "switches", "stages", "device", "versions", "commit"} <= set(result)


@pytest.mark.parametrize("file", [f for f in RUNS if read(f)["versions"]["moi"] != "0.1.0"], ids=lambda f: f.parent.name)
def test_a_result_of_today_says_what_a_student_costs_and_lacks(file):
    result = read(file)
    assert 0 < result["capacity"]["ratio"]["parameters"] <= 1 and type(result["not_inherited"]) is list
    for name in ("teacher", "student"):
        forms = {"torch", *result["params"]["export"]}
        assert set(result["latency"][name]) == forms and all(ms > 0 for ms in result["latency"][name].values())
    for kind in (k for k in ("retention", "agreement") if k in result["metrics"]):
        assert set(result["metrics"][kind]) == {"AP", "AP50"}


@pytest.mark.parametrize("file", [f for f in FILES if f not in RUNS], ids=lambda f: f.parent.relative_to(ROOT / "results").as_posix())
def test_a_benchmark_says_how_long_and_where(file):
    result = read(file)
    assert {"seconds", "device", "params", "versions", "commit"} <= set(result)
