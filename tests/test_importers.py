"Detectron2 and MMDetection: boxes as the frameworks found them, the same detector in other clothes, what is refused, and a student of each"
import functools
import json
import logging
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moi.data import read_image
from moi.detector import DetectorSpec, Rules, build_detector, detector_hash, fill, load_detector, plain, save_detector
from moi.experiment import OWN_TEACHER, run
from moi.export import OnnxDetector, export_onnx, parity
from moi.importers import parse_config, read_checkpoint, read_config, read_detectron2, read_framework, read_mmdetection, unwrap
from moi.outputs import anchors_of, features
from moi.regions import batch_iou, nearest_anchors
from moi.teachers import load

HERE = Path(__file__).parent/"oracles"
COPIED, OTHERS = ("detectron2_r18", "mmdet_r18"), ("detectron2_fpn_bn", "detectron2_fpn_torchvision", "mmdet_v3", "mmdet_caffe")
D2, MM = HERE/"detectron2_r18", HERE/"mmdet_r18"
SHAPES = ("ball", "box", "cone", "disc")


def weights(folder):
    "The file of weights in an oracle's folder"
    return next(p for p in (folder/"checkpoint.safetensors", folder/"checkpoint.pth") if p.is_file())


def shown(folder, name):
    return read_image(folder/"images"/name) / 255


def seen(detector, image):
    with torch.inference_mode(): return detector([image])[0]


def expected(folder, name):
    found = json.loads((folder/"expected.json").read_text())[name]
    return found, {"boxes": torch.tensor(found["boxes"]).view(-1, 4), "scores": torch.tensor(found["scores"]),
        "labels": torch.tensor(found["labels"]) + 1}


def enlarged(found, to, of):
    "Detections in another image's pixels, as the frameworks bring them back"
    scale, most = (torch.tensor([w, h] * 2, dtype=torch.float32) for h, w in ([t / o for t, o in zip(to, of)], to))
    return found | {"boxes": torch.minimum((found["boxes"] * scale).clamp(min=0), most)}


def agree(found, wanted, what):
    assert torch.equal(found["labels"], wanted["labels"]), what
    far, unsure = ((found[k] - wanted[k]).abs().max().item() for k in ("boxes", "scores"))
    print(f"{what}: {len(wanted['labels'])} detections, boxes to {far:.2g} px, scores to {unsure:.2g}")
    assert far <= 1e-3 and unsure <= 1e-4, what


@pytest.mark.parametrize("name", ["a.png", "b.png", "c.png", "d.png"])
@pytest.mark.parametrize("oracle", COPIED + OTHERS)
def test_boxes_are_the_frameworks(oracle, name, shared):
    folder = HERE/oracle if oracle in COPIED else shared(f"oracles/{oracle}")
    about, wanted = expected(folder, name)
    classes, size = json.loads((folder/"classes.json").read_text()), about["input_size"]
    detector = load(weights(folder), classes, size) # its configuration lies beside it
    assert detector.spec.size == tuple(size) and detector.spec.resize == "keep"
    if name != "d.png": return agree(seen(detector, shown(folder, name)), wanted, f"{oracle}, {name}")
    found = enlarged(seen(detector, shown(folder, "d_network_input.png")), about["original_size"], size)
    agree(found, wanted, f"{oracle}, d.png as the framework resized it")
    detector = load(weights(folder), classes, config=folder/about["config"]) # and now it resizes
    assert detector.spec.size == (224, 288)
    agree(seen(detector, shown(folder, name)), wanted, f"{oracle}, d.png resized here")


@functools.cache
def read(folder): return unwrap(read_checkpoint(weights(folder))), read_config(next(folder.glob("config_resize.*")))


def state_of(folder): return dict(read(folder)[0])


def config_of(folder): return dict(read(folder)[1])


def reader(folder): return read_detectron2 if folder is D2 else read_mmdetection


def save(tmp_path, found, folder, name="x.pth"):
    "A checkpoint beside its configuration"
    (tmp_path/"config").with_suffix(".yaml" if folder is D2 else ".py").write_bytes(next(folder.glob("config_resize.*")).read_bytes())
    if name.endswith(".pkl"): (tmp_path/name).write_bytes(pickle.dumps(found))
    else: torch.save(found, tmp_path/name)
    return tmp_path/name


def same(a, b):
    "The same detector to the bit"
    assert a.spec == b.spec
    assert detector_hash(a) == detector_hash(b)


@pytest.mark.parametrize("folder", [D2, MM], ids=COPIED)
def test_files_in_other_wrappings(folder, tmp_path, caplog):
    "Nested, prefixed, with a second set of weights, as numpy arrays, with heads that no box depends on"
    state, caplog = state_of(folder), (caplog.set_level(logging.INFO), caplog)[1]
    plainly = load(save(tmp_path, state, folder), SHAPES)
    mask = "roi_heads.mask_head.a.weight" if folder is D2 else "roi_head.mask_head.a.weight"
    zeros = {f"module.{k}": torch.zeros_like(v) for k, v in state.items()} | {"steps": torch.tensor(3)}
    wrapped = {"state_dict": {f"module.{k}": v for k, v in (state | {mask: torch.ones(1)}).items()}, "ema_state_dict": zeros,
        "optimizer": {"lr": .1}}
    caplog.clear()
    same(load(save(tmp_path, wrapped, folder), SHAPES), plainly)
    assert {"left out: a mask head", "left out, beside state_dict: optimizer",
        "left out: a second set of weights, ema_state_dict; ema=True takes it"} <= {r.getMessage() for r in caplog.records}
    assert not load(save(tmp_path, wrapped, folder), SHAPES, ema=True).backbone.body.conv1.weight.any()
    with pytest.raises(ValueError, match="it has no second set of weights"):
        load(save(tmp_path, state, folder), SHAPES, ema=True)
    arrays = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "somebody"}
    same(load(save(tmp_path, arrays, folder, "x.pkl"), SHAPES), plainly)
    same(load(save_detector(plainly, tmp_path/"y.safetensors")), plainly)
    with pytest.raises(ValueError, match="config is 'x.yaml', and .* was saved by moi"):
        load(tmp_path/"y.safetensors", config="x.yaml")


def test_what_a_checkpoint_of_mmdetections_carries(tmp_path, caplog):
    "Its configuration and the names of its classes; a file beside it beats the first, what is given beats all"
    meta = {"cfg": (MM/"config_resize.py").read_text(), "dataset_meta": {"classes": ("a", "b", "c", "d")}}
    torch.save({"meta": meta, "state_dict": state_of(MM)}, tmp_path/"x.pth")
    carried = load(tmp_path/"x.pth")
    assert carried.spec.classes == ("a", "b", "c", "d") and carried.spec.size == (224, 288)
    same(load(tmp_path/"x.pth", SHAPES), load(weights(MM), config=MM/"config_resize.py"))
    (tmp_path/"x.py").write_text(meta["cfg"].replace("score_thr=0.1", "score_thr=0.3"))
    assert load(tmp_path/"x.pth").spec.rules.score == .3
    fields = dict(resize="squeeze", anchors=((8.,), (16.,), (32.,), (64.,), (128.,)))
    given = load(tmp_path/"x.pth", size=(64, 96), config=MM/"config.py", rules={"score": .5}, **fields).spec
    assert given.rules.score == .5 and given.size == (64, 96) and all(getattr(given, k) == v for k, v in fields.items())
    older = {"CLASSES": "abcd", "config": meta["cfg"]}
    torch.save({"meta": older, "state_dict": state_of(MM)}, tmp_path/"y.pth")
    with pytest.raises(ValueError, match="1 names for 5 outputs"):
        load(tmp_path/"y.pth")


STEM = "backbone.bottom_up.stem.conv1"
RPN = {D2: ("proposal_generator.rpn_head.objectness_logits", "proposal_generator.rpn_head.anchor_deltas"),
    MM: ("rpn_head.rpn_cls", "rpn_head.rpn_reg")}


def fours(v, change):
    "Rows of deltas, changed four by four"
    return change(v.view(-1, 4, *v.shape[1:]).movedim(1, -1)).movedim(-1, 1).reshape(v.shape)


def changed(state, config, folder, bgr=False, alike=False, deltas=False):
    "The same detector, written down in another way"
    d2 = folder is D2
    stem, box = (STEM, "roi_heads.box_predictor.bbox_pred") if d2 else ("backbone.conv1", "roi_head.bbox_head.fc_reg")
    state, config = dict(state), dict(config)
    rows = lambda name, change: state.update({f"{name}.{k}": change(state[f"{name}.{k}"], k) for k in ("weight", "bias")})
    if bgr:
        state[f"{stem}.weight"] = state[f"{stem}.weight"].flip(1)
        names = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD") if d2 else ("model.data_preprocessor.mean", "model.data_preprocessor.std")
        config |= {k: config[k][::-1] for k in names} | ({"INPUT.FORMAT": "BGR"} if d2 else {"model.data_preprocessor.bgr_to_rgb": False})
    if alike: rows(box, lambda v, kind: v[:4])
    if deltas and d2: # weights of other sizes
        config |= {"MODEL.RPN.BBOX_REG_WEIGHTS": (2., 2., 4., 4.), "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (5., 5., 10., 10.)}
        scales = {RPN[folder][1]: (2., 2., 4., 4.), box: (.5, .5, 2., 2.)}
        for name, by in scales.items(): rows(name, lambda v, kind, by=by: fours(v, lambda x: x * torch.tensor(by)))
    elif deltas: # other standard deviations, and means
        means, stds = (.5, -.25, .25, .125), (.2, .2, .1, .1)
        config |= {"model.roi_head.bbox_head.bbox_coder.target_stds": stds, "model.roi_head.bbox_head.bbox_coder.target_means": means}
        by, less = torch.tensor([.5, .5, 2., 2.]), torch.tensor(means) / torch.tensor(stds)
        rows(box, lambda v, kind: fours(v, lambda x: x * by - (less if kind == "bias" else 0)))
    return state, config


@pytest.mark.parametrize("folder", [D2, MM], ids=COPIED)
@pytest.mark.parametrize("how", ["bgr", "deltas", "alike"])
def test_what_weights_can_say_is_written_into_them(folder, how):
    state, config = state_of(folder), config_of(folder)
    fields, tensors = reader(folder)(state, config)
    again, other = reader(folder)(*changed(state, config, folder, **{how: True}))
    if how == "bgr": assert again["rules"].mean == pytest.approx(fields["rules"].mean)
    assert again | {"rules": fields["rules"]} == fields
    if how == "alike": # each class has the first one's box
        for k in ("weight", "bias"):
            first = tensors[f"roi_heads.box_predictor.bbox_pred.{k}"].unflatten(0, (-1, 4))[1]
            assert torch.equal(other[f"roi_heads.box_predictor.bbox_pred.{k}"].unflatten(0, (-1, 4))[1:], first.expand(4, *first.shape))
        return
    assert all(torch.allclose(other[k], v, rtol=1e-6, atol=1e-6) for k, v in tensors.items())


SIDES, RATIOS = ((20., 30., 44.), (40., 60., 88.), (80., 120., 176.), (160., 240., 352.), (320., 480., 704.)), (.4, 1., 2.2, 3.)


def test_several_anchors_at_a_place_are_the_frameworks(tmp_path):
    "Each anchor of ours is the one that the same row of the framework's RPN speaks of"
    kinds = len(SIDES[0]) * len(RATIOS)
    four = lambda w, h, at=0.: [at - w / 2, at - h / 2, at + w / 2, at + h / 2]
    by_size = [[four(s / r**.5, s * r**.5) for s in sides for r in RATIOS] for sides in SIDES]
    by_ratio = [[four(s / r**.5, s * r**.5) for r in RATIOS for s in sides] for sides in SIDES]
    half = [[four(s / r**.5, s * r**.5, 2. * 2**i) for r in RATIOS for s in sides] for i, sides in enumerate(SIDES)]
    a = "model.rpn_head.anchor_generator."
    strides = {f"{a}strides": ((4, 4), 8, 16, 32, 64)}
    scales = {f"{a}scales": (5., 7.5, 11.), f"{a}ratios": RATIOS}
    octaves = {f"{a}octave_base_scale": 5, f"{a}scales_per_octave": 3, f"{a}scales": None, f"{a}ratios": RATIOS}
    sizes = [[5 * s * 2**(i / 3) for i in range(3)] for s in (4, 8, 16, 32, 64)]
    cases = [(D2, {"MODEL.ANCHOR_GENERATOR.SIZES": SIDES, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (RATIOS,)}, by_size),
        (D2, {"MODEL.ANCHOR_GENERATOR.SIZES": SIDES[:1], "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (RATIOS,) * 5}, by_size[:1] * 5),
        (MM, scales | strides, by_ratio), (MM, scales | {f"{a}scale_major": False}, by_size),
        (MM, scales | {f"{a}center_offset": .5}, half),
        (MM, {f"{a}base_sizes": (1, 2, 4, 8, 16), f"{a}scales": SIDES[0], f"{a}ratios": RATIOS}, by_ratio),
        (MM, octaves, [[four(s / r**.5, s * r**.5) for r in RATIOS for s in level] for level in sizes])]
    for folder, change, theirs in cases:
        state, (logits, deltas) = state_of(folder), RPN[folder]
        state |= {f"{logits}.weight": torch.zeros(kinds, 32, 1, 1), f"{logits}.bias": torch.arange(float(kinds)),
            f"{deltas}.weight": torch.zeros(4 * kinds, 32, 1, 1), f"{deltas}.bias": torch.arange(4. * kinds)}
        fields, tensors = reader(folder)(state, config_of(folder) | change)
        detector = fill(DetectorSpec(**fields | {"classes": SHAPES}), tensors)
        order = detector.rpn.head.cls_logits.bias.int()
        assert torch.equal(detector.rpn.head.bbox_pred.bias.view(-1, 4)[:, 0].int(), 4 * order)
        for ours, level in zip(detector.rpn.anchor_generator.cell_anchors, torch.tensor(theirs)):
            assert torch.allclose(ours, level[order], atol=1e-4)


def test_the_nearest_anchor_overlaps_most():
    "Also where anchors stand on grids of their own, half a stride off, on an image that isn't a multiple of the fifth level's"
    rules = Rules(whole_anchors=False, own_strides=True, anchor_offset=.5)
    detector = build_detector(DetectorSpec(SHAPES, (160, 224), width=.125, fpn_channels=8, head_channels=8, rules=rules)).eval()
    view = features(detector, torch.zeros(1, 3, 160, 224))
    corner = torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(0)) * 120
    boxes = torch.cat([corner, corner + 20 + corner.flip(1) / 2], 2)
    overlap = batch_iou(boxes, anchors_of(detector, view, (160, 224))[None])
    assert torch.allclose(overlap.gather(2, nearest_anchors(detector, view, boxes, (160, 224))).amax(2), overlap.amax(2))


@pytest.mark.parametrize("folder", [D2, MM], ids=COPIED)
def test_a_dead_size_changes_nothing(folder, tmp_path):
    "One more size at each place, whose anchors make boxes too small to be proposed"
    d2, (logits, deltas) = folder is D2, RPN[folder]
    state, config = state_of(folder), config_of(folder)
    dead = {f"{logits}.bias": torch.full((3,), -50.), f"{deltas}.bias": torch.tensor([0., 0, -50, -50]).repeat(3)}
    for k in (f"{logits}.weight", f"{logits}.bias", f"{deltas}.weight", f"{deltas}.bias"):
        rows = state[k].view(3, -1, *state[k].shape[1:])
        new = dead.get(k, torch.zeros_like(state[k])).view(rows.shape)
        state[k] = torch.stack([rows, new], 0 if d2 else 1).reshape(-1, *state[k].shape[1:]) # size by size, or ratio by ratio
    sizes = {"MODEL.ANCHOR_GENERATOR.SIZES": tuple((s, s / 5) for (s,) in config["MODEL.ANCHOR_GENERATOR.SIZES"])} if d2 else {
        "model.rpn_head.anchor_generator.scales": (5, 1)}
    fields, tensors = reader(folder)(state, config | sizes)
    found = seen(fill(DetectorSpec(**fields | {"classes": SHAPES}), tensors), shown(folder, "d.png"))
    agree(found, expected(folder, "d.png")[1], f"{folder.name}, d.png with a dead size")


@pytest.mark.parametrize("folder", [D2, MM], ids=COPIED)
def test_it_leaves_as_it_is(folder, tmp_path):
    "Without our kernels, and as ONNX: its rules are in the graph, resizing among them"
    detector = load(weights(folder), SHAPES, config=folder/next(folder.glob("config_resize.*")).name)
    noise = torch.randint(0, 256, (3, 39, 78), generator=torch.Generator().manual_seed(0)) / 255 # 2:1: where rounding is a matter of order
    images = [shown(folder, n) for n in ("a.png", "b.png", "c.png", "d.png")] + [noise]
    found, file = [seen(detector, i) for i in images], OnnxDetector(export_onnx(detector, tmp_path/"x.onnx"))
    assert file.spec == detector.spec and sum(len(d["labels"]) for d in found) > 50
    for other in (plain(detector), file):
        compared = parity(found, [seen(other, i) for i in images])
        assert compared["alone"] == 0, compared
    agree(file([images[3]])[0], expected(folder, "d.png")[1], f"{folder.name}, d.png in onnxruntime")


@pytest.mark.parametrize("folder", [D2, MM], ids=COPIED)
def test_a_student_of_it(folder, tmp_path):
    "By the way of whoever has only a teacher: the student has its teacher's rules, is saved, loaded and exported"
    given = {"teacher": str(weights(folder)), "teacher_config": str(next(folder.glob("config_resize.*"))), "device": "cpu"}
    few = dict.fromkeys(("impressions", "textures", "shard", "agreement", "synthesis_steps", "distill_steps", "batch"), 2)
    result = run(OWN_TEACHER | given | few | {"classes": SHAPES, "size": [64, 96], "widths": {"fpn": .5, "head": .5}}, tmp_path/"runs")
    teacher, student = (load_detector(tmp_path/"runs/mine"/f"{who}.safetensors") for who in ("teacher", "student"))
    assert result["weights"]["student"] == detector_hash(student) and teacher.spec.classes == SHAPES
    assert student.spec.rules == teacher.spec.rules and student.spec.fpn_channels == teacher.spec.fpn_channels // 2
    image = shown(folder, "b.png")
    found, exported = (seen(d, image) for d in (student, OnnxDetector(export_onnx(student, tmp_path/"x.onnx"))))
    assert parity([found], [exported])["alone"] == 0 and all(v.isfinite().all() for v in found.values())


D2_NAMES = {"roi_heads.box_head.0.fc1.weight": "a cascade", "roi_heads.res5.0.conv1.weight": "a C4 or DC5 detector",
    "backbone.bottom_up.res4.0.conv2_offset.weight": "deformable convolutions",
    "roi_heads.box_head.conv1.weight": "convolutions in its box head",
    "backbone.top_block.p6.weight": "a one-stage detector",
    "proposal_generator.rpn_head.conv.conv0.weight": "several convolutions in its RPN",
    "backbone.bottom_up.stem.conv1_2.weight": "a stem of several", "backbone.fpn_lateral2.norm.weight": "norms in its pyramid",
    "something.else": "something.else: .1,., nothing is needed"}
MM_NAMES = {"roi_head.bbox_head.0.fc_cls.weight": "a cascade", "roi_head.shared_head.layer4.0.conv1.weight": "a C4 detector",
    "backbone.layer3.0.conv2.conv_offset.weight": "deformable convolutions", "bbox_head.fc_cls.weight": "MMDetection 1",
    "roi_head.bbox_head.shared_convs.0.conv.weight": "other layers than two shared",
    "rpn_head.rpn_conv.0.conv.weight": "several convolutions in its RPN",
    "backbone.stem.0.weight": "a stem of several", "backbone.layer1.0.context_block.a": "plug-ins",
    "neck.lateral_convs.0.bn.weight": "norms in its pyramid",
    "neck.fpn_convs.4.conv.weight": "the pyramid's last level", "neck.downsample_convs.0.conv.weight": "another neck"}
D2_VALUES = {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.FPN.NORM": "GN", "MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.NUM_GROUPS": 32, "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": (False, True, True, True), "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN", "INPUT.FORMAT": "YUV-BT.601",
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14, "MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "VERSION": 1}
MM_VALUES = {"model.type": "CascadeRCNN", "model.backbone.type": "ResNeXt", "model.backbone.dcn.type": "DCNv2",
    "model.backbone.deep_stem": True, "model.backbone.norm_cfg.type": "GN", "model.neck.type": "PAFPN",
    "model.neck.add_extra_convs": "on_input", "model.neck.norm_cfg.type": "GN",
    "model.neck.upsample_cfg.mode": "bilinear", "model.rpn_head.type": "GARPNHead", "model.rpn_head.loss_cls.use_sigmoid": False,
    "model.rpn_head.anchor_generator.type": "LegacyAnchorGenerator", "model.rpn_head.bbox_coder.type": "TBLRBBoxCoder",
    "model.roi_head.type": "CascadeRoIHead", "model.roi_head.bbox_roi_extractor.type": "GenericRoIExtractor",
    "model.roi_head.bbox_roi_extractor.roi_layer.type": "RoIPool", "model.roi_head.bbox_roi_extractor.finest_scale": 28,
    "model.roi_head.bbox_head.type": "DoubleConvFCBBoxHead", "model.roi_head.bbox_head.loss_cls.type": "SeesawLoss",
    "model.roi_head.bbox_head.bbox_coder.clip_border": False, "model.test_cfg.rcnn.nms.type": "soft_nms",
    "model.test_cfg.rcnn.nms.class_agnostic": True, "model.data_preprocessor.type": "DetTTAPreprocessor"}


@pytest.mark.parametrize("folder, names, values", [(D2, D2_NAMES, D2_VALUES), (MM, MM_NAMES, MM_VALUES)], ids=COPIED)
def test_what_is_not_served_is_refused_by_name(folder, names, values, tmp_path, monkeypatch):
    "And nothing is built before"
    monkeypatch.setattr("moi.teachers.fill", lambda *_: pytest.fail("it was built"))
    state, config = state_of(folder), config_of(folder)
    for name, says in names.items():
        with pytest.raises(ValueError, match=says): load(save(tmp_path, state | {name: torch.zeros(1)}, folder), SHAPES)
    for name, value in values.items():
        with pytest.raises(ValueError, match=re.escape(f"its configuration has {name} = {value!r}; ")):
            reader(folder)(state, config | {name: value})
    norm = "backbone.bottom_up.stem.conv1.norm." if folder is D2 else "backbone.bn1."
    still = {k: v for k, v in state.items() if k not in (f"{norm}running_mean", f"{norm}running_var")}
    with pytest.raises(ValueError, match="it has GroupNorm"): reader(folder)(still, config)
    parts = ("backbone.fpn_lateral2", "roi_heads.box_predictor") if folder is D2 else ("neck.lateral_convs.0", "roi_head.bbox_head.fc_cls")
    for part in parts:
        less = {k: v for k, v in state.items() if not k.startswith(part)}
        with pytest.raises(ValueError, match=f"it has no '{part}"): reader(folder)(less, config)


def test_configurations_that_are_not_served():
    a = "model.rpn_head.anchor_generator."
    for change, says in (({"MODEL.ANCHOR_GENERATOR.SIZES": ((20,), (40,))}, "anchor sizes for 2 levels; the pyramid has 5"),
            ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ((1.,),) * 4 + ((2.,),)}, "the same at each are served"),
            ({"MODEL.PIXEL_MEAN": (1., 2.)}, "Rules.mean"), ({"MODEL.RPN.NMS_THRESH": "much"}, "Rules.proposal_overlap"),
            ({"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (0., 1, 1, 1)}, "not as Detectron2 writes them"),
            ({"MODEL.ANCHOR_GENERATOR.SIZES": 3}, "not as Detectron2 writes them")):
        with pytest.raises(ValueError, match=says): load_from(D2, change)
    lost = {k: v for k, v in config_of(MM).items() if k != "model.test_cfg.rpn.nms_pre"}
    with pytest.raises(ValueError, match="has no model.test_cfg.rpn.nms_pre"): read_mmdetection(state_of(MM), lost)
    for change, says in (({f"{a}strides": (8, 16, 32, 64, 128)}, "its anchors have the strides"),
            ({f"{a}base_sizes": (4, 8, 16, 32, 65), f"{a}center_offset": .5}, "one of the two is served"),
            ({"model.test_cfg.rpn.nms_post": 100}, "fewer proposals of each level"),
            ({"model.data_preprocessor.mean": 3}, "not as MMDetection writes them"),
            ({"test_dataloader.dataset.pipeline": ({"type": "Mosaic"},)}, "a step 'Mosaic'"),
            ({"test_dataloader.dataset.pipeline": ({"type": "Pad", "size_divisor": 32},)}, "beside the model's data_preprocessor"),
            ({"test_dataloader.dataset.pipeline": ({"type": "Resize", "scale": [(96, 64), (192, 128)]},)}, "several sizes")):
        with pytest.raises(ValueError, match=says): load_from(MM, change)


def load_from(folder, change):
    "As load does, without a file"
    return read_framework("Detectron2" if folder is D2 else "MMDetection", state_of(folder), config_of(folder) | change)


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: no file 'nowhere.yaml'"): load(weights(D2), SHAPES, config="nowhere.yaml")
    with pytest.raises(ValueError, match="has no MODEL, as Detectron2's config.yaml has"): load(weights(D2), SHAPES, config=MM/"config.py")
    with pytest.raises(ValueError, match="its configuration has no model.type"): load(weights(MM), SHAPES, config=D2/"config.yaml")
    with pytest.raises(ValueError, match="its configuration leaves images as they are; give size="): load(weights(MM))
    with pytest.raises(ValueError, match="its 5 outputs have no names"): load(weights(D2), size=(64, 96))
    with pytest.raises(ValueError, match="builder is 'fasterrcnn_resnet50_fpn', and it is a file of MMDetection's"):
        load(weights(MM), builder="fasterrcnn_resnet50_fpn")
    torch.save(state_of(D2), tmp_path/"alone.pth")
    with pytest.raises(ValueError, match="alone.pth': it is a checkpoint of Detectron2 .*give config=, the config.yaml"):
        load(tmp_path/"alone.pth", SHAPES)
    (tmp_path/"alone.yaml").write_text("_BASE_: ../Base-RCNN-FPN.yaml\nMODEL: {RESNETS: {DEPTH: 18}}")
    with pytest.raises(ValueError, match="builds on _BASE_ '../Base-RCNN-FPN.yaml', which is no file"): load(tmp_path/"alone.pth", SHAPES)
    (tmp_path/"alone.yaml").write_text("MODEL: {RESNETS: {DEPTH: 18}}") # what it lacks has Detectron2's defaults, which are no pyramid's
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME = 'build_resnet_backbone'"): load(tmp_path/"alone.pth", SHAPES)


class Planted:
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args


def test_nothing_of_a_hostile_file_runs(tmp_path, shared):
    "Neither of a pickle nor of a configuration"
    mark = tmp_path/"mark"
    plant, calls = Planted(os.mkdir, str(mark)), []
    for name in ("x.pth", "x.pkl"):
        for found in ({"model": state_of(D2) | {"x": plant}}, {"meta": plant, "state_dict": state_of(MM)}):
            if name == "x.pth": torch.save(found, tmp_path/name)
            else: (tmp_path/name).write_bytes(pickle.dumps({"model": {"x": plant}}))
            with pytest.raises(ValueError, match=r"x\.p(th|kl)'.*mkdir") as e: load(tmp_path/name, SHAPES)
            calls.append(str(e.value))
    assert "convert it once" in calls[0] and "is no pickle of arrays" in calls[-1]
    (tmp_path/"x.py").write_text(f"import os\nos.mkdir({str(mark)!r})")
    (tmp_path/"x.yaml").write_text(f"MODEL: !!python/object/apply:os.mkdir [{str(mark)!r}]")
    torch.save(state_of(MM), tmp_path/"x.pth")
    with pytest.raises(ValueError, match="line 1: 'import os' is no literal"): load(tmp_path/"x.pth")
    with pytest.raises(ValueError, match="is no YAML of plain values"): load(weights(D2), SHAPES, config=tmp_path/"x.yaml")
    assert not mark.exists()
    with pytest.raises(ValueError, match=r"checkpoint\.pth' cannot be read as tensors alone: it pickles mmengine\.logging\.history_buffer"):
        load(shared("oracles/mmdet_r18")/"checkpoint.pth")


@pytest.mark.parametrize("seed", range(3))
def test_broken_pickles_of_arrays_are_refused(seed, tmp_path):
    "Bytes changed at random: it is read or refused, and nothing else happens"
    whole, rng = pickle.dumps({"model": {"a": np.arange(6.).reshape(2, 3), "b": np.int64(3)}}, seed + 2), random.Random(seed)
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 4)): broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path/"x.pkl").write_bytes(broken)
        try: read_checkpoint(tmp_path/"x.pkl")
        except ValueError as e: assert "x.pkl' is no pickle of arrays" in str(e)
    for shape in ((-1, 3), (2**40,), (7,)): # an array that claims another size than it has
        core = np.zeros(6).__reduce__()
        class Lies:
            def __reduce__(self, shape=shape, core=core): return core[0], core[1], (1, shape, *core[2][2:])
        (tmp_path/"x.pkl").write_bytes(pickle.dumps({"model": Lies()}))
        if shape != (-1, 3):
            with pytest.raises(ValueError, match="is no pickle of arrays"): read_checkpoint(tmp_path/"x.pkl")


@pytest.mark.parametrize("folder", [D2, MM], ids=COPIED)
def test_broken_configurations_are_refused(folder):
    "Values of other kinds, anywhere: read, or refused with a sentence"
    state, config, rng = state_of(folder), config_of(folder), random.Random(0)
    odd, refused = [None, -1, 0, .5, 1e9, "x", (), (1,), ((1, 2), (3,)), True, {"a": 1}], 0
    for _ in range(150):
        some = {k: rng.choice(odd) for k in rng.sample(sorted(config), 3)}
        try:
            fields, _ = load_from(folder, some)
            DetectorSpec(**fields | {"classes": SHAPES})
        except ValueError: refused += 1
    assert refused > 10
    for _ in range(60):
        text = bytearray(next(folder.glob("config_resize.*")).read_bytes())
        for _ in range(3): text[rng.randrange(len(text))] = rng.randrange(32, 127)
        try:
            parsed = parse_config(text.decode(), "x") if folder is MM else None
            if parsed: reader(folder)(state, parsed)
        except ValueError: pass
