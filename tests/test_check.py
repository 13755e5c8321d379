"What `.ci/check.py` says of stored outputs"
import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

SPEC = importlib.util.spec_from_file_location("check", Path(__file__).parents[1] / ".ci/check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "interactive(...)"}


@pytest.mark.parametrize("output, what", [
    (new_output("display_data", data=WIDGET), "a widget"),
    (new_output("stream", name="stderr", text="train: 10%|█         | 1/10 [00:00<00:05,  1.66it/s]"), "a progress bar"),
    (new_output("display_data", data={"text/plain": "<Figure size 400x300 with 1 Axes>"}), "a figure without a picture"),
    (new_output("display_data", data={"text/plain": "<Figure with 0 Axes>", "image/png": "aaaa"}), "a figure without a picture"),
    (new_output("display_data", data={"text/plain": "<Figure with 1 Axes>", "image/png": "aaaa"}), None),
    (new_output("stream", name="stdout", text="found: 90% of 10 objects"), None),
])
def test_what_is_dead_is_found(output, what, tmp_path):
    (tmp_path / "nbs").mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell("", outputs=[output], id="one")]), tmp_path / "nbs/a.ipynb")
    assert list(check.stored_outputs(tmp_path)) == ([f"nbs/a.ipynb, cell one: stores {what}"] if what else [])
