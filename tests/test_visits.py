"First visits: each is a script of what a newcomer types; here only that what they name is there. They run by `bash tests/visits/NAME.sh`"
import re
import subprocess
from pathlib import Path

import pytest

from moi.experiment import PARAMETERS

ROOT = Path(__file__).parents[1]
VISITS = sorted((ROOT / "tests/visits").glob("*.sh"))


def test_there_are_three(): assert [f.stem for f in VISITS] == ["own_data", "own_teacher", "reader"]


@pytest.mark.parametrize("file", VISITS, ids=lambda f: f.stem)
def test_what_it_types_is_there(file):
    text = file.read_text()
    assert subprocess.run(["bash", "-n", file], capture_output=True).returncode == 0
    for name in re.findall(r"nbs/[\w/.-]+\.(?:ipynb|yaml)", text): assert (ROOT / name).is_file(), name
    given = re.findall(r"-p (\w+) ", text)
    assert given and set(given) <= set(PARAMETERS), given
