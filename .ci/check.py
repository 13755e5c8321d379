"""Checks what can be checked without running the code: the notebooks are clean and store nothing dead, moi/ and
README.md are what nbs/ exports, and ruff passes. It works in a copy of what git tracks or would track, and changes nothing in the tree."""
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import nbformat
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parents[1]
OUTPUT_LIMIT = 300_000  # bytes of stored outputs that one notebook may carry


def copy_tree(root, to):
    "Copies the files that git tracks in `root`, and those that it would add"
    listing = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, text=True)
    for name in filter(None, listing.split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, to / name)


def read(root, pattern):
    "The files that match, as a dictionary from path to text"
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in sorted(root.glob(pattern))}


def compare(old, new, advice):
    "A problem for each path whose text differs between `old` and `new`"
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            texts = (files.get(name, "").splitlines(keepends=True) for files in (old, new))
            diff = list(difflib.unified_diff(*texts, name, name))[:40]
            yield f"{name}: {advice}\n{''.join(diff)}"


def clean_notebooks(tree):
    "Notebooks are valid and clean; those for papermill hold no outputs, and the others' are small"
    before = read(tree, "nbs/**/*.ipynb")
    if not before:
        yield "nbs/: there is no notebook"
    for name, text in before.items():
        try:
            nb = nbformat.reads(text, as_version=4)
            nbformat.validate(nb)
        except Exception as e:
            yield f"{name}: not a valid notebook: {e}"
            continue
        size = sum(len(str(o)) for c in nb.cells for o in c.get("outputs", []))
        limit = 0 if name.startswith("nbs/experiments/") else OUTPUT_LIMIT
        if size > limit:
            yield f"{name}: stores {size} bytes of outputs, and {limit} are allowed"
    nbdev_clean(fname="nbs")
    yield from compare(before, read(tree, "nbs/**/*.ipynb"), "not clean: run `nbdev_clean`")


def stored_outputs(tree):
    "What notebooks store can be seen without a kernel: no widget, no bar that stands still, no figure without its picture"
    for name, text in (read(tree, "nbs/**/*.ipynb") | read(tree, "results/**/*.ipynb")).items():
        nb = nbformat.reads(text, as_version=4)
        if "widgets" in nb.metadata:
            yield f"{name}: stores the state of widgets"
        for cell in nb.cells:
            for output in cell.get("outputs", []):
                what = dead(output)
                if what:
                    yield f"{name}, cell {cell.get('id')}: stores {what}"


def dead(output):
    "What of an output nobody can use, in words"
    data = output.get("data", {})
    words = output.get("text", "") + data.get("text/plain", "")
    if any("widget-view" in kind for kind in data):
        return "a widget"
    if re.search(r"\d%\|.*(it/s|s/it)", words):
        return "a progress bar"
    if words.startswith("<Figure") and ("with 0 Axes" in words or not any(kind.startswith("image/") for kind in data)):
        return "a figure without a picture"


def exported(tree):
    "Every module is exported by a notebook, and as it stands there"
    before = read(tree, "moi/**/*.py")
    for name in before:
        if name != "moi/__init__.py":
            (tree / name).unlink()
    try:
        nbdev_export(path="nbs")
    except Exception as e:
        yield f"nbdev_export failed: {type(e).__name__}: {e}"
        return
    advice = "not what nbs/ exports: run `nbdev_export`, and delete a module whose notebook is gone"
    yield from compare(before, read(tree, "moi/**/*.py"), advice)


def tool(*args):
    "The output of a Python tool that failed"
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        yield done.stdout + done.stderr


def main():
    warnings.simplefilter("ignore", DeprecationWarning)
    os.environ.pop("IN_TEST", None)  # nbdev exports nothing where it is set
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copy_tree(ROOT, tree)
        os.chdir(tree)  # nbdev finds its settings from here
        checks = {
            "notebooks are clean": clean_notebooks(tree),
            "what notebooks store can be seen": stored_outputs(tree),
            "moi/ is what nbs/ exports": exported(tree),
            "README.md is what nbs/index.ipynb renders to": tool(".ci/readme.py", "--check"),
            "ruff": tool("-m", "ruff", "check", "--quiet", "."),
        }
        failed = 0
        for name, problems in checks.items():
            problems = list(problems)
            failed += bool(problems)
            print("FAIL" if problems else "ok  ", name, *problems, sep="\n" if problems else " ", flush=True)
        os.chdir(ROOT)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
