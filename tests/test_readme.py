"The README says what the notebook says today, and the results are the ones on disk"
import re
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


def test_the_readme_is_read_in_a_few_minutes():
    "At most 900 words as `wc -w` counts them, one picture, one table, and no commit"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len(re.findall(r"!\[", text)) == 1 and len(re.findall(r"^\|[-|]+\|$", text, re.M)) == 1
    assert not re.search(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", text)


def test_the_readme_defines_its_terms_and_names_what_it_builds_on():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"*{term}*" in text for term in ("retention", "BN prior", "Strict")) and "source-free domain adaptation" in text
    assert all(link in text for link in ("arxiv.org/abs/2110.14215", "[DIODE](https://", "[Chen et al.](https://", "@inproceedings"))
