"""The demos' page in headless Chromium: each tab is used once; screenshots go to build/demo_screenshots/.

Needs Playwright's driver and a browser: `pip install playwright` and, on Debian, `apt-get install chromium`; another
Chromium is named by the environment variable CHROMIUM.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'gated-vision-suite[demo]'")
pytest.importorskip("playwright", reason="Playwright is not installed: pip install playwright")
from playwright.sync_api import expect, sync_playwright

from tests.demos.served_page import served

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium, or set CHROMIUM"),
    pytest.mark.slow,
]
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "demo_screenshots"
# Without these, Chromium asks its maker's servers for this and that.
QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic")
WIDTHS = {"wide": 1280, "narrow": 390}
WAIT = 60_000  # milliseconds, of a machine that is busy with other work
SECOND, SLACK = 1.0, 3.0
expect.set_options(timeout=WAIT)
DONE = re.compile(r"CPU thread")


@pytest.fixture(scope="module")
def address():
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        switches = [f"--{switch}" for switch in (*QUIET, "disable-gpu", "no-sandbox")]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()


class Visit:
    """A page, and what went wrong on it.

    Attributes:
        page: Playwright's.
        wrong: errors of the console and requests that leave this machine.
    """

    def __init__(self, browser, address, width):
        self.page, self.wrong = browser.new_page(viewport={"width": width, "height": 900}), []
        self.page.set_default_timeout(WAIT)
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.look_at(request.url))
        self.page.goto(address)
        self.button("Classify").wait_for()

    def look_at(self, url):
        if not url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.wrong.append(url)

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first

    @property
    def status(self):
        return self.page.locator(".work:visible").first

    def open_tab(self, name):
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if tab.count() and tab.first.is_visible():
            tab.first.click()
        else:  # where the tabs do not fit, the others hide behind a button
            self.page.locator(".overflow-menu > button").first.click()
            self.page.locator(".overflow-dropdown button", has_text=name).click()

    def press(self, name, said=DONE):
        """Press a button and wait until the line about the work says something."""
        self.button(name).click()
        expect(self.status).to_have_text(said, timeout=WAIT)

    def take_picture(self, name):
        """Save a screenshot; the page must not be wider than the window."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(700)  # pictures fade in
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
        width, window = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width <= window


@pytest.fixture
def visit(browser, address, request):
    visit = Visit(browser, address, WIDTHS[request.param])
    yield visit
    visit.page.close()
    assert visit.wrong == []


both_widths = pytest.mark.parametrize("visit", WIDTHS, indirect=True)
wide = pytest.mark.parametrize("visit", ["wide"], indirect=True)


def width_of(visit):
    return next(name for name, width in WIDTHS.items() if visit.page.viewport_size["width"] == width)


@both_widths
def test_classify(visit):
    visit.page.locator("table img").first.click()
    expect(visit.page.locator(".image-frame:visible img, button.image-frame img").first).to_be_visible()
    visit.press("Classify")
    expect(visit.page.get_by_test_id("label-output-value")).to_have_text("7")
    expect(visit.page.locator(".whole img:visible")).to_have_count(5)
    visit.take_picture(f"classify_{width_of(visit)}")


@both_widths
def test_text_to_image(visit):
    visit.open_tab("Text to image")
    visit.press("Draw")
    expect(visit.page.locator(".whole:visible img")).to_have_count(4)
    seeds = visit.page.locator("label", has_text="Seeds of these pictures").locator("textarea")
    expect(seeds).to_have_value("7, 8, 9, 10")
    visit.take_picture(f"text_to_image_{width_of(visit)}")


@wide
def test_paint_into_a_picture(visit):
    visit.open_tab("Text to image")
    visit.press("Draw")
    visit.page.get_by_role("button", name="Paint into a picture").click()
    visit.button("Take the first picture").click()
    canvas = visit.page.locator("canvas:visible").first
    canvas.scroll_into_view_if_needed()
    visit.page.wait_for_timeout(1500)  # the picture is put onto the canvas
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visit.page.mouse.move(x - 60, y)
    visit.page.mouse.down()
    visit.page.mouse.move(x + 60, y, steps=10)
    visit.page.mouse.up()
    visit.page.wait_for_timeout(1000)
    # The whole pictures took 13 steps; those of which a part is known take fewer.
    visit.press("Draw the painted part", re.compile(r"4 pictures in ([1-9]|1[0-2]) steps"))
    visit.take_picture("paint")


@both_widths
def test_spiking_diffusion(visit):
    visit.open_tab("Spiking diffusion")
    visit.press("Draw")
    expect(visit.page.locator(".block img:visible")).to_have_count(4)
    expect(visit.page.get_by_text("of the twin's").first).to_be_visible()
    visit.take_picture(f"spiking_{width_of(visit)}")


@both_widths
def test_zoom_question(visit):
    visit.open_tab("Zoom question")
    visit.button("Draw this scene").click()
    expect(visit.page.get_by_label("Question", exact=True)).to_have_value("What is the code at green?")
    visit.press("Ask", re.compile("Looked closer"))
    expect(visit.page.get_by_label("Answer as chosen")).to_have_value("green 27")
    visit.take_picture(f"zoom_question_{width_of(visit)}")


@both_widths
def test_fly_through(visit):
    visit.open_tab("Fly through")
    visit.press("Look", re.compile("128 x 128 pixels"))
    visit.page.get_by_label("number input for Frames of the video").fill("3")
    visit.press("Fly", re.compile("3 frames of"))
    expect(visit.page.locator("video").first).to_be_visible()
    playable = (
        "() => { const v = document.querySelector('video'); return v && v.readyState >= 2 && v.videoWidth === 288 }"
    )
    visit.page.wait_for_function(playable)
    visit.take_picture(f"fly_through_{width_of(visit)}")


@wide
def test_cancel_stops_what_is_under_way(visit):
    visit.open_tab("Fly through")
    visit.press("Look", re.compile("128 x 128 pixels"))  # the model is loaded
    for field, value in (("Frames of the video", "120"), ("Size of the video's pictures", "256")):
        visit.page.get_by_label(f"number input for {field}").fill(value)
    visit.press("Fly", re.compile(r"frame \d+ of 120"))  # of which there is more than a minute's work
    began = time.perf_counter()
    visit.press("Cancel", "Stopped.")
    assert time.perf_counter() - began < SECOND + SLACK
    visit.page.wait_for_timeout(1500)
    expect(visit.status).to_have_text("Stopped.")
    visit.press("Look", re.compile("128 x 128 pixels"))


def test_leaving_the_page_stops_what_is_under_way(browser, address):
    first, second = (Visit(browser, address, WIDTHS["wide"]) for _ in range(2))
    for visit in (first, second):
        visit.open_tab("Fly through")
    second.press("Look", re.compile("128 x 128 pixels"))
    for field, value in (("Frames of the video", "120"), ("Size of the video's pictures", "256")):
        first.page.get_by_label(f"number input for {field}").fill(value)
    first.press("Fly", re.compile(r"frame \d+ of 120"))
    first.page.close()
    began = time.perf_counter()
    second.button("Look").click()
    expect(second.status).to_have_text(re.compile("Drawing"))  # the line of the last time is gone
    expect(second.status).to_have_text(re.compile("128 x 128 pixels"), timeout=WAIT)
    second.page.close()
    assert time.perf_counter() - began < 10 + SLACK


@wide
def test_bad_input_shows_its_message(visit):
    visit.open_tab("Text to image")
    visit.page.get_by_label("Prompt", exact=True).fill("   ")
    visit.button("Draw").click()
    expect(visit.page.get_by_text("Prompt is empty; write a few words.").first).to_be_visible()
    visit.take_picture("bad_input")
