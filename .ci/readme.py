"""Writes README.md from the stored outputs of nbs/index.ipynb, or with --check says where the two differ. With --execute the
notebook is run first, and unless --check is given its outputs are stored."""
import argparse
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

DIRECTIVE = re.compile(r"\s*#\s*\|\s*(.*?)\s*")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.M | re.S)
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)\s"]+)')


class Directives(Preprocessor):
    "Keeps of each cell what nbdev's directives let a reader see"

    def preprocess(self, nb, resources):
        nb.cells = [self.shown(c) for c in nb.cells if c.cell_type != "raw" and not self.hidden(c)]
        nb.metadata.language_info = {"name": "python"}
        return nb, resources

    @staticmethod
    def directives(cell):
        "The directives that open `cell`, `#| echo: false` as `echo: false`"
        lines = cell.source.splitlines() if cell.cell_type == "code" else []
        matches = (DIRECTIVE.fullmatch(line) for line in lines if line.lstrip().startswith("#"))
        return [re.sub(r"\s*:\s*", ": ", m[1]) for m in matches if m]

    def hidden(self, cell):
        "Does nothing of `cell` belong to the README?"
        unseen = re.compile(r"(hide|export\w*|default_exp)\b|include: false$")
        return any(unseen.match(d) for d in self.directives(cell))

    def shown(self, cell):
        "`cell` without its directives, and without its source or its outputs where they say so"
        if cell.cell_type != "code":
            return cell
        directives = self.directives(cell)
        if "echo: false" in directives:
            cell.metadata["transient"] = {"remove_source": True}
        if "output: false" in directives:
            cell.outputs = []
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                raise SystemExit(f"index.ipynb: a cell that opens with {cell.source[:60]!r} stored an error or warning")
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                raise SystemExit(
                    f"index.ipynb: a cell that opens with {cell.source[:60]!r} stored an image; "
                    "show a file below results/ with ![what it shows](../results/…) instead"
                )
        cell.source = "\n".join(ln for ln in cell.source.splitlines() if not DIRECTIVE.fullmatch(ln)).strip("\n")
        return cell


def from_root(text, folder, root):
    "`text` with its links, which start in `folder`, starting in `root`; a link to no file is an error"

    def moved(match):
        opening, target = match.groups()
        if re.match(r"[a-z][a-z+.-]*:|[#/]", target):
            return match[0]
        path, hash_, part = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if not (root / path).exists():
            raise SystemExit(f"index.ipynb: a link goes to {target}, and there is no {path}")
        return f"{opening}{path}{hash_}{part}"

    pieces = CODE.split(text)  # prose, code, prose, ...
    return "".join(piece if i % 2 else LINK.sub(moved, piece) for i, piece in enumerate(pieces))


def run(root):
    "The notebook after a fresh run, without what would only make noise in a diff"
    from nbclient import NotebookClient

    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    before = nb.metadata.copy()
    NotebookClient(nb, timeout=300, record_timing=False, resources={"metadata": {"path": str(root / "nbs")}}).execute()
    nb.metadata = before
    for cell in nb.cells:
        for counted in (cell, *cell.get("outputs", [])):
            if "execution_count" in counted:
                counted.execution_count = None
    return nb


def render(root, nb):
    "The text of README.md, of the notebook `nb`"
    text, _ = MarkdownExporter(preprocessors=[Directives]).from_notebook_node(nb)
    text = re.sub(r"\n{3,}", "\n\n", from_root(text, "nbs", root)).strip()
    return text + "\n\n<!-- Written by .ci/readme.py from nbs/index.ipynb: edit that. -->\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; if README.md is old, say how, exit 1")
    parser.add_argument("--execute", action="store_true", help="run the notebook first, instead of taking its stored outputs")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository")
    args = parser.parse_args()
    readme, index = args.root / "README.md", args.root / "nbs/index.ipynb"
    nb = run(args.root) if args.execute else nbformat.read(index, as_version=4)
    stored = nbformat.writes(nb)
    new = render(args.root, nb)
    if not args.check:
        if args.execute:
            index.write_text(stored.rstrip("\n") + "\n", encoding="utf-8")
        readme.write_text(new, encoding="utf-8")
        return
    old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    lines = (text.splitlines(keepends=True) for text in (old, new))
    diff = "".join(difflib.unified_diff(*lines, "README.md", "README.md from nbs/index.ipynb"))
    if diff:
        print(diff, "README.md is not what nbs/index.ipynb renders to: run `python .ci/readme.py`", sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
