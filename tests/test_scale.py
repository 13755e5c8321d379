"What runs on many GPUs are estimated to cost follows from what one GPU was measured to need"
from math import ceil
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "nbs/experiments/scale.ipynb"
SOURCES = [c.source.replace("%matplotlib inline", "") for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]


@pytest.fixture(scope="module")
def page():
    "All that the notebook defines before it draws"
    names, until = {"__annotations__": {}}, next(i for i, s in enumerate(SOURCES) if "plt.subplots" in s)
    exec("\n".join(SOURCES[:until]), names)
    return names


def test_the_law_with_launches_is_near_what_was_measured_at_another_size(page):
    taken, plain, law = list(zip(*page["checks"], strict=True))[-3:]
    assert law == pytest.approx(taken, rel=.25)
    assert plain != pytest.approx(taken, rel=.8) # knows nothing of launches


def test_painting_shares_out_but_for_its_last_shards_and_training_pays_for_the_network(page):
    run, stages, x = page["runs"]["100,000 impressions"] | {"textures": 0}, page["stages"], page["inputs"]
    one, many = (stages(run, n)["painting"]["GPU"] for n in (1, 64))
    shards = ceil(run["impressions"] / run["shard"])
    assert many / one == pytest.approx(ceil(shards / 64) / shards) and page["tail"](run, 64) == pytest.approx(1 - one / many / 64)
    assert page["exchange"](x, page["half"], 1) == (0, 0)
    gradients, _ = page["exchange"](x, page["half"], 64)
    size = 4 * page["networks"][page["half"]]["parameters"]
    assert gradients == pytest.approx(2 * 63 / 64 * size / (1e9 * page["bandwidth"]["Ethernet"]))


def test_no_input_makes_a_run_shorter_by_being_larger(page):
    for run in page["runs"].values():
        for k, v in page["inputs"].items():
            assert page["wall"](run, 64, page["inputs"] | {k: 2 * v}) >= page["wall"](run, 64)


@pytest.mark.parametrize("wrong, said", [("gpu = 1", "no parameter 'gpu'; did you mean 'gpus'"),
    ("inside = 'string'", "latency of 'string'"), ("gpus = [3]", "batch is 128; 3 GPUs can't share"),
    ("runs['KITTI'].pop('shard')", "run 'KITTI': shard is missing or unknown")])
def test_a_wrong_parameter_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said): exec("\n".join([SOURCES[0], wrong, SOURCES[1]]), {"__annotations__": {}})
