"""The demo page's widgets and server, without a browser: what a visitor does, and what is answered."""

import asyncio
import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from threading import Lock

import numpy as np
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

pytest.importorskip("panel", reason="needs panel: pip install -e '.[demo]'")

import param

from experiments.page import engine, image_tab, models
from experiments.page.elements import Gallery, Message, Swipe, Upload, described
from experiments.page.guard import reported
from experiments.page.image_tab import ImageTab
from experiments.page.serve import checked, page
from experiments.page.uploads import MAX_BYTES, Uploads
from experiments.page.video_tab import VideoTab
from experiments.settings import SettingError


def png(size=(96, 64)):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "png")
    return file.getvalue()


def text(message: Message) -> str:
    return re.sub(r"<[^>]*>", "", message.object or "")


def is_error(message: Message) -> bool:
    return 'role="alert"' in message.object


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path)


@pytest.fixture
def tab(uploads):
    """Small enough for a test."""
    made = ImageTab(models.Encoders([{"name": "hog8"}, {"name": "hog16"}]), ["bundled"], uploads, Lock())
    made.side.options = [48, *made.side.options]
    made.side.value = 48
    return made


@pytest.fixture
def answered(tab):
    tab.start()
    return tab


def test_the_first_answer_needs_no_click(answered):
    assert re.match(r"astronaut: 6 x 6 cells to 48 x 48 pixels in \d+\.\d s\.", text(answered.message))
    assert [one["title"] for one in answered.swipe.pictures] == ["bilinear", "A: bundled"]
    titles = [one["title"] for one in answered.similarity.pictures]
    assert titles == ["image", "before: 6 x 6", "A: bundled", "B: attention=global"]
    assert [one["title"][:2] for one in answered.attention.pictures] == ["A:", "B:"]
    assert len(answered.uncertainty.pictures) == 2
    assert answered.similarity.scale[::2] == [f"{float(end):.2f}" for end in answered.similarity.scale[::2]]
    picture = Image.open(io.BytesIO(base64.b64decode(answered.swipe.pictures[1]["source"].partition(",")[2])))
    assert picture.size == (48, 48)
    assert np.asarray(picture).std() > 20
    assert answered.run.disabled is False


def test_a_click_shows_another_pixel_in_all_pictures(answered):
    before = {gallery: gallery.pictures for gallery in (answered.similarity, answered.attention)}
    answered.similarity.point = [0.9, 0.1]
    for gallery, pictures in before.items():
        assert gallery.point == [0.9, 0.1]
        assert gallery.pictures[-1]["source"] != pictures[-1]["source"]
    answered.attention.point = [0.5, 0.5]
    assert [gallery.pictures for gallery in before] == list(before.values())


def test_the_slider_is_between_any_two(answered):
    left, right = answered.sides
    left.value, right.value = "A: bundled", "B: attention=global"
    assert [one["title"] for one in answered.swipe.pictures] == ["A: bundled", "B: attention=global"]
    answered.variants["B"].fillers["attention"].value = "bilateral_prior"
    answered.variants["B"].settings["attention"]["temperature"].value = 2.0
    answered.run.clicks += 1
    label = "B: attention=bilateral_prior, temperature=2.0"
    assert [one["title"] for one in answered.swipe.pictures] == ["A: bundled", label]
    assert "B: The weights of attention are not trained: 3 tensors" in text(answered.message)
    assert not is_error(answered.message)


def test_overlays_follow_their_settings(answered):
    first = answered.uncertainty.pictures[0]["source"]
    answered.measure.value = "entropy"
    second = answered.uncertainty.pictures[0]["source"]
    attention = answered.attention.pictures[0]["source"]
    with param.edit_constant(answered.opacity):  # as when the handle is let go
        answered.opacity.param.update(value=0.2, value_throttled=0.2)
    assert len({first, second, answered.uncertainty.pictures[0]["source"]}) == 3
    assert answered.attention.pictures[0]["source"] != attention


def test_an_upload_is_upsampled_and_a_bad_one_leaves_everything_as_it_was(answered):
    answered.upload._handle_msg({"name": "mine.png", "size": 9, "data": base64.b64encode(png()).decode()})
    assert text(answered.message).startswith("mine.png: 4 x 6 cells to 32 x 48 pixels")
    shown = answered.swipe.pictures
    bad = {
        "notes.png": (base64.b64encode(b"not an image").decode(), "notes.png: not an image"),
        "broken.png": ("?", "broken.png did not arrive whole"),
        "<b>x</b>.png": ("", "&lt;b&gt;x&lt;/b&gt;.png: not an image"),
    }
    for name, (data, message) in bad.items():
        answered.upload._handle_msg({"name": name, "size": 9, "data": data})
        assert is_error(answered.message)
        assert text(answered.message).startswith(message)
        assert answered.swipe.pictures == shown
        assert answered.name == "mine.png"
    answered.upload._handle_msg({"name": "huge.png", "size": MAX_BYTES + 2**20, "data": ""})
    assert text(answered.message) == "huge.png has 21 MB; at most 20 MB are taken."


def test_sizes_that_cannot_be_are_answered_with_a_message(answered):
    shown = answered.swipe.pictures
    answered.output_side.value = 9000
    answered.upsample()
    assert is_error(answered.message)
    assert "an output of 9000 x 9000 with 87 channels is too large" in text(answered.message)
    assert answered.swipe.pictures == shown
    assert answered.run.disabled is False
    answered.output_side.value = 30
    answered.upsample()
    assert "to 30 x 30 pixels" in text(answered.message)


def test_a_filler_that_refuses_its_settings_is_answered_with_its_message(answered):
    answered.variants["B"].fillers["attention"].value = "bilateral_prior"
    answered.variants["B"].settings["attention"]["share_at_start"].value = 2.0
    answered.upsample()
    assert is_error(answered.message)
    assert "share_at_start" in text(answered.message)


def test_a_defect_is_no_answer(tab):
    with pytest.raises(ZeroDivisionError), reported(tab.message, tab.run):
        raise ZeroDivisionError
    assert tab.run.disabled is False


def test_controls_show_what_the_checkpoint_has(uploads):
    tab = ImageTab(models.Encoders(None), ["bundled", "bundled_released"], uploads, Lock())
    controls = tab.variants["A"]
    assert controls.settings["unifier"]["ordering"].value == "paper"
    controls.checkpoint.value = "bundled_released"
    assert controls.settings["unifier"]["ordering"].value == "released"
    assert models.label(controls.variant) == "bundled_released"
    assert list(controls.fillers) == ["unifier", "attention", "decoder", "refiner"]
    for hook, select in controls.fillers.items():
        assert select.options == models.offered(hook)


def test_a_video_becomes_a_film_with_single_frames(uploads, monkeypatch):
    monkeypatch.setattr("experiments.page.clips.MAX_FRAMES", 3)
    monkeypatch.setattr("experiments.page.clips.SIDE", 64)
    tab = VideoTab(models.Encoders([{"name": "hog8"}]), ["bundled"], uploads, Lock())
    tab.run.clicks += 1
    assert re.match(
        r"3 frames of a camera over coffee\. Change .* \d.\d{3} frame by frame, \d.\d{3} with the", text(tab.message)
    )
    assert "video/mp4;base64," in tab.film.object
    assert (tab.frame.end, tab.gallery.pictures[0]["title"]) == (2, "image")
    first = tab.gallery.pictures
    tab.frame.value = 2
    assert tab.gallery.pictures != first
    film = (uploads.folder / "film.mp4").read_bytes()
    tab.upload._handle_msg({"name": "a.txt", "size": 2, "data": base64.b64encode(b"ab").decode()})
    assert text(tab.message).startswith("a.txt is no MP4")
    tab.upload._handle_msg({"name": "own.mp4", "size": 2, "data": base64.b64encode(film).decode()})
    assert text(tab.message).startswith("own.mp4: 3 frames. Press the button")
    tab.run.clicks += 1
    assert text(tab.message).startswith("3 frames of own.mp4.")


def test_elements_never_take_text_for_html():
    message = Message()
    message.say("<script>alert(1)</script>", "error")
    assert "<script>" not in message.object
    code = (ROOT / "experiments/page/elements.js").read_text()
    assert "innerHTML" not in code
    assert "http" not in code  # nothing from elsewhere
    for element in (Gallery(), Swipe(), Upload(print, print)):
        assert f"{element.element}" in code
    assert described({"a": np.zeros((2, 3, 3))}, "about")[0]["alt"] == "about: a"


def test_the_page_of_a_visitor(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTab, "start", lambda self: None)
    made = page(models.Encoders(None), ["bundled"], tmp_path, Lock())
    assert [made[1]._names[i] for i in range(3)] == ["Image", "Video", "Help"]
    assert len(list(tmp_path.iterdir())) == 1


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("demo", list(overrides))


def test_only_this_machine_is_offered_the_page_by_default():
    assert config().address == "127.0.0.1"
    encoders, checkpoints = checked(config("backbones=[{name: hog8}]"))
    assert (encoders.names, checkpoints) == (["hog8"], ["bundled", "bundled_released"])


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("port=-1", SettingError, "port must be a whole number"),
        ("checkpoints=[]", SettingError, "checkpoints is empty"),
        ("checkpoints=[missing.safetensors]", FileNotFoundError, "there is no such file"),
    ],
)
def test_settings_that_cannot_be_are_refused(override, error, message):
    with pytest.raises(error, match=message):
        checked(config(override))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The real command -> its port and its two folders."""
    folder = tmp_path_factory.mktemp("server")
    port, work, temporary = free_port(), folder / "work", folder / "tmp"
    work.mkdir()
    temporary.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    arguments = [f"port={port}", "num_threads=1", "backbones=[{name: hog8}]"]
    with (work.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.demo", *arguments], cwd=work, env=environment, stderr=log
        )
        try:
            for _ in range(3000):
                assert process.poll() is None, (work.parent / "log").read_text()
                if f"Open http://127.0.0.1:{port}" in (work.parent / "log").read_text():
                    break
                time.sleep(0.1)
            yield port, work, temporary
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    assert list(temporary.glob("anyup-demo-*")) == []  # nothing stays


def test_the_command_serves_the_page_and_writes_nothing_elsewhere(server):
    port, work, temporary = server
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        html = answer.read().decode()
    assert "AnyUp Lab" in html
    assert re.findall(r'(?:src|href)="(?:https?:)?//[^"]*"', html) == []  # no content delivery network
    assert list(work.iterdir()) == []
    assert [path.name[:11] for path in temporary.iterdir()] == ["anyup-demo-"]


def test_another_site_cannot_use_the_page(server):
    """A browser says in `Origin` which site's code asks for the connection."""
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    port, *_ = server
    request = HTTPRequest(f"ws://127.0.0.1:{port}/ws", headers={"Origin": "http://elsewhere.example"})

    async def connect():
        with pytest.raises(HTTPClientError, match="403"):
            await websocket_connect(request)

    asyncio.run(connect())


def test_settings_are_the_ones_that_are_read():
    """`num_threads` is read by the command, the others by `serve`."""
    code = "".join((ROOT / name).read_text() for name in ("experiments/page/serve.py", "experiments/demo.py"))
    keys = {key for key in OmegaConf.to_container(config(), resolve=False) if key != "hydra"}
    assert {key for key in keys if f"config.{key}" in code} == keys
    assert image_tab.FIRST_SIDE in image_tab.IMAGE_SIDES
    assert engine.MEASURES[0] == "rarity"
