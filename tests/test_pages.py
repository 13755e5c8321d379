"The notebooks as a site: every page is there, every link leads somewhere, and nothing is loaded from elsewhere"
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("pages", ROOT / ".ci/pages.py")
pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pages)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "site"
    pages.build(ROOT, folder)
    return folder


def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(site):
    assert list(pages.problems(site)) == []


def test_every_notebook_has_its_page_and_is_in_the_navigation(site):
    menu = (site / "index.html").read_text(encoding="utf-8").partition("</nav>")[0]
    for file in (*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/experiments").glob("*.ipynb")):
        page = Path("index.html") if file.stem == "index" else file.relative_to(ROOT).with_suffix(".html")
        assert (site / page).is_file() and f'href="{page.as_posix()}"' in menu
    assert all((site / f.relative_to(ROOT)).with_suffix(".html").is_file() for f in (ROOT / "results").rglob("*.ipynb"))
    assert "results/index.html" in menu and "CHANGELOG.html" in menu


def test_formulas_pictures_and_code_are_shown_as_they_are(site):
    text = (site / "nbs/12_impressions.html").read_text(encoding="utf-8")
    assert "<math" in text and 'src="data:image/png;base64,' in text and '<span class="k">def</span>' in text
    prose = re.sub(r"<pre>.*?</pre>|<style>.*?</style>|<code>.*?</code>", "", text, flags=re.S)
    assert not re.search(r"\$|\\[a-z]+", prose)


@pytest.fixture
def repository(tmp_path):
    "A small one, whose only notebook links to the text that is put in"
    def make(text, *cells):
        root = tmp_path / "repository"
        shutil.rmtree(root, ignore_errors=True)
        (root / "nbs").mkdir(parents=True)
        (root / "README.md").write_text("# Here\n\n[one](nbs/00_one.ipynb)\n", encoding="utf-8")
        (root / "a picture.png").write_bytes(b"png")
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"# One\n\n## A part\n\n{text}"), *cells]), root / "nbs/00_one.ipynb")
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        pages.build(root, tmp_path / "site")
        return (tmp_path / "site/nbs/00_one.html").read_text(encoding="utf-8"), list(pages.problems(tmp_path / "site"))
    return make


def test_links_are_moved_and_files_brought_along(repository, tmp_path):
    text, wrong = repository("[home](../README.md#Here) [part](#A-part) [else](https://example.org) ![seen](<../a picture.png>)")
    assert not wrong and 'href="../index.html#Here"' in text and 'href="https://example.org"' in text
    assert (tmp_path / "site/a picture.png").read_bytes() == b"png"


def test_a_link_that_leads_nowhere_is_named(repository):
    with pytest.raises(SystemExit, match="00_one.ipynb: a link goes to nbs/nowhere.ipynb, and there is no such file"):
        repository("[nowhere](nowhere.ipynb)")
    assert repository("[part](#no-part)")[1] == ["nbs/00_one.html: #no-part leads to no heading"]


@pytest.mark.parametrize("loaded", ['<img src="https://example.org/x.png">', '<script src="x.js"></script>', '<iframe src="x"></iframe>'])
def test_what_would_be_loaded_from_elsewhere_is_named(repository, loaded):
    assert any("00_one.html: loads something" in line for line in repository(loaded)[1])


def test_what_nbdev_hides_is_hidden(repository):
    def cell(source): return new_code_cell(source, outputs=[new_output("stream", text=f"{source[-1]} said\n")])
    widget = new_output("display_data", {pages.WIDGET: {}, "text/plain": "a blank bar"})
    text, wrong = repository("", cell("#| hide\na"), cell("#| echo: false\nb"), cell("#| export\nc"), new_code_cell("d", outputs=[widget]))
    assert not wrong and "a said" not in text and "b said" in text and "c said" in text and "blank" not in text
    assert not re.search(r'class="n">[ab]<', text) and 'class="n">c<' in text and "export" not in text
