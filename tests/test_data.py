"Readers, writers and the check, on real data where it is at hand, on random data, and on broken files"
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from moi import data, layouts
from moi.data import DataError, Resized, collate
from moi.detector import DetectorSpec
from moi.layouts import (
    COCODataset,
    KITTIDataset,
    VOCDataset,
    check,
    open_dataset,
    write_coco,
    write_coco_results,
    write_kitti,
    write_voc,
)
from moi.teachers import class_names

CLASSES = ("Car", "Pedestrian", "Cyclist")
WRITERS = {"KITTI": write_kitti, "VOC": write_voc, "COCO": write_coco}


def noise(h, w, seed=0): return torch.randint(0, 256, (3, h, w), generator=torch.Generator().manual_seed(seed)).byte()


def target(boxes=((2, 3, 20, 30), (0, 0, 9, 7)), labels=(1, 3)):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}


def write_all(root, samples, splits=None):
    for layout,write in WRITERS.items(): write(root/layout, samples, CLASSES, splits or {})
    return [root/layout for layout in WRITERS]


@pytest.fixture
def folders(tmp_path):
    "Three samples in three layouts, split into train and val"
    samples = [(f"{i:06d}", noise(32, 40, i), target()) for i in range(2)] + [("000002", noise(32, 40), target((), ()))]
    write_all(tmp_path, samples, {"train": ["000002", "000000"], "val": ["000001"]})
    return tmp_path


def fields(d, name): return torch.cat([d.target(i)[name] for i in range(len(d))])


def decode_all(d): return [tuple(d.image(i).shape) for i in range(len(d))]


# Real data, every count

def test_kitti3(shared):
    d = open_dataset(shared("kitti3"))
    assert type(d) is KITTIDataset and d.ids == ["000000", "000001", "000002"] and d.classes == CLASSES
    assert d.counts() == {"Car": 2, "Pedestrian": 1, "Cyclist": 1}
    assert d.left_out == {"Truck": 1, "Misc": 1} and not d.problems
    assert [len(d.target(i)["dontcare"]) for i in range(3)] == [0, 4, 0]
    assert fields(d, "labels").tolist() == [2, 1, 3, 1]
    assert fields(d, "occlusion").tolist() == [0, 0, 3, 0] and not fields(d, "truncation").any()
    assert not fields(d, "ignore").any()
    np.testing.assert_allclose(d.target(0)["boxes"], [[712.40, 143.00, 810.73, 307.92]], rtol=1e-6)
    np.testing.assert_allclose(d.target(1)["dontcare"][3], [559.62, 175.83, 575.40, 183.15], rtol=1e-6)
    assert decode_all(d) == [(3, *s) for s in d.sizes.tolist()] and d.sizes.tolist()[1] == [375, 1242]
    everything = KITTIDataset(shared("kitti3"), classes=("Car", "Truck", "Misc", "Pedestrian", "Cyclist"))
    assert sum(everything.counts().values()) == 6 and not everything.left_out
    assert check(d)


def test_kitti_split():
    lists = Path(layouts.__file__).parent/"kitti_split"
    train,val = ([line for line in (lists/f"{s}.txt").read_text().split("\n") if line] for s in ("train", "val"))
    assert (len(train), len(val), len({*train, *val})) == (3712, 3769, 7481)
    assert {*train, *val} == {f"{i:06d}" for i in range(7481)}


def test_voc100(shared):
    root = shared("voc100")
    sets = {s: open_dataset(root/"VOCdevkit", s) for s in (None, "trainval", "train", "val")}
    assert [len(d) for d in sets.values()] == [100, 100, 80, 20]
    d = sets[None]
    assert d.classes == layouts.VOC_CLASSES and not d.problems and not d.left_out
    assert sum(d.counts().values()) == 273 and int(fields(d, "difficult").sum()) == 38
    assert int(fields(d, "truncated").sum()) == 137
    assert list(d.counts().values()) == [15, 14, 6, 11, 13, 6, 14, 5, 15, 14, 7, 8, 7, 5, 91, 7, 10, 10, 6, 9]
    assert sum(sets["train"].counts().values()) + sum(sets["val"].counts().values()) == 273
    i = d.ids.index("2007_001027")
    assert d.target(i)["boxes"][0].tolist() == [202, 173, 254, 273]     # 203 174 254 273 in the file
    assert d.target(i)["boxes"][6].tolist() == [0, 243, 43, 340]
    assert d.target(i)["difficult"].tolist() == [False, True, True, False, True, False, False]
    assert decode_all(d) == [(3, *s) for s in d.sizes.tolist()]
    for folder in root, root/"VOCdevkit", root/"VOCdevkit/VOC2012":
        assert VOCDataset(folder, "val", year=None).ids == sets["val"].ids
    assert check(d)


def test_bccd(shared):
    counts = {}
    for split,images in {"train": 205, "val": 87, "test": 72, "trainval": 292, None: 364}.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            d = open_dataset(shared("bccd"), split)
        assert len(d) == images and d.classes == ("Platelets", "RBC", "WBC") and not fields(d, "difficult").any()
        counts[split] = Counter(d.counts())
        assert sum(p.kind == "zero-size box" for p in d.problems) == len(d.problems)
        said = " ".join(str(w.message) for w in caught)
        for name in {"BloodImage_00338", "BloodImage_00343"} & set(d.ids): assert f"{name}.xml:" in said
    assert len(d.problems) == 2 and "2 box(es) dropped" in said
    assert "BloodImage_00338.xml:158: RBC box 504 337 504 337" in said
    assert counts[None] == {"Platelets": 361, "RBC": 4153, "WBC": 372}      # 4888 in the files
    assert counts["train"] + counts["val"] + counts["test"] == counts[None]
    assert int(fields(d, "truncated").sum()) == 1131
    boxes = fields(d, "boxes")
    assert (boxes >= 0).all() and (boxes[:,2:] > boxes[:,:2]).all() and (boxes[:,2:] <= torch.tensor([640, 480])).all()
    assert set(decode_all(d)) == {(3, 480, 640)}


def test_coco38(shared):
    root = shared("coco38")
    train,val = open_dataset(root, "train"), COCODataset(root, "val2017")
    assert (len(train), len(val)) == (32, 6)
    assert (len(fields(train, "labels")), len(fields(val, "labels"))) == (288, 136)
    assert (int(fields(train, "iscrowd").sum()), int(fields(val, "iscrowd").sum())) == (4, 1)
    assert sum(not len(train.target(i)["labels"]) for i in range(32)) == 2      # images without annotations are kept
    assert len(train.classes) == 80 and train.classes[0] == "person" and train.category_ids[-1] == 90
    assert not train.problems and not val.problems
    for d,file in (train, "train"), (val, "val"):
        raw = json.loads((root/f"annotations/instances_{file}2017.json").read_text())
        assert d.ids == [im["id"] for im in raw["images"]]
        name = {c["id"]: c["name"] for c in raw["categories"]}
        assert {c: n for c,n in d.counts().items() if n} == Counter(name[a["category_id"]] for a in raw["annotations"])
        for i,id in enumerate(d.ids):
            mine,t = [a for a in raw["annotations"] if a["image_id"] == id],d.target(i)
            assert [d.category_ids[k-1] for k in t["labels"].tolist()] == [a["category_id"] for a in mine]
            np.testing.assert_allclose(t["area"], [a["area"] for a in mine], rtol=1e-6)
            xywh = np.array([a["bbox"] for a in mine]).reshape(-1, 4)
            np.testing.assert_allclose(t["boxes"][:,2:] - t["boxes"][:,:2], xywh[:,2:], atol=1e-3)
            assert t["ignore"].tolist() == t["iscrowd"].tolist() == [bool(a["iscrowd"]) for a in mine]
    assert decode_all(train) == [(3, *s) for s in train.sizes.tolist()]
    assert check(train) and check(val)


def test_coco_results_load_in_pycocotools(shared, tmp_path):
    coco = pytest.importorskip("pycocotools.coco").COCO(shared("coco38")/"annotations/instances_val2017.json")
    d = open_dataset(shared("coco38"), "val")
    found = [{k: t[k] for k in ("boxes", "labels")} | {"scores": torch.rand(len(t["labels"]))}
             for t in map(d.target, range(len(d)))]
    written = write_coco_results(found, d, tmp_path/"r.json")
    results = coco.loadRes(str(tmp_path/"r.json"))
    assert len(results.anns) == len(written) == 136
    by_class = [Counter(a["category_id"] for a in c.anns.values()) for c in (results, coco)]
    assert by_class[0] == by_class[1]


def test_detector_with_91_outputs(shared):
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    d = COCODataset(shared("coco38"), "train", classes=names[1:])
    ours = open_dataset(shared("coco38"), "train")
    assert DetectorSpec(class_names(None, 91)).labels == ours.category_ids # a teacher's labels are the dataset's
    labels = fields(ours, "labels").tolist()
    assert fields(d, "labels").tolist() == [ours.category_ids[k-1] for k in labels]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    unused = {"boxes": torch.tensor([[0., 0, 5, 5]]), "labels": torch.tensor([12]), "scores": torch.ones(1)}
    assert write_coco_results([nothing]*32, d) == []
    with pytest.raises(ValueError, match="no category has label 12"): write_coco_results([unused] + [nothing]*31, d)


# There and back

sides = st.integers(8, 40)


@st.composite
def scenes(draw):
    "A few images with whole-pixel boxes, at least two pixels wide and high"
    out = []
    for i in range(draw(st.integers(1, 3))):
        h,w,n = draw(sides), draw(sides), draw(st.integers(0, 4))
        x = [sorted(draw(st.lists(st.integers(0, w//2), min_size=2, max_size=2, unique=True))) for _ in range(n)]
        y = [sorted(draw(st.lists(st.integers(0, h//2), min_size=2, max_size=2, unique=True))) for _ in range(n)]
        boxes = [(2*a, 2*b, 2*c, 2*d) for (a,c),(b,d) in zip(x, y, strict=True)]
        labels = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
        out.append((f"{i:06d}", noise(h, w, i), target(boxes, labels)))
    return out


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_every_layout_gives_back_the_same(tmp_path_factory, samples):
    root = tmp_path_factory.mktemp("scenes")
    ids = [id for id,_,_ in samples][::-1]
    for folder in write_all(root, samples, {"all": ids}):
        d = open_dataset(folder, "all", CLASSES)
        assert [f"{int(id):06d}" for id in d.ids] == ids and not d.problems
        for i,(_,image,t) in enumerate(samples[::-1]):
            assert torch.equal(d.image(i), image)
            for k in "boxes", "labels":
                assert torch.equal(d.target(i)[k], t[k]) and d.target(i)[k].dtype == t[k].dtype
    shutil.rmtree(root)


def test_extra_fields_come_back(tmp_path):
    box = [[2.5, 3.25, 20.125, 30.7], [0, 0, 9, 7]]
    t = target(box) | {"ignore": torch.tensor([True, False]), "truncation": torch.tensor([.25, .5]),
                       "occlusion": torch.tensor([2, 1]), "dontcare": torch.tensor([[1., 1, 5, 6]])}
    write_kitti(tmp_path/"k", [("7", noise(32, 40), t)], CLASSES)
    assert (tmp_path/"k/training/label_2/7.txt").read_text().startswith("Van 0.25 2 ")
    for k,v in KITTIDataset(tmp_path/"k").target(0).items(): assert torch.equal(v, t[k]), k
    t = target(box) | {"difficult": torch.tensor([True, False]), "truncated": torch.tensor([False, True])}
    write_voc(tmp_path/"v", [("7", noise(32, 40), t)], CLASSES)
    for k,v in VOCDataset(tmp_path/"v", classes=CLASSES).target(0).items(): assert torch.equal(v, t[k]), k
    t = target(box) | {"area": torch.tensor([7.5, 3.25]), "iscrowd": torch.tensor([True, False]),
                       "ignore": torch.tensor([True, True])}
    write_coco(tmp_path/"c", [(7, noise(32, 40), t)], CLASSES)
    for k,v in COCODataset(tmp_path/"c").target(0).items(): assert torch.equal(v, t[k]), k


def test_writers_refuse(tmp_path):
    image = noise(32, 40)
    with pytest.raises(ValueError, match="no area in VOC"):
        write_voc(tmp_path/"a", [("1", image, target([[1, 1, 2, 5]], [1]))], CLASSES)
    with pytest.raises(ValueError, match="whole numbers"): write_coco(tmp_path/"b", [("a1", image, target())], CLASSES)
    with pytest.raises(ValueError, match="no way to ignore a 'Cyclist'"):
        write_kitti(tmp_path/"c", [("1", image, target() | {"ignore": torch.tensor([False, True])})], CLASSES)
    for write in WRITERS.values():
        with pytest.raises(ValueError, match="image 1: label 3, allowed are 1..2"):
            write(tmp_path/"d", [("1", image, target())], CLASSES[:2])
        with pytest.raises(ValueError, match="split 'x': 1 ids are not among the samples"):
            write(tmp_path/"e", [("1", image, target())], CLASSES, {"x": ["2"]})


# What readers do

def test_layouts_are_recognised(folders, tmp_path):
    assert [type(open_dataset(folders/k, "train")) for k in WRITERS] == [KITTIDataset, VOCDataset, COCODataset]
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="looked for KITTI.*VOC.*COCO"): open_dataset(tmp_path/"empty")
    with pytest.raises(FileNotFoundError, match="no such folder"): open_dataset(tmp_path/"none")
    for k in WRITERS:
        with pytest.raises(FileNotFoundError, match="there are: train.*, val"): open_dataset(folders/k, "tranning")
    shutil.copytree(folders/"VOC", folders/"KITTI", dirs_exist_ok=True)
    with pytest.raises(DataError, match="KITTI and like VOC"): open_dataset(folders/"KITTI")


def test_subset_shares_and_join_joins(folders):
    for k in WRITERS:
        train,val = (open_dataset(folders/k, s, CLASSES) for s in ("train", "val"))
        both = train + val
        assert both.ids == train.ids + val.ids and both.counts() == {"Car": 2, "Pedestrian": 0, "Cyclist": 2}
        back = both.subset([2, 0])
        assert back.ids == [both.ids[2], both.ids[0]] and len(back.target(1)["labels"]) == 0
        assert torch.equal(back.target(0)["boxes"], val.target(0)["boxes"]) and torch.equal(back.image(0), val.image(0))
        assert len(list(train)) == 2        # iteration ends
        with pytest.raises(ValueError, match="ids occur in more"): train + train
    with pytest.raises(ValueError, match="one layout"): train + open_dataset(folders/"VOC", "val", CLASSES)


def test_what_a_reader_gives_is_a_copy(folders):
    d = open_dataset(folders/"KITTI")
    d.target(0)["boxes"].zero_()
    assert d.target(0)["boxes"].any()


def test_voc_years(tmp_path):
    for year,splits in {"2007": {"trainval": ["0"], "test": ["1"]}, "2012": {"trainval": ["20"]}}.items():
        samples = [(i, noise(32, 40), target()) for s in splits.values() for i in s]
        write_voc(tmp_path/f"VOCdevkit/VOC{year}", samples, layouts.VOC_CLASSES, splits)
    def open_(split, **options): return VOCDataset(tmp_path, split, **options).ids
    assert open_("trainval") == ["0", "20"] and open_("test") == ["1"] and open_(None) == ["0", "1", "20"]
    assert open_("trainval", year="2012") == ["20"] == open_("trainval", year=["2012"])
    assert (VOCDataset(tmp_path, "trainval") + VOCDataset(tmp_path, "test")).ids == ["0", "20", "1"]
    with pytest.raises(FileNotFoundError, match="no year 2010, there are: 2007, 2012"): open_("test", year="2010")


def test_classes_do_not_depend_on_the_split(tmp_path):
    samples = [("0", noise(32, 40), target(labels=(1, 1))), ("1", noise(32, 40), target(labels=(3, 2)))]
    write_voc(tmp_path, samples, CLASSES, {"a": ["0"], "b": ["1"]})
    assert VOCDataset(tmp_path, "a").classes == VOCDataset(tmp_path, "b").classes == tuple(sorted(CLASSES))
    some = VOCDataset(tmp_path, classes=("Cyclist",))
    assert some.counts() == {"Cyclist": 1} and some.left_out == {"Car": 2, "Pedestrian": 1}


def test_parts_of_a_person_are_no_objects(tmp_path):
    write_voc(tmp_path, [("0", noise(32, 40), target([[2, 3, 20, 30]], [2]))], CLASSES)
    file = tmp_path/"Annotations/0.xml"
    part = "<part><name>head</name><bndbox><xmin>4</xmin><ymin>4</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part>"
    file.write_text(file.read_text().replace("</object>", part + "</object>"))
    d = VOCDataset(tmp_path)
    assert d.classes == ("Pedestrian",) and d.target(0)["boxes"].tolist() == [[2, 3, 20, 30]]


def test_voc_size_from_the_image_where_the_file_has_none(tmp_path):
    write_voc(tmp_path, [("0", noise(32, 40), target())], CLASSES)
    file = tmp_path/"Annotations/0.xml"
    file.write_text(file.read_text().replace("<width>40", "<width>0"))
    assert VOCDataset(tmp_path).sizes.tolist() == [[32, 40]]


def test_kitti_names_in_any_case(tmp_path):
    write_kitti(tmp_path, [("0", noise(32, 40), target())], ("car", "x", "CYCLIST"))
    assert KITTIDataset(tmp_path).target(0)["labels"].tolist() == [1, 3]


def test_missing_images(folders):
    for file in ("KITTI/training/image_2", "VOC/JPEGImages", "COCO/images"): (folders/file/"000001.png").unlink()
    for k in WRITERS:
        with pytest.raises(DataError, match="000001"): open_dataset(folders/k, "val")
        assert len(open_dataset(folders/k, "train")) == 2
        with pytest.warns(UserWarning, match="left out"): assert len(open_dataset(folders/k, "val", strict=False)) == 0
        assert check(folders/k, "val").counts == {"missing file": 1}


def test_images_that_end_early_are_named(folders):
    for file in ("KITTI/training/image_2", "VOC/JPEGImages", "COCO/images"):
        f = folders/file/"000001.png"
        f.write_bytes(f.read_bytes()[:-100])
    for k in WRITERS:
        with pytest.raises(DataError, match="000001.png: cannot be decoded"): open_dataset(folders/k, "val")[0]
        assert check(folders/k, "val").counts == {"unreadable image": 1}
        assert check(open_dataset(folders/k, "val")).counts == {"unreadable image": 1}


def test_lists_with_errors(folders):
    for k,lists in ("KITTI", "ImageSets"), ("VOC", "ImageSets/Main"):
        (folders/k/lists/"val.txt").write_text("000001\n\n000009\n000001\n000000 -1\n")
        with pytest.raises(DataError, match="val.txt:3: '000009' has no annot"): open_dataset(folders/k, "val")
        assert check(folders/k, "val").counts == {"missing file": 1, "listed again": 1, "bad file": 1}


@pytest.mark.parametrize("box, kind", [("9 9 9 12", "zero-size box"), ("9 9 5 12", "zero-size box"),
                                       ("nan 9 12 12", "box without numbers"), ("50 9 60 12", "box outside"),
                                       ("30 9 60 12", "box over the border"), ("1e300 1 2e300 9", "box outside")])
def test_bad_boxes(folders, box, kind):
    x1,y1,x2,y2 = box.split()
    f = folders/"KITTI/training/label_2/000001.txt"
    f.write_text(f.read_text().replace("2.00 3.00 20.00 30.00", box))
    f = folders/"VOC/Annotations/000001.xml"
    for tag,old,new in ("xmin", 3, x1), ("ymin", 4, y1), ("xmax", 20, x2), ("ymax", 30, y2):
        f.write_text(f.read_text().replace(f"<{tag}>{old}<", f"<{tag}>{new}<", 1))
    f = folders/"COCO/annotations/instances_val.json"
    xywh = [float(v) for v in (x1, y1, float(x2)-float(x1), float(y2)-float(y1))]
    f.write_text(f.read_text().replace("[2.0, 3.0, 18.0, 27.0]", json.dumps(xywh)))
    for k,place in zip(WRITERS, ("000001.txt:1:", "000001.xml:8:", "annotation 1:"), strict=True):
        with pytest.warns(UserWarning, match=f"1 box.es.*\n.*{place}"): d = open_dataset(folders/k, "val", CLASSES)
        assert [p.kind for p in d.problems] == [kind]
        assert d.target(0)["boxes"].tolist()[-1] == [0, 0, 9, 7] and len(d.target(0)["labels"]) == 1 + ("over" in kind)
        if "over" in kind: assert d.target(0)["boxes"][0,2] == 40


def test_coco_annotations_that_make_no_sense(folders):
    f = folders/"COCO/annotations/instances_val.json"
    good = json.loads(f.read_text())
    wrong = [{"image_id": 99}, {"category_id": 4}, {"bbox": [1, 2, 3]}, {"bbox": None}, {"bbox": ["a", 1, 1, 1]},
             {"area": "x"}, {"image_id": [1]}]
    good["annotations"] += [good["annotations"][0] | {"id": 100+k} | w for k,w in enumerate(wrong)] + [3]
    f.write_text(json.dumps(good))
    with pytest.warns(UserWarning, match=f"{len(wrong)+1} box.es. dropped"): d = open_dataset(folders/"COCO", "val")
    assert len(d.target(0)["labels"]) == 2 and {p.kind for p in d.problems} == {"bad annotation"}
    assert "annotation 100: image_id 99 is not among the images" in d.problems[0].message
    good["annotations"] = good["annotations"][:2]*2
    f.write_text(json.dumps(good))
    with pytest.warns(UserWarning, match="2 annotation id.s. not unique"): d = open_dataset(folders/"COCO", "val")
    assert len(d.target(0)["labels"]) == 4


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("images"), "no list 'images'"),
    (lambda d: d["images"][0].pop("height"), "images.0.: height is None"),
    (lambda d: d["images"].append(d["images"][0]), "images.1.: duplicate id 1"),
    (lambda d: d["categories"][0].update(id="a"), "categories.0.: id is 'a'"),
    (lambda d: d["categories"][0].update(name="Cyclist"), "two categories have the same name"),
    (lambda d: d["images"][0].update(width=10**12), "width is 1000000000000")])
def test_bad_coco_files(folders, change, message):
    f = folders/"COCO/annotations/instances_val.json"
    content = json.loads(f.read_text())
    change(content)
    f.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message): open_dataset(folders/"COCO", "val")
    assert "instances_val.json" in repr(check(folders/"COCO", "val"))


def test_broken_files_are_named_and_never_crash(folders):
    "Random damage either changes nothing that matters, or ends in a DataError or a warning that names the file"
    rng = random.Random(0)
    files = {"KITTI": "training/label_2/000001.txt", "VOC": "Annotations/000001.xml",
             "COCO": "annotations/instances_val.json"}
    junk = [b"", b"\xff", b"nan", b"-", b"9"*30, b"<", b"\x00", b"]", b" ", b"1e999"]
    ends = Counter()
    for k,name in files.items():
        file = folders/k/name
        whole = file.read_bytes()
        for _ in range(200):
            broken = bytearray(whole)
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(broken))
                if rng.random() < .5: broken[at:at+1] = rng.choice(b"0123456789").to_bytes()
                else: broken[at:at + rng.randint(0, 4)] = rng.choice(junk)
            if rng.random() < .1: broken = broken[:rng.randrange(len(broken))]
            file.write_bytes(broken)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try: d = open_dataset(folders/k, "val", CLASSES, cache=False)
                except (DataError, ValueError) as e:
                    assert isinstance(e, DataError) or "no class" in str(e), repr(e)
                    assert Path(name).name in str(e) or Path(name).stem in str(e), str(e)
                    ends["error"] += 1
                    continue
            assert all(issubclass(w.category, UserWarning) for w in caught), [str(w.message) for w in caught]
            for i in range(len(d)):
                t,(h,w) = d.target(i), d.sizes[i].tolist()
                b = t["boxes"]
                assert (b >= 0).all() and (b[:,2:] > b[:,:2]).all() and (b[:,2:] <= torch.tensor([w, h])).all()
                assert ((t["labels"] >= 1) & (t["labels"] <= 3)).all() and len(b) == len(t["labels"])
            ends["warning" if caught else "read"] += 1
        file.write_bytes(whole)
        assert open_dataset(folders/k, "val", CLASSES).counts() == {"Car": 1, "Pedestrian": 0, "Cyclist": 1}
    assert all(ends[k] > 10 for k in ("error", "warning", "read")), ends


# The cache

def test_cache_notices_changes(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MOI_CACHE", str(tmp_path/"kept"))
    monkeypatch.setattr(data.cached, "__defaults__", (True, 0.))       # keep what took no time
    files = {"KITTI": ("training/label_2/000001.txt", b"Car", b"Van"),
             "VOC": ("Annotations/000001.xml", b"Car", b"Van"),
             "COCO": ("annotations/instances_val.json", b'"category_id": 1', b'"category_id": 3')}
    parse = {"KITTI": "parse_kitti", "VOC": "parse_voc", "COCO": "parse_coco"}
    for k,(name,old,new) in files.items():
        calls,real = [],getattr(layouts, parse[k])
        def counting(root, real=real, calls=calls):
            calls.append(root)
            return real(root)
        counting.__name__ = parse[k]
        monkeypatch.setattr(layouts, parse[k], counting)
        first,again = (open_dataset(folders/k, "val", CLASSES) for _ in range(2))
        assert len(calls) == 1 and repr(first) == repr(again)
        for key,v in first.target(0).items(): assert torch.equal(v, again.target(0)[key]), key
        f = folders/k/name
        before = f.stat()
        f.write_bytes(f.read_bytes().replace(old, new))                 # same size
        changed = open_dataset(folders/k, "val", CLASSES)
        assert len(calls) == 2 and repr(changed) != repr(first) or "ignore" in changed.target(0)
        os.utime(f, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        open_dataset(folders/k, "val", CLASSES)
        assert len(calls) == 3
        for z in (tmp_path/"kept").glob("*"): z.write_bytes(z.read_bytes()[:300])
        assert repr(open_dataset(folders/k, "val", CLASSES)) == repr(changed) and len(calls) == 4
        assert not list((tmp_path/"kept").glob("*.part"))


def test_cache_folder_that_cannot_be_written(folders, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("MOI_CACHE", str(tmp_path/"file"/"below"))
    monkeypatch.setattr(data.cached, "__defaults__", (True, 0.))
    assert len(open_dataset(folders/"VOC", "val")) == 1


def test_warnings_come_from_the_cache_too(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MOI_CACHE", str(tmp_path/"kept"))
    monkeypatch.setattr(data.cached, "__defaults__", (True, 0.))
    f = folders/"VOC/Annotations/000001.xml"
    f.write_text(f.read_text().replace("<xmax>20<", "<xmax>3<"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="000001.xml:8"): open_dataset(folders/"VOC", "val")
    assert len(open_dataset(folders/"VOC", "train").problems) == 0      # not of this split


# Batches

def test_workers_share(folders):
    d = Resized(open_dataset(folders/"COCO", "train"), (16, 20), cache=True)
    plain = Resized(open_dataset(folders/"COCO", "train"), (16, 20))
    for images,targets in DataLoader(d, 2, num_workers=2, collate_fn=collate):
        assert images.shape == (2, 3, 16, 20) and images.dtype == torch.uint8 and len(targets) == 2
        for i in range(2):
            assert torch.equal(images[i], plain.image(i))
            for k,v in targets[i].items(): assert torch.equal(v, plain.target(i)[k])
    assert d.ready.all() and torch.equal(d.subset([1]).image(0), plain.image(1)) and d.subset([1]).ready.all()
    assert d.category_ids == (1, 2, 3) and d.ids == plain.ids
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again.image(0), plain.image(0)) and again.classes == plain.classes
    with pytest.raises(ValueError, match="one size"): collate([d[0], (noise(8, 8), target())])


def test_fields_that_scale(tmp_path):
    t = target() | {"dontcare": torch.tensor([[10., 10, 20, 20]])}
    write_kitti(tmp_path, [("0", noise(32, 40), t)], CLASSES)
    small = Resized(KITTIDataset(tmp_path), (16, 10)).target(0)
    assert small["dontcare"].tolist() == [[2.5, 5, 5, 10]] and small["boxes"][0].tolist() == [.5, 1.5, 5, 15]


def test_annotations_are_not_held_as_python_objects(tmp_path):
    "A pickled dataset (what a spawned worker gets) holds tensors only: its size is that of the numbers"
    n = 3000
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 100, "width": 100} for i in range(1, n+1)]
    anns = [{"id": 7*i+k, "image_id": i, "category_id": 1, "bbox": [k, k, 9, 9], "area": 81, "iscrowd": 0}
            for i in range(1, n+1) for k in range(7)]
    (tmp_path/"images").mkdir()
    for im in images: (tmp_path/"images"/im["file_name"]).touch()
    content = {"images": images, "annotations": anns, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path/"annotations.json").write_text(json.dumps(content))
    d = open_dataset(tmp_path)
    assert len(d) == n and d.counts() == {"a": 7*n}
    p = d.packed
    tensors = [p.sizes, p.ids, p.files, p.objects.start, p.objects.stop, *p.objects.columns.values()]
    size = sum(t.numel()*t.element_size() for t in tensors)
    assert len(pickle.dumps(d)) < size + 10_000 and size < 60*7*n
    held = [v for v in vars(d).values() if isinstance(v, (list, dict)) and len(v) > 10]
    assert not held


def test_import_needs_no_notebook_tools():
    code = "import sys, moi.layouts; print([m for m in ('nbdev', 'fastcore', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
