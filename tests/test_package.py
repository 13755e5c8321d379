"What is installed is the whole package and nothing else; it imports where there is neither nbdev nor Jupyter, and its command runs"
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT / "moi").glob("*.py") if p.stem not in ("__init__", "_modidx"))
UNWANTED = (
    "nbdev fastcore execnb ghapi IPython ipykernel ipywidgets jupyter jupyter_client jupyter_core jupyter_server "
    "jupyterlab nbclient nbconvert nbformat notebook papermill traitlets"
).split()
IMPORT_ALL = """
import importlib, sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
    "Finds modules as Python does, but for the unwanted ones, which are then as if never installed"
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in unwanted else PathFinder.find_spec(name, path, target)

unwanted, modules = sys.argv[1].split(), sys.argv[2].split()
sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
for name in unwanted:
    try: importlib.import_module(name)
    except ModuleNotFoundError: pass
    else: sys.exit(f"{name} was not hidden, so this proves nothing")
import moi
for name in modules: importlib.import_module(f"moi.{name}")
print(moi.__version__, moi.__file__, sep="\\n")
"""


def settings():
    "The `[DEFAULT]` section of settings.ini"
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def run(*args, **kwargs):
    "Run Python with `args`, which has to succeed; what it printed"
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "A folder with the sdist, what it unpacks to, and the wheel built from that"
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    for name in ("moi", "nbs", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in "setup.py settings.ini pyproject.toml MANIFEST.in README.md CHANGELOG.md CONTRIBUTING.md LICENSE".split():
        shutil.copyfile(ROOT / name, tree / name)
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=tree)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as tar:
        tar.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder, cwd=unpacked)
    return folder


def test_the_changelog_begins_with_this_version():
    heading = next(line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## "))
    assert heading == f"## {settings()['version']}"


def package_files():
    "The files that the package is made of, as paths from the root"
    found = (p for pattern in ("*.py", "*.txt") for p in (ROOT / "moi").rglob(pattern))
    return {p.relative_to(ROOT).as_posix() for p in found}


def test_the_sdist_holds_notebooks_and_licence(dist):
    (unpacked,) = (dist / "sdist").iterdir()
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*")}
    assert package_files() <= names
    assert {"nbs/index.ipynb", "settings.ini", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= names


def test_the_wheel_is_the_package_and_no_more(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        info = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(wheel.read(info))
    assert names == package_files()
    assert metadata["Name"] == "moi"
    assert metadata["Version"] == settings()["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == f">={settings()['min_python']}"
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(needed) == len(settings()["requirements"].split())
    assert not any(r.startswith(("nbdev", "fastcore", "pytest", "ruff")) for r in needed)


def test_the_wheel_declares_the_command(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        points = next(n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
        declared = ConfigParser(delimiters=["="])
        declared.read_string(wheel.read(points).decode())
    assert dict(declared["console_scripts"]) == {"moi": "moi.experiment:cli"}


@pytest.fixture(scope="module")
def installed(dist):
    "A folder outside the repository, with the wheel installed in its `site`"
    there = dist / "there"
    there.mkdir()
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", there / "site", next(dist.glob("*.whl")))
    return there


def test_the_installed_wheel_imports_without_nbdev_or_jupyter(installed):
    run_there = "import sys; sys.path.insert(0, 'site')\n" + IMPORT_ALL
    version, file = run("-c", run_there, " ".join(UNWANTED), " ".join(MODULES), cwd=installed).splitlines()
    assert version == settings()["version"]
    assert (installed / file).is_relative_to(installed / "site")


def test_the_installed_command_runs(installed):
    "The script itself, and what it calls; its exit code is what the command says"
    elsewhere = os.environ | {"PYTHONPATH": str(installed / "site")}
    (script,) = (p for p in (installed / "site").rglob("moi*") if p.parent.name in ("bin", "Scripts"))
    done = subprocess.run([sys.executable, script, "--help"], cwd=installed, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0 and all(word in done.stdout for word in ("run", "compress", "check", "clean")), done.stderr
    done = subprocess.run([sys.executable, script, "check", "nowhere"], cwd=installed, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 1 and "nowhere" in done.stderr
    call = "import moi; from moi.experiment import cli; print(moi.__file__); cli(['run', '--help'])"
    shown = run("-c", call, cwd=installed, env=elsewhere)
    assert Path(shown.splitlines()[0]).is_relative_to(installed / "site") and "distill_steps" in shown
