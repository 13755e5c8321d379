"JupyterLab in a real browser: the notebook with the sliders runs, each of them moves its picture, and nothing goes wrong on the page"
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync"]
RUN, PICTURE = ".widget-interact", "img[src^='data:image']" # sliders and their picture
PATIENCE = 45_000 # milliseconds; a machine may be busy


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A page of a browser, with no state from before"
    api = pytest.importorskip("playwright.sync_api", reason="the sliders were not tried: playwright is not installed")
    if not BROWSER: pytest.skip("the sliders were not tried in a browser: chromium is not installed")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


@pytest.fixture(scope="module")
def lab(page, tmp_path_factory):
    "A JupyterLab that serves a copy of the notebook; gives its address, with `{}` for a notebook's path"
    root = tmp_path_factory.mktemp("lab")
    (root/"work/nbs").mkdir(parents=True)
    content = json.loads((ROOT/"nbs/19_explore.ipynb").read_text())
    content["cells"] = [c for c in content["cells"] if "#| eval: false" not in c["source"]] # the one that writes moi/
    (root/"work/nbs/19_explore.ipynb").write_text(json.dumps(content))
    (root/"work/results").symlink_to(ROOT/"results")
    settings = {"config/labconfig/page_config.json": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
        "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}} # every cell is on the page
    for name, value in settings.items():
        (root/name).parent.mkdir(parents=True)
        (root/name).write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, token = s.getsockname()[1], secrets.token_hex()
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(root/"config"), "JUPYTERLAB_SETTINGS_DIR": str(root/"settings"), "MPLBACKEND": "",
        "JUPYTERLAB_WORKSPACES_DIR": str(root/"workspaces"), "IPYTHONDIR": str(root/"ipython"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}",
        "--allow-root", "--expose-app-in-browser", f"--ServerApp.root_dir={root/'work'}"]
    with open(root/"log", "w") as log: server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
            except OSError: time.sleep(.25)
            else: break
        else: pytest.fail(f"JupyterLab did not start: {(root/'log').read_text()}", pytrace=False)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        page.goto("about:blank")
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill() # its kernels end with it


@pytest.fixture(scope="module")
def notebook(page, lab):
    "The page, after Run All; what it complains of is in `page.complaints`"
    page.complaints = []
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.goto(lab.format("nbs/19_explore.ipynb"))
    page.wait_for_function("window.jupyterapp", timeout=PATIENCE)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", state="attached", timeout=PATIENCE)
    page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus == 'connected'",
        timeout=PATIENCE)
    page.wait_for_timeout(3000) # a notebook that is run too early is not run at all
    for command in ("application:toggle-left-area", "notebook:run-all-cells"):
        page.evaluate("name => { jupyterapp.commands.execute(name) }", command) # not waited for
    page.wait_for_selector(f"{RUN} {PICTURE}", timeout=2 * PATIENCE)
    cells = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
    late = time.monotonic() + 2 * PATIENCE / 1000
    while any(text in ("[*]:", "[ ]:") for text in cells.all_inner_texts()):
        assert time.monotonic() < late, cells.all_inner_texts()
        page.wait_for_timeout(200)
    return page


def picture(box):
    "What a widget shows now"
    return box.locator(PICTURE).last.get_attribute("src", timeout=PATIENCE)


def move(page, box, handle):
    "Push a slider with the keyboard, to the right and then to the left, until its picture is another"
    before = picture(box)
    for key in ["ArrowRight"] * 6 + ["ArrowLeft"] * 16:
        handle.press(key)
        for _ in range(40):
            page.wait_for_timeout(50)
            if box.locator(PICTURE).count() and picture(box) != before: return True
            if not box.locator(".jp-OutputArea-output.jp-mod-busy").count() and _ > 12: break
    return False


def move_all(page, box):
    "Push every slider of a widget"
    handles = box.locator(".noUi-handle")
    assert handles.count()
    box.scroll_into_view_if_needed()
    for k in range(handles.count()):
        name = handles.nth(k).locator("xpath=ancestor::*[contains(@class, 'widget-inline-hbox')][1]").inner_text()
        assert move(page, box, handles.nth(k)), f"slider {name!r} moves nothing"


def test_every_slider_moves_its_picture(notebook):
    cells = notebook.locator(f".jp-Cell-outputArea > .jp-OutputArea-child {RUN}:visible")
    alone = [b for b in cells.all() if not b.locator("xpath=ancestor::*[contains(@class, 'widget-tab')]").count()]
    assert len(alone) == 5 # laws, errors, steps, teacher and student, price
    for box in alone: move_all(notebook, box)


def test_every_page_of_a_run_has_its_picture(notebook):
    tabs = notebook.locator(".widget-tab").last
    titles = tabs.locator(".lm-TabBar-tab")
    names = titles.all_inner_texts()
    assert names == ["Pseudo-targets", "Transfer set", "Painting", "Differences"]
    for k, name in enumerate(names):
        titles.nth(k).click()
        if name == "Painting": tabs.get_by_role("button", name="paint 4 impressions").click()
        box = tabs.locator(f"{RUN}:visible")
        box.wait_for(timeout=PATIENCE)
        move_all(notebook, box)


def test_nothing_goes_wrong_on_the_page(notebook, tmp_path):
    assert not notebook.complaints
    wrong = notebook.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']")
    assert wrong.all_inner_texts() == []
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path)) # to be looked at, at desktop and laptop width
    for width in (1440, 1024):
        notebook.set_viewport_size({"width": width, "height": 900})
        for k, box in enumerate(notebook.locator(f"{RUN}:visible").all()):
            box.scroll_into_view_if_needed()
            notebook.screenshot(path=folder/f"explore-{width}-{k}.png")
            over = box.evaluate("e => e.scrollWidth - e.clientWidth")
            assert over <= 1, f"widget {k} is {over} pixels wider than a page of {width} has room for"
