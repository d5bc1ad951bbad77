"""The demo page in a real browser: upload, click, slider, video, refused files. `make test-demo` runs it.

With `--screenshot docs/demo.png` it also writes the picture of docs/demo.md.
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from experiments.data.video_files import write_video

pytest.importorskip("panel", reason="needs panel: pip install -e '.[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: uv sync --inexact --group browser")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_MS = 180_000  # on a busy machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the real command, running."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    command = [sys.executable, "-m", "experiments.demo", f"port={port}", "num_threads=1"]
    with log.open("wb") as written:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=written)
    for _ in range(3000):
        assert process.poll() is None, log.read_text()
        if "Open http" in log.read_text():
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def visit(address):
    """A browser's page after the first answer -> the page, the addresses it asked, and its errors."""
    asked, errors = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        said(page, r"astronaut: 14 x 14 cells to 224 x 224 pixels in [\d.]+ s\.")
        yield page, asked, errors
        browser.close()


def said(page, pattern):
    """Waits until the visible message matches."""
    message = page.locator(".message:visible").filter(has_text=re.compile(pattern))
    message.wait_for()
    return message.inner_text()


def gallery(page, number):
    """0 similarity, 1 attention, 2 uncertainty."""
    return page.locator(".pictures").nth(number)


def sources(pictures):
    return [image.get_attribute("src") for image in pictures.locator("img").all()]


def changed(pictures, before):
    """Waits until a gallery's last picture is another one."""
    for _ in range(WAIT_MS // 100):
        now = sources(pictures)
        if now and now[-1] != before[-1]:
            return now
        pictures.page.wait_for_timeout(100)
    raise AssertionError("the pictures stay as they were")


def test_it_shows_pictures_and_asks_nobody_else(visit, address, request):
    page, asked, errors = visit
    assert page.locator(".swipe img").count() == 2
    captions = gallery(page, 0).locator("figcaption").all_inner_texts()
    assert captions == ["image", "before: 14 x 14", "A: bundled", "B: attention=global"]
    for image in page.locator(".pictures:visible img").all():
        assert image.evaluate("one => one.complete && one.naturalWidth > 0")
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    assert errors == []
    if target := request.config.getoption("--screenshot"):
        before = sources(gallery(page, 1))
        gallery(page, 0).locator(".frame").first.click(position={"x": 110, "y": 170})  # on the suit
        changed(gallery(page, 1), before)
        screenshot(page, Path(target))


def screenshot(page, target):
    """The whole page, with few colours so that the file is small."""
    taken = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    taken.thumbnail((1000, 2000), Image.Resampling.LANCZOS)
    taken.quantize(256).save(target, optimize=True)
    assert target.stat().st_size < 300_000


def test_a_click_marks_the_pixel_and_shows_what_is_like_it(visit):
    page, *_ = visit
    similarity, attention = gallery(page, 0), gallery(page, 1)
    before = sources(similarity), sources(attention)
    similarity.locator(".frame").nth(2).click(position={"x": 30, "y": 60})
    changed(similarity, before[0])
    changed(attention, before[1])
    crosses = page.locator(".cross")
    assert crosses.count() == 4 + 2
    for cross in crosses.all():
        assert float(cross.evaluate("one => parseFloat(one.style.left)")) == pytest.approx(100 * 30 / 232, abs=1)
        assert float(cross.evaluate("one => parseFloat(one.style.top)")) == pytest.approx(100 * 60 / 232, abs=1)


def test_the_slider_moves_the_line_between_two_variants(visit):
    page, *_ = visit
    before = page.locator(".swipe .left").get_attribute("src")
    page.get_by_label("left", exact=True).select_option("A: bundled")
    page.get_by_label("right", exact=True).select_option("B: attention=global")
    page.locator(".swipe .titles", has_text="A: bundledB: attention=global").wait_for()
    assert page.locator(".swipe .left").get_attribute("src") != before
    slider = page.locator(".swipe input")
    slider.focus()
    page.keyboard.press("Home")
    assert "100%" in page.locator(".swipe .left").evaluate("one => one.style.clipPath")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert page.locator(".swipe .line").evaluate("one => one.style.left") == "30%"


def picture(tmp_path, name="mine.png"):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((180, 120)).save(path)
    return path


def test_an_upload_is_upsampled(visit, tmp_path):
    page, _, errors = visit
    page.locator("input[type=file]:visible").set_input_files(picture(tmp_path))
    said(page, r"mine\.png: 8 x 11 cells to 120 x 180 pixels")
    assert errors == []


def test_files_that_are_no_images_or_too_large_are_refused(visit, tmp_path):
    page, _, errors = visit
    shown = sources(gallery(page, 0))
    text = tmp_path / "notes.png"
    text.write_text("not an image <b>at all</b>")
    page.locator("input[type=file]:visible").set_input_files(text)
    assert said(page, r"^notes\.png: not an image")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(25 * 2**20)
    page.locator("input[type=file]:visible").set_input_files(large)
    assert said(page, "large") == "large.png has 25 MB; at most 20 MB are taken."
    assert sources(gallery(page, 0)) == shown
    assert errors == []


def test_an_output_that_is_too_large_is_refused(visit):
    page, *_ = visit
    size = page.get_by_label(re.compile("output, longer side"))
    size.fill("9000")
    size.press("Enter")
    page.get_by_role("button", name="Upsample", exact=True).click()
    said(page, "an output of 6000 x 9000 with 192 channels is too large")


def test_another_filler_is_chosen(visit):
    page, *_ = visit
    size = page.get_by_label(re.compile("output, longer side"))
    size.fill("90")
    size.press("Enter")
    page.get_by_label("attention").locator("visible=true").select_option("bilateral_prior")
    page.get_by_label("temperature").fill("3")
    page.get_by_label("temperature").press("Enter")
    page.get_by_role("button", name="Upsample", exact=True).click()
    assert "60 x 90 pixels" in said(page, "The weights of attention are not trained: 3 tensors")
    assert "B: attention=bilateral_prior, temperature=3" in gallery(page, 0).inner_text()


def test_a_video_plays_and_one_that_is_none_is_refused(visit, tmp_path):
    page, _, errors = visit
    page.get_by_text("Video", exact=True).click()
    film = tmp_path / "short.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((144, 108), Image.Resampling.BICUBIC)
    write_video(film, (large.crop((i, 0, 128 + i, 96)) for i in range(0, 12, 3)), 8)
    page.locator("input[type=file]:visible").set_input_files(picture(tmp_path))
    said(page, r"^mine\.png is no MP4, WebM, Matroska or AVI video")
    page.locator("input[type=file]:visible").set_input_files(film)
    said(page, r"^short\.mp4: 4 frames\.")
    page.get_by_role("button", name="Upsample the video").click()
    said(page, r"^4 frames of short\.mp4\. Change from frame to frame")
    page.wait_for_function(
        """() => {
          const find = (root) => root.querySelector("video")
            || [...root.querySelectorAll("*")].map((one) => one.shadowRoot && find(one.shadowRoot)).find(Boolean)
          const video = find(document)
          return video && video.readyState >= 2 && video.videoWidth > 300
        }"""
    )
    assert page.locator(".pictures:visible figcaption").all_inner_texts() == [
        "image",
        "frame by frame",
        "with the temporal filler",
    ]
    page.get_by_text("Help", exact=True).click()
    page.get_by_text("What this page shows").wait_for()
    assert errors == []
