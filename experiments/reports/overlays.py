"""What a model makes of one point of an image: similarity to it, the window, and where attention looks.

Points are (row, column) in the unit square, as for `AnyUp.query`. All functions return pictures for `panel`::

    maps = similarity_maps({"low-res": features, "AnyUp": output}, (0.6, 0.4), rgb.shape[-2:])
    seen = attention_overlay(rgb, model.attention_weights(image, features, torch.tensor([[0.6, 0.4]]))[0, 0])
    panel({"image": marked(rgb, (0.6, 0.4)), "attention": seen} | maps)
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from core.fast.windows import window_bounds
from experiments.reports.style import heat

Point = tuple[float, float]

_OPACITY = 0.75


def similarity(features: Tensor, point: Point, mean: Tensor | None = None) -> Tensor:
    """(1,C,h,w) -> (h,w): cosine between each vector and the one at the point, both without the mean vector.

    Args:
        mean: (1,C,1,1), to be taken off; None: the features' own.
    """
    mean = features.mean((2, 3), keepdim=True) if mean is None else mean
    unit = F.normalize((features - mean).float(), dim=1)[0]  # (C,h,w)
    row, column = (min(int(at * n), n - 1) for at, n in zip(point, unit.shape[1:], strict=True))
    return torch.einsum("chw,c->hw", unit, unit[:, row, column])


def similarity_maps(columns: Mapping[str, Tensor], point: Point, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Title -> similarity to the point, (*size,3) RGB: dark at 0 and below, light at 1, in all maps alike.

    The mean vector of the first column is taken off all. The point is marked.
    """
    mean = next(iter(columns.values())).mean((2, 3), keepdim=True)
    maps = {title: similarity(features, point, mean).cpu() for title, features in columns.items()}
    grown = {title: F.interpolate(one[None, None], size, mode="nearest-exact")[0, 0] for title, one in maps.items()}
    return {title: marked(heat(one.numpy(), limits=(0.0, 1.0)), point) for title, one in grown.items()}


def marked(picture: Tensor | np.ndarray, point: Point) -> np.ndarray:
    """(1,3,H,W) or (H,W,3) in [0,1] -> (H,W,3) with a ring around the point, visible on light and dark."""
    pixels = _pixels(picture)
    height, width = pixels.shape[:2]
    row, column = point[0] * height, point[1] * width
    sheet = Image.fromarray((pixels * 255).round().astype(np.uint8))
    draw, radius = ImageDraw.Draw(sheet), max(3.0, max(height, width) / 40)
    for grown, colour in ((1.5, "black"), (0.0, "white")):
        box = (column - radius - grown, row - radius - grown, column + radius + grown, row + radius + grown)
        draw.ellipse(box, outline=colour, width=2 if colour == "white" else 4)
    return np.asarray(sheet, dtype=np.float32) / 255


def window_overlay(image: Tensor, point: Point, window_ratio: float, grid: tuple[int, int]) -> np.ndarray:
    """(1,3,H,W) in [0,1] -> (H,W,3): darkened where the point's query sees no cell, with lines between the cells.

    Args:
        window_ratio: as for `attention=window`. grid: (h,w) of the features.
    """
    pixels = _pixels(image)
    seen = np.ix_(*(_seen(at, n, cells, window_ratio) for at, n, cells in zip(point, pixels.shape, grid, strict=False)))
    shade = np.full(pixels.shape[:2], 0.3, np.float32)
    shade[seen] = 1
    return marked(_with_cells(pixels * shade[..., None], grid), point)


def attention_overlay(image: Tensor, weights: Tensor, point: Point | None = None) -> np.ndarray:
    """(1,3,H,W) in [0,1], (h,w) weights of the cells -> (H,W,3): the image in grey, under the weights as colours.

    The largest weight is lightest, 0 is dark. The point is marked, if given.
    """
    pixels = _pixels(image)
    share = (weights / weights.max()).float().cpu()[None, None]
    share = F.interpolate(share, pixels.shape[:2], mode="nearest-exact")[0, 0].numpy()
    grey = pixels.mean(2, keepdims=True)
    mixed = (1 - _OPACITY) * grey + _OPACITY * heat(share, limits=(0.0, 1.0))
    return mixed.astype(np.float32) if point is None else marked(mixed, point)


def _pixels(picture: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(picture, Tensor):
        picture = picture[0].permute(1, 2, 0).cpu().float().numpy()  # (H,W,3)
    return np.clip(picture, 0, 1).astype(np.float32)


def _seen(at: float, pixels: int, cells: int, window_ratio: float) -> np.ndarray:
    """Pixels, along one axis, of the cells that the query of the pixel at that place sees."""
    first, last = window_bounds(pixels, cells, window_ratio)
    query = min(int(at * pixels), pixels - 1)
    cell = np.arange(pixels) * cells // pixels
    return np.flatnonzero((cell >= first[query]) & (cell < last[query]))


def _with_cells(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    lined = pixels.copy()
    for axis, cells in enumerate(grid):
        edges = (np.arange(1, cells) * pixels.shape[axis] / cells).round().astype(int)
        index = (edges,) if axis == 0 else (slice(None), edges)
        lined[index] = 0.7 * lined[index] + 0.3
    return lined
