"""A device that only pretends to be one: it finds tensors that lie on the wrong device, and counts kernels and waits, without a GPU.

`python -m tests.pretend count` prints what a step asks of a GPU, line by line; `check` what goes wrong there; with `--json` for
`test_device.py`. It takes a process of its own, since torch knows the device until the process ends. Nothing is computed: tensors
have a shape, a type and a device, numbers that are read are 1, and of what a condition selects (`nonzero`, a mask, NMS) there is half.
"""
import argparse
import contextlib
import copy
import functools
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

OURS, D, NAME = str(Path(__file__).resolve().parents[1]/"moi") + os.sep, None, "pretend"
TO = nn.Module.to
MODE = FakeTensorMode(allow_non_fake_inputs=True)


# The device


def register():
    "Make torch know the device; gives a sentence where this torch can't"
    global D
    try:
        from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
    except ImportError:
        return f"torch {torch.__version__} does not let Python register a device"
    class Backend(_DummyBackendModule): # what torch asks of it
        def is_available(self): return False # otherwise torch.tensor(..., device=...) goes round the mode
        def get_rng_state(self, device=None): return torch.zeros(1, dtype=torch.uint8)
        def set_rng_state(self, state, device=None): pass
        def manual_seed_all(self, seed): pass
        def _is_in_bad_fork(self): return False
        def get_amp_supported_dtype(self): return [torch.bfloat16]
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    D = torch.device(NAME, 0)
    def new_tensor(self, data, **k): return torch.tensor(data, **({"dtype": self.dtype, "device": self.device} | k))
    torch.Tensor.new_tensor = new_tensor # the one in C++ goes round the mode
    FakeTensor.tolist = lambda self: ones(self.cpu().shape, kind(self)) # one copy
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    nn.Module.to = to
    return ""


def kind(x): return bool if x.dtype == torch.bool else float if x.is_floating_point() else int


def ones(shape, of): return [ones(shape[1:], of) for _ in range(shape[0])] if len(shape) else of(1)


def really(make):
    "Have something made with real tensors, whoever asks for it"
    @functools.wraps(make)
    def outside(*args, **k):
        with _disable_current_modes(): return make(*args, **k)
    return outside


def swap(module, change):
    "Give each of a module's tensors for what `change` makes of it"
    for m in module.modules():
        for store in (m._parameters, m._buffers):
            for k, v in store.items():
                x = v if v is None else change(v)
                if x is not v: store[k] = nn.Parameter(x, v.requires_grad) if isinstance(v, nn.Parameter) else x
    return module


def to(module, *args, **k): # `nn.Module.to`, which can't move fakes
    fake = any(isinstance(v, FakeTensor) for v in module.state_dict().values())
    return swap(module, lambda v: v if v.to(*args, **k) is v else v.detach().to(*args, **k)) if fake else TO(module, *args, **k)


@really
def moved(module):
    "The module, its tensors on the pretended device; a deep copy of it is made of the module as it was"
    before = copy.deepcopy(module)
    with MODE: swap(module, lambda v: MODE.from_tensor(v.detach()).to(D))
    object.__setattr__(module, "__deepcopy__", really(lambda memo: moved(copy.deepcopy(before))))
    return module


# What is asked of it

FREE = {"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "is_same_size", "_local_scalar_dense"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


def half(n): return (n + 1) // 2


def found(x): # what `nonzero` gives, apart for each dimension
    return [x.new_empty(half(x.numel()), dtype=torch.int64) for _ in range(x.dim())]


def selected(name, func, args, kwargs):
    "What an operation gives whose answer's size, or whose answer, depends on numbers; nothing for any other"
    x = args[0] if args else None
    if name == "_local_scalar_dense": return kind(x)(1)
    if name == "equal": return True
    if name == "nonzero": return torch.stack(found(x), 1) if x.dim() and x.numel() else None
    if name == "masked_select": return x.new_empty(half(x.numel()))
    if name == "nms": return x.new_empty(half(len(x)), dtype=torch.int64)
    if name == "_unique2": return *found(x.flatten()), torch.empty_like(x, dtype=torch.int64), *found(x.flatten())
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and any(map(is_mask, args[1])):
        rows = [f for i in args[1] for f in (found(i) if is_mask(i) else [i])]
        return func(x, rows, *args[2:], **kwargs)
    return None


def known(func, args, kwargs, given):
    "What a CPU makes of numbers that the code holds, such as those of `torch.tensor([1, 2])`; nothing where others are read"
    fresh = func is torch.ops.aten.lift_fresh.default and not isinstance(given[0], FakeTensor)
    if not fresh and not (given and all(hasattr(x, "numbers") for x in given) and str(kwargs.get("device", "cpu")) == "cpu"): return None
    with _disable_current_modes():
        return given[0].clone() if fresh else func(*tree_map(numbers, args), **tree_map(numbers, kwargs))


def numbers(x): return getattr(x, "numbers", x)


def is_mask(x): return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def tensors(of): # as `tree_leaves` finds them, in a fifth of the time
    if isinstance(of, torch.Tensor): return [of]
    if isinstance(of, dict): of = of.values()
    elif not isinstance(of, (tuple, list)): return []
    return [x for v in of for x in tensors(v)]


def apart(name, args, kwargs):
    "Whether tensors meet that may not, of which the fake mode lets some pass; a number may come from anywhere, and so may an index"
    if "copy" in name: return False
    rows = tensors(args[1]) if name.startswith("index") and isinstance(args[1], (list, tuple)) else []
    rest = [x for x in tensors((args, kwargs)) if x.dim() and not any(x is r for r in rows)]
    where = {x.device.type for x in rest}
    return len(where) > 1 or where == {"cpu"} and any(x.device.type != "cpu" for x in rows)


def answer(real, func, name, args, kwargs):
    "What an operation gives: of what is known, what would depend on it, else as `selected` has it, else as the fake mode has it"
    if real is not None and {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags):
        return tree_map(lambda v: MODE.from_tensor(v) if isinstance(v, torch.Tensor) else v, real)
    out = selected(name, func, args, kwargs)
    return func(*args, **kwargs) if out is None else out


class Count(TorchDispatchMode):
    "Counts kernels, of them those on the way back, waits, and other copies between devices, by the line of ours that asks for them"
    def __init__(self):
        super().__init__()
        self.kernels, self.backwards, self.blocking, self.copies, self.names = Counter(), Counter(), Counter(), Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        given = tensors((args, kwargs))
        if apart(name, args, kwargs): raise RuntimeError(f"tensors on the CPU and on the device meet in {name}")
        real = known(func, args, kwargs, given)
        out = answer(real, func, name, args, kwargs)
        for x, value in zip(tensors(out), tensors(real)) if real is not None else (): x.numbers = value
        if real is None and func._schema.is_mutable: given[0].__dict__.pop("numbers", None)
        there = {x.device.type for x in [*given, *tensors(out)]}
        if NAME in there: self.note(func, name, args, kwargs, "cpu" in there, out)
        return out

    def note(self, func, name, args, kwargs, cpu, out):
        (line, back), copied = place(), cpu and name in ("_to_copy", "copy_")
        soon = kwargs.get("non_blocking", len(args) > 2 and args[2]) if copied else not cpu or name != "where" # which copies a number
        index = tensors(args[1:2]) if name.startswith("index") else []
        waits = name in WAITS or any(is_mask(x) or x.device.type == "cpu" for x in index) \
            or name == "repeat_interleave" and kwargs.get("output_size") is None
        if waits or not soon: self.blocking[line] += 1
        elif copied: self.copies[line] += 1
        if not copied and not free(func, name):
            self.kernels[line] += 1
            self.backwards[line] += back
            self.names.setdefault(line, Counter())[name] += 1

    def since(self, before=None):
        "What was asked for after another count, as a count of its own"
        out, before = Count(), before or Count()
        for what in ("kernels", "backwards", "blocking", "copies"): setattr(out, what, getattr(self, what) - getattr(before, what))
        out.names = {k: v - before.names.get(k, Counter()) for k, v in self.names.items()}
        return out

    def totals(self): return {k: sum(getattr(self, k).values()) for k in ("kernels", "backwards", "blocking", "copies")}


def free(func, name): # whether an operation starts no kernel
    if name in FREE or name.startswith(("empty", "new_empty")) or func.namespace == "prim": return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns) # a view


def place(): # the innermost line of ours, and whether it is on the way back
    node, frame = torch._C._current_autograd_node(), sys._getframe(3)
    while frame and not frame.f_code.co_filename.startswith(OURS): frame = frame.f_back
    if node is None or frame and frame.f_code.co_name == "backward": # a function of ours has its own
        return (at(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame else "(elsewhere)"), node is not None
    ahead = [e for text in node.metadata.get("traceback_", ()) for e in text.splitlines() if f'File "{OURS}' in e] # on the way forwards
    if not ahead: return "(gradients added up)", True
    file, line, name = ahead[-1].strip().split(", ")[:3]
    return at(file.split('"')[1], line.removeprefix("line "), name.removeprefix("in ")), True


@functools.cache
def at(file, line, name): return f"{Path(file).name}:{line} {name}"


@contextlib.contextmanager
def counting(lines=True):
    "What is asked of the device inside the `with`; without `lines` what happens on the way back is told of no line, in half the time"
    with warnings.catch_warnings(), MODE, Count() as count:
        warnings.simplefilter("ignore")
        with torch.autograd.set_detect_anomaly(lines, check_nan=False): yield count


# What is looked at, by default as large as the street teacher


@really
def detector(**k):
    from moi.detector import DetectorSpec, build_detector
    torch.manual_seed(0)
    fields = dict(classes=("circle", "square", "triangle"), size=(96, 96), width=.5, fpn_channels=64, head_channels=256,
        anchors=((8.,), (16.,), (32.,), (64.,), (96.,)))
    return build_detector(DetectorSpec(**fields | k)).eval()


@really
def student_of(teacher, freeze=False, **k):
    from moi.detector import build_detector
    from moi.inherit import StudentSpec, student_spec
    student = build_detector(student_spec(teacher.spec, StudentSpec(**k)))
    for part in (student.rpn, student.roi_heads) if freeze else (): part.requires_grad_(False)
    return moved(student)


@really
def targets_of(n, soft=False):
    from moi.pseudo_targets import sample_targets
    return sample_targets(n, (96, 96), (1, 2, 3), similarity=torch.eye(3) if soft else None, generator=torch.Generator().manual_seed(0))


def batch_of(n, objects=12):
    return torch.zeros(n, 3, 96, 96, dtype=torch.uint8, device=D), torch.zeros(n, objects, 4, device=D), \
        torch.zeros(n, objects, dtype=torch.int64, device=D)


class Pictures(list):
    "A dataset; `note` is called before each step that learns from it"
    def __init__(self, note=lambda: None, n=4):
        image, target = torch.zeros(3, 96, 96, dtype=torch.uint8), {"boxes": torch.tensor([[9., 9, 60, 60]]), "labels": torch.tensor([1])}
        super().__init__([(image, target)] * n)
        self.note = note


def loader(dataset, batch, steps, *rest): # in place of `moi.train.step_loader`: an order to shuffle by is numbers
    kept, rows = batch_of(64), torch.zeros(steps, batch, dtype=torch.int64, device=D)
    def load(first):
        for row in rows[first:]:
            dataset.note()
            yield tuple(x.index_select(0, row) for x in kept)
    return load


SMALL = dict(width=.25, fpn_channels=16, head_channels=32, strides=(4, 8), anchors=((16.,), (32.,), (64.,)))


def put_in_place():
    "Replace what can't do without numbers, shuffling and pycocotools, and what takes long on the CPU, where it needs no check"
    import moi.compress
    import moi.distill
    import moi.inherit
    import moi.train
    moi.distill.step_loader = moi.train.step_loader = loader
    moi.distill.agreement = moi.compress.agreement = lambda *a: SimpleNamespace(AP=1.)
    moi.inherit.most_telling = lambda readers, k: torch.arange(k)


def painting(lines, images=32):
    "A step of painting, and what it is more where the teacher's proposals are looked at: at each second step"
    from moi.impressions import Painting, synthesise
    teacher, targets, seen = moved(detector()), targets_of(images), []
    with counting(lines) as count:
        synthesise(teacher, targets, Painting(steps=4), refresh=2, progress="", watch=lambda *_: seen.append(count.since()))
    step = seen[2].since(seen[1]) # by then there is all that a device keeps
    return {"painting": step, "painting, a look": seen[3].since(seen[2]).since(step)}


def distilling(lines, images=8):
    "A step of distilling a default student, and what it is more where losses are read: at each second step"
    from moi.distill import Distilling, distill
    teacher, seen = moved(detector()), []
    student, how = student_of(teacher, freeze=True), Distilling(steps=5, batch=images)
    with counting(lines) as count:
        distill(student, teacher, Pictures(lambda: seen.append(count.since())), how, hold_moments=True, every=2, progress="")
    step = seen[3].since(seen[2])
    return {"distilling": step, "distilling, losses read": seen[4].since(seen[3]).since(step)}


def pyramid(lines, images=32):
    "A frozen pyramid, forwards and back to the images"
    from moi.detector import frozen
    from moi.outputs import features
    teacher, seen = moved(detector()), []
    with counting(lines) as count, frozen(teacher):
        for _ in range(2):
            seen.append(count.since())
            x = torch.zeros(images, 3, 96, 96, device=D, requires_grad=True)
            torch.stack([f.sum() for f in features(teacher, x).values()]).sum().backward()
        return {"pyramid": count.since(seen[-1])}


def known_lines(lines):
    "Lines of which it is known what they ask for: 8 kernels, one of them on the way back, 4 waits, and a copy that need not wait"
    with counting(lines) as count:
        x = torch.ones(3, device=D, requires_grad=True)
        (2 * x).sum().backward() # what it starts from is filled beforehand, and what a sum gives back is a view
        torch.tensor([1.], device=D), x.sum().item(), x[x > 0].cpu()
        torch.rand(3).to(D, non_blocking=True)
    return {"known": count.since()}


def counts(lines=True):
    put_in_place()
    return known_lines(lines) | pyramid(lines) | painting(lines) | distilling(lines)


def table(name, count):
    "What is asked for, line by line"
    total, key = count.totals(), lambda k: (-count.kernels[k], -count.blocking[k], k)
    print(f"\n{name}: {total['kernels']:g} kernels ({total['backwards']:g} on the way back), {total['blocking']:g} blocking, "
        f"{total['copies']:g} other copies between devices\n{'line':45} kernels   back  blocking  copies")
    for k in sorted(count.kernels.keys() | count.blocking.keys() | count.copies.keys(), key=key):
        names = ", ".join(f"{n} {m}" for n, m in count.names.get(k, Counter()).most_common())
        print(f"{k:45} {count.kernels[k]:7g}{count.backwards[k]:7g}{count.blocking[k]:10g}{count.copies[k]:8g}  {names[:90]}")


# What is to lie where


def on_device(*of):
    away = [str(x.device) for x in tensors(of) if x.device != D]
    if away or not tensors(of): raise AssertionError(f"of {len(tensors(of))} results {len(away)} are on {away[:1]}")


def learnt(*modules): # every weight that learns has a gradient there
    grads = [p.grad for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    if lost := sum(g is None for g in grads): raise AssertionError(f"{lost} weights have no gradient")
    on_device(grads)


def went(work):
    "What is wrong with `work`: nothing, or an error and the line of ours that it comes from"
    try:
        with counting(False): work()
        return ""
    except Exception as e:
        trace, lines = e.__traceback__, []
        while trace:
            code = trace.tb_frame.f_code
            if code.co_filename.startswith(OURS): lines.append(at(code.co_filename, trace.tb_lineno, code.co_name))
            trace = trace.tb_next
        return f"{lines[-1] if lines else 'here'}: {type(e).__name__}: {str(e).partition(chr(10))[0]}"


@functools.cache
def teachers():
    "Teachers by name; their numbers don't matter, so they are shared"
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from moi.detector import Rules
    from moi.teachers import adopt
    other = Rules(norm="frozen", own_strides=True, anchor_offset=.5, whole_anchors=False, sampling=0, aligned=True, shrink_limit=True,
        flat="after", proposal_side=0.)
    torch.manual_seed(0)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 4, min_size=96, max_size=96)
    return {"own": moved(detector(**SMALL)),
        "rules": moved(detector(**SMALL, rules=other)), "adopted": moved(adopt(theirs.eval(), ["a", "b", "c"], size=(96, 96)))}


def checks():
    "By name, what is to work on a device"
    from moi import augment, compress, distill, evaluate, impressions, inherit, outputs, pseudo_targets, train
    put_in_place()
    of, generator, plan = teachers(), torch.Generator().manual_seed(0), pseudo_targets.Laws()
    own = of["own"]
    def paint(teacher, student=None, soft=False, **how):
        p = impressions.Painting(steps=2, frozen_bn_prior=True, **how)
        impressions.synthesise(teacher, targets_of(4, soft), p, student, refresh=1, progress="", watch=lambda step, x: on_device(x))
    def losses(teacher, student=None, soft=None):
        images, boxes, labels = batch_of(2, 3)
        images = (images / 255).requires_grad_()
        found = impressions.impression_losses(teacher, images, boxes, labels, boxes, generator, soft=soft, student=student)
        sum(found.values()).backward()
        on_device(found, images.grad)
    def follow(recipe, widths):
        student, w = student_of(own, widths=widths), distill.check_recipe(recipe)
        adapt, (images, boxes, labels) = distill.adaptation(student, own, w), batch_of(2, 3)
        seen = augment.random_views(images / 255, boxes, labels, generator, .5)
        found = distill.distill_losses(student.train(), own, *seen, generator, w, adapt=adapt)
        sum(found.values()).backward()
        on_device(seen, found)
        learnt(student, adapt)
    def teach():
        how = distill.Distilling(steps=2, batch=2)
        distill.distill(student_of(own), own, Pictures(), how, Pictures(n=2), every=1, progress="")
    def views():
        images, boxes, labels = batch_of(3, 2)
        for mix in (0., .5): on_device(augment.random_views(images / 255, boxes, labels, generator, mix))
    def average():
        student = student_of(own)
        mean = train.MovingAverage(student, .9)
        for step in range(2): mean.update(step)
        on_device(mean.model.state_dict())
    def start(**k): # a student from its teacher
        spec, student = inherit.StudentSpec(**k), student_of(own, widths="slim")
        batches = lambda: [torch.zeros(2, 3, 96, 96, device=D)]
        inherit.inherit(student, own, spec, batches)
        adapt = distill.adaptation(student, own, distill.RECIPES["moi"])
        inherit.solve_adaptation(adapt, student, own, batches)
        on_device(student.state_dict(), adapt.state_dict())
    def seen(teacher):
        found = evaluate.predict(teacher, Pictures(), progress=False)
        if {x.device.type for x in tensors(found)} != {"cpu"}: raise AssertionError("detections are not on the CPU")
    images = torch.zeros(4, 3, 96, 96, dtype=torch.uint8)
    training = train.Training(steps=2, batch=2, ema=.9)
    return {
        **{f"paint, {name}": functools.partial(paint, d) for name, d in of.items()},
        "paint, all switches": lambda: paint(own, student_of(own), soft=True, adapt=1, pixels=True, l2=1.),
        "losses": lambda: losses(of["rules"]),
        "losses, a student and soft labels": lambda: losses(own, student_of(own), torch.zeros(2, 3, 4, device=D)),
        **{f"recipe {r}, {w}": functools.partial(follow, r, w) for r in distill.RECIPES for w in ("half", "slim")},
        "distill": teach,
        "train": lambda: train.train_detector(moved(detector(**SMALL)), Pictures(), training, progress=""),
        "views": views, "moving average": average,
        "inherit": start, "inherit, solved": lambda: start(reconstruct=True),
        "predict": lambda: seen(own), "predict, other rules": lambda: seen(of["rules"]),
        "preferred targets": lambda: pseudo_targets.preferred_targets(own, images[:2].to(D) / 255),
        "soft labels' similarity": lambda: on_device(pseudo_targets.class_similarity(own)),
        "shard": lambda: compress.paint_shard(own, 2, plan, impressions.Painting(steps=1), 0, None, train.Engine(device=D)),
        "label textures": lambda: compress.label_images(own, images),
        "calibration": lambda: on_device(list(compress.calibration(Pictures(), train.Engine(device=D), 0, views=1)())),
        "fewest proposals": lambda: compress.fewest_proposals(own, list(images)),
        "objects": lambda: evaluate.describe_objects(own, Pictures()),
        "capacity": lambda: outputs.capacity(own),
    }


def planted():
    "By name, mistakes that are to be found"
    from moi.impressions import impression_losses
    from moi.outputs import features
    own, generator = teachers()["own"], torch.Generator()
    def proposals():
        images, boxes, labels = batch_of(2, 3)
        impression_losses(own, images / 255, boxes, labels, boxes.cpu(), generator)
    def bias():
        wrong = copy.deepcopy(own)
        conv = wrong.backbone.fpn.inner_blocks[0][0]
        conv.bias = nn.Parameter(conv.bias.detach().cpu())
        features(wrong, batch_of(2)[0] / 255)
    def index(): return torch.zeros(4)[torch.zeros(2, dtype=torch.int64, device=D)]
    return {"proposals on the CPU": proposals, "a bias on the CPU": bias, "an index on the device": index}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=("check", "count"))
    parser.add_argument("--json", action="store_true", help="one line of JSON, in which counts are totals")
    given, missing = parser.parse_args(), register()
    if missing: sys.exit(print(json.dumps({"missing": missing}) if given.json else missing))
    said = {}
    if "check" in given.what:
        for name, works in (("checks", checks), ("planted", planted)):
            said[name] = {k: went(v) for k, v in works().items()}
            for k, v in said[name].items() if not given.json else (): print(f"{name}: {k}: {v or 'nothing wrong'}")
    if "count" in given.what:
        asked = counts(not given.json)
        said["counts"] = {k: v.totals() for k, v in asked.items()}
        for k, v in asked.items() if not given.json else (): table(k, v)
    if given.json: print(json.dumps(said))
