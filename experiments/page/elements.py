"""The page's own elements: pictures to click, a slider between two pictures, an upload, and a line of text.

What they do in the browser is in elements.js. Text from outside is never taken for HTML.
"""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import param
from panel.custom import JSComponent

from experiments.page.engine import Pictures, to_image
from experiments.page.uploads import MAX_BYTES
from experiments.reports.style import heat

_HERE = Path(__file__).parent
_STYLES = (_HERE / "elements.css").read_text(encoding="utf-8")
_TONES = {"info": ("#eef4fb", "#0b3d70"), "warning": ("#fff4d6", "#5c4300"), "error": ("#fde8e6", "#7a1209")}


class _Element(JSComponent):
    _esm = _HERE / "elements.js"
    _stylesheets = [_STYLES]  # noqa: RUF012  Panel's way
    element = param.String()


class Gallery(_Element):
    """Pictures side by side. With `clickable`, a click on one sets `point`, which is marked on all."""

    element = param.String(default="gallery")
    pictures = param.List(doc="title, source and alt of each picture")
    scale = param.List(doc="lowest value, colours from low to high, highest value; empty: no scale")
    point = param.List(doc="row and column in the unit square; empty: none")
    clickable = param.Boolean(default=False)

    def show(self, pictures: Pictures, about: str = "", ends: tuple[str, str] | None = None) -> None:
        """Shows pictures by title; `about` is said of each to those who cannot see it; `ends` are of a scale."""
        scale = [] if ends is None else [ends[0], _colours(), ends[1]]
        self.param.update(pictures=described(pictures, about), scale=scale)


class Swipe(_Element):
    """Two pictures on top of each other, with a slider between them."""

    element = param.String(default="swipe")
    pictures = param.List(doc="as of a gallery: left and right")
    share = param.Integer(default=50, bounds=(0, 100), doc="per cent of the width that the left picture fills")


class Upload(_Element):
    """A file from the visitor's disk: gives its name and content to `take`, which may refuse it.

    Args:
        take: gets name and content. refused: gets the reason for a file that is not even sent.
    """

    element = param.String(default="upload")
    accept = param.String()
    label = param.String()
    most = param.Integer(default=MAX_BYTES)

    def __init__(self, take: Callable[[str, bytes], None], refused: Callable[[str], None], **shown: Any):
        super().__init__(**shown)
        self._take, self._refused = take, refused

    def _handle_msg(self, message: dict[str, Any]) -> None:
        name, size, data = str(message["name"]), int(message["size"]), str(message["data"])
        if size > self.most:
            self._refused(f"{name} has {size / 2**20:.0f} MB; at most {self.most >> 20} MB are taken.")
            return
        try:
            content = base64.b64decode(data, validate=True)
        except ValueError:
            self._refused(f"{name} did not arrive whole: choose it again.")
            return
        self._take(name, content)


class Message(pn.pane.HTML):
    """One line that says what happened; `tone` is info, warning or error."""

    def say(self, text: str, tone: str = "info") -> None:
        """Shows text, which is not HTML; empty: nothing."""
        back, front = _TONES[tone]
        role = "alert" if tone == "error" else "status"
        box = f"background:{back};color:{front};padding:8px 12px;border-radius:4px;font:14px system-ui,sans-serif"
        self.object = f'<div role="{role}" class="message" style="{box}">{html.escape(text)}</div>' if text else ""


def small(text: str) -> str:
    """Text as HTML: an explanation below a widget."""
    return f'<div style="font:12px system-ui,sans-serif;color:#555">{html.escape(text)}</div>'


def described(pictures: Pictures, about: str = "") -> list[dict[str, str]]:
    """Pictures as an element takes them: title, PNG as a data URI, and a text in place of the picture."""
    return [
        {"title": title, "source": data_uri(values), "alt": f"{about}{': ' if about else ''}{title}"}
        for title, values in pictures.items()
    ]


def data_uri(picture: np.ndarray) -> str:
    """(h,w,3) in [0,1] -> a PNG inside an address."""
    file = io.BytesIO()
    to_image(picture).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _colours() -> str:
    return data_uri(heat(np.linspace(0, 1, 128)[None], percentile=0))
