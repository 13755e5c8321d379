"What results/README.md and the README's table say is what the files under results/ say, and nothing is left out"
import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/experiments/report.ipynb"
RUN = json.loads((ROOT / "results/quickstart-s0/result.json").read_text(encoding="utf-8"))
ON = {"device": {"type": "cpu", "name": "an abacus", "processes": 1}, "versions": {}, "commit": "c" * 40}


def report(folder, out):
    "The page of the results in `folder`, without a kernel"
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    code = "\n".join([cells[0], f"folder, out = {str(folder)!r}, {str(out)!r}", *cells[1:]])
    exec(code, {"__annotations__": {}})
    return out.read_text(encoding="utf-8")


def put(root, path, content):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content), encoding="utf-8")


def result(seed, **scores):
    "A run like the quickstart's, with AP as given"
    r = json.loads(json.dumps(RUN)) | {"seed": seed, "commit": f"{seed}" * 40, "stages": {}}
    r["params"] |= {"seed": seed, "widths": "slim", "textures": 0}
    of = {k: v for k, v in RUN["metrics"]["student"].items() if k != "protocol"}
    r["metrics"] = {k: of | {"AP": v, "AP50": v} for k, v in scores.items()}
    return r


def row(page, name):
    "The cells of the first line that begins with `name`"
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_the_page_in_results_is_what_the_notebook_writes(tmp_path):
    written, kept = report(ROOT / "results", tmp_path / "page.md"), (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert written == kept, "run nbs/experiments/report.ipynb, then `python .ci/readme.py --execute`"
    assert "## Not in a table" not in written


def test_the_readme_shows_the_headline():
    page, readme = ((ROOT / f).read_text(encoding="utf-8") for f in ("results/README.md", "README.md"))
    assert re.search(r"<!-- headline -->.*<!-- /headline -->", page, re.S)[0] in readme


def test_each_executed_notebook_stands_beside_the_command_that_makes_it_again():
    lines = (ROOT / "results/README.md").read_text(encoding="utf-8").split("## Once more")[1].splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("papermill ")]
    assert all((ROOT / word).is_file() for c in commands for word in c if word.startswith("nbs/"))
    given = [(c[1], yaml.safe_load(c[c.index("-y") + 1]) if "-y" in c else {}) for c in commands]
    notes = [json.loads(f.read_text(encoding="utf-8"))["metadata"].get("papermill", {}) for f in (ROOT / "results").rglob("*.ipynb")]
    noted = [(n["input_path"], n["parameters"]) for n in notes if n.get("input_path")]
    assert len(noted) > 10 and all(pair in given for pair in noted)


def test_a_table_is_medians_and_ranges_of_its_files(tmp_path):
    for seed, ap in enumerate((.5, .6, .4)):
        put(tmp_path, f"fidelity/mars-half-moi-s{seed}/result.json", result(seed, teacher=.8, student=ap))
        put(tmp_path, f"fidelity/mars-half-real-s{seed}/result.json", result(seed, teacher=.8, student=.64))
    page = report(tmp_path, tmp_path / "page.md")
    cells = row(page, r"**impressions**")
    assert cells[1:3] == ["0.500 (0.400–0.600)"] * 2 and cells[3] == "62.5% (50.0%–75.0%)" and cells[5] == "0, 1, 2"
    assert cells[6] == "0000000, 1111111, 2222222"
    assert row(page, "real training images, unlabelled")[1:4] == ["0.640", "0.640", "80.0%"]
    assert row(page, "the teacher")[1] == "0.800" and "already were made" not in page
    again = result(0, teacher=.8, student=.5) | {"stages": {"student": {"commits": ["f" * 40, "0" * 40]}, "scores": {}}}
    put(tmp_path, "fidelity/mars-half-moi-s0/result.json", again)
    assert "Stages that were there already were made at fffffff." in report(tmp_path, tmp_path / "page.md")


def test_a_difference_names_the_ap_that_it_is_of(tmp_path):
    ours, theirs = result(0, teacher=.8, student=.6), result(0, teacher=.8, student=.55)
    ours["metrics"]["student"]["AP50"] = .9
    for method, r in {"moi": ours, "real": theirs}.items(): put(tmp_path, f"fidelity/mars-slim-{method}-s0/result.json", r)
    differ = {"difference": ours["metrics"]["student"]["AP"] - theirs["metrics"]["student"]["AP"], "low": -.01, "high": .09}
    put(tmp_path, "fidelity/mars-slim-differences.json", {"slim, moi − real, seed 0": differ})
    page = report(tmp_path, tmp_path / "page.md")
    assert "AP of the student of impressions less that of the others" in page
    assert "| real training images, unlabelled | +5.0 (-1.0 to +9.0) |" in page


def test_a_difference_is_said_in_ap_first_and_in_ap50_beside_it(tmp_path):
    for method, ap in {"moi": .6, "real": .55}.items():
        put(tmp_path, f"fidelity/mars-slim-{method}-s0/result.json", result(0, teacher=.8, student=ap))
    differ = {"AP": {"difference": .05, "low": -.01, "high": .09}, "AP50": {"difference": .02, "low": -.03, "high": .06}}
    put(tmp_path, "fidelity/mars-slim-differences.json", {"slim, moi − real, seed 0": differ})
    first, second = report(tmp_path, tmp_path / "page.md").split("AP50 of the student of impressions less that of the others")
    assert "\nAP of the student of impressions less that of the others" in first
    assert "| real training images, unlabelled | +5.0 (-1.0 to +9.0) |" in first
    assert "| real training images, unlabelled | +2.0 (-3.0 to +6.0) |" in second


def test_a_compressed_student_is_the_headline_with_all_that_it_costs(tmp_path):
    for seed in (0, 1):
        r = result(seed, teacher=.8, student=.76, textures=.7, real=.77, inherited=.6, student_int8=.75, teacher_int8=.79)
        r["params"]["textures"] = 32
        r["metrics"]["agreement_int8"] = {"AP": .9, "AP50": .99}
        for who, ap in {"teacher": 33.1, "student": 31.2}.items():
            numbers = {"hard_R11": ap - 1, "hard_R40": ap, "hard_objects": 7}
            r["metrics"][who]["protocol"] = {"protocol": "KITTI in percent; curves", "summary": numbers, "per_class": {"Car": numbers}}
        r["capacity"]["student"]["total"] = {"parameters": 10**6, "flops": 10**9}
        r["capacity"]["ratio"] = {"parameters": .25, "flops": .8}
        times = {"teacher": {"torch": 20., "onnx": 18., "int8": 9.}, "student": {"torch": 10., "onnx": 8., "int8": 4. + seed}}
        r["latency"] = times | {"teacher_same_proposals": {"torch": 15., "onnx": 12.}}
        r["bytes"] = {k: {"onnx": 4 * 10**6, "int8": 10**6} for k in ("teacher", "student")}
        put(tmp_path, f"compression/street-slim-s{seed}/result.json", r)
        put(tmp_path, f"quickstart-s{seed}/result.json", result(seed, teacher=.5, student=.1))
    page = report(tmp_path, tmp_path / "page.md")
    head = page.split("<!-- headline -->")[1].split("<!-- /headline -->")[0]
    cells = row(head, "**student**, on impressions and textures")
    assert cells[1:] == ["0.760", "95.0%", "1.00", "1000", "10.0", "8.0", "4.5 (4.0–5.0)"]
    assert row(head, "teacher, as few proposals as the student")[1:] == ["", "", "3.89", "1250", "15.0", "12.0", ""]
    assert row(head, "the same on real images")[1] == "0.770" and "half of all channels" in head and "0.100" not in head
    assert row(page, "nothing: the student as it starts")[1] == "0.600"
    assert row(page, "impressions and textures, then in INT8")[1] == "0.750"
    assert "| hard_R11 | 32.100 | 30.200 |\n| hard_R40 | 33.100 | 31.200 |\n| Car, hard_R40 | 33.100 | 31.200 |\n\n" in page
    assert "| KITTI in percent | the teacher |" in page and "in float32: AP 0.900, AP50 0.990" in page
    cut = {f"teacher, {n} proposals": {"AP": ap, "AP50": .9, "bytes": 1, "parameters": 1, "flops": flops} | {"on": ON}
        for n, ap, flops in ((100, .7, 10**9), (200, .799, 1250 * 10**6))}
    took = {"of each": {"teacher": {"onnx": 10.}, **{k: {"onnx": 5.} for k in cut}}, "on": ON}
    first = {"teacher": cut["teacher, 100 proposals"], **cut, "milliseconds": took}
    put(tmp_path, "compression/latency.json", {"params": {"runs": [r["params"]["name"]]}, "rows": first})
    assert "| teacher, as few proposals as the student | 0.799, seed 0; 0.799, seed 1 |" in report(tmp_path, tmp_path / "page.md")


def test_what_the_compression_notebook_wrote_is_shown(tmp_path):
    on = {"of": {}, "on": ON}
    rows = {}
    for seed in (0, 1):
        rows[f"slim-s{seed}, teacher"] = {"AP": .8, "AP50": .9, "agreement": 1., "bytes": 1} | on
        for kind, v in {"impressions": .91, "real images": .95}.items():
            rows[f"slim-s{seed}, teacher, INT8, per channel, {kind}"] = {"AP": .7, "AP50": .9, "agreement": v + seed / 50} | on
    put(tmp_path, "compression/int8.json", {"params": {"runs": ["slim-s0", "slim-s1"]}, "rows": rows})
    detector = {"AP": .8, "AP50": .9, "bytes": 4 * 10**6, "parameters": 10**6, "flops": 10**9} | on
    took = {"teacher": {"torch": 20., "onnx": 10.}, "slim": {"torch": 10., "onnx": 5.}, "slim, INT8": {"int8": 2.5}}
    quick = {k: detector for k in took} | {"milliseconds": {"of each": took, "images": 3} | on}
    put(tmp_path, "compression/latency.json", {"params": {}, "rows": quick})
    large = [{"name": k, "proposals": 100, "milliseconds": {"torch": ms, "onnx": ms}, "parameters": 10**6, "flops": 10**9}
        for k, ms in {"teacher": 40., "slim": 10.}.items()]
    put(tmp_path, "compression/full-size.json", {"params": {}, "rows": {"milliseconds": {"detectors": large} | on}})
    put(tmp_path, "compression/forgotten.json", {"rows": {}})
    page = report(tmp_path, tmp_path / "page.md")
    assert row(page, "INT8, per channel")[2:] == ["0.920 (0.910–0.930)", "0.960 (0.950–0.970)"]
    assert row(page, "slim, INT8")[3:] == ["", "", "2.5 (0.25)", "1.00 (1.00)", "1000.00 (1.00)", "4.00 (1.00)"]
    assert row(page, "slim, 100 proposals")[1] == "10.0 (0.25)" and "an abacus" in page
    assert page.split("## Not in a table")[1].split("<!--")[0].strip() == "- [`compression/forgotten.json`](compression/forgotten.json)"


def test_what_students_lose_is_shown_by_world(tmp_path):
    def run(label, seed, still, *lost):
        part = [still, *lost]
        kept = {"Car": part, "Van": [0] * 5, "smallest third": part, "middle third": [0] * 5, "largest third": [9, 1, 0, 0, 0], "all": part}
        one = {"images": 10, "objects": kept, "alarms": {"all": [1, 0, 2]}}
        return {"label": label, "seed": seed, "teacher": one, "student": one, "kept": kept, "new": 2, "fit": {"all": [10, 9., 8.]}}
    rows = {"a": run("half-moi", 0, 90, 1, 2, 3, 4), "b": run("half-moi", 1, 80, 5, 5, 5, 5), "c": run("half-real", 0, 100, 0, 0, 0, 0)}
    fates = ["found", "another class", "box off", "score too low", "not seen"]
    put(tmp_path, "failures/mars.json", ON | {"rows": rows, "fates": fates, "thirds": [.01, .1], "classes": ["Car", "Van"],
        "params": {"score": .5}})
    page = report(tmp_path, tmp_path / "page.md")
    kept, why = page.split("What becomes of the others")
    assert "### mars: [`failures/mars.json`]" in kept and "up to 1.00%, up to 10.00%" in kept and "## Not in a table" not in page
    moi = row(kept, "**impressions**")[1:]
    assert moi == ["85.0% (80.0%–90.0%)", "85.0% (80.0%–90.0%)", "90.0%", "Car 85.0%", "0, 1"] # no middle third, no Van
    assert row(why, "**impressions**")[1:] == ["30", "20%", "23%", "27%", "30%", "4", "0.800 (0.900)", "0.30 (0.30)"]
    assert row(why, "real training images, unlabelled")[1:6] == ["0", "0%", "0%", "0%", "0%"]


def test_worlds_stand_beneath_each_other_and_weak_teachers_last(tmp_path):
    for world, ap50 in {"signs20": .8, "chess12": .95, "venus": .95}.items():
        for method, ap in {"moi": .6, "real": .65}.items():
            if world == "venus" and method == "real": continue
            r = result(0, teacher=.8, student=ap)
            r["params"] |= {"dataset": "voc", "splits": ["train", "val", "val" if world == "signs20" else "test"]}
            r["metrics"]["val"] = {"teacher": {"AP": .8, "AP50": ap50}}
            put(tmp_path, f"fidelity/{world}-half-{method}-s0/result.json", r)
    apart = {"difference": -.04, "low": -.09, "high": .01}
    put(tmp_path, "fidelity/chess12-half-differences.json", {"half, moi − real, seed 0": {"AP": apart, "AP50": apart}})
    page, *rest = report(tmp_path, tmp_path / "page.md").partition("## Chess")
    assert "Here *val* is the test split" in rest[1].split("## Traffic")[1] and rest[1].count("is the test split") == 1
    assert row(page, "Chess pieces, photographs")[1:] == ["0", "96, 600", "0.800", "75.0%", "81.2%", "92.3%", "-9.0 to +1.0"]
    assert row(page, "Traffic signs, photographs, a *weak* teacher")[1:] == ["0", "96, 600", "0.800", "75.0%", "81.2%", "92.3%", ""]
    assert page.index("| Chess pieces") < page.index("| Traffic signs") and "venus" not in page
    put(tmp_path, "quickstart/result.json", result(0, teacher=.8, student=.6))
    head = report(tmp_path, tmp_path / "page.md").split("<!-- /headline -->")[0]
    assert head.rstrip().endswith("on impressions (real images; textures): Chess pieces 75.0% (81.2%; –). Where the teacher is weak, "
        "in 600 steps: Traffic signs 75.0% (81.2%; –).")
    for world, ap in {"chess12": .7, "signs20": .5}.items():
        put(tmp_path, f"fidelity/{world}-half-moi_proxy-s0/result.json", r | {"metrics": result(0, teacher=.8, student=ap)["metrics"]})
    put(tmp_path, "fidelity/street_strict-half-strict-s0/result.json", result(0, teacher=.8, student=.4))
    head = report(tmp_path, tmp_path / "page.md").split("<!-- /headline -->")[0]
    assert "Chess pieces 75.0% (81.2%; –; 87.5% with half unrelated photographs)" in head and head.count("unrelated") == 1
    assert head.rstrip().endswith("on the street world: 50.0% on impressions.")


def test_a_misspelt_parameter_is_refused():
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    with pytest.raises(ValueError, match="no parameter 'folders'; did you mean 'folder'"):
        exec("\n".join([cells[0], "folders = 1", cells[1]]), {"__annotations__": {}})
