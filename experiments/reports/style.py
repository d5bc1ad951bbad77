"""How figures and maps look, in notebooks, reports and docs alike.

Colours are Okabe and Ito's (2008), which people tell apart whatever their colour vision. Colour maps have an evenly
rising brightness. Fonts stay legible when a page shows a figure as wide as its text.
"""

import io
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
from cycler import cycler
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from PIL import Image

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"
)  # fmt: skip
GREY = "#A0A0A0"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
"""Of lines, in this order. Yellow is left out: it is too pale for lines on white."""
LINES = ("-", "--", ":", "-.")
SEQUENTIAL, DIVERGING = "inferno", "PuOr"
"""Colour maps: for values from low to high, and for values around zero."""
WIDTH = 9.5
"""Largest width of a figure in inches: wider ones are shrunk on a page until their text is too small."""
_DPI = 120
_SETTINGS = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "font.size": 11,
    "grid.alpha": 0.3,
    "image.cmap": SEQUENTIAL,
    "legend.fontsize": 10,
    "legend.framealpha": 0.6,
    "lines.linewidth": 1.8,
}
_P, _R = ParamSpec("_P"), TypeVar("_R")


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator of a function that draws a figure: what it draws has this style, and nothing else changes."""

    @wraps(draw)
    def within(*args: _P.args, **settings: _P.kwargs) -> _R:
        with rc_context(_SETTINGS):
            return draw(*args, **settings)

    return within


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, at most `WIDTH` wide."""
    return Figure(figsize=(min(width, WIDTH), height), layout="constrained", dpi=_DPI)


def colour(number: int) -> str:
    """The colour of line `number`, counted from 0; after the last comes the first."""
    return PALETTE[number % len(PALETTE)]


def picture(figure: Figure) -> Image.Image:
    """The figure as a picture, which a notebook shows."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def heat(values: np.ndarray, percentile: float = 1.0, limits: tuple[float, float] | None = None) -> np.ndarray:
    """(h,w) -> (h,w,3) RGB in [0,1]; the range leaves out `percentile` per cent of the values at either end.

    `limits` gives the range instead, so that several maps share it. A map that is the same everywhere is dark.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"expected finite values of shape (h,w), got {values.shape}")
    low, high = np.percentile(values, (percentile, 100 - percentile)) if limits is None else limits
    share = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    return colormaps[SEQUENTIAL](share)[..., :3]
