"What the tests share: where the real data is, and a cache folder of their own"
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ: # before torch is imported: workers, and what they start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2]/"shared"/"data"


@pytest.fixture
def shared():
    "A function from the name of a folder of real data to its path; it skips the test where there is none"
    def find(name):
        if not (SHARED/name).is_dir(): pytest.skip(f"real data {name!r} is not at ../shared/data")
        return SHARED/name
    return find


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    "Parsed annotations are cached in a folder that goes with the tests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
