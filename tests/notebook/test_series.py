"""The course as a reader goes through it: each notebook opened in JupyterLab, Run All, and looked at. The English one
with the small model: nbval executes the Chinese one with the other.

CHATMAGIC_SCREENSHOTS=FOLDER keeps what was seen, in light, in dark and 600 pixels wide.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from lab import jupyterlab

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.network]
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = "/usr/bin/chromium"
OUTPUTS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap(
    cell => cell.type == "code" ? cell.outputs.toJSON() : [])"""
UNSEEN = """() => [...document.querySelectorAll(".jp-OutputArea-output img")].filter(
    image => !image.complete || image.naturalWidth == 0 || image.width == 0).length"""
WIDE = "document.documentElement.scrollWidth > window.innerWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory, small):
    if not (find_spec("playwright") and find_spec("jupyterlab") and os.path.exists(CHROMIUM)):
        reason = f"JupyterLab, playwright or {CHROMIUM} is not installed"
        (pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_BROWSER") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    folder, settings = tmp_path_factory.mktemp("series"), tmp_path_factory.mktemp("settings")
    for name in ("notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in (folder / "notebooks").rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
        nbformat.write(notebook, path)
    with jupyterlab(folder, settings, CHATMAGIC_PROFILE="smollm2-135m") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.address = address
        yield page
        browser.close()


def command(page, name, **arguments):
    return page.evaluate("([name, given]) => window.jupyterapp.commands.execute(name, given)", [name, arguments])


@pytest.mark.parametrize("notebook", sorted(path.stem for path in (ROOT / "notebooks" / "en").glob("0*.ipynb")))
def test_run_all(page, notebook):
    """No cell fails, none is left out, no output is an alarm on stderr, every picture is there and nothing is cut off.
    In their order: each needs those before it."""
    page.set_viewport_size({"width": 1100, "height": 900})
    page.goto(f"{page.address}/lab/tree/notebooks/en/{notebook}.ipynb?reset")
    page.get_by_text("| Idle").wait_for(timeout=120_000)
    command(page, "notebook:run-all-cells")
    outputs = page.evaluate(OUTPUTS)
    failed = [each for each in outputs if each["output_type"] == "error"]
    assert failed == [], failed
    counts = "() => [...window.jupyterapp.shell.currentWidget.content.model.cells].filter("
    assert page.evaluate(counts + "cell => cell.type == 'code' && !cell.executionCount).length") == 0
    said = "".join("".join(each["text"]) for each in outputs if each.get("name") == "stderr")
    assert "Traceback" not in said and "%|" not in said, "a bar or an error on stderr"
    assert page.evaluate(UNSEEN) == 0
    for look, theme, width in [("light", "Light", 1100), ("dark", "Dark", 1100), ("600", "Light", 600)]:
        command(page, "apputils:change-theme", theme=f"JupyterLab {theme}")
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(500)
        assert not page.evaluate(WIDE), look
        if folder := os.environ.get("CHATMAGIC_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{notebook}-{look}.png")
    command(page, "notebook:shutdown-kernel")
