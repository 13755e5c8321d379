"Every notebook under nbs/, the experiments aside, runs from top to bottom in a process of its own"
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 1800  # seconds; a notebook is meant to take under 60, and a machine may be busy


def notebooks():
    "The notebooks that are tests, as paths from the root"
    found = (p.relative_to(ROOT) for p in sorted((ROOT / "nbs").rglob("*.ipynb")))
    return [p for p in found if "experiments" not in p.parts and not any(part[0] in "_." for part in p.parts)]


def test_there_are_notebooks():
    assert Path("nbs/index.ipynb") in notebooks()


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.as_posix())
def test_notebook(path):
    run = "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], timing=True)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", run, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{path} was still running after {TIME_LIMIT} s", pytrace=False)
    output = done.stdout + done.stderr
    if done.returncode:
        pytest.fail(output, pytrace=False)
    # nbdev also ends well when it found nothing to run: only this line says that it ran
    assert re.search(rf"^{re.escape(path.name)}: \d+ secs$", done.stdout, re.M), f"nbdev did not run {path}:\n{output}"
