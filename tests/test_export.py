"What leaves: the same detections in onnxruntime, whatever the detector is made of, read by anybody, in INT8, and in fewer bits"
import dataclasses
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import onnx
import pytest
import torch
import torchvision

from moi.data import write_image
from moi.detector import DetectorSpec, Rules, build_detector, fill, plain, save_detector, spec_from_json, weights_hash
from moi.evaluate import agreement, predict
from moi.experiment import run
from moi.export import READER, OneImage, OnnxDetector, export_onnx, exportable, fake_quantize, metadata, parity, predictors, quantize
from moi.outputs import latency
from moi.street import CLASSES, draw_scene
from moi.textures import make_textures
from moi.train import Training, train_detector
from moi.transfer_set import NOTHING, join_shards, set_hash, write_shard

SIZES = [(96, 192), (60, 200), (375, 1242), (97, 131), (131, 97), (33, 47), (200, 61), (63, 64), (237, 140), (400, 243)]
HIDE = """
import importlib, sys
sys.modules.update(dict.fromkeys({hidden})) # as if never installed
for name in {hidden}:
    try: importlib.import_module(name)
    except ModuleNotFoundError: continue
    sys.exit(f"{{name}} was not hidden, so this proves nothing")
"""


class Scenes(torch.utils.data.Dataset):
    "Drawn street scenes"
    def __init__(self, n, first=0): self.scenes = [draw_scene((64, 64), first + i) for i in range(n)]
    def __len__(self): return len(self.scenes)
    def __getitem__(self, i): return self.scenes[i]


@pytest.fixture(scope="module")
def detector():
    "A small one that learnt a little; some logits of its objectness are far below -18"
    torch.manual_seed(0)
    spec = DetectorSpec(CLASSES, (64, 64), width=.25, fpn_channels=32, head_channels=64, anchors=(8, 16, 32, 64, 128), roi_samples=32)
    d = build_detector(spec)
    train_detector(d, Scenes(96), Training(steps=300, views=.5), progress="")
    return d.eval()


@pytest.fixture(scope="module")
def images():
    "More than twenty: scenes of the detector's size and of others, black, grey, noise"
    g = torch.Generator().manual_seed(0)
    found = [image for image, _ in Scenes(10, 1000)] + [draw_scene(size, 7)[0] for size in SIZES]
    found += [torch.full((3, h, w), grey, dtype=torch.uint8) for h, w, grey in ((64, 64, 0), (120, 80, 128))]
    return found + [torch.randint(0, 256, (3, h, 64), generator=g, dtype=torch.uint8) for h in (64, 90)]


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    "A transfer set without impressions"
    folder = tmp_path_factory.mktemp("textures")
    write_shard(folder, 0, 0, make_textures(20, (64, 64), "leaves", 0), [NOTHING] * 20, "texture", {})
    join_shards(folder, 1, CLASSES)
    return folder


def see(detector, images): return predict(detector, images, batch_size=1, progress=False)


def same(detector, exported, images):
    "Whether both see the same; how many detections there were"
    a, b = see(detector, images), see(exported, images)
    found = parity(a, b)
    assert found["alone"] == 0, found
    return sum(len(d["labels"]) for d in a)


CHANGES = {
    "as it is": {},
    "50 proposals": {"test_proposals": 50},
    "5 proposals": {"test_proposals": 5},
    "keeps the shape": {"resize": "keep", "size": (64, 96)},
    "proposals have a least score": {"rules": Rules(proposal_score=.2)},
    "few detections": {"rules": Rules(score=.3, detections=3)},
    "an output that stands for nothing": {"classes": ("Car", None, "Cyclist")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_says_what_its_detector_says(change, detector, images, tmp_path):
    d = fill(dataclasses.replace(detector.spec, **CHANGES[change]), detector.state_dict())
    file = export_onnx(d, tmp_path / "d.onnx")
    assert len(images) >= 20 and same(d, OnnxDetector(file), images) > 20
    assert OnnxDetector(file).spec == d.spec and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("resize", ["squeeze", "keep"])
def test_nothing_is_found_in_a_file_either(resize, detector, images, tmp_path):
    d = fill(dataclasses.replace(detector.spec, resize=resize, rules=Rules(score=.9999)), detector.state_dict())
    assert same(d, OnnxDetector(export_onnx(d, tmp_path / "d.onnx")), images) == 0


FAMILIES = {
    "frozen norms": {"backbone": "resnet50", "width": .125, "rules": Rules(norm="frozen", score=.02)},
    "mobilenet_v2": {"backbone": "mobilenet_v2", "width": .25},
    "mobilenet_v3_large": {"backbone": "mobilenet_v3_large", "width": .5, "strides": (32, 32),
        "anchors": ((16., 32.), (32., 64.), (64., 128.))},
    "convolutions everywhere": {"width": .125, "fpn_norm": True, "rpn_convs": 2, "rpn_channels": 8, "box_convs": 2, "box_channels": 12},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves(family, images, tmp_path):
    "Untrained, with weights and moments that are not trivial; all norms are folded into convolutions"
    torch.manual_seed(0)
    few = {"anchors": (8, 16, 32, 64, 128), "rules": Rules(score=.02)} | FAMILIES[family]
    d = build_detector(DetectorSpec(["a", "b"], (64, 64), fpn_channels=16, head_channels=32, **few)).eval()
    with torch.no_grad():
        for k, v in d.state_dict().items():
            if k.endswith("running_var"): v.copy_(1 + torch.rand(v.shape))
            elif k.endswith("running_mean") or k.endswith(("bn.bias", "bn1.bias")): v.copy_(torch.randn(v.shape) * .1)
        d(torch.rand(4, 3, 64, 64).unbind())
        for m in (d.rpn.head.cls_logits, d.rpn.head.bbox_pred): m.weight.mul_(30)
        d.roi_heads.box_predictor.cls_score.weight.mul_(3)
    file = export_onnx(d, tmp_path / "d.onnx")
    assert same(d, OnnxDetector(file), images[6:14]) > 50
    assert not {"BatchNormalization", "ScatterElements", "Loop"} & {n.op_type for n in onnx.load(file).graph.node}
    assert sum("bbox_pred" in n for n in predictors(onnx.load(file))) == len(d.spec.anchors) + 1
    close = parity(see(d, images[:4]), see(fake_quantize(d, images[:4], 16, 16), images[:4]), .02, 1.) # norms folded, and all in its place
    assert close["alone"] <= 2


@pytest.mark.parametrize("opset", [16, 18, 20])
def test_other_opsets(opset, detector, images, tmp_path):
    file = export_onnx(detector, tmp_path / "d.onnx", opset)
    assert onnx.load(file).opset_import[0].version == opset and same(detector, OnnxDetector(file), images[8:14])


def test_exporting_leaves_the_detector_and_repeats(detector, tmp_path):
    before, modes = weights_hash(detector), [m.training for m in detector.train().modules()]
    files = [export_onnx(detector, tmp_path / n) for n in ("a.onnx", "b.onnx")]
    assert files[0].read_bytes() == files[1].read_bytes() and weights_hash(detector) == before
    assert [m.training for m in detector.modules()] == modes
    detector.eval()


def test_torchscript_says_the_same(detector, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(plain(detector))
        seen = [scripted([image / 255])[1][0] for image in images]
    assert parity(see(detector, images), seen)["alone"] == 0


def test_the_successor_of_the_exporter(detector, images, textures, tmp_path, monkeypatch):
    "torch's new exporter, with the one function of torchvision that it cannot trace replaced"
    pytest.importorskip("onnxscript")
    def batched_nms(boxes, scores, classes, overlap): # one row more: nothing has no maximum
        apart = torch.cat([boxes, boxes.new_zeros(1, 4)]).max() + 1
        return torchvision.ops.nms(boxes + (classes.to(boxes) * apart)[:, None], scores, overlap)
    monkeypatch.setattr("torchvision.ops.boxes.batched_nms", batched_nms)
    side = {i + 1: torch.export.Dim(n, min=16, max=4096) for i, n in enumerate(("height", "width"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(OneImage(exportable(detector)).eval(), (torch.zeros(3, 64, 64),), dynamo=True, opset_version=20,
            input_names=["image"], output_names=["boxes", "labels", "scores"], dynamic_shapes=(side,), verbose=False)
    monkeypatch.undo()
    graph = program.model_proto
    onnx.helper.set_model_props(graph, metadata(detector.spec))
    (tmp_path / "new.onnx").write_bytes(graph.SerializeToString())
    assert same(detector, OnnxDetector(tmp_path / "new.onnx"), images) > 100
    assert len(predictors(graph)) == 12
    int8 = quantize(tmp_path / "new.onnx", textures, tmp_path / "int8.onnx", images=4)
    assert agreement(see(detector, Scenes(16, 2000)), see(OnnxDetector(int8), Scenes(16, 2000)), CLASSES).AP > .5


def fresh(code, hidden, *args):
    "A process from which modules are hidden; what it printed"
    done = subprocess.run([sys.executable, "-c", HIDE.format(hidden=hidden) + code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_anybody_reads_it(detector, tmp_path):
    "The reader of the notebook, without torch and moi, on an image of another size and with an alpha channel"
    d = fill(dataclasses.replace(detector.spec, rules=Rules(score=.05)), detector.state_dict())
    file = export_onnx(d, tmp_path / "d.onnx")
    scenes = [draw_scene((90, 120), 40 + i)[0] for i in range(12)]
    found = see(d, scenes)
    i = max(range(12), key=lambda i: int((found[i]["scores"] >= .5).sum()))
    write_image(tmp_path / "scene.png", scenes[i])
    said = [line.split() for line in fresh(READER, ("moi", "torch", "torchvision"), file, tmp_path / "scene.png").splitlines()]
    sure = found[i]["scores"] >= .5
    assert sure.any() and [w[0] for w in said] == [CLASSES[k - 1] for k in found[i]["labels"][sure]]
    numbers = np.array([[float(x) for x in w[1:]] for w in said])
    np.testing.assert_allclose(numbers[:, 0], found[i]["scores"][sure], atol=1e-3)
    np.testing.assert_allclose(numbers[:, 1:], found[i]["boxes"][sure], atol=.11)
    lines = [line for line in READER.splitlines() if line and "import" not in line]
    assert len(lines) <= 10


def test_metadata_is_enough_without_moi(detector):
    spec = dataclasses.replace(detector.spec, classes=("Car", None, "Cyclist"), resize="keep", size=(64, 96))
    about = metadata(spec)
    assert json.loads(about["classes"]) == {"1": "Car", "3": "Cyclist"} and json.loads(about["size"]) == [64, 96]
    assert "shorter side of 64 pixels, or a longer one of 96" in about["preprocessing"] and about["resize"] == "keep"
    assert "squeezed to 64x64" in metadata(detector.spec)["preprocessing"] and spec_from_json(about["moi"]) == spec
    assert all(isinstance(v, str) for v in about.values())


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory): return export_onnx(detector, tmp_path_factory.mktemp("exported") / "d.onnx")


@pytest.fixture(scope="module")
def int8(exported, textures, tmp_path_factory):
    "Files by whether each channel has a scale of its own, calibrated on a transfer set"
    at = tmp_path_factory.mktemp("int8")
    return {each: quantize(exported, textures, at / f"{each}.onnx", each) for each in (True, False)}


def told(file): return {p.key: p.value for p in onnx.load(file).metadata_props}


@pytest.mark.parametrize("per_channel", [True, False])
def test_int8(per_channel, detector, exported, int8, textures, tmp_path):
    handlers, small = logging.getLogger().handlers[:], int8[per_channel]
    assert small.stat().st_size < .4 * exported.stat().st_size
    assert metadata(detector.spec).items() <= told(small).items()
    assert json.loads(told(small)["int8"]) == {"images": 20, "per_channel": per_channel, "transfer_set": set_hash(textures)}
    scenes = Scenes(24, 2000)
    seen = [predict(d, scenes, progress=False) for d in (detector, OnnxDetector(small))]
    assert agreement(*seen, CLASSES).AP > .6 and parity(*seen)["alone"] > 0
    again = quantize(exported, textures, tmp_path / "again.onnx", per_channel)
    assert again.read_bytes() == small.read_bytes() and list(tmp_path.iterdir()) == [again]
    assert logging.getLogger().handlers == handlers
    with pytest.raises(ValueError, match="images is 0; at least 1 is needed"): quantize(exported, textures, again, images=0)
    with pytest.raises(FileNotFoundError, match="no transfer set"): quantize(exported, tmp_path, again)


def grids(path):
    "Of a file: channels and scales of each layer's weights; scale and zero point of what each gives, the predictors aside"
    graph = onnx.load(path).graph
    numbers = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    read = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    given = {n.input[0]: n for n in graph.node if n.op_type == "QuantizeLinear"}
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] in read]
    weights = [[numbers[name] for name in read[n.input[1]].input[:2]] for n in layers]
    steps = [(float(numbers[q.input[1]]), int(numbers[q.input[2]]) + 128) for q in (given[n.output[0]] for n in layers)]
    return [(len(w), s.size) for w, s in weights], sorted(steps)


def test_a_scale_for_each_channel_or_one_for_a_layer(int8):
    (each, ranges), (one, same) = grids(int8[True]), grids(int8[False])
    assert len(each) > 30 and all(n == channels > 1 for channels, n in each) and all(n == 1 for _, n in one) and ranges == same


def test_any_images_calibrate(exported, int8, tmp_path):
    shown = list(make_textures(20, (64, 64), "leaves", 0)) # what the transfer set holds
    small = quantize(exported, shown, tmp_path / "int8.onnx")
    about = json.loads(told(small)["int8"])
    assert grids(small) == grids(int8[True]) and about.keys() == {"images", "per_channel", "pixels"} and about["images"] == 20
    with pytest.raises(ValueError, match="no image to calibrate on"): quantize(exported, [], small)


def test_simulated_bits(detector, textures, int8):
    "The grids are the file's; 16 bits say what float32 says, 8 as much of it as INT8 does, fewer bits less and less"
    few = {b: fake_quantize(detector, textures, b) for b in (16, 8, 4, 2)}
    steps = sorted((s, z) for m in few[8].modules() for h in m._forward_hooks.values() for s, z, *_ in h.__self__.grids)
    assert np.allclose(steps, grids(int8[True])[1], rtol=1e-4, atol=0)
    assert not any(m._forward_hooks for n, m in few[8].named_modules() if "box_predictor" in n or "cls_logits" in n)
    scenes = Scenes(16, 2000)
    seen = {k: predict(d, scenes, progress=False) for k, d in {**few, "fp32": detector, "int8": OnnxDetector(int8[True])}.items()}
    left = {k: agreement(seen["fp32"], v, CLASSES).AP for k, v in seen.items()}
    assert left[16] > .95 and abs(left[8] - left["int8"]) < .1 and left[8] > .7 > left[4] + .2 and left[2] < .05, left
    coarse = fake_quantize(detector, textures, 16, weights=3, per_channel=False, images=1)
    assert all(len(m.weight.unique()) <= 7 for m in coarse.modules() if m._forward_hooks)
    for name in ("activations", "weights"):
        with pytest.raises(ValueError, match=f"{name} is 17; allowed is 2 to 16 bits"): fake_quantize(detector, textures, **{name: 17})


def test_a_file_is_asked_as_a_detector_is(detector, tmp_path):
    exported = OnnxDetector(export_onnx(detector, tmp_path / "d.onnx"), threads=1)
    scenes = [image / 255 for image, _ in Scenes(3, 1000)]
    found = exported(scenes)
    assert [d.keys() for d in found] == [{"boxes", "labels", "scores"}] * 3 and found[0]["labels"].dtype == torch.int64
    assert all((d["scores"].diff() <= 0).all() for d in found) # falling, as torchvision's
    assert torch.equal(exported([scenes[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)])[0]["boxes"], found[0]["boxes"])
    took = latency({"torch": detector, "onnx": exported}, scenes)
    assert set(took) == {"torch", "onnx"} and all(v > 0 for v in took.values())
    with pytest.raises(FileNotFoundError, match="no file"): OnnxDetector(tmp_path / "nowhere.onnx")
    bare = onnx.load(tmp_path / "d.onnx")
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(ValueError, match="not exported by moi"): OnnxDetector(tmp_path / "bare.onnx")


WITHOUT = """
from moi.export import OnnxDetector, export_onnx, quantize
for ask in (lambda: export_onnx(None, "x"), lambda: OnnxDetector("x"), lambda: quantize("x", "x", "x")):
    try: ask()
    except ImportError as e: print(e)
"""


def test_without_the_extra_it_says_what_to_install():
    said = fresh(WITHOUT, ("onnx", "onnxruntime")).splitlines()
    assert len(said) == 3 and all("pip install 'moi[export]'" in line for line in said)


# The notebook that measures what compression brings

COMPRESSION = Path(__file__).parents[1] / "nbs/experiments/compression.ipynb"
TINY = {"scenes": [8, 4, 6], "size": [64, 64], "teacher_width": .25, "fpn_channels": 16, "head_channels": 32, "teacher_steps": 4,
    "teacher_batch": 4, "impressions": 2, "textures": 2, "synthesis_steps": 2, "distill_steps": 2, "batch": 2, "baselines": [],
    "device": "cpu", "timed": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two finished runs of one teacher"
    place = tmp_path_factory.mktemp("compression")
    slim = run(TINY | {"name": "slim", "widths": "slim", "student_proposals": 20, "export": ["onnx"]}, place, progress=False)
    return place, slim, run(TINY | {"name": "half", "widths": "half"}, place, progress=False)


def test_the_teacher_is_timed_at_its_students_proposals(runs):
    _, slim, half = runs
    took = slim["latency"]
    assert took.keys() == {"teacher", "student", "teacher_same_proposals"} and all(t.keys() == {"torch", "onnx"} for t in took.values())
    assert took["teacher_same_proposals"]["onnx"] < took["teacher"]["onnx"] # 20 regions, not 1,000
    assert half["latency"]["teacher_same_proposals"] == half["latency"]["teacher"] # it is the same


def execute(parameters):
    "The cells of the notebook, in this process; what they left"
    cells = [c.source for c in nbformat.read(COMPRESSION, 4).cells if c.cell_type == "code"]
    names = {"__annotations__": {}}
    exec("\n".join([cells[0], *(f"{k} = {v!r}" for k, v in parameters.items()), *cells[1:]]).replace("%matplotlib inline", ""), names)
    return names


def test_the_notebook_on_compression(runs, tmp_path, monkeypatch):
    "To the end, of tiny runs; a second time nothing is made"
    place, slim, half = runs
    asked, kept, threads = [], {}, torch.get_num_threads()
    def export(detector, path): # instead of what takes long, and is tested above
        kept[Path(path)] = detector
        return save_detector(detector, path)
    def quantized(onnx_path, shown, path, per_channel=True, images=32):
        asked.append((len(shown) if isinstance(shown, list) else "transfer set", per_channel))
        return export(kept[Path(onnx_path)], path)
    stand_in = {"export_onnx": export, "quantize": quantized, "OnnxDetector": kept.__getitem__}
    for name, function in stand_in.items(): monkeypatch.setattr(f"moi.export.{name}", function)
    small = {"runs": ["slim"], "half": "half", "folder": str(place), "out": str(tmp_path / "out"), "threads": threads, "calibrated": 2,
        "bits": [4], "fewer": 10, "proposals": [30], "side": 64, "width": .25, "fpn_channels": 16, "head_channels": 32, "large": 2}
    execute(small)
    assert asked.count((2, True)) == 10 + 3 and asked.count((2, False)) == 10 and asked.count(("transfer set", True)) == 2
    rows = {f: json.loads((tmp_path / "out" / f"{f}.json").read_text())["rows"] for f in ("int8", "latency", "full-size")}
    assert len(rows["int8"]) == 2 * (1 + 3 * 5) and all({"AP", "AP50", "agreement", "of", "on"} <= r.keys() for r in rows["int8"].values())
    assert rows["latency"].keys() == {"teacher", "teacher, 20 proposals", "teacher, 10 proposals", "teacher, 40×40 pixels", "teacher, INT8",
        "half", "slim", "slim, INT8", "slim, 10 proposals", "milliseconds"}
    assert rows["latency"]["milliseconds"]["images"] == 6 and rows["latency"]["slim"]["parameters"] < rows["latency"]["half"]["parameters"]
    assert rows["latency"]["slim"]["of"]["detector"] == slim["weights"]["student"]
    assert [d["name"] for d in rows["full-size"]["milliseconds"]["detectors"]] == ["teacher", "half", "slim"]
    assert (tmp_path / "out/compression.png").is_file()
    asked.clear()
    before = {f: f.read_bytes() for f in (tmp_path / "out").glob("*.json")}
    execute(small)
    assert not asked and {f: f.read_bytes() for f in (tmp_path / "out").glob("*.json")} == before and torch.get_num_threads() == threads
    for wrong, says in (({"runs": ["slm"]}, "run 'slm' is not finished"), ({"fewr": 10}, "no parameter 'fewr'; did you mean 'fewer'")):
        with pytest.raises((ValueError, FileNotFoundError), match=says): execute(small | wrong)
