#!/usr/bin/env bash
# A first visit: somebody reads the README, runs the quickstart and looks around. From the root of a fresh clone, in a fresh
# virtual environment. SHORT="-f nbs/experiments/params/tiny.yaml -p name quickstart" makes it a matter of a minute.
set -euxo pipefail
python -m pip install -q -e '.[dev]'
papermill nbs/experiments/zero_shot_kd.ipynb runs/quickstart.ipynb ${SHORT:-}
ls runs/quickstart                    # what the last line of the notebook says
head -20 runs/quickstart/student.md   # what did I get?
moi run --plan -p name another -p seed 1
moi clean < /dev/null                 # what takes space; nothing is deleted without a yes
python - <<'PYTHON'
from moi.explore import explore
tabs = explore("runs/quickstart", most=4, progress=False)
print(tabs.titles)
assert {"Pseudo-targets", "Transfer set", "Painting", "Errors", "Differences", "Price"} == set(tabs.titles)
PYTHON
