"""Procedural surfaces: fractal noise and patterns, which fade out where a pixel covers a whole period.

Solid noise after Perlin, "An Image Synthesizer", SIGGRAPH 1985. The lattice holds several octaves at once, so two
look-ups replace six.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from experiments.data.scenes.geometry import Vector

_SIDE = 64


@dataclass(frozen=True)
class Material:
    """How a surface looks; colours are linear RGB."""

    pattern: str
    """A key of `PATTERNS`."""
    colours: tuple[Vector, Vector]
    period: float
    """Of the pattern, in metres."""
    mottle: float
    """Strength of irregular brightness."""
    gloss: float
    """Strength of the highlight."""
    offset: Vector
    """Of its noise."""


@cache
def _lattice() -> np.ndarray:
    """(_SIDE³,) float32 periodic noise with amplitude falling as frequency^-1.9 (in three dimensions), about N(0,1)."""
    frequency = np.fft.fftfreq(_SIDE)
    squared = sum(np.square(np.meshgrid(frequency, frequency, frequency, indexing="ij")))
    squared[0, 0, 0] = np.inf
    spectrum = np.fft.fftn(np.random.default_rng(0).standard_normal((_SIDE,) * 3)) * squared**-0.95
    values = np.fft.ifftn(spectrum).real
    return (values / values.std()).astype(np.float32).ravel()


def noise(points: np.ndarray) -> np.ndarray:
    """(N,) smooth noise at points (3,N), of mean 0 and deviation about 1, repeating every 64 along each axis."""
    lattice = _lattice()
    corner = np.floor(points)
    x, y, z = points - corner
    low = corner.astype(np.int32) & (_SIDE - 1)
    high = (low + 1) & (_SIDE - 1)
    total = np.zeros_like(x)
    for i, wx in ((low[0], 1 - x), (high[0], x)):
        for j, wy in ((low[1], 1 - y), (high[1], y)):
            row = (i * _SIDE + j) * _SIDE
            a, b = lattice.take(row + low[2]), lattice.take(row + high[2])
            total += wx * wy * (a + z * (b - a))
    return total


def _step(x: np.ndarray, blur: np.ndarray) -> np.ndarray:
    """0 below, 1 above zero, over `blur` (both in periods)."""
    return np.clip(x / blur + 0.5, 0, 1)


def _wave(x: np.ndarray, share: float, blur: np.ndarray) -> np.ndarray:
    """1 over `share` of every period."""
    return _step(share / 2 - np.abs(x - np.floor(x) - 0.5), blur)


def _plain(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.25 * rough, 0, 1)


def _stripes(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return _wave(uv[0], 0.5, blur)


def _bands(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return _wave(uv[1], 0.5, blur)


def _checker(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    a, b = _wave(uv[0] / 2, 0.5, blur / 2), _wave(uv[1] / 2, 0.5, blur / 2)
    return a + b - 2 * a * b


def _tiles(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return _wave(uv[0], 0.94, blur) * _wave(uv[1], 0.94, blur)


def _bricks(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    row = np.floor(3 * uv[1])
    along = uv[0] + 0.5 * (row % 2)
    tint = np.sin(57.0 * row + 31.0 * np.floor(along))  # each brick has its own
    return _wave(along, 0.94, blur) * _wave(3 * uv[1], 0.85, 3 * blur) * (0.85 + 0.15 * tint)


def _planks(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    grain = 0.5 + 0.5 * np.sin(9 * uv[0] + 0.6 * uv[1] + 3 * rough + 17.0 * np.floor(uv[0]))
    return _wave(uv[0], 0.96, blur) * (0.35 + 0.65 * grain)


def _wood(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(12 * uv[0] + 1.5 * uv[1] + 2.5 * rough)


def _marble(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return 1 - np.abs(np.sin(2 * uv[0] + uv[1] + 2 * rough)) ** 0.7


def _dots(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    u, v = uv - np.floor(uv) - 0.5
    return _step(0.3 - np.sqrt(u * u + v * v), blur)


def _leaves(uv: np.ndarray, rough: np.ndarray, blur: np.ndarray) -> np.ndarray:
    return _step(rough, np.maximum(blur, 0.6))


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "stripes": _stripes,
    "bands": _bands,
    "checker": _checker,
    "tiles": _tiles,
    "bricks": _bricks,
    "planks": _planks,
    "wood": _wood,
    "marble": _marble,
    "dots": _dots,
    "leaves": _leaves,
}
"""(2,N) surface coordinates in periods, (N,) noise, (N,) size of a pixel in periods -> (N,) share of the 2nd colour."""


def albedo(material: Material, points: np.ndarray, uv: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """(3,N) linear RGB of a surface.

    `points` (3,N) are in the part's own frame, `uv` (2,N) along its surface, and `footprint` (N,) is what a pixel
    covers there, all in metres.
    """
    period = material.period
    offset = np.array(material.offset, points.dtype)[:, None]
    coarse = noise(points * (4 / period) + offset)
    fine = noise(points * 23.0 + offset[::-1]) / (1 + 23.0 * footprint)
    blur = footprint / period
    share = PATTERNS[material.pattern](uv / period, coarse, np.maximum(blur, 0.02))
    keep = np.clip(1.5 - 1.5 * blur, 0, 1)  # larger pixels show the mean
    share = 0.5 + keep * (share - 0.5)
    first, second = (np.array(colour, points.dtype)[:, None] for colour in material.colours)
    brightness = np.exp(material.mottle * (0.6 * keep * coarse + 1.3 * fine))
    return (first + share * (second - first)) * brightness
