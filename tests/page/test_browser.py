"""The page in a headless Chromium: what it says it does, it does, by pointer and by keyboard."""

import shutil

import numpy as np
import pytest
from problems.page_folders import (
    EIGENVALUES,
    HOSTILE,
    every_run,
    exact_spectra,
    many_blocks,
)

import hessian_tools as ht
from hessian_tools.page.words import shown
from hessian_tools.page.writing import report_html
from hessian_tools.tables import shortened

try:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    webdriver = None

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
BLOCKS = "[data-blocks] .scroll > table"
CHART = "[data-blocks] .spectra"


@pytest.fixture(scope="module")
def chromium():
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if webdriver is None:
        pytest.skip("selenium is not installed")
    if not browser or not driver:
        pytest.skip("no Chromium with its driver is installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, "--window-size=1360,1000"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    every_run(folder)
    return ht.write_report(folder)


class Page:
    """An open page, and short words for what is done there."""

    def __init__(self, chromium, file):
        self.browser = chromium
        self.shown_as()
        chromium.get(file.as_uri())

    def shown_as(self, scheme="light", media=""):
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        settings = {"media": media, "features": features}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", settings)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def script(self, text, *arguments):
        return self.browser.execute_script(text, *arguments)

    def pointed(self, selector, right=0.0, down=0.0):
        """The pointer there, shares of the size away from the middle; still to be performed."""
        element = self.one(selector)
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        place = (round(right * element.size["width"]), round(down * element.size["height"]))
        return ActionChains(self.browser).move_to_element_with_offset(element, *place)

    def press(self, selector, *keys):
        self.script("arguments[0].focus()", self.one(selector))
        for key in keys:
            ActionChains(self.browser).send_keys(key).perform()

    def column(self, table, number):
        """The texts of a column, of rows that are to be seen."""
        return self.script(
            "return [...document.querySelector(arguments[0]).tBodies].filter(b => !b.hidden)"
            ".map(b => b.rows[0].cells[arguments[1]].innerText.trim())",
            table,
            number,
        )

    def compared(self):
        """Head and lines of the comparison, as texts."""
        return self.script(
            "return [...document.querySelector('.compare table').rows]"
            ".map(r => [...r.cells].map(c => c.innerText.replaceAll('\\u200b', '').trim()))"
        )

    def colour(self, selector):
        return self.script(
            "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor",
            selector,
        )


@pytest.fixture
def page(chromium, written):
    opened = Page(chromium, written)
    yield opened
    assert [entry for entry in chromium.get_log("browser") if entry["level"] != "INFO"] == []


def button(name):
    """Of a block's row."""
    return f'.pick[title="{name}"]'


def test_it_opens_whole(page):
    """Without a word on the console, which the fixture holds; hostile names are text."""
    assert page.browser.title.endswith("– curvature report") and len(page.all(".headline")) == 4
    titles = page.script("return [...document.querySelectorAll('.pick')].map(b => b.title)")
    assert titles == list(EIGENVALUES) and HOSTILE in titles


def test_columns_sort_both_ways_by_keyboard_and_pointer(page):
    head = page.one(f"{BLOCKS} thead th:nth-child(3)")
    sizes = [str(len(values)) for values in EIGENVALUES.values()]
    assert head.get_attribute("aria-sort") == "none" and page.column(BLOCKS, 2) == sizes
    page.press(f"{BLOCKS} thead th:nth-child(3) .sort", Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.column(BLOCKS, 2) == sorted(sizes)
    page.one(f"{BLOCKS} thead th:nth-child(3) .sort").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.column(BLOCKS, 2) == sorted(sizes, reverse=True)
    # by value, not by text: 100 is more than 30
    page.one(f"{BLOCKS} thead th:nth-child(6) .sort").click()
    assert head.get_attribute("aria-sort") == "none"
    tops = sorted(max(values) for values in EIGENVALUES.values())
    assert page.column(BLOCKS, 5) == [shown(top) for top in tops]


def test_a_filter_keeps_the_rows_that_have_all_words(page):
    page.press("[data-blocks] input[type=search]", *"QUERY layers.1")
    (kept,) = page.column(BLOCKS, 0)
    assert kept.endswith("layers.1.query")
    assert page.text("[data-blocks] .count") == "1 of 6 rows"
    page.press("[data-blocks] input[type=search]", *[Keys.BACKSPACE] * 20)
    assert page.text("[data-blocks] .count") == "6 rows" and len(page.column(BLOCKS, 0)) == 6


def test_verdicts_are_filtered_by_their_buttons_and_unfold(page):
    table = "section.part:has(.evidence) .scroll > table"
    chip = page.one(".chip")
    kind = chip.get_attribute("data-kind")
    page.press(f".chip[data-kind='{kind}']", Keys.SPACE)
    assert chip.get_attribute("aria-pressed") == "true"
    verdicts = [text.lstrip("✓⊖⊕⇄? \n") for text in page.column(table, 1)]
    assert set(verdicts) == {kind}
    assert chip.text == f"{len(verdicts)} {kind}"
    unfold = page.one("tbody:not([hidden]) .unfold")
    below = page.one(f"#{unfold.get_attribute('aria-controls')}")
    assert not below.is_displayed() and unfold.get_attribute("aria-expanded") == "false"
    page.script("arguments[0].scrollIntoView({block: 'center'})", unfold)
    unfold.click()
    assert below.is_displayed() and unfold.get_attribute("aria-expanded") == "true"
    assert "had it been claimed" in below.text


def test_pointing_at_a_row_or_a_curve_tells_its_numbers(page):
    page.pointed(button("head.weight")).perform()
    told = page.text(f"{CHART} .readout")
    assert told.startswith("head") and "largest 200" in told and "smallest 100" in told
    assert page.one(f"{CHART} .preview").get_attribute("visibility") == "visible"
    # the curve's own place: at the summit of the block with the largest eigenvalues
    x, y = page.script(
        "const svg = document.querySelector('.spectra svg'), at = svg.getBoundingClientRect();"
        "const path = svg.querySelectorAll('defs path')[5], scale = at.width / svg.viewBox.baseVal.width;"
        "const points = [...path.getAttribute('d').matchAll(/[ML]([\\d.]+) ([\\d.]+)/g)]"
        ".map(m => [Number(m[1]), Number(m[2])]).sort((a, b) => a[1] - b[1]);"
        "return [points[0][0] * scale / at.width - 0.5, points[0][1] * scale / at.height - 0.5]"
    )
    page.pointed(f"{CHART} svg", x, y + 0.01).perform()
    assert page.text(f"{CHART} .readout").startswith("head")
    page.pointed("h1").perform()
    assert "smallest and largest Ritz value" in page.text(f"{CHART} .readout")


def test_two_blocks_are_compared_by_click_and_by_keyboard(page):
    spectra = exact_spectra()
    one, other = "layers.0.value.weight", "layers.1.query.weight"
    page.one("[data-blocks] .clear").click()
    assert page.text(".compare .said") == "Choose two blocks to compare."
    page.pointed(button(one)).click().perform()
    page.press(button(other), Keys.ENTER)
    assert page.one(button(one)).get_attribute("aria-pressed") == "true"
    head, *lines = page.compared()
    assert [name.replace("\n", "") for name in head] == [
        "",
        "Alayers.0.value",
        "Blayers.1.query",
        "A ÷ B",
    ]
    by_name = {line[0]: line[1:] for line in lines}
    scales = [spectra[name].rms.value for name in (one, other)]
    assert by_name["rms"] == [
        shown(scales[0]),
        shown(scales[1]),
        f"{shown(scales[0] / scales[1])}×",
    ]
    assert by_name["smallest"] == ["−2", "−0.02", "100×"]
    js = ht.js_heterogeneity(spectra)
    places = [js.names.index(name) for name in (one, other)]
    distance = js.readings["curvature"].matrix[*places]
    assert by_name["distance of squared curvature"] == [f"{shown(distance)} decades"]
    assert page.text(".compare .said").startswith(
        "Comparing layers.0.value (A) with layers.1.query"
    )
    for letter, name in (("a", one), ("b", other)):
        used = page.one(f"{CHART} .chosen.{letter} use").get_attribute("href")
        assert used.endswith(f"-curve-{list(EIGENVALUES).index(name)}")
    # a third begins a new pair; the same again is let go
    page.press(button("head.weight"), Keys.ENTER)
    assert len(page.compared()[0]) == 2
    page.press(button("head.weight"), Keys.ENTER)
    assert page.text(".compare .said") == "Choose two blocks to compare."


def test_a_heat_map_tells_its_cells_and_joins_two_blocks(page):
    js = ht.js_heterogeneity(exact_spectra())
    matrix = js.readings["curvature"].matrix
    middle = np.linspace(-0.5, 0.5, 7)[:-1] + 1 / 12  # of cells, of the picture
    page.pointed("[data-map] image", middle[1], middle[3]).perform()
    told = page.text("[data-map] .readout")
    assert told.startswith(f"{shown(matrix[3, 1])} decades")
    assert told.endswith(f"{js.names[3]} × {js.names[1]}")
    page.pointed("h1").perform()
    page.press("[data-map] svg", Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert page.text("[data-map] .readout").endswith(f"{js.names[1]} × {js.names[1]}")
    page.press("[data-map] svg", Keys.ARROW_RIGHT, Keys.ENTER)
    pressed = page.script(
        "return [...document.querySelectorAll('.pick[aria-pressed=true]')].map(b => b.title)"
    )
    assert pressed == [js.names[1], js.names[2]]
    page.one(".join").click()
    farthest = np.unravel_index(np.nanargmax(matrix), matrix.shape)
    said = page.text(".compare .said")
    assert all(shortened(js.names)[k] in said for k in farthest)


def test_values_are_read_off_curves(page):
    loss = "section.part:has(.curves[data-curves]) .curves"
    page.press(f"{loss} svg", Keys.HOME)
    assert page.text(f"{loss} .readout").startswith("step 0")
    first = page.text(f"{loss} .readout")
    page.press(f"{loss} svg", Keys.END)
    assert page.text(f"{loss} .readout").startswith("step 6") and "loss" in first
    page.pointed(f"{loss} svg", -0.4, 0.0).perform()
    assert page.text(f"{loss} .readout") == first


def test_a_legend_hides_a_curve(page):
    key = page.one(".key")
    label = key.get_attribute("data-label")
    curve = page.one(f'.curve[data-label="{label}"]')
    assert curve.is_displayed()
    page.script("arguments[0].scrollIntoView({block: 'center'})", key)
    key.click()
    assert key.get_attribute("aria-pressed") == "false" and not curve.is_displayed()


def test_dark_scheme_and_paper(page):
    light = page.colour("body")
    page.shown_as("dark")
    dark = page.colour("body")
    brightness = [sum(map(int, c[4:-1].split(","))) for c in (light, dark)]
    assert brightness[0] > 600 and brightness[1] < 150
    page.shown_as("dark", "print")
    assert page.colour("body") == "rgb(255, 255, 255)"
    for selector in (".controls", ".contents", ".copy", ".readout"):
        assert not page.one(selector).is_displayed()
    assert page.one(f"{BLOCKS}").is_displayed() and page.one(".command code").is_displayed()


def test_everything_that_answers_can_be_reached_by_tabs(page):
    unreachable = page.script(
        "return [...document.querySelectorAll('button, input, summary, [role=img][tabindex]')]"
        ".filter(e => e.tabIndex < 0 || !(e.ariaLabel || e.textContent.trim()"
        " || e.labels?.length)).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unreachable == []
    page.press("a.skip", Keys.TAB)
    assert page.script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_narrow_window_scrolls_only_inside_its_parts(page):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        width = page.script("return document.documentElement.scrollWidth")
        wide = page.script(
            "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right"
            " > 401 && !e.closest('.scroll, .wide, .compare, .pairs')).map(e => e.outerHTML.slice(0, 90))"
        )
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 400, wide


def test_400_blocks(chromium, tmp_path):
    run = many_blocks(readings=("curvature",))
    spectra = run.results["spectra"]
    file = tmp_path / "page.html"
    file.write_text(report_html("400 blocks", [run]))
    page = Page(chromium, file)
    took = page.script(
        "const [whole] = performance.getEntriesByType('navigation'); return whole.domComplete"
    )
    assert took < 15_000  # ms; about 700 on two idle cores
    sorting = page.script(
        "const start = performance.now();"
        "document.querySelector('[data-blocks] th:nth-child(4) .sort').click();"
        "document.body.getBoundingClientRect(); return performance.now() - start"
    )
    assert sorting < 5_000
    scales = [spectra[name].rms.value for name in spectra]
    assert page.column(BLOCKS, 3)[0] == shown(min(scales))
    assert [entry for entry in chromium.get_log("browser") if entry["level"] != "INFO"] == []
