#!/usr/bin/env bash
# A first visit: somebody has photographs with boxes. From the root of a fresh clone, where moi is installed. Here a drawn world
# stands for the photographs. SHORT="-p teacher_steps 5 -p impressions 4 -p synthesis_steps 5 -p distill_steps 5 -p shard 4 -p batch 2"
# makes it a matter of a minute.
set -euxo pipefail
python -c 'from moi.street import write_street; write_street("photographs", train=20, val=4, test=4, layout="voc")'
moi check photographs
cp -r photographs damaged
damaged=$(ls damaged/JPEGImages | head -1)
echo "no image" > "damaged/JPEGImages/$damaged"
{ ! moi check damaged; } 2>&1 | grep "$damaged" # it names the file
papermill nbs/experiments/zero_shot_kd.ipynb runs/mine-data.ipynb -p name mine-data -p dataset voc -p data_root photographs \
    -y "{splits: [train 0-80%, train 80-100%, val], size: [96, 96], classes: [Car, Pedestrian, Cyclist]}" ${SHORT:-}
python - <<'PYTHON'
from moi.evaluate import predict
from moi.explore import browse, explore
from moi.detector import load_detector
browse("photographs", split="val")
browse("photographs", load_detector("runs/mine-data/student.safetensors"), split="val", progress=False)
print(explore("runs/mine-data", most=4, progress=False).titles)
PYTHON
