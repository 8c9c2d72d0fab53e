"""The page in a real browser: offline, at the width of a phone and of a desk, in both themes."""

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome")

PHONE, DESK = 400, 1280
SMALLEST = 11  # pixels of text
POINTS_TO_PIXELS = 96 / 72

SMALL_TEXTS = """() => {
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const size = parseFloat(getComputedStyle(texts.currentNode.parentElement).fontSize);
    if (texts.currentNode.data.trim() && size < %s) found.push([texts.currentNode.data.trim(), size]);
  }
  return found;
}"""
"""Texts below so many pixels."""

FULL_CELLS = """() => [...document.querySelectorAll("th, td")].filter(cell => cell.scrollWidth > cell.clientWidth + 1)
  .map(cell => cell.textContent)"""
"""Cells out of which text runs into the next one."""

IMAGES = """() => [...document.images].map(image => ({
  width: image.clientWidth, natural: image.naturalWidth, source: image.currentSrc, complete: image.complete }))"""

CONTRAST = """() => {
  const part = value => { value /= 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
  const luminance = colour => { const [r, g, b] = colour.match(/\\d+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll("p, td, td small, caption, dt, figcaption, h2")].map(element => {
    const ink = luminance(getComputedStyle(element).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }));
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens a page and yields it with what it said and asked for; every fold is open."""
    contexts = []

    def open_page(folder, width, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "report.html").as_uri(), wait_until="load")
        page.evaluate("() => document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
        return page, said, asked

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(params=["old_folder", "generalized_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
class TestInABrowser:
    def test_is_whole_and_readable(self, opened, folder, width, scheme):
        page, said, asked = opened(folder, width, scheme)
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.evaluate(SMALL_TEXTS % SMALLEST) == []
        assert page.evaluate(FULL_CELLS) == []
        assert page.evaluate(CONTRAST) >= 4.5
        headings = page.locator("h2").all_inner_texts()
        assert {"Figures", "Attacks", "Other measures", "Examples", "Versions"} <= set(headings)
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(22, 27, 34)"
        assert dark == (scheme == "dark")

    def test_every_figure_is_drawn_and_its_text_large_enough(self, opened, folder, width, scheme):
        page, _, _ = opened(folder, width, scheme)
        images = page.evaluate(IMAGES)
        assert len(images) == (2 if folder.name.startswith("old") else 4)
        for image in images:
            assert image["complete"] and image["natural"] > 0
            # No text of a figure is below 9 points.
            assert 9 * POINTS_TO_PIXELS * image["width"] / image["natural"] >= SMALLEST


def test_a_figure_follows_theme_and_width(opened, generalized_folder):
    sources = set()
    for width in (PHONE, DESK):
        for scheme in ("light", "dark"):
            page, _, _ = opened(generalized_folder, width, scheme)
            sources.add(page.evaluate(IMAGES)[2]["source"])
    assert len(sources) == 4
