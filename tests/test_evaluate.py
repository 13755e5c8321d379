"moi.evaluate against numbers computed by others, against the rules written out as plain loops, and its properties"
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moi.detector import DetectorSpec, build_detector
from moi.evaluate import (
    ALARMS,
    COCO_NUMBERS,
    KITTI_LEVELS,
    OUTCOMES,
    agreement,
    bootstrap,
    coco_ap,
    coco_matches,
    drawn_ap,
    flatten_pair,
    kitti_ap,
    kitti_match,
    kitti_roles,
    outcomes,
    overlaps,
    predict,
    voc_ap,
)
from moi.experiment import Stages, check_parameters, open_data, score, specs_of
from moi.layouts import open_dataset, write_coco, write_kitti, write_voc
from moi.train import Engine

ORACLES = Path(__file__).parent / "oracles"
KITTI = ("Car", "Pedestrian", "Cyclist")
LEVELS = tuple(KITTI_LEVELS)


# ---- numbers computed by others ----

def voc_padilla(folder):
    "Rows are `class [score] x y w h`; the toolkit takes x+w and y+h as the last pixels"
    samples = []
    for file in sorted((ORACLES / "voc_padilla" / folder).glob("*.txt")):
        rows = torch.tensor([[float(v) for v in line.split()[1:]] for line in file.read_text().splitlines()]).double()
        boxes = torch.cat([rows[:, -4:-2], rows[:, -4:-2] + rows[:, -2:]], 1)
        samples.append({"boxes": boxes, "labels": torch.ones(len(boxes)).long(), "scores": rows[:, 0]})
    return samples


@pytest.mark.parametrize("method, expected", [
    ("every-point", (.3371980676, .2456866804, .0222222222, 0)),
    ("11-point", (.3333333333, .2683982683, .0303030303, 0)),
])
def test_voc_oracle(method, expected):
    gt, dt = voc_padilla("gts"), voc_padilla("dets")
    assert len(gt) == len(dt) == 7
    ap = [voc_ap(gt, dt, ["object"], iou=iou, method=method, inclusive=True).AP for iou in (.1, .3, .5, .75)]
    assert ap == pytest.approx(expected, abs=1e-9)


def test_coco_oracle():
    folder = ORACLES / "coco_fakebbox100"
    truth = json.loads((folder / "sampled_gts_bbox_area.json").read_text())
    found = json.loads((folder / "cocoapi_results.json").read_text())
    label = {c["id"]: i for i, c in enumerate(truth["categories"], 1)}
    ids = sorted(im["id"] for im in truth["images"])        # equal scores are settled by the order of the images
    targets, detections = [], []
    for rows, samples, extra in ((truth["annotations"], targets, "area"), (found, detections, "score")):
        for i in ids:
            mine = [r for r in rows if r["image_id"] == i]
            xywh = torch.tensor([r["bbox"] for r in mine], dtype=torch.float64).reshape(-1, 4)
            samples.append({
                "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
                "labels": torch.tensor([label[r["category_id"]] for r in mine], dtype=torch.int64),
                "scores" if extra == "score" else extra: torch.tensor([r[extra] for r in mine], dtype=torch.float64),
            })
    result = coco_ap(targets, detections, [c["name"] for c in truth["categories"]])
    expected = (.503647, .696973, .571667, .593252, .557991, .489363,
                .386813, .593680, .595353, .654764, .603130, .553744)
    assert [result.summary[k] for k in COCO_NUMBERS] == pytest.approx(expected, abs=1e-6)
    assert result.objects == len(truth["annotations"]) == 830
    mean = np.nanmean([row["AP"] for row in result.per_class.values()])
    assert mean == pytest.approx(result.AP, abs=1e-12)      # every class has as many recalls and limits


def kitti_synth(folder, dtype):
    "KITTI's text files as targets or detections; no class of ours: left out, or class 4 if it was detected"
    names, neighbours = [c.lower() for c in KITTI], {"van": "car", "person_sitting": "pedestrian"}
    samples = []
    for file in sorted((ORACLES / "kitti_synth" / folder).glob("*.txt")):
        rows = [line.split() for line in file.read_text().splitlines()]
        kinds = [r[0].lower() for r in rows]
        numbers = torch.tensor([[float(v) for v in r[1:]] for r in rows], dtype=dtype).reshape(
            len(rows), 15 if folder == "detections" else 14)
        boxes = numbers[:, 3:7]
        if folder == "detections":
            labels = [names.index(k) + 1 if k in names else 4 for k in kinds]
            samples.append({"boxes": boxes, "labels": torch.tensor(labels).long(), "scores": numbers[:, 14]})
            continue
        ours = [i for i, k in enumerate(kinds) if neighbours.get(k, k) in names]
        labels = [names.index(neighbours.get(kinds[i], kinds[i])) + 1 for i in ours]
        samples.append({
            "boxes": boxes[ours], "labels": torch.tensor(labels).long(),
            "ignore": torch.tensor([kinds[i] in neighbours for i in ours]).bool(),
            "truncation": numbers[ours, 0], "occlusion": numbers[ours, 1].long(),
            "dontcare": boxes[[i for i, k in enumerate(kinds) if k == "dontcare"]],
        })
    return samples


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_kitti_oracle(dtype):
    expected = json.loads((ORACLES / "kitti_synth/expected.json").read_text())
    gt, dt = kitti_synth("label_2", dtype), kitti_synth("detections", dtype)
    assert len(gt) == len(dt) == 60
    result = kitti_ap(gt, dt, (*KITTI, "other"))
    for name in KITTI:
        row = result.per_class[name]
        assert [row[f"{level}_objects"] for level in LEVELS] == [
            expected["diagnostics"][name][level]["valid_gt"] for level in LEVELS]
        for sampling in ("R11", "R40"):
            assert [row[f"{level}_{sampling}"] for level in LEVELS] == pytest.approx(expected[name][sampling], abs=1e-6)
        assert result.curves[name][1] == pytest.approx(expected["diagnostics"][name]["moderate"]["precision"], abs=1e-9)


# ---- the rules as plain loops ----

def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / total if total else 0


def voc_loop(targets, detections, label, limit):
    "The devkit's loop over the detections: hits, in falling order of score, without those on difficult objects"
    ranked = [(-s, i, k) for i, d in enumerate(detections) for k, s in enumerate(d["scores"].tolist())
              if d["labels"][k] == label]
    taken, hits = set(), []
    for _, i, k in sorted(ranked):
        box = detections[i]["boxes"][k].tolist()
        objects = [(iou(box, b), -g) for g, b in enumerate(targets[i]["boxes"].tolist())
                   if targets[i]["labels"][g] == label]
        best, g = max(objects, default=(0, 0))
        if best < limit: hits.append(False)
        elif targets[i]["difficult"][-g]: continue
        else:
            hits.append((i, g) not in taken)
            taken.add((i, g))
    return hits


def voc_loop_ap(hits, n):
    "Area under the interpolated curve"
    points = [(sum(hits[:k + 1]) / n, sum(hits[:k + 1]) / (k + 1)) for k in range(len(hits))]
    recalls = [0, *(r for r, _ in points)]
    return sum((recalls[k + 1] - recalls[k]) * max(p for _, p in points[k:]) for k in range(len(points)))


def kitti_loop(target, detection, label, level, limit, threshold):
    "One frame's counting pass: hits, false alarms; with no threshold the collecting pass: the scores"
    least, occlusion, truncation = KITTI_LEVELS[level]
    boxes, scores = detection["boxes"].tolist(), detection["scores"].tolist()
    low = [b[3] - b[1] < least for b in boxes]
    live = [not small and c == label for small, c in zip(low, detection["labels"].tolist())]
    taken, hits, collected = set(), 0, []
    for g, box in enumerate(target["boxes"].tolist()):
        if target["labels"][g] != label: continue
        counts = (box[3] - box[1] > least and target["occlusion"][g] <= occlusion
                  and round(float(target["truncation"][g]), 3) <= truncation and not target["ignore"][g])
        free = [k for k in range(len(boxes)) if (low[k] or live[k]) and k not in taken and iou(boxes[k], box) > limit
                and (threshold is None or scores[k] >= threshold)]
        if not free: continue
        if threshold is None: k = max(free, key=lambda k: (scores[k], -k))
        else: k = max(free, key=lambda k: (live[k], iou(boxes[k], box) if live[k] else 0, -k))
        taken.add(k)
        if counts and live[k]:
            hits += 1
            collected.append(scores[k])
    if threshold is None: return collected
    def excused(b):
        return any(max(min(b[2], a[2]) - max(b[0], a[0]), 0) * max(min(b[3], a[3]) - max(b[1], a[1]), 0)
                   > limit * (b[2] - b[0]) * (b[3] - b[1]) for a in target["dontcare"].tolist())
    false = [live[k] and k not in taken and scores[k] >= threshold and not excused(b) for k, b in enumerate(boxes)]
    return hits, sum(false)


def crowded(seed, images=4, objects=7, found=14):
    "Small frames full of boxes that overlap, with few distinct places and scores so that there are ties"
    rng = np.random.default_rng(seed)
    def boxes(n):
        xy, wh = rng.integers(0, 5, (n, 2)) * 8, rng.integers(2, 8, (n, 2)) * 8
        return torch.tensor(np.concatenate([xy, xy + wh], 1).reshape(n, 4)).float()
    def labels(n): return torch.tensor(rng.integers(1, 3, n))
    targets, detections = [], []
    for _ in range(images):
        n, m = rng.integers(0, objects + 1), rng.integers(0, found + 1)
        targets.append({
            "boxes": boxes(n), "labels": labels(n), "ignore": torch.tensor(rng.random(n) < .2),
            "difficult": torch.tensor(rng.random(n) < .3), "occlusion": torch.tensor(rng.integers(0, 4, n)),
            "truncation": torch.tensor(rng.choice([0, .15, .16, .3, .5], n)).float(),
            "dontcare": boxes(rng.integers(0, 2))})
        detections.append({"boxes": boxes(m), "labels": labels(m), "scores": torch.tensor(rng.integers(0, 6, m) / 6)})
    return targets, detections


def outcomes_loop(target, detection, limit):
    "One image, box by box: the outcome of each object that counts, and the kind of false alarm of each detection, the best first"
    boxes, labels, scores = (detection[k].tolist() for k in ("boxes", "labels", "scores"))
    left = (target["difficult"] | target["ignore"]).tolist()
    counted = [g for g, skip in enumerate(left) if not skip]
    over = [[iou(b, g) for g in target["boxes"].tolist()] for b in boxes]
    same = [[c == g for g in target["labels"].tolist()] for c in labels]
    ranked = [k for k in sorted(range(len(boxes)), key=lambda k: (-scores[k], k)) if scores[k] >= limit]
    beside = [g for g, skip in zip(target["boxes"].tolist(), left) if skip] + target["dontcare"].tolist()
    def inside(b, a):
        return (max(min(b[2], a[2]) - max(b[0], a[0]), 0) * max(min(b[3], a[3]) - max(b[1], a[1]), 0)
                >= .5 * (b[2] - b[0]) * (b[3] - b[1]))
    outcome, explains = {}, set()
    rules = {"found": lambda k, g: same[k][g] and over[k][g] >= .5, "another class": lambda k, g: not same[k][g] and over[k][g] >= .5,
             "box off": lambda k, g: same[k][g] and .1 <= over[k][g] < .5}
    for name, fits in rules.items():
        for k in ranked:
            free = [g for g in counted if g not in outcome and fits(k, g)] if k not in explains else []
            if free:
                outcome[max(free, key=lambda g: (over[k][g], -g))] = name
                explains.add(k)
        explains |= {k for k in ranked if any(inside(boxes[k], a) for a in beside)}
    def alarm(k):
        close = {same[k][g] for g in counted if over[k][g] >= .5}
        return "" if k in explains else "second box" if True in close else "another class" if close else "background"
    return [outcome.get(g, "not seen") for g in counted], [alarm(k) for k in ranked]


def test_outcomes_equal_the_loop():
    targets, detections = crowded(0, images=400)
    for limit in (0, .5):
        told = outcomes(targets, detections, torch.full((400, 2), 96), 2, score=limit)
        loops = [outcomes_loop(t, d, limit) for t, d in zip(targets, detections)]
        codes = [OUTCOMES[k] for k in told.objects["outcome"]]
        assert codes == [o for objects, _ in loops for o in objects] and set(codes) == set(OUTCOMES)
        kinds = [ALARMS[k] if k >= 0 else "" for k in told.detections["alarm"]]
        assert kinds == [a for _, alarms in loops for a in alarms] and set(kinds) == {"", *ALARMS}
    by = told.objects["by"]
    found = told.objects["outcome"] == 0
    assert (told.detections["labels"][by] == told.objects["labels"])[found].all() and len(set(by[by >= 0])) == (by >= 0).sum()
    x1, y1, x2, y2 = told.objects["boxes"].T
    assert told.objects["area"] == pytest.approx((x2 - x1) * (y2 - y1) / 96**2)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([.3, .5, .75]))
def test_voc_equals_the_loop(seed, limit):
    targets, detections = crowded(seed)
    result = voc_ap([{k: v for k, v in t.items() if k != "ignore"} for t in targets], detections, ["a", "b"], iou=limit)
    for label, row in enumerate(result.per_class.values(), 1):
        n = sum(int(((t["labels"] == label) & ~t["difficult"]).sum()) for t in targets)
        assert row["objects"] == n
        hits = voc_loop(targets, detections, label, limit)
        assert row["detections"] == len(hits)
        if n: assert row["AP"] == pytest.approx(voc_loop_ap(hits, n), abs=1e-12)
        else: assert np.isnan(row["AP"])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(LEVELS), st.sampled_from([.3, .5]))
def test_kitti_equals_the_loop(seed, level, limit):
    targets, detections = crowded(seed)
    gt, dt = flatten_pair(targets, detections, 2, ignore=False, truncation=0., occlusion=0)
    gt["turn"] = np.concatenate([np.arange(len(t["boxes"])) for t in targets])
    areas = np.concatenate([t["dontcare"].numpy() for t in targets])
    at = np.repeat(np.arange(len(targets)), [len(t["dontcare"]) for t in targets])
    inside, _, share = overlaps(dt["boxes"], areas, dt["image"], at, limit, own=True)
    dt["excused"] = np.isin(np.arange(len(dt["boxes"])), inside[share > limit])
    d, g, v = overlaps(dt["boxes"], gt["boxes"], dt["image"], gt["image"], limit)
    pairs = d[v > limit], g[v > limit], v[v > limit]
    for label in (1, 2):
        ours, theirs = kitti_roles(gt, dt, label, level)
        frames = [partial(kitti_loop, t, f, label, level, limit) for t, f in zip(targets, detections)]
        thresholds = np.unique(dt["scores"])[::-1]
        match = kitti_match(ours, theirs, pairs, thresholds)
        expected = np.array([np.sum([frame(s) for frame in frames], 0) for s in thresholds]).reshape(-1, 2)
        assert match["hits"].tolist() == expected[:, 0].tolist()
        assert match["false"].tolist() == expected[:, 1].tolist()
        collected = sorted((s for frame in frames for s in frame(None)), reverse=True)
        chosen = kitti_match(ours, theirs, pairs)["thresholds"]
        assert set(chosen) <= set(collected)
        if collected: assert (chosen[0], chosen[-1]) == (collected[0], collected[-1])


# ---- properties ----

def apart(seed, images=3):
    "Objects that do not touch, each in a cell of its own"
    rng = np.random.default_rng(seed)
    targets = []
    for _ in range(images):
        cells = rng.permutation(24)[:rng.integers(0, 17)]
        xy = np.stack([cells % 6, cells // 6], 1) * 100 + rng.integers(0, 10, (len(cells), 2))
        boxes = np.concatenate([xy, xy + rng.integers(5, 90, xy.shape)], 1)
        targets.append({
            "boxes": torch.tensor(boxes).float().reshape(-1, 4),
            "labels": torch.tensor(rng.integers(1, 4, len(cells))),
            "truncation": torch.tensor(rng.choice([0, .15, .4], len(cells))).float(),
            "occlusion": torch.tensor(rng.integers(0, 3, len(cells)))})
    return targets, rng


def every_ap(targets, detections):
    "Each number that is an AP, of each class and protocol"
    protocols = {"voc": voc_ap, "voc11": partial(voc_ap, method="11-point"), "coco": coco_ap, "kitti": kitti_ap}
    results = {name: evaluate(targets, detections, KITTI) for name, evaluate in protocols.items()}
    return {(p, c, k): v for p, r in results.items() for c, row in r.per_class.items() for k, v in row.items()
            if k.startswith("AP") or "_R" in k}, results


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_a_perfect_detector_is_perfect(seed):
    targets, rng = apart(seed)
    detections = [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.tensor(rng.random(len(t["labels"])))}
                  for t in targets]
    numbers, results = every_ap(targets, detections)
    for (protocol, name, key), ap in numbers.items():
        if protocol != "kitti":
            assert np.isnan(ap) or ap == pytest.approx(1, abs=1e-9), (protocol, name, key)
            continue
        n = results["kitti"].per_class[name][key.split("_")[0] + "_objects"]     # 100 only from 41 objects on
        places = range(0, 41, 4) if key.endswith("R11") else range(1, 41)
        expected = 100 * sum(p < n for p in places) / len(places) if n else np.nan
        assert ap == pytest.approx(expected, abs=1e-9, nan_ok=True) or n > 41, (name, key, n)
    assert agreement(detections, detections, KITTI, confident=0.).AP == pytest.approx(1, abs=1e-9) or not any(
        len(t["labels"]) for t in targets)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.floats(0, 1), st.integers(1, 3), st.integers(0, 2))
def test_a_false_alarm_never_helps(seed, score, label, image):
    targets, rng = apart(seed)
    detections = []
    for t in targets:
        n = len(t["labels"])
        boxes = t["boxes"] + torch.tensor(rng.normal(0, 3, (n, 4))).float()
        labels = torch.where(torch.tensor(rng.random(n) < .8), t["labels"], 1)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
        detections.append({"boxes": boxes, "labels": labels,
                           "scores": torch.tensor(rng.integers(0, 9, n) / 8)})
    before, _ = every_ap(targets, detections)
    box = torch.tensor([[900., 0, 900 + rng.integers(5, 90), rng.integers(5, 90)]])
    extra = {"boxes": box, "labels": torch.tensor([label]), "scores": torch.tensor([score]).double()}
    detections[image] = {k: torch.cat([v, extra[k]]) for k, v in detections[image].items()}
    after, _ = every_ap(targets, detections)
    for key, ap in before.items(): assert np.isnan(ap) or after[key] <= ap + 1e-12, key


def test_the_order_of_classes_and_images_does_not_matter():
    targets, rng = apart(5, images=12)
    detections = [{"boxes": t["boxes"] + torch.tensor(rng.normal(0, 2, t["boxes"].shape)), "labels": t["labels"],
                   "scores": torch.tensor(rng.random(len(t["labels"])))} for t in targets]
    for d in detections: d["boxes"][:, 2:] = torch.maximum(d["boxes"][:, 2:], d["boxes"][:, :2] + 1)
    before, _ = every_ap(targets, detections)
    after, _ = every_ap(targets[::-1], detections[::-1])
    assert after == pytest.approx(before, abs=1e-12, nan_ok=True)


# ---- whatever a detector may return ----

EVALUATORS = [coco_ap, voc_ap, kitti_ap]
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
CAR = {"boxes": torch.tensor([[0., 0, 60, 60]]), "labels": torch.tensor([1])}
SEEN = CAR | {"scores": torch.tensor([.5])}


@pytest.mark.parametrize("evaluate", EVALUATORS)
def test_degenerate_but_allowed(evaluate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for targets, detections in (
                ([], []), ([NOTHING], [NOTHING]), ([NOTHING], [SEEN]), ([CAR], [NOTHING]), ([CAR] * 50, [NOTHING] * 50),
                ([CAR], [{"boxes": torch.zeros(0), "labels": torch.zeros(0), "scores": torch.zeros(0)}]),
                ([CAR], [{"boxes": [], "labels": [], "scores": []}])):
            result = evaluate(targets, detections, KITTI)
            numbers = [v for k, v in result.per_class["Car"].items() if k.startswith("AP") or "_R" in k]
            known = [v for v in numbers if v == v]
            assert not any(known)                            # zero or undefined
            assert known or not any(len(t["boxes"]) for t in targets)
            json.loads(result.to_json())
            assert "Car" in repr(result)


@pytest.mark.parametrize("evaluate", EVALUATORS)
def test_strange_boxes_are_scored(evaluate):
    many = {k: v.repeat(300, *[1] * (v.ndim - 1)) for k, v in SEEN.items()}
    outside = SEEN | {"boxes": torch.tensor([[-500., -500, 9000, 9000]])}
    flat = SEEN | {"boxes": torch.tensor([[5., 5, 5, 5]])}
    half = SEEN | {"boxes": CAR["boxes"].half(), "scores": torch.tensor([-7.]).half(), "labels": CAR["labels"].int()}
    brain = SEEN | {"scores": torch.tensor([.5], dtype=torch.bfloat16, requires_grad=True)}
    for detection, good in ((many, True), (outside, False), (flat, False), (half, True), (brain, True)):
        result = evaluate([CAR] * 41, [detection] * 41, KITTI)
        ap = result.per_class["Car"].get("AP", result.per_class["Car"].get("moderate_R40"))
        assert (ap > 0) == good


@pytest.mark.parametrize("evaluate", EVALUATORS)
@pytest.mark.parametrize("bad, message", [
    ({"scores": torch.tensor([float("nan")])}, r"detections\[1\], box 0 has a score that is not finite"),
    ({"scores": torch.tensor([float("inf")])}, "a score that is not finite"),
    ({"boxes": torch.tensor([[0., 0, float("nan"), 9]])}, r"detections\[1\], box 0 has a coordinate that is not"),
    ({"boxes": torch.tensor([[30., 0, 20, 9]])}, "x2 < x1"),
    ({"labels": torch.tensor([4])}, "unknown label; allowed are 1 to 3"),
    ({"labels": torch.tensor([0])}, "unknown label"),
    ({"labels": torch.tensor([1.5])}, "unknown label"),
    ({"scores": torch.tensor([.5, .5])}, r"detections\[1\]\['scores'\] has shape \(2,\), allowed is \(1,\)"),
    ({"boxes": torch.zeros(1, 5)}, r"detections\[1\]\['boxes'\] has shape \(1, 5\), allowed is \(1, 4\)"),
    ({"boxes": torch.zeros(4)}, r"detections\[1\]\['boxes'\] has shape \(4,\)"),
])
def test_meaningless_detections_are_named(evaluate, bad, message):
    with pytest.raises(ValueError, match=message): evaluate([CAR] * 2, [SEEN, SEEN | bad], KITTI)
    with pytest.raises(ValueError, match=message.replace("detections", "teacher_detections")):
        agreement([SEEN, SEEN | bad], [SEEN] * 2, KITTI)


@pytest.mark.parametrize("evaluate", EVALUATORS)
def test_other_errors(evaluate):
    with pytest.raises(ValueError, match="2 targets beside 1 detections"): evaluate([CAR] * 2, [SEEN], KITTI)
    with pytest.raises(ValueError, match=r"detections\[0\] has no 'scores'"): evaluate([CAR], [CAR], KITTI)
    with pytest.raises(ValueError, match=r"targets\[0\], box 0 has an unknown label"):
        evaluate([CAR | {"labels": torch.tensor([9])}], [SEEN], KITTI)
    with pytest.raises(ValueError, match="method is 'exact'"): voc_ap([CAR], [SEEN], KITTI, method="exact")
    with pytest.raises(ValueError, match="iou is 50"): voc_ap([CAR], [SEEN], KITTI, iou=50)


@pytest.mark.parametrize("evaluate", EVALUATORS)
def test_what_is_ignored_is_neither_asked_for_nor_punished(evaluate):
    two = {"boxes": torch.tensor([[0., 0, 60, 60], [100, 0, 160, 60]]), "labels": torch.tensor([1, 1])}
    target = two | {"ignore": torch.tensor([False, True])}
    one_row = {k: v[:1] for k, v in two.items()}
    plain = evaluate([one_row] * 50, [SEEN] * 50, KITTI)
    for detection in (SEEN, two | {"scores": torch.tensor([.5, .9])}):
        result = evaluate([target] * 50, [detection] * 50, KITTI)
        key = "hard_R40" if evaluate is kitti_ap else "AP"
        assert result.per_class["Car"][key] == plain.per_class["Car"][key]


def test_a_crowd_excuses_any_number():
    crowd = {"boxes": torch.tensor([[0., 0, 60, 60], [100, 0, 300, 200]]), "labels": torch.tensor([1, 1]),
             "iscrowd": torch.tensor([False, True])}
    boxes = torch.tensor([[0., 0, 60, 60], [110, 0, 160, 60], [150, 20, 200, 90], [200, 100, 290, 190]])
    detection = {"boxes": boxes, "labels": torch.ones(4).long(), "scores": torch.tensor([.5, .9, .8, .7])}
    assert coco_ap([crowd], [detection], ["a"]).AP == pytest.approx(1, abs=1e-12)
    single = {k: v for k, v in crowd.items() if k != "iscrowd"} | {"ignore": torch.tensor([False, True])}
    assert coco_ap([single], [detection], ["a"]).AP < .5


@pytest.mark.parametrize("confident, objects", [(.4, 2), (.6, 1), (.95, 0)])
def test_agreement_asks_for_what_the_teacher_is_sure_of(confident, objects):
    boxes = torch.tensor([[0., 0, 60, 60], [100, 0, 160, 60]])
    teacher = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([.9, .5])}
    result = agreement([teacher], [teacher | {"scores": torch.tensor([.5, .9])}], ["a"], confident=confident)
    assert result.objects == objects
    assert result.AP == pytest.approx(1, abs=1e-9) or not objects


# ---- real annotations ----

def jittered(targets, seed=0):
    "Each object found twice, more or less, and sometimes as another class"
    rng, detections = np.random.default_rng(seed), []
    for t in targets:
        boxes = t["boxes"].double().repeat(2, 1)
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes = boxes + size * torch.tensor(rng.normal(0, .06, boxes.shape))
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = t["labels"].repeat(2)
        labels = torch.where(torch.tensor(rng.random(len(labels)) < .9), labels, 1)
        detections.append({"boxes": boxes, "labels": labels, "scores": torch.tensor(rng.random(len(labels)))})
    return detections


def test_coco_equals_pycocotools_on_its_own_files(shared, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    ds = open_dataset(shared("coco38"), split="train")
    targets = [ds.target(i) for i in range(len(ds))]
    assert any(t["iscrowd"].any() for t in targets)
    detections = jittered(targets)
    result = coco_ap(targets, detections, ds.classes)
    assert not capsys.readouterr().out                       # pycocotools is kept quiet
    rows = [{"image_id": i, "category_id": ds.category_ids[c - 1], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": s}
            for i, d in zip(ds.ids, detections)
            for (x1, y1, x2, y2), c, s in zip(d["boxes"].tolist(), d["labels"].tolist(), d["scores"].tolist())]
    truth = COCO(shared("coco38") / "annotations/instances_train2017.json")
    theirs = COCOeval(truth, truth.loadRes(rows), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert 0 < result.AP < 1
    assert [result.summary[k] for k in COCO_NUMBERS] == pytest.approx(theirs.stats.tolist(), abs=1e-6)


@pytest.mark.parametrize("name, split", [("voc100", None), ("kitti3", None), ("bccd", "val"), ("coco38", "val")])
@pytest.mark.filterwarnings("ignore:.*dropped")              # the zero-size boxes of bccd
def test_every_protocol_takes_every_dataset(shared, name, split):
    ds = open_dataset(shared(name), split=split)
    targets = [ds.target(i) for i in range(len(ds))]
    detections = jittered(targets)
    assert 0 < coco_ap(targets, detections, ds.classes).AP < 1
    assert 0 < voc_ap(targets, detections, ds.classes, iou=.9).AP < 1
    kitti = kitti_ap(targets, detections, ds.classes)
    assert 0 <= kitti.hard_R40 < 100 and kitti.hard_objects > 0


# ---- a benchmark's own numbers, as a run reports them ----

class TruthInItsOwnPixels(torch.nn.Module):
    "In place of a detector's heads: what there is in image after image, in the network's pixels"
    def __init__(self, targets, scale):
        super().__init__()
        self.found = iter([{"boxes": t["boxes"] * scale, "labels": t["labels"], "scores": torch.full((2,), .9 - k / 100)}
                           for k, t in enumerate(targets)])

    def forward(self, features, proposals, sizes, targets=None): return [next(self.found) for _ in sizes], {}


@pytest.mark.parametrize("layout, write", [("kitti", write_kitti), ("voc", write_voc), ("coco", write_coco)])
def test_a_run_reports_its_layouts_own_protocol_in_the_images_own_pixels(layout, write, tmp_path):
    "Cars are 30 and pedestrians 44 pixels high, and a third of that for the network"
    classes, pixels = ("Car", "Pedestrian"), torch.zeros(3, 96, 160, dtype=torch.uint8)
    boxes = torch.tensor([[10., 20, 40, 50], [60, 30, 90, 74]])
    targets = [{"boxes": boxes + k % 9, "labels": torch.tensor([1, 2])} for k in range(45)]
    write(tmp_path / "data", [(f"{k:06}", pixels, t) for k, t in enumerate(targets)], classes, {"test": [f"{k:06}" for k in range(45)]})
    given = {"dataset": layout, "data_root": str(tmp_path / "data"), "classes": classes, "splits": ["test"] * 3, "size": [32, 64]}
    s = specs_of(check_parameters(given))
    detector = build_detector(DetectorSpec(classes, width=.125, size=(32, 64), fpn_channels=8, head_channels=16))
    detector.roi_heads = TruthInItsOwnPixels(targets, torch.tensor([64 / 160, 32 / 96] * 2))
    stages = Stages(tmp_path, Engine(device="cpu"), progress=False)
    found = score(detector, "one that sees all", open_data(s, stages)[0], stages)
    own = json.loads(json.dumps(found))["protocol"]
    total, (car, walker) = own["summary"], (own["per_class"][c] for c in classes)
    assert set(own) == {"protocol", "summary", "per_class"} and set(own["per_class"]) == set(classes)
    if layout == "kitti":
        assert set(total) == {f"{v}_{k}" for v in LEVELS for k in ("R11", "R40", "objects")}
        assert [car[f"{v}_objects"] for v in LEVELS] == [0, 45, 45] and [walker[f"{v}_objects"] for v in LEVELS] == [45] * 3
        assert car["easy_R40"] is None                                      # a car is too low for easy: nothing is asked for
        numbers = [row[f"{v}_{k}"] for row in (car, walker, total) for v in LEVELS for k in ("R11", "R40")]
        assert {round(v, 6) for v in numbers if v is not None} == {100}
    elif layout == "voc":
        assert total == pytest.approx({"AP50": 1, "AP50_11": 1, "objects": 90}) and car["objects"] == 45
        assert (found["AP50_voc"], found["AP50_voc11"]) == (total["AP50"], total["AP50_11"])
    else:
        assert set(total) == {*COCO_NUMBERS, "objects"} and found["AP"] == total["AP"] == pytest.approx(1)
        sizes = [[row[k] and round(row[k], 9) for k in ("APs", "APm", "APl")] for row in (car, walker, total)]
        assert sizes == [[1, None, None], [None, 1, None], [1, 1, None]]    # 900 and 1,320 pixels; for the network all is small


# ---- results, prediction, bootstrap ----

@pytest.mark.parametrize("evaluate", EVALUATORS)
@pytest.mark.parametrize("n", [3, 12])
def test_results_print_serialise_and_draw(evaluate, n):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    classes = [f"class {i}" for i in range(1, n + 1)]
    labels = [torch.tensor([1 + i % (n - 1)]) for i in range(60)]
    result = evaluate([CAR | {"labels": c} for c in labels], [SEEN | {"labels": c} for c in labels], classes)
    assert len(repr(result).splitlines()) == n + 3
    plain = json.loads(result.to_json())
    assert plain == result.as_dict()
    assert set(plain) == {"protocol", "summary", "per_class"} and list(plain["per_class"]) == classes
    ax = result.plot()
    assert len(ax.lines) == len(result.curves) + (n > 8)
    fig, mine = plt.subplots()
    assert result.plot(mine) is mine
    plt.close("all")


def test_predict_restores_every_mode_and_stays_inside():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, box_score_thresh=0., box_detections_per_img=5,
        min_size=64, max_size=96)
    detector.train()
    detector.backbone.eval()
    modes = [m.training for m in detector.modules()]
    sizes = [(40, 60), (50, 50), (64, 30)]
    images = [(torch.randint(0, 256, (3, h, w), dtype=torch.uint8), {"anything": 1}) for h, w in sizes]
    found = predict(detector, images, batch_size=2, progress=False)
    assert [m.training for m in detector.modules()] == modes
    assert len(found) == 3 and all(len(d["boxes"]) for d in found)
    for d, (h, w) in zip(found, sizes):
        assert set(d) == {"boxes", "labels", "scores"} and not d["boxes"].requires_grad
        assert (d["boxes"] >= 0).all() and (d["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    assert all(e([target] * 3, found, KITTI) for e in EVALUATORS)


def test_predict_restores_modes_after_an_error():
    class Broken(torch.nn.Module):
        def forward(self, images): raise RuntimeError("broken")
    detector = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        predict(detector, [torch.zeros(3, 8, 8, dtype=torch.uint8)], progress=False)
    assert detector.training


@pytest.mark.parametrize("seed", range(6))
def test_a_draw_is_the_repeated_images(seed):
    "Ties, ignored and crowded objects, images without either; pycocotools itself on the images as drawn"
    targets, detections = crowded(seed, images=9)
    rng = np.random.default_rng(seed)
    for t, d in zip(targets, detections):
        t["iscrowd"] = torch.tensor(rng.random(len(t["labels"])) < .2)
        d["scores"] = torch.tensor(rng.permutation(len(d["scores"])) / 6)    # tied with other images', not inside one
    matches = coco_matches(targets, detections, 3)                          # the third class has no object
    drawn = [np.arange(9), *(np.sort(rng.integers(0, 9, 9)) for _ in range(4)), np.full(9, 4)]
    ap = drawn_ap(matches, torch.tensor(np.array([np.bincount(rows, minlength=9) for rows in drawn])))
    assert ap.shape == (6, 10)
    for rows, found in zip(drawn, ap):
        result = coco_ap([targets[i] for i in rows], [detections[i] for i in rows], ["a", "b", "c"])
        expected = [result.AP, result.AP50, result.AP75]
        assert [found.mean().item(), found[0].item(), found[5].item()] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_each_image_once_is_the_usual_ap():
    targets, detections = crowded(1, images=30, objects=9, found=20)        # with ties inside an image
    one = drawn_ap(coco_matches(targets, detections, 2), torch.ones(1, 30).long())[0]
    result = coco_ap(targets, detections, ["a", "b"])
    assert [one.mean().item(), one[0].item()] == pytest.approx([result.AP, result.AP50], abs=1e-12) and 0 < result.AP < 1
    assert drawn_ap(coco_matches([NOTHING] * 2, [SEEN] * 2, 1), torch.ones(3, 2).long()).isnan().all()


def test_many_draws_are_scored_in_pieces_like_one():
    targets, detections = crowded(2, images=40, found=60)
    matches = coco_matches(targets, detections, 2)
    times = torch.tensor(np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 5000))
    assert len(matches[0].image) * len(times) > 1 << 21
    ap = drawn_ap(matches, times)
    assert torch.equal(ap[-3:].nan_to_num(-1), drawn_ap(matches, times[-3:]).nan_to_num(-1))


def test_bootstrap_is_repeatable():
    ours, theirs = (coco_matches([CAR] * 20, seen, 1) for seen in ([SEEN] * 20, [SEEN] * 10 + [NOTHING] * 10))
    first, again = (bootstrap(ours, theirs, draws=100, seed=3) for _ in range(2))
    assert first == again and set(first) == {"AP", "AP50"}
    for d in first.values():
        assert d["difference"] == pytest.approx(1 - 51 / 101)               # of the recalls, 0 to .5 are reached
        assert d["low"] <= .5 <= d["high"] and d["low"] > .1
    assert bootstrap(theirs, ours, draws=100, seed=3)["AP"]["low"] == pytest.approx(-first["AP"]["high"], abs=1e-12)
