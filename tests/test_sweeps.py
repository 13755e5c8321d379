"Notebooks that sweep over runs refuse a name that is none of theirs"
from pathlib import Path

import nbformat
import pytest

SWEEPS = Path(__file__).parents[1] / "nbs/experiments"


@pytest.mark.parametrize("name, wrong, right", [("fidelity", "distil_steps", "distill_steps"), ("ablation", "lever", "levers"),
    ("benchmark", "sides", "side"), ("canary", "plant", "planted"), ("failures", "picture", "pictures")])
def test_a_misspelt_parameter_is_refused(name, wrong, right):
    cells = [c.source for c in nbformat.read(SWEEPS / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
    exec("\n".join(cells[:2]), {"__annotations__": {}})
    with pytest.raises(ValueError, match=f"no parameter {wrong!r}; did you mean {right!r}"):
        exec("\n".join([cells[0], f"{wrong} = 1", cells[1]]), {"__annotations__": {}})


def test_a_world_whose_name_would_split_a_row_is_refused():
    cells = [c.source for c in nbformat.read(SWEEPS / "fidelity.ipynb", 4).cells if c.cell_type == "code"]
    with pytest.raises(ValueError, match="world is 'my-world', but must have letters, digits and _ alone"):
        exec("\n".join([cells[0], "world = 'my-world'", cells[2].replace("%matplotlib inline", "")]), {"__annotations__": {}})
