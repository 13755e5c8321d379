"""What would go wrong, and what would take long, on a GPU: found without one, on a device that only pretends (`pretend.py`).

Nothing is computed there, so what follows from numbers does not run, or not as it would. Read instead, for tensors on the wrong device:
- shuffling (`step_loader`, `read_all`), for which batches stand in, and how often boxes are found (half of what NMS or a mask is given);
- whatever goes through a file: `save_state` and `resume`, `save_detector` and `load_detector`, `write_shard`;
- several processes, `torch.compile`, and bfloat16 (torch has no autocast for a device that was registered from Python);
- resizing as an image library does (`LibraryTransform`), which is asked there for the size that an image has;
- `latency`, peak memory, the thread that writes shards, and scores (`agreement`, which pycocotools computes on the CPU).
A copy that waits where it need not, such as a device's tensor assigned to part of a CPU's, is legal: it is counted, not refused.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST = { # of a step at the street world's size, and of what is done at some steps only: kernels, and calls that wait for the device
    "pyramid": (200, 0), "painting": (700, 4), "painting, a look": (150, 0), "distilling": (600, 6), "distilling, losses read": (10, 1),
}


@pytest.fixture(scope="module")
def said():
    "What a process of its own finds, since torch keeps a device once it knows it"
    done = subprocess.run([sys.executable, "-m", "tests.pretend", "check", "count", "--json"], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if "missing" in found: pytest.skip(found["missing"])
    return found


def test_nothing_lies_on_the_wrong_device(said):
    assert len(said["checks"]) > 25
    assert {k: v for k, v in said["checks"].items() if v} == {}


def test_planted_mistakes_are_found(said):
    assert len(said["planted"]) == 3
    for name, error in said["planted"].items(): assert "cpu" in error.lower(), name


def test_kernels_and_waits_of_known_lines_are_counted(said):
    assert said["counts"]["known"] == {"kernels": 8, "backwards": 1, "blocking": 4, "copies": 1}


@pytest.mark.parametrize("step", MOST)
def test_a_step_asks_for_few_kernels_and_hardly_waits(said, step):
    kernels, blocking = MOST[step]
    found = said["counts"][step]
    assert 0 < found["kernels"] <= kernels and found["blocking"] <= blocking, f"{found}; `python -m tests.pretend count` tells the lines"
