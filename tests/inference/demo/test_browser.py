"""The page in a headless Chromium: an upload, the slider, an example, files that are refused, a phone.

python -m pytest -n 0 tests/inference/demo/test_browser.py --basetemp shots    # the screenshots are in shots/
"""

import shutil
from pathlib import Path

import pytest

from ride_timm.inference.demo.examples import write_examples
from ride_timm.inference.demo.opinions import load_demo

pytest.importorskip("gradio", reason="needs the extra demo")
pytest.importorskip("playwright", reason="needs playwright")

from playwright import sync_api as playwright

from ride_timm.inference.demo.page import launch

RELEASE = Path(__file__).parents[3] / "hub" / "ride_resnet32.fashion_lt"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desktop": dict(width=1280, height=900), "phone": dict(width=390, height=844)}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def demo():
    return load_demo(f"local-dir:{RELEASE}", "cpu")


@pytest.fixture(scope="module")
def url(demo):
    page, url = launch(demo, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=WIDTHS)
def page(browser, url, request, tmp_path):
    """The page at one width; afterwards a screenshot, no error on its console, and no request to elsewhere."""
    problems = []
    context = browser.new_context(viewport=WIDTHS[request.param])
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("request", lambda sent: sent.url.startswith((url, "data:", "blob:")) or problems.append(sent.url))
    page.goto(url)
    playwright.expect(page.locator("#decision")).to_contain_text("Drop an image", timeout=60_000)
    yield page
    page.screenshot(path=tmp_path / f"{request.param}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[request.param]["width"]
    assert not problems
    context.close()


def shows(page, where, text):
    playwright.expect(page.locator(where)).to_contain_text(text, timeout=60_000)


def upload(page, path):
    page.locator("#image input[type=file]").set_input_files(path)


def test_upload_result_and_slider(page, demo, tmp_path):
    path = next(path for path in write_examples("fashion_lt", tmp_path) if path.stem == "Coat")
    upload(page, path)
    by_threshold = [demo.predict(path, point["threshold"]).routed for point in demo.settings]
    shows(page, "#decision", f"{by_threshold[demo.default].experts_used} of 3 experts")
    shows(page, "#about", f"{demo.settings[demo.default]['all']:.1f}\u00a0%")
    rows = page.locator("#classes table").first.locator("tr")
    assert rows.count() == 6  # a heading and five classes
    for row, candidate in zip(rows.all()[1:], demo.predict(path).ensemble, strict=True):
        assert row.inner_text().split("\t")[0].strip() == candidate.label
        assert row.inner_text().split()[-1] == f"{candidate.train_images:,}"
    assert page.locator("#classes .cards > div").count() == 3
    for key, index in (("Home", 0), ("End", -1)):
        page.locator("#setting input[type=range]").press(key)
        point, used = demo.settings[index], by_threshold[index].experts_used
        shows(page, "#about", f"{point['all']:.1f}\u00a0%")
        shows(page, "#about", f"{point['macs'] / 1e6:.1f}MMACs per image")
        shows(page, "#decision", f"all {used} experts" if used == 3 else f"{used} of 3 experts")
        assert page.locator("#classes .skipped").count() == 3 - used


def test_an_example(page, demo, tmp_path):
    (first, *_) = paths = write_examples("fashion_lt", tmp_path)
    assert page.locator(".gallery-item").count() == len(paths)
    page.locator(".gallery-item").first.click()
    shows(page, "#decision", demo.predict(first).routed.best.label)


def test_a_file_that_only_has_the_name_of_an_image(page, tmp_path):
    (tmp_path / "words.png").write_text("hello")
    upload(page, tmp_path / "words.png")
    shows(page, "#decision [role=alert]", "words.png cannot be read as an image")


DROP = """element => {
  const dropped = new DataTransfer();
  dropped.items.add(new File(["hello"], "words.txt", {type: "text/plain"}));
  element.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, bubbles: true, cancelable: true}));
}"""


def test_another_file_is_refused_where_it_is_dropped(page):
    page.locator("#image button").first.evaluate(DROP)
    shows(page, "[data-testid=toast-body]", "image")
