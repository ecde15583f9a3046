"""The pages in a browser: each in light and dark, on a wide screen and a narrow one."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import create_tables, new_database, new_workspace

TITLES = {"report": "Listing vectors of ", "evaluate": "Evaluation of ", "search": "Nearest to "}
LONG = "a" * 180 + ".jpg"
HOSTILE = '"><script>document.title="taken"<\\script>.jpg'
ARROW_RIGHT = "\ue014"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, and its log."""
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install it")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options, selenium.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(
    browser: Any, server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Each page of a market by its command: one photo has no end of a name, one's is a script."""
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(tmp_path_factory.mktemp("pages") / "work", database, encoder)
        work.knows_photos = True
        draw = np.random.default_rng(5)
        for listing in range(1, 13):
            others = (LONG, HOSTILE) if listing == 2 else (f"{listing}/1.jpg", f"{listing}/2.jpg")
            names = [work.noise(name, draw) for name in (f"{listing}/0.jpg", *others)]
            database.add_listing(listing, [*names, f"lost-{listing}.jpg"])
        work.run("report")
        work.run("evaluate")
        sheet = work.folder / "sheet.html"
        words = ["search", "2", "--top", "8", "--format", "html", "--out", str(sheet)]
        found = work.python("-m", "pipeline", *words, "--config", f"model_name=local-dir:{encoder}")
        assert 0 == found.code, found.output
        yield {
            "report": work.results / "report" / "index.html",
            "evaluate": work.results / "evaluate" / "index.html",
            "search": sheet,
        }


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1280, 390])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    """Open a page as a screen of this width shows it to whom likes light or dark."""
    browser.get_log("performance")
    mobile = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    liked = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", liked)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", mobile)
    browser.get(page.as_uri())


def asked_for(browser: Any) -> list[str]:
    """All that the browser asked for since the page was opened."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


# How many pictures a page has, and how many of them cannot be drawn.
PICTURES = """
const drawn = image => { image.loading = "eager"; return image.decode(); };
return Promise.allSettled([...document.images].map(drawn)).then(
  ends => [ends.length, ends.filter(end => end.status == "rejected").length]);
"""
# The least contrast of a text to what is behind it, by WCAG's formula, and the text.
CONTRAST = """
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const light = colour => {
  const [r, g, b] = parts(colour).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if ((parts(colour)[3] ?? 1) > 0) return colour;
  }
  return getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "rgb(0, 0, 0)" : "rgb(255, 255, 255)";
};
let least = [99, ""];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; text = texts.nextNode();) {
  const element = text.parentElement;
  if (!text.data.trim() || !element.checkVisibility() || element.closest("script, style, svg")) continue;
  const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
  const contrast = (a + .05) / (b + .05);
  if (contrast < least[0]) least = [contrast, text.data.trim()];
}
return least;
"""  # noqa: E501


@pytest.mark.parametrize("name", TITLES)
def test_a_page_is_whole_and_asks_for_nothing(
    pages: dict[str, Path], browser: Any, name: str, width: int, scheme: str
) -> None:
    """No error, no request, pictures that all show, text to be read, none beyond the screen."""
    show(browser, pages[name], width, scheme)
    url = pages[name].as_uri()
    pictures, broken = browser.execute_script(PICTURES)
    contrast, text = browser.execute_script(CONTRAST)

    assert browser.title.startswith(TITLES[name])
    assert [] == browser.get_log("browser")
    assert [] == [each for each in asked_for(browser) if not each.startswith((url, "data:"))]
    assert pictures > 0 == broken
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert contrast >= 4.5, text


def test_the_report_leads_from_a_listing_to_its_neighbours(
    pages: dict[str, Path], browser: Any, width: int, scheme: str
) -> None:
    """A click through three of them, and a walk on the map; none asks for anything."""
    show(browser, pages["report"], width, scheme)
    seen: list[str] = []
    browser.find_element("css selector", "#seeds a").click()
    for _ in range(3):
        seen.append(heading(browser, seen[-1:]))
        browser.find_element("css selector", "#listing .row a").click()
    seen.append(heading(browser, seen[-1:]))
    browser.find_element("css selector", "#chart svg").send_keys(ARROW_RIGHT)
    pointed = browser.find_element("id", "pointed").text

    assert 4 == len([name for name in seen if re.fullmatch(r"Listing \d+", name)])
    assert pointed.startswith("listing ")
    assert [] == browser.get_log("browser")
    url = pages["report"].as_uri()
    assert [] == [each for each in asked_for(browser) if not each.startswith((url, "data:"))]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def heading(browser: Any, before: list[str]) -> str:
    """That of the listing which is shown, once it is another than before."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        script = "return document.querySelector('#listing h3')?.textContent"
        if (found := browser.execute_script(script)) and [found] != before:
            return str(found)
        time.sleep(0.05)
    return ""
