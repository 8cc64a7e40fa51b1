"""The pages in a real browser: every figure is drawn, nothing is complained about, nothing is asked of the network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import SETTINGS
from unnorm import evaluate, remove
from unnorm.analysis.analyze import analyze

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,1400"
)

DRAWN = """
return [...document.querySelectorAll('.plot')].map((element) => ({
  id: element.id,
  width: element.getBoundingClientRect().width,
  shapes: [...element.querySelectorAll('.plot path, .trace path, .hm image, .heatmaplayer image')]
    .filter((shape) => shape.getBoundingClientRect().width + shape.getBoundingClientRect().height > 0).length,
  axes: element.querySelectorAll('.xtick, .ytick').length,
  wider: element.scrollWidth > element.clientWidth + 1,
}));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that logs its console and its network requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver on this machine: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def open_page(browser: Any, page: Path) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """What was drawn, what the console says, and the addresses that were asked for, of one page."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    drawn = browser.execute_script(DRAWN)
    console = [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own new tab asks for things of its own.
    requests = [params["request"]["url"] for params in sent if params["documentURL"] == page.as_uri()]
    return drawn, console, requests


def assert_page_works(browser: Any, page: Path, figures: set[str]) -> None:
    drawn, console, requests = open_page(browser, page)
    assert {plot["id"] for plot in drawn} == figures
    for plot in drawn:
        assert plot["width"] > 240 and plot["shapes"] > 0 and plot["axes"] > 1, plot
        assert not plot["wider"], plot
    assert console == []
    # The page itself, and what is in it.
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


def test_report(browser: Any, finished_run: Path) -> None:
    # Nothing was trained, so there is no course of a run to show.
    figures = {"scales", "positions", "density", "kl", "entropy"}
    assert_page_works(browser, finished_run / "report.html", figures)


def test_report_of_a_trained_run(browser: Any, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    remove(tiny_model_dir, data=text_file, out=tmp_path / "run", control=True, **SETTINGS)
    figures = {"run", "scales", "positions", "density", "kl", "entropy"}
    assert_page_works(browser, tmp_path / "run" / "report.html", figures)


def test_evaluation(browser: Any, finished_run: Path, tmp_path: Path) -> None:
    evaluate(finished_run, tokens=1000, out=tmp_path / "evaluation", device="cpu")
    figures = {"positions", "calibration", "density", "kl", "entropy"}
    assert_page_works(browser, tmp_path / "evaluation" / "evaluation.html", figures)


def test_analysis(browser: Any, finished_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompt = {"clean": "k a c e c", "corrupted": "k a c e a", "answer": " n", "wrong_answer": " p"}
    prompts.write_text(json.dumps(prompt))
    analyze(finished_run, tokens=128, prompts=prompts, out=tmp_path, device="cpu")
    figures = {
        "attribution_error", "attribution_parts", "patching_scatter", "patching_error", "sinks_share", "sinks_norm",
        "neurons_weights", "neurons_ablation", "neurons_norm", "lens", "scales", "geometry_singular", "geometry_gain",
    }  # fmt: skip
    assert_page_works(browser, tmp_path / "analysis.html", figures)


def test_pages_fit_phones_and_tablets(browser: Any, finished_run: Path, tmp_path: Path) -> None:
    """Nothing is wider than the screen, and no number runs into the one beside it."""
    analyze(finished_run, tokens=128, out=tmp_path, device="cpu")
    wider = "return [...document.querySelectorAll('dd.value')].filter((e) => e.scrollWidth > e.clientWidth).length"
    try:
        for width in (320, 360, 640, 641, 768, 821):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            for page in (finished_run / "report.html", tmp_path / "analysis.html"):
                browser.get(page.as_uri())
                assert browser.execute_script("return document.documentElement.scrollWidth") == width
                assert browser.execute_script(wider) == 0, (width, page)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_printing_leaves_the_page_as_it_was(browser: Any, finished_run: Path) -> None:
    """On paper figures have a width of their own."""
    browser.get((finished_run / "report.html").as_uri())
    before = browser.execute_script(DRAWN)
    browser.execute_cdp_cmd("Page.printToPDF", {})
    browser.execute_async_script("setTimeout(arguments[0], 500)")
    assert [plot["width"] for plot in browser.execute_script(DRAWN)] == [plot["width"] for plot in before]
    drawn = "return [...document.querySelectorAll('.plot .main-svg:first-of-type')].map((e) => e.clientWidth)"
    assert browser.execute_script(drawn) == [round(plot["width"]) for plot in before]


def test_tokens_are_told_of_by_keyboard(browser: Any, finished_run: Path) -> None:
    browser.get((finished_run / "report.html").as_uri())
    press = (
        "const run = document.querySelector('.run-of-text'); run.focus();"
        "if (document.activeElement !== run) return 'not focused';"
        "for (const key of arguments) run.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
        "return [...run.querySelectorAll('.t')].indexOf(document.querySelector('.t.on'));"
    )
    assert browser.execute_script(press, "ArrowRight") == 0
    assert "loss" in browser.execute_script("return document.getElementById('detail').textContent")
    assert browser.execute_script(press, "ArrowRight", "ArrowRight", "ArrowLeft") == 1


def test_a_page_with_an_error_is_noticed(browser: Any, tmp_path: Path) -> None:
    """The test itself: a script that throws, and an image from elsewhere, are seen."""
    page = tmp_path / "broken.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><div id=a class=plot></div><script>nothing()</script>")
    drawn, console, requests = open_page(browser, page)
    assert drawn[0]["shapes"] == 0
    assert any("nothing is not defined" in line for line in console)
    assert "http://127.0.0.1:9/x.png" in requests
