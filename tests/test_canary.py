"A pattern that was planted is found, and the notebook that plants one says what it found"
import json
import shutil
from math import log2
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from test_report import report, row

from moi.evaluate import cross_correlation, echoes
from moi.street import write_street

ROOT = Path(__file__).parents[1]
TINY = {"params": "tiny", "planted": [3], "side": 16, "block": 4, "candidates": 15, "sizes": [12, 16], "asked": 2, "device": "cpu"}


def blocks(n, block, seed=0):
    "Squares of 4 x 4 blocks of random colours"
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).repeat_interleave(block, 2).repeat_interleave(block, 3)


@pytest.mark.parametrize("size", [(3, 3), (5, 7), (1, 12)])
def test_the_correlation_is_that_of_each_patch_by_itself(size):
    g = torch.Generator().manual_seed(1)
    patterns, images = torch.rand(4, 3, *size, generator=g), torch.randint(256, (3, 3, 12, 15), generator=g, dtype=torch.uint8)
    patches = images.double().unfold(2, size[0], 1).unfold(3, size[1], 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    unit = [F.normalize(v - v.mean(-1, keepdim=True), dim=-1) for v in (patches, patterns.double().flatten(1))]
    expected = torch.einsum("nyxk,pk->pnyx", *unit).float()
    torch.testing.assert_close(cross_correlation(patterns, images), expected, atol=1e-5, rtol=0)
    both = torch.maximum(*(cross_correlation(p, images).amax((2, 3)) for p in (patterns, patterns.flip(3))))
    torch.testing.assert_close(echoes(patterns, images), both)


@pytest.mark.parametrize("seed", range(3))
def test_a_pasted_pattern_is_found_wherever_it_is_and_however_bright(seed):
    g, patterns = torch.Generator().manual_seed(seed), blocks(70, 3, seed)
    images = torch.randint(256, (20, 3, 40, 50), generator=g, dtype=torch.uint8)
    y, x = (int(torch.randint(n, (), generator=g)) for n in (29, 39))
    for i, change in {3: lambda p: p, 7: lambda p: p.flip(2), 11: lambda p: .2 + .3 * p, 15: lambda p: 1 - .8 * p}.items():
        images[i, :, y:y + 12, x:x + 12] = (255 * change(patterns[5])).round()
    found = echoes(patterns, images)
    assert found.abs().max() <= 1 and found[5, [3, 7, 11]].min() > .999
    assert found[5, 15] < .9 and cross_correlation(patterns[5:6], images[15:16]).min() < -.999 # a negative is none
    others = torch.cat([found[:5], found[6:]])
    assert others.max() < .9 and found[5, [0, 1, 2, 19]].max() < .9


def test_what_is_flat_has_no_echo_and_what_is_too_small_is_named():
    images = torch.full((2, 3, 20, 20), 200, dtype=torch.uint8)
    images[1, :, 3, 3] = 201 # a single grey level, once
    assert not echoes(blocks(3, 4), images).any() and not echoes(torch.full((1, 3, 4, 4), .3), images).any()
    assert echoes(blocks(3, 4), images[:0]).shape == (3, 0)
    with pytest.raises(ValueError, match="patterns of 24x24 pixels are looked for in images of 20x20"): echoes(blocks(1, 6), images)


def carry_out(given):
    "The notebook's last variables, without a kernel"
    cells = [c.source for c in nbformat.read(ROOT / "nbs/experiments/canary.ipynb", 4).cells if c.cell_type == "code"]
    given = "\n".join(f"{k} = {v!r}" for k, v in given.items())
    names = {"__annotations__": {}}
    exec("\n".join([cells[0], given, *cells[1:]]).replace("%matplotlib inline", ""), names)
    return names


def test_the_canary_notebook_plants_looks_and_tells(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    shutil.copytree(ROOT / "nbs/experiments/params", tmp_path / "nbs/experiments/params")
    monkeypatch.chdir(tmp_path)
    names = carry_out(TINY | {"out": "results/canary"})
    file = tmp_path / "results/canary/canary.json"
    told = json.loads(file.read_text())
    assert list(told["rows"]) == ["3"] and len(told["rows"]["3"]) == 1
    found = told["rows"]["3"][0]
    assert found["impressions"] == 8 and {k: len(s["others"]) for k, s in found["scores"].items()} == {"teacher": 2, "student": 2}
    for e in (found["anywhere"], found["on average"]):
        assert 1 <= e["rank"] <= 16 and e["bits"] == pytest.approx(4 - log2(e["rank"]))
        assert (e["rank"] == 1) == (e["echo"] > e["largest of the others"])
    real = found["training images"]
    assert (real["rank"], real["bits"], real["images"]) == (1, 4, 3) and real["echo"] > .999 > real["largest of the others"]
    assert 0 < found["faintest copy"] <= 1

    def files(world): return {f.relative_to(world).as_posix(): f.read_bytes() for f in sorted(world.rglob("*")) if f.is_file()}
    none, three = (files(names["world_of"](0, n)) for n in (0, 3))
    assert none == files(write_street(tmp_path / "street", (64, 64), 12, 8, 8, progress=False))
    changed = {k for k in three if three[k] != none.get(k)} - {"ImageSets/train.txt"}
    assert len(changed) == 6 and all("-" in k for k in changed) # three images and their labels
    for k in changed:
        if not k.endswith(".txt"): continue
        before = none[k.partition("-")[0] + ".txt"].decode().splitlines()
        *kept, new = three[k].decode().splitlines()
        assert kept == before and new.startswith("Cyclist ")

    told["rows"] = {"0": [{k: v for k, v in found.items() if k != "training images"}]} | told["rows"] # with a control
    file.write_text(json.dumps(told))
    page = report(tmp_path / "results", tmp_path / "page.md")
    for n in "03": assert row(page, n)[1:3] == [str(found["anywhere"]["rank"]), f"{found['anywhere']['bits']:.1f}"]
    assert [row(page, n)[-1] for n in "03"] == ["", "1"]
    known = found["AP"]["student"], found["scores"]["student"]["canary"]
    assert row(page, "student, 3 planted")[1:3] == [f"{v:.3f}" for v in known]
    assert "canary/canary.png" in page and "## Not in a table" not in page


@pytest.mark.parametrize("given, message", [({"planted": [13]}, "planted holds 13; there are 12 training scenes"),
    ({"label": "Tram"}, "no class 'Tram'; there are Car"), ({"block": 5}, "block 5 does not divide it"),
    ({"sizes": [70]}, "a pattern of 70 pixels does not fit"), ({"params": "bccd"}, "has dataset ")])
def test_what_cannot_be_planted_is_refused(given, message):
    with pytest.raises(ValueError, match=message): carry_out(TINY | given)
