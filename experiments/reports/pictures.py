"""Pictures of features: one PCA for everything compared, so that equal colours mean equal features.

Pure functions, for notebooks and for the command line::

    colours = fit_colours([features, output])
    panel({"image": rgb, "low-res": colours.paint(features), "AnyUp": colours.paint(output)})
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from core.streams import named_stream

_FIT_SIDE = 64
"""Every column is sampled at this many rows and columns to fit the colours."""
_BAND_VALUES = 2**24
"""Values projected at once, so that `paint` needs about 150 MB on top of its input, whatever the size."""
_MARGIN, _TITLE, _FONT = 10, 26, 16
"""Layout of a panel in pixels, where it is at most `_PAGE` wide; text on wider ones is larger in proportion."""
_PAGE = 1200
_MOST_ACROSS = 5
_STRETCHED = 1.4
"""A picture is stretched by so much to cover the others' shape (grids are rounded); beyond it keeps its own."""


@dataclass(frozen=True)
class Colours:
    """A fixed affine map from feature vectors to RGB."""

    mean: Tensor
    """(C,)"""
    components: Tensor
    """(3,C) directions, strongest first; where there are fewer than three, the last is repeated."""
    low: Tensor
    """(3,) projected value that is shown as 0."""
    high: Tensor
    """(3,) projected value that is shown as 1."""

    def paint(self, features: Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
        """(C,h,w) or (1,C,h,w) features of any real dtype on any device -> (h,w,3) float32 RGB in [0,1].

        With `size` (rows, columns), the features are enlarged bilinearly first. Projection commutes with interpolation,
        so only three channels are enlarged.
        """
        features = _one(features)
        rows = max(1, _BAND_VALUES // (features.shape[0] * features.shape[2]))
        projected = torch.cat([self._project(band) for band in features.split(rows, dim=1)], dim=1)  # (3,h,w)
        if size is not None:
            projected = F.interpolate(projected[None], size, mode="bilinear")[0]  # (3,*size)
        low, high = self.low[:, None, None], self.high[:, None, None]
        return ((projected - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).numpy()  # (h,w,3)

    def _project(self, features: Tensor) -> Tensor:
        vectors = features.flatten(1).cpu().float() - self.mean[:, None]  # (C,h·w)
        return (self.components @ vectors).unflatten(1, features.shape[1:])  # (3,h,w)


def fit_colours(columns: Sequence[Tensor], percentile: float = 1.0) -> Colours:
    """Fits one PCA, and one range per component, to all `columns`: each (C,h,w) or (1,C,h,w), of any h and w.

    Every column has the same weight, whatever its size. The range leaves out `percentile` per cent of the samples at
    either end, so that a few outliers do not make the rest grey.

    Raises:
        ValueError: no columns, columns of different width C, or values that are not finite.
    """
    samples = [_sample(_one(column)) for column in columns]
    widths = {sample.shape[1] for sample in samples}
    if len(widths) != 1:
        raise ValueError(f"common colours need equal numbers of channels, got {sorted(widths) or 'none'}")
    vectors = torch.cat(samples).double()  # (columns·64·64,C)
    if not torch.isfinite(vectors).all():
        raise ValueError("some features are not finite, so no colours can be fitted to them")
    mean = vectors.mean(0)
    with named_stream(0, "colours"):  # the method draws random directions
        axes = torch.pca_lowrank(vectors - mean, q=min(6, *widths), center=False, niter=4)[2].T  # (q,C)
    components = axes[[min(i, len(axes) - 1) for i in range(3)]]  # (3,C)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # (3,1)
    components = components * largest.sign()  # an axis has no direction of its own: choose one
    bounds = torch.tensor([percentile, 100 - percentile], dtype=torch.float64) / 100
    low, high = torch.quantile((vectors - mean) @ components.T, bounds, dim=0)  # (3,), (3,)
    constant = high - low <= 1e-6 * vectors.abs().max()
    middle = (low + high) / 2
    low, high = torch.where(constant, middle - 1, low), torch.where(constant, middle + 1, high)  # shown as grey
    return Colours(mean.float(), components.float(), low.float(), high.float())


def panel(columns: Mapping[str, np.ndarray | Tensor], across: int | None = None) -> Image.Image:
    """Pictures side by side, `across` in a row, each under its title.

    By default at most five are in a row, and wide pictures are one above the other.

    Each is (h,w,3), or an image tensor (3,H,W) or (1,3,H,W), with values in [0,1]. All are shown at the size of the
    largest, within 224 to 1024 pixels; one of quite another shape keeps it. Smaller ones are enlarged without
    smoothing, so that their resolution is visible.
    """
    pictures = {title: _pixels(values) for title, values in columns.items()}
    height, width = max((picture.shape[:2] for picture in pictures.values()), key=lambda size: size[0] * size[1])
    scale = min(max(1.0, 224 / max(height, width)), 1024 / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    if across is None:
        across = -(-len(pictures) // -(-len(pictures) // _MOST_ACROSS)) if width <= 2 * height else 1
    down = -(-len(pictures) // across)
    size = across * (width + _MARGIN) + _MARGIN
    title_height, font_size = (round(part * max(1, size / _PAGE)) for part in (_TITLE, _FONT))
    sheet = Image.new("RGB", (size, down * (height + title_height + _MARGIN) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(font_size)
    for i, (title, picture) in enumerate(pictures.items()):
        left = _MARGIN + (i % across) * (width + _MARGIN)
        top = _MARGIN + (i // across) * (height + title_height + _MARGIN)
        draw.text((left, top), title, fill=(40, 40, 40), font=font)
        filter_ = Image.Resampling.NEAREST if picture.shape[0] <= height else Image.Resampling.BOX
        size = _fitted(picture.shape[1], picture.shape[0], width, height)
        sheet.paste(Image.fromarray(picture).resize(size, filter_), (left, top + title_height))
    return sheet


def _fitted(width: int, height: int, most_width: int, most_height: int) -> tuple[int, int]:
    """Size at which a picture is shown: all of the room, or as much of it as its shape allows."""
    stretch = width * most_height / (height * most_width)
    if 1 / _STRETCHED <= stretch <= _STRETCHED:
        return most_width, most_height
    return max(1, round(most_width * min(1, stretch))), max(1, round(most_height / max(1, stretch)))


def _one(features: Tensor) -> Tensor:
    if features.dim() == 4 and features.shape[0] == 1:
        features = features[0]
    if features.dim() != 3:
        raise ValueError(f"expected the features of one image, (C,h,w) or (1,C,h,w), got {tuple(features.shape)}")
    return features.detach()


def _sample(features: Tensor) -> Tensor:
    """(C,h,w) -> (64·64,C) float32 on the CPU, reading no more than it returns."""
    rows, columns = (((torch.arange(_FIT_SIDE) + 0.5) * n / _FIT_SIDE).long() for n in features.shape[1:])
    picked = features[:, rows.to(features.device)[:, None], columns.to(features.device)]  # (C,64,64)
    return picked.flatten(1).T.cpu().float()  # (64·64,C)


def _pixels(values: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = _one(values).permute(1, 2, 0).cpu().float().numpy()  # (h,w,3)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"expected a picture of shape (h,w,3), got {values.shape}")
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
