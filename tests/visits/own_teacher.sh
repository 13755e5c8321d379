#!/usr/bin/env bash
# A first visit: somebody has a torchvision detector, and no data. From the root of a fresh clone, where moi is installed.
# SHORT="-p impressions 4 -p textures 4 -p synthesis_steps 5 -p distill_steps 5 -p agreement 4 -p shard 4" makes it a matter of a minute.
set -euxo pipefail
python - <<'PYTHON'
import torch, torchvision
detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
torch.save(detector.state_dict(), "inspector.pth")
PYTHON
{ ! moi compress inspectr.pth --classes scratch dent stain --size 96 128; } 2>&1 | grep "no file 'inspectr.pth'" # misspelt
{ ! moi compress inspector.pth --classes scratch dent --size 96 128; } 2>&1 | grep "2 names for 4 outputs" # one class too few
moi compress inspector.pth --classes scratch dent stain --size 96 128 --plan
moi compress inspector.pth --classes scratch dent stain --size 96 128 ${SHORT:-}
cat runs/mine/student.md
python - <<'PYTHON'
import torch
from moi.detector import load_detector
from moi.explore import explore
student = load_detector("runs/mine/student.safetensors")
print(student([torch.rand(3, 96, 128)])[0].keys())
print(explore("runs/mine", most=4, progress=False).titles)
PYTHON
