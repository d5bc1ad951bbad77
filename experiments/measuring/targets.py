"""Targets of fidelity: features of high-resolution crops, averaged where the crops overlap.

The features of one crop depend on what else the crop happens to show, so a single crop is a noisy target. The mean
over many overlapping crops is a better one, and two means over disjoint halves of the crops tell how good: their
agreement is what no upsampler can be expected to pass (docs/evidence.md).

Crops have `view` pixels. Their corners lie on the fine grid of scale·h x scale·w cells, `step` cells apart.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from core.backbones import Backbone
from core.streams import generator
from experiments.data.feature_cache import fingerprint
from experiments.data.source_digest import file_digest
from experiments.settings import SettingError

_AT_ONCE = 16


@dataclass(frozen=True)
class CropSettings:
    """Which crops a target is the mean of.

    Args:
        step: cells of the fine grid between the corners of neighbouring crops; None: crops side by side, one for each
            cell.
        most: at most so many crops; more are thinned out at random, and every cell keeps one. None: all.

    Raises:
        SettingError: a value out of its range.
    """

    step: int | None = 2
    most: int | None = 256

    def __post_init__(self):
        for name, value in (("crop_step", self.step), ("num_crops", self.most)):
            if value is not None and (type(value) is not int or value < 1):
                raise SettingError(f"{name} must be null or a whole number from 1, got {value}")


AVERAGED = CropSettings()

Corner = tuple[int, int]
"""(row, column) of a crop, in cells of the fine grid."""


@lru_cache(64)
def crop_corners(grid: tuple[int, int], scale: int, settings: CropSettings) -> tuple[tuple[Corner, ...], ...]:
    """The corners of the crops in two halves, which alternate over the image like the fields of a chessboard.

    Args:
        grid: (h,w) features of one crop. scale: s; the fine grid has (s·h,s·w) cells.
    """
    axes = [_offsets(cells, scale, settings.step) for cells in grid]
    fields = [(i, j) for i in range(len(axes[0])) for j in range(len(axes[1]))]
    if settings.most is not None and len(fields) > settings.most:
        needed = [{axis.index(at) for at in _covering(axis, cells)} for axis, cells in zip(axes, grid, strict=True)]
        kept = [(i, j) for i, j in fields if i in needed[0] and j in needed[1]]
        rest = [field for field in fields if field not in set(kept)]
        order = torch.randperm(len(rest), generator=generator("crops of a target", grid, scale, settings.step))
        fields = sorted(kept + [rest[k] for k in order[: max(0, settings.most - len(kept))].tolist()])
    return tuple(tuple((axes[0][i], axes[1][j]) for i, j in fields if (i + j) % 2 == half) for half in (0, 1))


def crop_counts(grid: tuple[int, int], scale: int, settings: CropSettings) -> Tensor:
    """(2,s·h,s·w) float32: how many crops of each half show each cell."""
    counts = torch.zeros(2, scale * grid[0], scale * grid[1])
    for half, corners in enumerate(crop_corners(grid, scale, settings)):
        for row, column in corners:
            counts[half, row : row + grid[0], column : column + grid[1]] += 1
    return counts


class HalfTarget(nn.Module):
    """The mean over one half of the crops, called like a backbone, so that a `FeatureCache` keeps what it gives.

    Args:
        backbone: frozen encoder. grid: (h,w) of its features of `view` x `view` pixels.
        scale: the image has scale·view pixels on each side. half: 0 or 1.
    """

    def __init__(
        self, backbone: Backbone, grid: tuple[int, int], scale: int, view: int, settings: CropSettings, half: int
    ):
        super().__init__()
        self.backbone, self.grid, self.scale, self.view = backbone, tuple(grid), scale, view
        self.settings, self.half, self.name = settings, half, backbone.name

    def fingerprint(self) -> str:
        """Digest of all that the target depends on besides the image."""
        made_of = [fingerprint(self.backbone), self.grid, self.scale, self.view, self.settings, self.half, _code()]
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def forward(self, rgb: Tensor) -> Tensor:
        """(1,3,s·v,s·v) RGB in [0,1] -> (1,C,s·h,s·w) float32; 0 in cells that no crop of this half shows."""
        corners = crop_corners(self.grid, self.scale, self.settings)[self.half]
        total = None
        for first in range(0, len(corners), _AT_ONCE):
            some = corners[first : first + _AT_ONCE]
            features = self.backbone(torch.cat([self._crop(rgb, corner) for corner in some])).float()  # (n,C,h,w)
            if total is None:
                total = features.new_zeros(features.shape[1], *(self.scale * cells for cells in self.grid))
            for (row, column), one in zip(some, features, strict=True):
                total[:, row : row + self.grid[0], column : column + self.grid[1]] += one
        counts = crop_counts(self.grid, self.scale, self.settings)[self.half].to(total.device)
        return (total / counts.clamp(min=1))[None]

    def _crop(self, rgb: Tensor, corner: Corner) -> Tensor:
        """(1,3,v,v); a cell need not be a whole number of pixels."""
        top, left = (round(at * self.view / cells) for at, cells in zip(corner, self.grid, strict=True))
        return rgb[..., top : top + self.view, left : left + self.view]


def mean_of_halves(halves: Sequence[Tensor], counts: Tensor) -> Tensor:
    """One or two (B,C,s·h,s·w) half targets and (2,s·h,s·w) counts -> (B,C,s·h,s·w) mean over all crops."""
    counts = counts.to(halves[0].device)
    return sum(half * count for half, count in zip(halves, counts, strict=False)) / counts.sum(0)


def half_targets(
    backbone: Backbone, grid: tuple[int, int], scale: int, view: int, settings: CropSettings
) -> tuple[HalfTarget, ...]:
    """The halves that have crops: one or two."""
    found = crop_corners(tuple(grid), scale, settings)
    return tuple(HalfTarget(backbone, grid, scale, view, settings, half) for half in (0, 1) if found[half])


@cache
def _code() -> str:
    return file_digest(Path(__file__))


def _offsets(cells: int, scale: int, step: int | None) -> list[int]:
    """Where crops of `cells` begin along an axis of scale·cells; never so far apart that a cell is left out."""
    last = (scale - 1) * cells
    return sorted({*range(0, last, min(step or cells, cells)), last})


def _covering(offsets: list[int], cells: int) -> list[int]:
    """Some of the offsets, as far apart as may be."""
    chosen = [offsets[0]]
    while chosen[-1] < offsets[-1]:
        chosen.append(max(at for at in offsets if at <= chosen[-1] + cells))
    return chosen
