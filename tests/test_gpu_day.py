"The notebook for the day a GPU is at hand: its parameters are those of its files, and whatever it starts is accepted beforehand"
from pathlib import Path

import nbformat
import pytest

from moi.experiment import METHODS, as_method, check_parameters, read_parameters

SWEEPS = Path(__file__).parents[1]/"nbs/experiments"


def cells(name): return [c.source for c in nbformat.read(SWEEPS/f"{name}.ipynb", 4).cells if c.cell_type == "code"]


def defaults(name):
    "The parameters that a notebook spells out"
    names = {"__annotations__": {}}
    exec(cells(name)[0], names)
    return {k: names[k] for k in names["__annotations__"]}


def given(file): return read_parameters(SWEEPS/f"params/notebooks/{file}.yaml")


def test_its_file_holds_its_defaults_and_the_miniature_the_same_names():
    assert given("gpu") == defaults("gpu")
    assert list(given("gpu-miniature")) == list(given("gpu"))


def test_a_misspelt_parameter_is_refused():
    with pytest.raises(ValueError, match="no parameter 'minute'; did you mean 'minutes'"):
        exec("\n".join([cells("gpu")[0], "minute = 1", cells("gpu")[1]]), {"__annotations__": {}})


@pytest.mark.parametrize("file", ["gpu", "gpu-miniature"])
def test_all_runs_that_it_starts_have_sound_parameters(file):
    p = given(file)
    small = p["smoke"] | {"name": "x", "device": "cpu", "baselines": [], "proxy_root": ["x"]}
    for method in p["methods"] or METHODS: check_parameters(as_method(check_parameters(small), method))
    for case in p["cases"].values(): check_parameters(small | case)
    for world in (p["street"], p["published"]):
        for widths in ({"widths": 1., "inherit_body": False}, {"widths": "half"}, {"widths": "slim", "reconstruct": True}):
            whole = check_parameters(world | widths | {"name": "x", "baselines": []})
            for method in p["taught"]: check_parameters(as_method(whole, method))


@pytest.mark.parametrize("file", ["gpu", "gpu-miniature"])
def test_the_benchmarks_that_it_asks_for_have_the_benchmark_s_parameters(file):
    p, known = given(file), defaults("benchmark")
    for different in p["benchmarks"].values():
        for k, v in (p["benchmark"] | different).items(): assert type(v) is type(known[k]), k


def test_the_benchmark_refuses_a_section_that_it_has_not():
    source = cells("benchmark")
    with pytest.raises(ValueError, match="no section 'paintings'; there are pooling, painting"):
        exec("\n".join([source[0], "sections = ['paintings']", source[1]]), {"__annotations__": {}})
