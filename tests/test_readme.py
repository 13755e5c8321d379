"The README says what the notebook says today, and the results are the ones on disk"
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_index_run_afresh_renders_to_the_readme():
    command = [sys.executable, ".ci/readme.py", "--check", "--execute"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    advice = "run nbs/index.ipynb, save it, then `python .ci/readme.py`"
    assert done.returncode == 0, f"{advice}\n{done.stdout}{done.stderr}"


def test_readme_gives_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    install = "python -m pip install -e '.[dev]' && "
    assert install + "papermill nbs/experiments/zero_shot_kd.ipynb runs/quickstart.ipynb" in lines
    assert install + "pytest" in lines
