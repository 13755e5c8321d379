"""What a run promises when it is killed, runs out of disk or meets damaged files, tried at full size.

`python -m tests.reliability --out results/reliability --hours 8` tries all parts, `--parts kills disks` some. A case is kept in
`--work` (by default `runs/reliability/cases.jsonl`) as soon as it is finished, so that the command goes on where it was stopped; its
counts are in `result.json` under `--out`. Every case is a process of its own, forked from one that has only imported, with one thread.
A case ends the same (as a run that nobody disturbed, to the byte), reads what a user's damaged file still says (as a sound dataset or
detector), is refused in a sentence that names the file, or is a fault.
"""
import argparse
import builtins
import collections
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from moi import experiment, street
from moi.compress import make_student, paint_transfer_set
from moi.data import cached, check_target, read_image, write_image
from moi.detector import DetectorSpec, build_detector, save_detector
from moi.distill import Distilling, distill
from moi.experiment import check_parameters, read_parameters, run
from moi.impressions import Painting, synthesise
from moi.layouts import COCODataset, KITTIDataset, VOCDataset, parse_coco
from moi.pseudo_targets import sample_targets
from moi.teachers import adopt, load
from moi.train import Engine, Training, train_detector

ROOT = Path(__file__).resolve().parents[1]
RUN = dict(name="tiny", device="cpu", scenes=[3, 2, 2], size=[64, 64], teacher_width=.25, student_width=.125, fpn_channels=8,
    head_channels=16, teacher_steps=2, teacher_batch=2, batch=2, impressions=4, textures=2, shard=2, synthesis_steps=2, distill_steps=4,
    rounds=2, held_out=1, baselines=[], timed=1)
EXPORTED = RUN | {"export": ["onnx"]}
SPEC = DetectorSpec(("a", "b"), (64, 64), width=.25, fpn_channels=8, head_channels=16, anchors=(8, 16, 32, 64, 128))
WAIT = 120 # Seconds that a case may take: what takes longer hangs
MEMORY = 2 * 2**30 # Bytes that reading a damaged file may add
CPU = Engine(device="cpu")


# Processes


def child(work, folder, limit=WAIT, hook=lambda: None, after=None, stop=signal.SIGKILL):
    "`work()` in a process of its own, sent `stop` some seconds `after` its start: how it ended, and what it said"
    begun = begin(work, folder, hook)
    if after is not None:
        time.sleep(after)
        os.kill(begun[0], stop)
    return end(begun, limit)


def begin(work, folder, hook=lambda: None):
    "Fork; what is printed goes to a log beside the folder"
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return pid, ours
    try:
        os.close(ours)
        for stream in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        hook()
        try: said = ["ended", work()]
        except BaseException as e: said = explain(e)
        os.write(theirs, json.dumps(said).encode()[:60000])
    finally: os._exit(0)


def explain(e):
    "An error as a case reports it: kind, message, and whether the kind is one that users see"
    kind = type(e)
    known = isinstance(e, (ValueError, OSError, ImportError, MemoryError, FloatingPointError)) and not isinstance(e, UnicodeError)
    known &= kind.__module__ in ("builtins", "moi.data")
    return ["refused" if known else "raw", f"{kind.__name__}: {e}"[:1500]]


def end(begun, limit=WAIT):
    "Wait for a process; one that takes too long is killed"
    pid, ours = begun
    until = time.monotonic() + limit
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(.01)
        if time.monotonic() < until: continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)
        return ["hangs", f"it took more than {limit} s"]
    with open(ours, "rb") as f: said = f.read()
    return json.loads(said) if said else ["killed", ""]


def small_run(runs, parameters=RUN):
    "A tiny run, as a piece of work"
    def work(): run(parameters, runs, progress=False)
    return work


# What a run has made


def contents(runs):
    "What a run has made, file by file: all but when, how long, and what the card says of that"
    return {str(f.relative_to(runs)): content(f) for f in sorted(Path(runs).rglob("*")) if f.is_symlink() or f.is_file()}


def content(file):
    "A file's checksum, of a record without its times; a link's target"
    if file.is_symlink(): return os.readlink(file).replace(str(file.parent.parent), "")
    data = file.read_bytes()
    if file.name == "student.md": data = b""
    if file.name == "result.json": data = json.dumps({k: json.loads(data)[k] for k in ("params", "seed", "metrics")}).encode()
    if file.name == "stage.json":
        passing = {"seconds", "memory", "commits", "checksum"}
        data = json.dumps({k: v for k, v in json.loads(data).items() if k not in passing}, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def differs(ours, wanted):
    "Where two of them differ; leftovers are differences too"
    names = [n for n in sorted(ours.keys() | wanted.keys()) if ours.get(n) != wanted.get(n)]
    about = lambda n: f"{n} is {'left' if n not in wanted else 'lost' if n not in ours else 'another'}"
    return "; ".join(map(about, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def ended(said, runs, wanted):
    "The verdict on a run that should have ended like an undisturbed one"
    if said[0] != "ended": return "fault", f"{said[0]}: {said[1]}"
    found = differs(contents(runs), wanted)
    return ("fault", found) if found else ("same", "")


# Write points


class Watch:
    "Counts what a process changes below a folder, and at one of these points, or half way through a write, kills it; or fills the disk"
    def __init__(self, folder, before=-1, half=-1, room=None):
        self.folder, self.before, self.half, self.room = str(folder) + os.sep, before, half, room
        self.points, self.files, self.open = [], 0, io.open

    def start(self):
        "From now on"
        sys.addaudithook(self.hear)
        io.open = builtins.open = self.opened

    def hear(self, event, args):
        "An audit event of Python's, before it is carried out"
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink"): return
        path = args[1] if event == "os.symlink" else args[0]
        if isinstance(path, int) or path is None or not os.fspath(path).startswith(self.folder): return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        self.points.append(f"{event} {os.path.basename(os.fspath(path))}")
        if len(self.points) - 1 == self.before: os.kill(os.getpid(), signal.SIGKILL)

    def opened(self, file, mode="r", *args, **named):
        "A file, whose writing is watched"
        f = self.open(file, mode, *args, **named)
        if isinstance(file, int) or not set(mode) & set("wxa+") or not os.fspath(file).startswith(self.folder): return f
        number, write, self.files = self.files, f.write, self.files + 1
        def halved(data):
            if number == self.half:
                write(data[:len(data) // 2])
                f.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.room is not None and (left := max(0, self.room)) < len(data):
                write(data[:left])
                self.room = 0
                raise OSError(28, "No space left on device")
            if self.room is not None: self.room -= len(data)
            return write(data)
        f.write = halved
        return f


class Reference:
    "A run that nobody disturbed: what it made, how long it took, and its write points"
    def __init__(self, work, parameters):
        folder = work/"reference"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True) # as in every case: a run that makes it itself has one write point more
        watch = Watch(folder)
        def counted():
            watch.start()
            start = time.perf_counter()
            run(parameters, folder, progress=False)
            return [watch.points, watch.files, time.perf_counter() - start]
        said = child(counted, folder)
        if said[0] != "ended": raise SystemExit(f"the undisturbed run: {said}")
        self.points, self.files, self.seconds = said[1]
        self.made, self.bytes = contents(folder), sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


class Part:
    "Cases of one kind; `of` gives them, `attempt` tries one"
    def __init__(self, work): self.work = work

    def fresh(self):
        "An empty folder `runs`"
        runs = self.work/"case"
        for f in (runs, runs.with_name("case.log")): shutil.rmtree(f, ignore_errors=True) if f.is_dir() else f.unlink(missing_ok=True)
        runs.mkdir(parents=True)
        return runs

    def tries(self, cases):
        "Each case, with its verdict and the reason"
        for case in cases: yield case, *self.attempt(case)

    weight = staticmethod(lambda case: 1) # For how many a case counts


class Kills(Part):
    "Every write point of a run, before and half way; then 200 at any time, four in each run"
    def of(self):
        self.exported, self.plain = Reference(self.work/"exported", EXPORTED), Reference(self.work/"plain", RUN)
        points = [{"before": k} for k in range(len(self.exported.points))] + [{"half": k} for k in range(self.exported.files)]
        random.Random(0).shuffle(points) # what there was no time for is anywhere
        for a in range(50): # as many of each kind, however far it gets
            yield {"random": a}
            yield from points[a::50]

    def attempt(self, case):
        runs = self.fresh()
        if "random" in case: return self.at_random(case["random"], runs)
        said = child(small_run(runs, EXPORTED), runs, hook=Watch(runs, **case).start)
        if said[0] != "killed": return "fault", f"it was not killed: {said}"
        verdict, why = ended(child(small_run(runs, EXPORTED), runs), runs, self.exported.made)
        at = self.exported.points[case["before"]] if "before" in case else f"write {case['half']}"
        return verdict, f"{at}: {why}" if why else ""

    def at_random(self, seed, runs):
        for after in random.Random(seed).choices(range(1000), k=4):
            child(small_run(runs), runs, after=after / 1000 * self.plain.seconds)
        return ended(child(small_run(runs), runs), runs, self.plain.made)

    weight = staticmethod(lambda case: 4 if "random" in case else 1)


class Pairs(Part):
    "Two processes at the same moment: on one run, of which one leaves with a sentence, or on the stages of two runs"
    def of(self):
        self.plain = Reference(self.work/"plain", RUN)
        return [{"pair": k, "names": 1 + k % 2} for k in range(50)]

    def attempt(self, case):
        runs, names = self.fresh(), ["tiny", "tiny" if case["names"] == 1 else "other"]
        later = random.Random(case["pair"]).choice([0, 0, .1, .5])
        both = [begin(small_run(runs, RUN | {"name": names[0]}), runs)]
        time.sleep(later)
        both.append(begin(small_run(runs, RUN | {"name": names[1]}), runs))
        said = [end(b) for b in both]
        left = [s for s in said if s[0] == "refused" and "another process is at work here" in s[1]]
        wrong = [s for s in said if s[0] != "ended" and s not in left]
        if wrong or len(left) > (case["names"] == 1): return "fault", str(said)
        made = contents(runs)
        others = {k for k in made if k.startswith("other/")}
        if len(others) != (0 if case["names"] == 1 else sum(k.startswith("tiny/") for k in made)): return "fault", f"of the other: {others}"
        found = differs({k: v for k, v in made.items() if k not in others}, self.plain.made)
        return ("fault", found) if found else ("same", "")


class Interrupts(Part):
    "Ctrl-C at any moment: the run leaves no file half written, and resumes"
    def of(self):
        self.plain = Reference(self.work/"plain", RUN)
        return [{"interrupt": k} for k in range(20)]

    def attempt(self, case):
        runs, after = self.fresh(), (.02 + .96 * random.Random(case["interrupt"]).random()) * self.plain.seconds
        said = child(small_run(runs), runs, after=after, stop=signal.SIGINT)
        if said[0] not in ("raw", "ended") or said[0] == "raw" and "KeyboardInterrupt" not in said[1]: return "fault", str(said)
        left = [str(f.relative_to(runs)) for f in runs.rglob("*") if f.suffix == ".part" or f.name.startswith(".world-")]
        if left: return "fault", f"left after the interrupt: {left[:3]}"
        return ended(child(small_run(runs), runs), runs, self.plain.made)


class Disks(Part):
    "Disks of 50 kB and more: what is full is named, nothing half written stays, and with more room the run resumes"
    def of(self):
        self.exported = Reference(self.work/"exported", EXPORTED)
        whole = self.exported.bytes / 1000 # of what stays; at times there is a checkpoint beside it
        sizes = [50, 60, 75, 100, 150, 250, *(whole * (.05 + 1.55 * k / 17) for k in range(18))]
        return [{"kB": round(kB)} for kB in random.Random(0).sample(sizes, 24)]

    def attempt(self, case):
        runs, size = self.fresh(), case["kB"] * 1024
        mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(runs)], capture_output=True).returncode
        try:
            hook = (lambda: None) if mounted else Watch(runs, room=size).start
            said = child(small_run(runs, EXPORTED), runs, hook=hook)
            left = [str(f.relative_to(runs)) for f in runs.rglob("*") if f.suffix == ".part" or f.name.startswith(".world-")]
            if left: return "fault", f"left on the full disk: {left[:3]}"
            if said[0] == "refused" and not ("No space left" in said[1] and str(runs) in said[1]): return "fault", str(said)
            if said[0] not in ("refused", "ended"): return "fault", str(said)
            if mounted: subprocess.run(["mount", "-o", "remount,size=100m", str(runs)], check=True)
            verdict, why = ended(child(small_run(runs, EXPORTED), runs), runs, self.exported.made)
            return verdict, why or said[1] or ""
        finally:
            if mounted: subprocess.run(["umount", str(runs)], check=True)


# Damaged files


def flip(data, rng):
    "One bit is another"
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]


def insert(data, rng):
    "Some bytes, of any value, that were not there"
    i = rng.randrange(len(data) + 1)
    return data[:i] + rng.randbytes(rng.choice([1, 4, 100])) + data[i:]


def piece(data, rng, times):
    "A piece comes so many times"
    i, n = rng.randrange(len(data)), rng.choice([1, 8, 200])
    return data[:i] + data[i:i + n] * times + data[i + n:]


def number(data, rng, values):
    "Another number, of text; of anything else, bytes of one"
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data[:10**6]))
    i, k = (rng.choice(found).span() if found else (rng.randrange(len(data)),) * 2)
    if b"\0" in data: i, k, values = (j := rng.randrange(len(data))), j + 4, [b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\xff\xff\xff\xff"]
    return data[:i] + rng.choice(values) + data[k:]


MUTATIONS = {"flip": flip, "flips": lambda d, r: flip(flip(flip(d, r), r), r), "cut": lambda d, r: d[:r.randrange(len(d))],
    "insert": insert, "repeat": lambda d, r: piece(d, r, 2), "lose": lambda d, r: piece(d, r, 0), "empty": lambda d, r: b"",
    "huge": lambda d, r: number(d, r, [b"1e400", b"1e30", b"99999999999999999999", b"-1"]),
    "nan": lambda d, r: number(d, r, [b"NaN", b"Infinity", b"nan", b".nan", b"null"])}


def damage(folder, patterns, rng):
    "Mutate one file of a folder; which, and how"
    files = collections.defaultdict(list)
    for pattern in patterns:
        for f in sorted(folder.rglob(pattern)):
            if f.is_file() and not f.is_symlink(): files[re.sub(r"\d", "0", f.name)].append(f)
    file, how = rng.choice(files[rng.choice(sorted(files))]), rng.choice(list(MUTATIONS))
    data = file.read_bytes()
    if data: file.write_bytes(MUTATIONS[how](data, rng))
    return file, how


class Format:
    "A format that is read: `make` writes it into a folder, `read` gives what it says; `exact` where nothing else may come of damage"
    cases, files, exact, named = 300, ("*",), False, ()
    def make(self, folder): raise NotImplementedError
    def read(self, folder): raise NotImplementedError
    def prepare(self, file): "What is to be done when a file was damaged, before it is read"


class Layout(Format):
    "An annotated data set"
    def __init__(self, name, dataset, files): self.name, self.dataset, self.files = name, dataset, files
    def make(self, folder): street.write_street(folder/"data", (64, 64), 2, 1, 1, layout=self.name)
    def read(self, folder):
        told = []
        for split in ("train", "test"):
            data = self.dataset(folder/"data", split)
            for i in range(len(data)):
                image, target = data[i]
                check_target(data.ids[i], image, target, data.classes)
                told.append([image.sum().item(), {k: v.tolist() for k, v in target.items()}])
        return told


class Picture(Format):
    "An image by itself"
    cases = 200
    def __init__(self, name): self.name = name
    def make(self, folder):
        write_image(folder/"image.png", street.draw_scene((64, 64), 0)[0])
        if self.name == "png": return
        from PIL import Image
        with Image.open(folder/"image.png") as im: im.save(folder/f"image.{self.name}")
        (folder/"image.png").unlink()
    def read(self, folder):
        image = read_image(next(folder.iterdir()))
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return [list(image.shape), image.sum().item()]


class Weights(Format):
    "A teacher's file"
    cases = 150
    def __init__(self, name): self.name = name
    def make(self, folder):
        torch.manual_seed(0)
        detector = build_detector(SPEC).eval()
        if self.name == "safetensors": save_detector(detector, folder/"teacher.safetensors")
        else: torch.save(detector.state_dict(), folder/"teacher.pth")
    def read(self, folder):
        given = {} if self.name == "safetensors" else dict(classes=SPEC.classes, size=SPEC.size, anchors=SPEC.anchors)
        return asked(load(next(folder.iterdir()), **given))


class Framework(Format):
    "A teacher of another framework's, beside its configuration"
    cases = 60
    def __init__(self, name): self.name = name
    def make(self, folder):
        for pattern in ("checkpoint.*", "config_resize.*"):
            file = next((ROOT/f"tests/oracles/{self.name}_r18").glob(pattern))
            shutil.copyfile(file, folder/file.name)
    def read(self, folder): return asked(load(next(folder.glob("checkpoint.*")), ["ball", "box", "cone", "disc"],
        config=next(folder.glob("config_resize.*"))))


def asked(detector):
    "What a detector is and sees"
    with torch.inference_mode(): seen = detector([torch.linspace(0, 1, 3 * 64 * 64).view(3, 64, 64)])[0]
    return [repr(detector.spec), *(v.tolist() for v in seen.values())]


class Parameters(Format):
    "A run's parameters"
    name, named = "parameters", ("parameter",)
    def make(self, folder): shutil.copyfile(ROOT/"nbs/experiments/params/tiny.yaml", folder/"tiny.yaml")
    def read(self, folder): return check_parameters(read_parameters(folder/"tiny.yaml"))


class Cache(Format):
    "Parsed annotations that were kept: whatever happens to them, the annotations are read"
    exact, name, files = True, "cache", ("*.npz",)
    def make(self, folder): (folder/"data").mkdir()
    def read(self, folder):
        os.environ["MOI_CACHE"], root = str(folder), folder.with_name("annotated")
        if not root.exists(): street.write_street(root, (64, 64), 2, 1, 1, layout="coco")
        file = root/"annotations/instances_train.json"
        parsed = cached(parse_coco, file, [file], slow=0.)
        return repr({k: v.tolist() if hasattr(v, "tolist") else v for k, v in vars(parsed).items()} | {"columns": {
            k: v.tolist() for k, v in parsed.columns.items()}})


class Set(Format):
    "A transfer set and a student that were begun or finished in a folder"
    exact, cases, name = True, 120, "transfer set"
    def teacher(self):
        torch.manual_seed(0)
        return adopt(build_detector(SPEC).eval())
    def make(self, folder):
        paint_transfer_set(self.teacher(), folder/"set", impressions=4, textures=2, shard=2, steps=2, engine=CPU, progress=False)
        make_student(self.teacher(), folder/"set", folder/"student", steps=2, batch=2, held_out=1, engine=CPU, progress=False)
    def prepare(self, file):
        if file.parent.name != "student": shutil.rmtree(next(p for p in file.parents if p.name == "set").with_name("student"))
    def read(self, folder):
        self.make(folder)
        return whole(folder)


class Given(Set):
    "A transfer set that is not painted again, but only learnt from"
    exact, cases, name, files = False, 60, "set to learn from", ("*.json", "*.png")
    def read(self, folder):
        make_student(self.teacher(), folder/"set", folder/"other", steps=2, batch=2, held_out=1, engine=CPU, progress=False)
        return contents(folder/"other")
    def prepare(self, file): "Nothing: the student is another's"


class State(Format):
    "A finished run"
    exact, cases, name, before = True, 50, "finished run", None
    def make(self, folder):
        if self.before is None: return run(RUN, folder/"runs", progress=False) and None
        name, times = self.before
        reference = Reference(folder/"first", RUN)
        at = [k for k, p in enumerate(reference.points) if p.startswith(f"open {name}.")][times]
        shutil.rmtree(folder/"first")
        child(small_run(folder/"runs"), folder/"runs", hook=Watch(folder/"runs", before=at).start)
        (folder/"runs.log").unlink()
    def read(self, folder):
        run(RUN, folder/"runs", progress=False)
        return whole(folder/"runs")


class Begun(State):
    "A run that was killed just before it wrote a teacher, or a student"
    cases = 20
    def __init__(self, name, times): self.name, self.before = f"run killed at {name}", (f"{name}.safetensors", times)
    files = ("training.pt", "commits.json", "stage.json", "made_from.json", "stages.json", "params.yaml", "0*.json")


def whole(folder):
    "What lies in a folder, but for what was set aside as damaged; PNGs tell themselves whether they are damaged, once they are decoded"
    made = {k: v for k, v in contents(folder).items() if ".damaged" not in k}
    return {k: "" if k.endswith(".png") else v for k, v in made.items()}


FORMATS = [Layout("kitti", KITTIDataset, ("*.txt", "*.png")), Layout("voc", VOCDataset, ("*.xml", "*.txt")),
    Layout("coco", COCODataset, ("*.json",)), Picture("png"), Picture("jpg"), Weights("safetensors"), Weights("torch"), Parameters(),
    Framework("detectron2"), Framework("mmdet"), Cache(), Set(), Given(), State(), Begun("teacher", 0), Begun("student", 1)]


class Mutations(Part):
    "Files with flipped bits, cut, repeated, with numbers that are none: more than 2,000 over every format that is read"
    def of(self):
        tenth = lambda f, a: range(a * f.cases // 10, (a + 1) * f.cases // 10)
        return [{"format": f.name, "seed": k} for a in range(10) for f in FORMATS for k in tenth(f, a)] # some of each, however far it gets

    def tries(self, cases):
        by_name = {f.name: f for f in FORMATS}
        for name, some in itertools.groupby(cases, key=lambda c: c["format"]):
            f, mine = by_name[name], list(some)
            base = self.work/f.name.replace(" ", "-")
            if not (base/"made").is_file():
                shutil.rmtree(base, ignore_errors=True)
                (base/"base").mkdir(parents=True)
                said = child(lambda f=f, base=base: f.make(base/"base"), base/"base")
                if said[0] != "ended": raise SystemExit(f"{f.name}: {said}")
                (base/"made").touch()
            while mine:
                for verdict, why in stream(lambda f=f, base=base, mine=mine: self.worker(f, base, mine), base/"case"):
                    yield mine.pop(0), verdict, why

    def worker(self, f, base, cases):
        "Verdicts, one after another"
        resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + MEMORY, -1))
        os.environ["MOI_CACHE"] = str(base/"cache")
        warnings.simplefilter("ignore")
        wanted = f.read(self.copy(base))
        for case in cases: yield self.attempt(f, self.copy(base), case, wanted)

    @staticmethod
    def copy(base):
        shutil.rmtree(base/"case", ignore_errors=True)
        return shutil.copytree(base/"base", base/"case", symlinks=True)

    @staticmethod
    def attempt(f, folder, case, wanted):
        "A verdict, and what was said"
        if f.name == "cache": f.read(folder)
        names = {p.name for p in folder.rglob("*") if p.is_file()} | set(f.named)
        file, how = damage(folder, f.files, random.Random(f"{f.name} {case['seed']}"))
        f.prepare(file)
        try: found = f.read(folder)
        except Exception as e:
            kind, said = explain(e)
            named = any(n in said for n in names)
            return "refused" if kind == "refused" and named else "fault", f"{file.name}, {how}: {said[:400]}"
        if found == wanted: return "same", ""
        told = differs(found, wanted) if isinstance(found, dict) and f.exact else ""
        return "fault" if f.exact else "read", f"{file.name}, {how}{': ' if told else ''}{told}"


def stream(work, folder, limit=60):
    "What a generator gives in a process of its own, up to where it ends, dies or hangs"
    log, (ours, theirs) = folder.with_name("worker.log"), os.pipe()
    if not (pid := os.fork()):
        try:
            os.close(ours)
            for s in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), s)
            for told in work(): os.write(theirs, json.dumps(told).encode() + b"\n")
        except BaseException as e: os.write(theirs, json.dumps(["fault", f"worker: {explain(e)[1]}"]).encode() + b"\n")
        finally: os._exit(0)
    os.close(theirs)
    said, status = b"", None
    try:
        while status is None:
            if not select.select([ours], [], [], limit)[0]:
                yield "fault", f"it took more than {limit} s"
                return
            some = os.read(ours, 2**16)
            *lines, said = (said + some).split(b"\n")
            yield from map(json.loads, lines)
            if not some: status = os.waitpid(pid, 0)[1]
        if status: yield "fault", f"the process died: {status}"
    finally:
        os.close(ours)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# Memory


class Memory(Part):
    "2,000 steps of painting, distilling and training: neither memory nor open files grow"
    bound = 32 * 2**20 # Bytes, from the 200th step on
    def of(self): return [{"steps": 2000, "of": of} for of in ("painting", "distilling", "training")]

    def attempt(self, case):
        said = child(lambda: self.measured(**case), self.fresh(), limit=1200)
        if said[0] != "ended": return "fault", str(said)
        told = said[1]
        why = f"memory grew by {told['bytes'] / 2**20:.1f} MB, open files by {told['files']}, over {told['steps']} steps"
        return "fault" if told["bytes"] > self.bound or told["files"] > 0 else "same", why

    def measured(self, steps, of):
        seen, page = [], resource.getpagesize()
        def look(*_): # of each step's first forward pass
            seen.append((int(Path("/proc/self/statm").read_text().split()[1]) * page, len(os.listdir("/proc/self/fd"))))
        torch.manual_seed(0)
        teacher, student = build_detector(SPEC).eval(), build_detector(SPEC)
        targets = sample_targets(4, SPEC.size, SPEC.labels, generator=torch.Generator().manual_seed(0))
        if of == "painting": synthesise(teacher, targets, Painting(steps=steps), watch=look, progress="")
        else:
            scenes = [street.draw_scene(SPEC.size, k)[0] for k in range(4)]
            images = Scenes(list(zip(scenes, targets)))
            student.backbone.register_forward_hook(look)
            if of == "distilling": distill(student, teacher, images, Distilling(steps=steps, batch=2), engine=CPU, progress="")
            else: train_detector(student, images, Training(steps=steps, batch=2), engine=CPU, progress="")
        first, later = seen[len(seen) // 10:len(seen) // 5], seen[-len(seen) // 10:]
        most = lambda some, k: max(s[k] for s in some)
        return {"steps": steps, "bytes": most(later, 0) - most(first, 0), "files": most(later, 1) - most(first, 1)}


class Scenes(list):
    "Images and targets, as a data set"


# Main


PARTS = {"kills": Kills, "pairs": Pairs, "interrupts": Interrupts, "disks": Disks, "mutations": Mutations, "memory": Memory}


def try_part(name, kept, file, work, until, most, again):
    "Try the cases of a part that were not tried yet, or were a fault and are tried again, until time is up; how many are planned"
    part = PARTS[name](work/name)
    cases = list(part.of())
    found = [kept.get(json.dumps([name, c]), {}).get("verdict") for c in cases]
    todo, start = [c for c, v in zip(cases, found) if v is None or again and v == "fault"][:most], time.monotonic()
    tries = part.tries(todo) if todo and start < until else ()
    for case, verdict, why in tries:
        took, start = time.monotonic() - start, time.monotonic()
        told = {"part": name, "case": case, "of": part.weight(case), "verdict": verdict, "why": why, "seconds": round(took, 2),
            "commit": experiment.commit()}
        kept[json.dumps([name, case])] = told
        with open(file, "a") as f: f.write(json.dumps(told) + "\n")
        if verdict == "fault": print(f"{name} {case}: {why}", flush=True)
        if start > until: break
    return sum(map(part.weight, cases))


def counted(records):
    "How many cases, by verdict"
    found = collections.Counter()
    for r in records: found[r["verdict"]] += r["of"]
    return {"done": sum(found.values()), **{k: found[k] for k in ("same", "read", "refused", "fault")}}


def tell(records, planned, options):
    "What `result.json` holds"
    of = lambda name: [r for r in records if r["part"] == name]
    part = lambda name: {"about": PARTS[name].__doc__, "planned": planned.get(name), **counted(of(name)),
        "seconds": round(sum(r["seconds"] for r in of(name)))}
    formats = {f.name: {"planned": f.cases, **counted([r for r in of("mutations") if r["case"]["format"] == f.name])} for f in FORMATS}
    faults = [{k: r[k] for k in ("part", "case", "why")} for r in records if r["verdict"] == "fault"]
    where = experiment.surroundings(CPU)
    return {"parts": {name: part(name) for name in PARTS}, "formats": formats, "faults": faults,
        "memory": {r["case"]["of"]: r["why"] for r in of("memory")}, "seconds": round(sum(r["seconds"] for r in records)),
        "commits": sorted({str(r["commit"]) for r in records}), "params": options, "device": where["device"], "versions": where["versions"],
        "commit": where["commit"], "command": "python -m tests.reliability --out results/reliability --hours 8",
        "seeds": "random.Random(case number); the case itself is its seed, and all cases of a part are in its `of`"}


def main(arguments=None):
    "The command"
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description="Try what a run promises when things go wrong.")
    parser.add_argument("--out", type=Path, default=ROOT/"results/reliability", help="folder of result.json")
    parser.add_argument("--work", type=Path, default=ROOT/"runs/reliability", help="folder of finished cases, and of what they need")
    parser.add_argument("--hours", type=float, default=8., help="stop after so long")
    parser.add_argument("--minutes", type=float, help="stop after so long, instead")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="what is tried")
    parser.add_argument("--most", type=int, help="cases of each part that are tried now, at most")
    parser.add_argument("--again", action="store_true", help="try once more what was a fault")
    o = parser.parse_args(arguments)
    until = time.monotonic() + (60 * o.minutes if o.minutes is not None else 3600 * o.hours)
    torch.set_num_threads(1)
    o.work.mkdir(parents=True, exist_ok=True)
    file, plans = o.work/"cases.jsonl", o.work/"planned.json"
    kept = {json.dumps([r["part"], r["case"]]): r for r in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    planned = json.loads(plans.read_text()) if plans.is_file() else {}
    for name in o.parts:
        planned[name] = try_part(name, kept, file, o.work.resolve(), until, o.most, o.again)
        plans.write_text(json.dumps(planned))
    o.out.mkdir(parents=True, exist_ok=True)
    options = {"parts": o.parts, "hours": o.hours if o.minutes is None else round(o.minutes / 60, 2)}
    result = tell(list(kept.values()), planned, options)
    (o.out/"result.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in PARTS: print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in result["parts"][name].items() if k != "about"))
    return len(result["faults"])


if __name__ == "__main__": sys.exit(min(1, main()))
