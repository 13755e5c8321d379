"What a user's folder may hold: lists, parts and layouts of many kinds, damaged and hostile files; each is said in a sentence or read right"
import io
import json
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moi import data
from moi.data import DataError, check_image, read_image
from moi.layouts import (
    COCODataset,
    KITTIDataset,
    VOCDataset,
    check,
    check_images,
    open_dataset,
    write_coco,
    write_kitti,
    write_voc,
)

CLASSES = ("Car", "Pedestrian", "Cyclist")
WRITERS = {"KITTI": write_kitti, "VOC": write_voc, "COCO": write_coco}
IMAGES = {"KITTI": "training/image_2", "VOC": "JPEGImages", "COCO": "images"}
LABELS = {"KITTI": "training/label_2/000001.txt", "VOC": "Annotations/000001.xml", "COCO": "annotations/instances_val.json"}


def noise(h, w, seed=0): return torch.randint(0, 256, (3, h, w), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture
def folders(tmp_path):
    "Twelve samples with two boxes each in three layouts, split into train and val"
    target = {"boxes": torch.tensor([[2., 3, 20, 30], [0, 0, 9, 7]]), "labels": torch.tensor([1, 3])}
    samples = [(f"{i:06d}", noise(32, 40, i), target) for i in range(12)]
    ids = [s[0] for s in samples]
    for layout, write in WRITERS.items(): write(tmp_path / layout, samples, CLASSES, {"train": ids[2:], "val": ids[:2]})
    return tmp_path


def edit(file, *changes):
    text = file.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    file.write_text(text)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def quiet(function, *args, **options):
    "What a call gives, and what it warned of"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*args, **options), [str(w.message) for w in caught]


# Splits

def test_a_list_that_names_images_twice_is_read_once_with_one_warning(folders):
    for k, lists in ("KITTI", "ImageSets"), ("VOC", "ImageSets/Main"):
        file = folders / k / lists / "val.txt"
        file.write_text("\ufeff000001\n000000\n000001\n000001\n000000\n") # with a byte-order mark, too
        d, said = quiet(open_dataset, folders / k, "val", CLASSES)
        assert d.ids == ["000001", "000000"] and len(said) == 1
        assert "3 line(s) that list an image again, read once" in said[0] and "val.txt:3: '000001' was in line 1 already" in said[0]


def test_a_set_without_lists_is_split_by_shares(folders):
    for k in "KITTI", "VOC": shutil.rmtree(folders / k / "ImageSets")
    (folders / "COCO/annotations/instances_val.json").unlink()
    found = {}
    for k, n in {"KITTI": 12, "VOC": 12, "COCO": 10}.items():
        parts = [open_dataset(folders / k, s, CLASSES) for s in ("0-50%", "50-75%", "75-100%")]
        everything = sorted(i for d in parts for i in d.ids)
        assert everything == sorted(open_dataset(folders / k, None, CLASSES).ids) and len(everything) == len(set(everything)) == n
        assert [d.ids for d in parts] == [open_dataset(folders / k, s, CLASSES).ids for s in ("0-50%", "50-75%", "75-100%")]
        assert all(d.ids == sorted(d.ids) for d in parts) and "split 50-75%:" in repr(parts[1])
        assert open_dataset(folders / k, "0-50% seed 1", CLASSES).ids != parts[0].ids
        found[k] = parts
        with pytest.raises(ValueError, match="from below to above"): open_dataset(folders / k, "75-50%", CLASSES)
        with pytest.raises(ValueError, match="no image is in 0-1% of 1[02] images"): open_dataset(folders / k, "0-1%", CLASSES)
    assert found["KITTI"][0].ids == found["VOC"][0].ids # it is the ids that decide
    with pytest.raises(FileNotFoundError, match="no split 'train' .* splits such as 0-70%"): open_dataset(folders / "VOC", "train")


def test_a_list_is_split_by_shares(folders):
    for k in WRITERS:
        train = open_dataset(folders / k, "train", CLASSES)
        parts = [open_dataset(folders / k, f"train {s}", CLASSES) for s in ("0-80%", "80-100%")]
        assert [len(d) for d in parts] == [8, 2] and sorted(i for d in parts for i in d.ids) == sorted(train.ids)
        with pytest.raises(FileNotFoundError, match="there are: train.*, val"): open_dataset(folders / k, "tranning 0-80%")


def test_a_kitti_subset_without_lists_says_so(folders):
    shutil.rmtree(folders / "KITTI/ImageSets")
    with pytest.raises(DataError) as e: KITTIDataset(folders / "KITTI", "train")
    said = str(e.value)
    assert "it has no ImageSets/" in said and "0-70%" in said and said.count("\n") == 1
    there = set((Path(data.__file__).parent / "kitti_split/train.txt").read_text().split()) & {f"{i:06d}" for i in range(12)}
    d, _ = quiet(KITTIDataset, folders / "KITTI", "train", strict=False)
    assert set(d.ids) == there and f"lacks {3712 - len(there)} frames of the papers' 'train'" in said
    with pytest.raises(FileNotFoundError, match="no split 'test' in .*no ImageSets/, and the papers have train and val"):
        KITTIDataset(folders / "KITTI", "test")
    with pytest.raises(ValueError, match="frames of the papers' 'train'; write"): KITTIDataset(folders / "KITTI", "train 0-80%")


# Layouts

def test_voc_files_under_other_names(folders):
    "`annotations/` beside `images/`, no lists"
    (folders / "other").mkdir()
    for old, new in ("Annotations", "annotations"), ("JPEGImages", "images"): (folders / "VOC" / old).rename(folders / "other" / new)
    d, same = open_dataset(folders / "other", classes=CLASSES), open_dataset(folders / "COCO", "train", CLASSES)
    assert type(d) is VOCDataset and len(d) == 12 and not d.problems and check(folders / "other", classes=CLASSES)
    assert torch.equal(d[2][0], same[0][0]) and torch.equal(d.target(2)["boxes"], same.target(0)["boxes"])
    edit(folders / "other/annotations/000001.xml", ("<xmin>3<", "<xmin>30<"))
    d, said = quiet(VOCDataset, folders / "other", "0-100%", CLASSES)
    assert "other/annotations/000001.xml:8: Car box 30 4 20 30 has no area" in said[0] and len(d) == 12


def test_coco_images_in_a_folder_with_a_year(folders):
    for place in "images/val2017", "val2017":
        if (folders / "COCO/images").is_dir(): (folders / "COCO/images").rename(folders / "moved")
        (folders / "COCO" / place).parent.mkdir(exist_ok=True)
        (folders / "moved").rename(folders / "COCO" / place)
        assert COCODataset(folders / "COCO", "val").image(1).shape == (3, 32, 40)
        (folders / "COCO" / place).rename(folders / "moved")
        shutil.rmtree(folders / "COCO/images", ignore_errors=True)


@pytest.mark.parametrize("files, what", [
    (("labels/train/0.txt", "images/train/0.jpg"), "YOLO (labels/train/0.txt), which is not read here"),
    (("train/labels/0.txt", "train/images/0.jpg", "data.yaml"), "YOLO (train/labels/0.txt)"),
    (("train/_annotations.coco.json", "train/0.jpg"), "COCO with a file beside each split's images (train/_annotations.coco.json)"),
    (("0.xml", "0.jpg"), "VOC with the XML files beside the images (0.xml)"),
    (("annotations/xmls/0.xml", "images/0.jpg"), "VOC's XML in a folder of its own (annotations/xmls/0.xml)"),
    (("boxes.csv", "images/0.jpg"), "a table (boxes.csv)"),
    (("images/0.jpg",), "images without annotations (images/0.jpg)"),
    (("set/training/label_2/0.txt",), "KITTI (set/training/label_2), a folder below"),
])
def test_a_folder_of_another_layout_says_which(files, what, tmp_path):
    for f in files:
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f).touch()
    with pytest.raises(FileNotFoundError) as e: open_dataset(tmp_path)
    assert f"it looks like {what}" in str(e.value)


def test_a_reader_says_which_layout_it_was_given_instead(folders):
    for k, reader in ("COCO", KITTIDataset), ("KITTI", VOCDataset), ("VOC", COCODataset):
        with pytest.raises(FileNotFoundError, match=rf"is no \w+ folder.*; it looks like {k} \("): reader(folders / k, "train")


def test_a_class_that_is_named_twice_is_refused(folders):
    for k, wrong in ("KITTI", ("Car", "car")), ("VOC", ("Car", "Cyclist", "Car")), ("COCO", ("Car", "Car")):
        with pytest.raises(ValueError, match="is named twice among"): open_dataset(folders / k, "train", wrong)


def test_a_folder_without_its_images_says_so(folders):
    for k in "KITTI", "VOC":
        shutil.rmtree(folders / k / IMAGES[k])
        with pytest.raises(DataError, match="2 error.s. in its files\n.*no image for .*000000"): open_dataset(folders / k, "val", CLASSES)


# Labels

def test_a_byte_order_mark_costs_no_object(folders):
    for k in WRITERS:
        file = folders / k / LABELS[k]
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert open_dataset(folders / k, "val", CLASSES).counts() == {"Car": 2, "Pedestrian": 0, "Cyclist": 2}


def test_xml_with_a_namespace(folders):
    file = folders / "VOC/Annotations/000001.xml"
    edit(file, ("<annotation>", '<annotation xmlns="http://example.org/voc">'), ("<xmin>3<", "<xmin>30<"))
    d, said = quiet(VOCDataset, folders / "VOC", "val", CLASSES)
    assert d.counts() == {"Car": 1, "Pedestrian": 0, "Cyclist": 2} and "000001.xml:8: Car box 30" in said[0]
    text = file.read_text().replace('xmlns=', 'xmlns:v=')
    for tag in "annotation", "object", "name", "bndbox", "xmin":
        text = text.replace(f"<{tag}", f"<v:{tag}").replace(f"</{tag}>", f"</v:{tag}>")
    file.write_text(text)
    d, said = quiet(VOCDataset, folders / "VOC", "val", CLASSES)
    assert d.counts() == {"Car": 1, "Pedestrian": 0, "Cyclist": 2} and "000001.xml:8: Car box 30" in said[0]


@pytest.mark.parametrize("value, crowd", [("0", False), ("1", True), (0, False), (True, True), (None, False), ("no", None), (2, None)])
def test_what_is_a_crowd(value, crowd, folders):
    edit_json(folders / "COCO/annotations/instances_val.json", lambda c: c["annotations"][0].update(iscrowd=value))
    d, said = quiet(COCODataset, folders / "COCO", "val")
    if crowd is None: assert f"annotation 1: iscrowd is {value!r}, 0 or 1 is needed" in said[0] and len(d.target(0)["labels"]) == 1
    else: assert d.target(0)["iscrowd"].tolist() == d.target(0)["ignore"].tolist() == [crowd, False] and not said


def test_an_impossible_area_is_the_boxs(folders):
    wrong = [-1, float("inf"), float("nan")]
    def change(c):
        for a, v in zip(c["annotations"], [*wrong, 7.5]): a["area"] = v
    edit_json(folders / "COCO/annotations/instances_val.json", change)
    d, said = quiet(COCODataset, folders / "COCO", "val")
    assert [t for i in range(2) for t in d.target(i)["area"].tolist()] == [18 * 27, 63, 18 * 27, 7.5]
    assert len(said) == 1 and "3 impossible area(s), taken from the box" in said[0] and "annotation 1: area is -1" in said[0]


def test_a_box_of_no_numbers_is_said_to_be_one(folders):
    edit_json(folders / "COCO/annotations/instances_val.json", lambda c: c["annotations"][0].update(bbox=[float("nan"), 1, 2, 3]))
    edit(folders / "KITTI/training/label_2/000001.txt", ("2.00 3.00", "inf 3.00"))
    edit(folders / "VOC/Annotations/000001.xml", ("<xmin>3<", "<xmin>nan<"))
    for k in WRITERS:
        d, said = quiet(open_dataset, folders / k, "val", CLASSES)
        assert [p.kind for p in d.problems] == ["box without numbers"] and "is not four finite numbers" in said[0]


# Places

@pytest.mark.parametrize("name", ["../../secret.png", "{secret}", "sub/../../../secret.png", "a\0b.png"])
def test_a_coco_path_that_leaves_the_folder_is_refused(name, folders):
    secret = folders / "secret.png"
    shutil.copyfile(folders / "COCO/images/000001.png", secret)
    (folders / "COCO/images/sub").mkdir()
    name = name.format(secret=secret)
    edit_json(folders / "COCO/annotations/instances_val.json", lambda c: c["images"][1].update(file_name=name))
    with pytest.raises(DataError, match=r"images\[1\]: file_name .* leads out of the folder") as e: COCODataset(folders / "COCO", "val")
    assert e.value.kind != "bad file" or "path" in str(e.value)
    d, _ = quiet(COCODataset, folders / "COCO", "val", strict=False)
    assert d.ids == [0] and check(folders / "COCO", "val").counts == {"path outside": 1}


def test_a_link_out_of_the_folder_is_refused_and_a_folder_that_is_one_read(folders):
    (folders / "disk").mkdir()
    for k, images in IMAGES.items():
        image = folders / k / images / "000001.png"
        image.rename(folders / "disk/secret.png")
        image.symlink_to(folders / "disk/secret.png")
        with pytest.raises(DataError, match="000001.png: a link out of the data's folder"): open_dataset(folders / k, "val", CLASSES)
        assert check(folders / k, "val", CLASSES).counts == {"path outside": 1}
        image.unlink()
        (folders / "disk/secret.png").rename(image)
        (folders / k / images).rename(folders / "disk" / k)
        (folders / k / images).symlink_to(folders / "disk" / k)
        assert check(folders / k, "val", CLASSES)
    label = folders / "VOC/Annotations/000001.xml"
    label.rename(folders / "disk/1.xml")
    label.symlink_to(folders / "disk/1.xml")
    with pytest.raises(DataError, match="000001.xml: a link out of the data's folder"): open_dataset(folders / "VOC", "val", CLASSES)
    label.unlink()
    label.symlink_to(folders / "nowhere.xml")
    with pytest.raises(DataError, match="000001.xml: a link out"): open_dataset(folders / "VOC", "val", CLASSES)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_refused(folders):
    "They would be waited for, or read, for ever"
    def pipe(file):
        file.unlink()
        os.mkfifo(file)
    for k in WRITERS:
        image, file = folders / k / IMAGES[k] / "000001.png", folders / k / LABELS[k]
        whole = image.read_bytes()
        pipe(image)
        assert check(folders / k, "val").counts == {"unreadable image": 1}
        image.unlink()
        image.write_bytes(whole)
        pipe(file)
        with pytest.raises(DataError, match=f"{file.name}: not a regular file"): open_dataset(folders / k, "val", CLASSES)
    file = folders / "VOC/ImageSets/Main/train.txt"
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises((DataError, FileNotFoundError)): open_dataset(folders / "VOC", "train", CLASSES)


# Images

def test_images_of_more_than_8_bits_are_scaled_or_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png")
    assert grey.shape == (3, 16, 16) and grey[1].flatten().tolist() == list(range(256))
    for values in ramp.astype(np.float32), ramp.astype(np.int32):
        Image.fromarray(values).save(tmp_path / "b.tif")
        with pytest.raises(DataError, match="b.tif: cannot be read: its pixels are 32-bit numbers"): read_image(tmp_path / "b.tif")
    Image.fromarray(ramp).save(tmp_path / "c.tif")
    assert torch.equal(read_image(tmp_path / "c.tif"), grey)


def bomb(file, side):
    "A PNG of one bit a pixel that claims `side` squared of them, in little more than a thousandth of that many bytes"
    Image.new("1", (side, side)).save(file)


def test_sizes_are_compared_before_anything_is_decoded(tmp_path, monkeypatch):
    bomb(tmp_path / "a.png", 9000)
    assert (tmp_path / "a.png").stat().st_size < 20_000
    bomb(tmp_path / "b.png", 4000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="a.png: .* is 9000x9000 pixels, allowed are 67,108,864"): read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="4000x4000 pixels, its annotation says 40x32"): read_image(tmp_path / "b.png", (32, 40))


def test_headers_and_endings_find_what_was_cut_short(tmp_path):
    pixels = noise(64, 64).permute(1, 2, 0).numpy()
    for name in "a.png", "a.jpg", "a.bmp":
        file = tmp_path / name
        Image.fromarray(pixels).save(file)
        whole = file.read_bytes()
        check_image(file, (64, 64))
        half = whole[:len(whole) // 2]
        for part in half, whole[:-100], *([half.ljust(len(whole), b"\0")] if name == "a.png" else []): # the last was never filled
            file.write_bytes(part)
            with pytest.raises(DataError, match=f"{name}: cannot be decoded"): check_image(file, (64, 64))
        file.write_bytes(whole + b"\n what a camera appends" * 3)
        check_image(file, (64, 64))
        with pytest.raises(DataError, match="its annotation says 64x32"): check_image(file, (32, 64))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    damaged = bytearray((tmp_path / "a.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255 # in the middle: header and ending are fine
    (tmp_path / "a.png").write_bytes(damaged)
    check_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot be decoded"): check_image(tmp_path / "a.png", decode=True)


def test_check_images_names_every_image(folders):
    for k in WRITERS:
        file = folders / k / IMAGES[k] / "000005.png"
        file.write_bytes(file.read_bytes()[:-60])
        d = open_dataset(folders / k, "train", CLASSES)
        problem, = check_images(d, progress=False)
        assert d.files[problem.image] == str(file) and problem.kind == "unreadable image"


# The cache

def hostile(parsed):
    "What a cache may say that no parser gives; each change is to be noticed"
    def boxes(v): parsed.columns["boxes"][0, 2] = v
    def rows(): parsed.count[0] += 1
    def name(): parsed.columns["name"][0] = 99
    def path(): parsed.files = np.array(["../" * 9 + "etc/passwd", *parsed.files[1:]])
    def kind(): parsed.problems.append(data.Problem("strange", "x"))
    def image(): parsed.problems.append(data.Problem("bad file", "x", 99))
    def text(): parsed.columns["boxes"] = parsed.columns["boxes"].astype(str)
    def sizes(): parsed.sizes = parsed.sizes[:1]
    def pickled(): parsed.columns["name"] = parsed.columns["name"].astype(object)
    return [lambda: boxes(1e9), lambda: boxes(float("nan")), rows, name, path, kind, image, text, sizes, pickled]


def test_a_hostile_cache_is_made_anew(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MOI_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(data.cached, "__defaults__", (True, 0.)) # keep what took no time
    first, load = open_dataset(folders / "VOC", "val", CLASSES), data.load_parsed
    file, = (tmp_path / "kept").glob("*.npz")
    good = file.read_bytes()
    with np.load(io.BytesIO(data.unseal(good))) as z: stamp = str(z["stamp"])
    ends = Counter()
    for k in range(len(hostile(load(file, stamp)))):
        parsed = load(file, stamp)
        hostile(parsed)[k]()
        with pytest.MonkeyPatch.context() as patch: # np.savez pickles where it must
            patch.setattr(data, "write_whole", lambda path, content: Path(path).write_bytes(content))
            data.save_parsed(file, stamp, parsed)
        with pytest.raises(ValueError): load(file, stamp)
        again = open_dataset(folders / "VOC", "val", CLASSES)
        assert repr(again) == repr(first) and torch.equal(again.target(0)["boxes"], first.target(0)["boxes"])
        assert load(file, stamp).problems == [] # made anew
        ends["noticed"] += 1
    assert ends["noticed"] == 10
    for content in (b"", b"PK", good[:-9], good.replace(b"NUMPY", b"NUMPX"), b"\x93NUMPY\x01\x00v\x00{'descr'", bytes(99)):
        file.write_bytes(content)
        assert repr(open_dataset(folders / "VOC", "val", CLASSES)) == repr(first)
