"""Makes a small static site of all notebooks, from their stored outputs: `python .ci/pages.py FOLDER`. What it writes needs no
network: no script, no font, no picture comes from elsewhere, and formulas are MathML, which browsers show by themselves."""
import argparse
import html
import posixpath
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter, TemplateExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
DIRECTIVE = re.compile(r"\s*#\s*\|\s*(.*?)\s*")
LINK = re.compile(r'(<(?:a|img)\b[^>]*?\b(?:href|src)=")([^"]*)(")')
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.I)
LOADED = re.compile(r'<(?:script|iframe|object|embed|link)\b|\bsrc="(?!data:)(?:[a-z]+:|//)|@import|url\(', re.I)
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2329; --soft: #5b6570; --line: #dde2e7; --code: #f5f7f9; --link: #0b62b8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15191d; --text: #dfe4e8; --soft: #98a3ad; --line: #333b42; --code: #1e2429; --link: #74b3f5 }
  .output_png img { background: #fff }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.6 system-ui, sans-serif; display: flex }
nav { flex: 0 0 15rem; height: 100vh; position: sticky; top: 0; overflow: auto; padding: 1.5rem 1rem; border-right: 1px solid var(--line);
  font-size: .875rem }
nav p { margin: 1rem 0 .25rem; color: var(--soft) }
nav a { display: block; padding: .125rem .5rem; border-radius: .25rem }
nav a[aria-current] { background: var(--code); font-weight: 600 }
main { flex: 1; min-width: 0; max-width: 74rem; margin: 0 auto; padding: 1.5rem }
main :is(p, li, blockquote) { max-width: 52rem }
a { color: var(--link); text-decoration: none }
a:hover { text-decoration: underline }
.anchor-link { visibility: hidden; padding-left: .5rem }
:hover > .anchor-link { visibility: visible }
img { max-width: 100%; height: auto }
pre { background: var(--code); padding: .75rem 1rem; overflow: auto; border-radius: .25rem; font-size: .8125rem; line-height: 1.5 }
.output pre { background: none; border-left: 3px solid var(--line); border-radius: 0; padding: .25rem 1rem; margin: .5rem 0 }
.prompt { display: none }
code { font-size: .875em }
pre code { font-size: inherit }
.highlight pre, pre:has(code) { white-space: pre-wrap; overflow-wrap: anywhere }
blockquote { margin: 0; color: var(--soft); font-size: 1.125rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .875rem; margin: 1rem 0 }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: left }
math[display=block] { overflow-x: auto; margin: 1rem 0 }
footer { display: flex; justify-content: space-between; border-top: 1px solid var(--line); margin-top: 3rem; padding: 1rem 0 }
@media (max-width: 80rem) { nav { flex-basis: 12rem; padding: 1.5rem .5rem } table { font-size: .75rem } th, td { padding: .25rem .5rem } }
@media (max-width: 50rem) { body { display: block } nav { position: static; height: auto; max-height: 40vh; border: 0 } }
"""


class Renderer(IPythonRenderer):
    "Markdown as nbconvert writes it, with formulas in MathML"

    def block_math(self, body):
        return self.formula(body, "block")

    def inline_math(self, body):
        return self.formula(body, "inline")

    def latex_environment(self, name, body):
        return self.formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    @staticmethod
    def formula(tex, display):
        tex = tex.replace(r"\*", "*").replace(r"\arg\min", r"\operatorname*{arg\,min}")
        mathml = convert(tex.strip(), display=display)
        if unknown := re.search(r">\\\w+", mathml):
            raise SystemExit(f"a formula has {unknown[0][1:]}, which cannot be shown: {tex}")
        return mathml


def markdown(text):
    "Markdown as HTML; a range in a table does not break at its dash"
    found = MarkdownWithMath(renderer=Renderer(escape=False)).render(text)
    return re.sub(r"<td\b.*?</td>", lambda cell: re.sub(r"(?<=[\d%])–(?=\d)", "\u2060–\u2060", cell[0]), found, flags=re.S)


class Exporter(HTMLExporter):
    "nbconvert's, which neither cleans nor parses what it has just written: the notebooks are ours, and this takes a quarter of the time"

    def default_filters(self):
        yield from super().default_filters()
        yield "markdown2html", markdown
        yield "clean_html", lambda text: text
        yield "highlight_code", Highlight2HTML(pygments_lexer="ipython3")

    def from_notebook_node(self, nb, resources=None, **kw):
        return TemplateExporter.from_notebook_node(self, nb, self._init_resources(resources), **kw)


def shown(nb):
    "A notebook without what nbdev's directives hide, and without views of widgets, which are blank here"
    def keep(cell):
        lines = cell.source.splitlines()
        said = [m[1] for line in lines if (m := DIRECTIVE.fullmatch(line))] if cell.cell_type == "code" else []
        if cell.cell_type == "raw" or any(re.match(r"hide\b|default_exp|include: *false", d) for d in said):
            return False
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in lines if not DIRECTIVE.fullmatch(line)).strip("\n")
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            silent = any(re.match("echo: *false", d) for d in said)
            cell.metadata = {"transient": {"remove_source": silent}, "alt": "what the cell above shows"}
        return True

    nb.cells, nb.metadata = [cell for cell in nb.cells if keep(cell)], nbformat.NotebookNode()
    return nb


def pages(root):
    "Every page: its file in the repository, and what it becomes in the site"
    found = {"README.md": "index.html", "nbs/index.ipynb": "index.html", "results/README.md": "results/index.html"}
    found |= {name: f"{Path(name).stem}.html" for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for pattern in ("nbs/*.ipynb", "nbs/experiments/*.ipynb", "results/**/*.ipynb"):
        for file in sorted(root.glob(pattern)):
            name = file.relative_to(root).as_posix()
            if not any(part.startswith(".") for part in file.parts[len(root.parts):]):
                found.setdefault(name, f"{name.removesuffix('.ipynb')}.html")
    return {name: to for name, to in found.items() if (root / name).is_file()}


def title_of(name, text):
    "A page's title: its first heading, after its number where it has one"
    number = re.match(r"\d+(?=_)", Path(name).name)
    heading = re.search(r"^# (.+)$", text, re.M)
    return (f"{number[0]} " if number else "") + (heading[1].strip() if heading else Path(name).stem)


def body_of(file, exporter):
    "A page's title and what stands in it"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return title_of(file, text), markdown(text)
    nb = nbformat.reads(text, as_version=4)
    texts = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    return title_of(file, texts), exporter.from_notebook_node(shown(nb))[0]


def moved(body, name, to, known, root, site):
    "`body` with its links, which start at `name` in the repository, starting at `to` in the site; linked files are copied there"
    def target(path):
        homes = [posixpath.dirname(name)] + ["nbs/experiments"] * name.startswith("results/")  # an executed copy's links start there
        found = [posixpath.normpath(posixpath.join(home, path)) for home in homes]
        path = next((p for p in found if (root / p).exists() and not p.startswith("..")), None)
        if path is None:
            raise SystemExit(f"{name}: a link goes to {found[0]}, and there is no such file")
        if (root / path).is_dir():
            path = next((p for p in (f"{path}/README.md", *known) if p in known and p.startswith(f"{path}/")), path)
        if path not in known:
            if (root / path).is_dir():
                raise SystemExit(f"{name}: a link goes to the folder {path}, which has no page")
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, site / path)
        return known.get(path, path)

    def link(match):
        path, hash_, part = html.unescape(match[2]).partition("#")
        if not path or ELSEWHERE.match(path):
            return match[0]
        path = posixpath.relpath(target(unquote(path)), posixpath.dirname(to) or ".")
        return match[1] + html.escape(path + hash_ + part) + match[3]

    return LINK.sub(link, body)


def navigation(order, to):
    "Links to every page of the order, from the page `to`"
    relative = lambda page: posixpath.relpath(page, posixpath.dirname(to) or ".")
    lines = []
    for heading, names in order.items():
        lines.append(f"<p>{heading}</p>" if heading else "")
        for page, title in names:
            current = ' aria-current="page"' if page == to else ""
            lines.append(f'<a href="{relative(page)}"{current}>{html.escape(title)}</a>')
    row = [page for names in order.values() for page in names]
    here = next((i for i, (page, _) in enumerate(row) if page == to), None)
    around = {} if here is None else {"←": row[here - 1] if here else None, "→": row[here + 1] if here + 1 < len(row) else None}
    turn = [f'<a href="{relative(p[0])}">{arrow} {html.escape(p[1])}</a>' if p else "<span></span>" for arrow, p in around.items()]
    return "\n".join(filter(None, lines)), "\n".join(turn)


def problems(site):
    "What is wrong with a site: links that lead nowhere, and what would be loaded from elsewhere"
    texts = {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in sorted(site.rglob("*.html"))}
    ids = {name: set(re.findall(r'\bid="([^"]*)"', text)) for name, text in texts.items()}
    for name, text in texts.items():
        for found in LOADED.finditer(re.sub(r"<pre>.*?</pre>|<style>.*?</style>", "", text, flags=re.S)):
            yield f"{name}: loads something by {found[0]!r}"
        for _, link, _ in LINK.findall(text):
            path, _, part = html.unescape(link).partition("#")
            if ELSEWHERE.match(link):
                continue
            to = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path))) if path else name
            if not (site / to).is_file() or not (site / to).resolve().is_relative_to(site.resolve()):
                yield f"{name}: {link} leads nowhere"
            elif part and to in ids and not {part, unquote(part)} & ids[to]:
                yield f"{name}: {link} leads to no heading"


def build(root, site):
    "Write the site"
    known, exporter, made = pages(root), Exporter(template_name="basic"), {}
    for name, to in known.items():
        if to not in made:
            made[to] = (name, *body_of(root / name, exporter))
    groups = {"": lambda n: n == "README.md", "Notebooks": lambda n: re.fullmatch(r"nbs/[^/]+", n),
        "Experiments": lambda n: n.startswith("nbs/experiments/"), "More": lambda n: n.endswith(".md") and n != "README.md"}
    order = {heading: [(to, title) for to, (name, title, _) in made.items() if of(name)] for heading, of in groups.items()}
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    style = f"{STYLE}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none }}"
    for to, (name, title, body) in made.items():
        nav, turn = navigation(order, to)
        text = (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
            f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<nav>\n{nav}\n</nav>\n<main>\n"
            f"{moved(body, name, to, known, root, site)}\n<footer>\n{turn}\n</footer>\n</main>\n</body>\n</html>\n")
        (site / to).parent.mkdir(parents=True, exist_ok=True)
        (site / to).write_text(text, encoding="utf-8")
    return sorted(made)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, help="folder to write to; it is made, and must not hold anything")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    args = parser.parse_args()
    if args.site.exists() and any(args.site.iterdir()):
        sys.exit(f"{args.site} holds something already")
    made = build(args.root.resolve(), args.site)
    if wrong := list(problems(args.site)):
        sys.exit("\n".join(wrong))
    print(f"{len(made)} pages in {args.site}/index.html")


if __name__ == "__main__":
    main()
