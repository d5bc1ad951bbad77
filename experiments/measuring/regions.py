"""Regions of an image in which fidelity is measured separately: where an upsampler gains, and where it loses.

- `thin`: structures narrower than three cells of the target grid, by a morphological top-hat of the grey image;
- `flat`: the half of the grid where the grey image varies least, within a Gaussian of one cell;
- `decile_1` to `decile_10`: the positions by how uncertain the low-resolution features are (`core.uncertainty.rarity`,
  enlarged bilinearly). That order knows no upsampler and no target, so it is the same for all arms.

Edges are measured always (`experiments.measuring.metrics.image_edges`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.uncertainty import rarity

DECILES = tuple(f"decile_{k}" for k in range(1, 11))
REGIONS = ("thin", "flat", *DECILES)
_THIN_SHARE = 0.1
_ROUNDING = 1e-12
"""Variances of grey values in [0,1] up to this are rounding errors."""
_FOOTPRINT = 3
"""Side of the top-hat's square, in cells of the target grid: what is narrower is thin."""


@torch.no_grad()
def regions_of(image: Tensor, features: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """(1,3,H,W) RGB, (1,C,h,w) low-resolution features -> each of `REGIONS`, (rows,columns) bool on the CPU.

    A region without positions is left out: `thin` and `flat` of a blank image.
    """
    from scipy.ndimage import black_tophat, gaussian_filter, white_tophat
    from skimage.color import rgb2gray

    cells = F.interpolate(image.detach().cpu().double(), size, mode="area")[0]  # (3,rows,columns)
    grey = rgb2gray(cells.permute(1, 2, 0).numpy())  # (rows,columns)
    square = (_FOOTPRINT, _FOOTPRINT)
    narrow = torch.from_numpy(white_tophat(grey, square, mode="nearest") + black_tophat(grey, square, mode="nearest"))
    mean, squares = (gaussian_filter(x, 1, mode="nearest") for x in (grey, grey**2))
    change = torch.from_numpy(squares - mean**2)  # local variance: a gradient would be zero along a ridge
    change = change.clamp(min=_ROUNDING)
    found = {"thin": narrow > narrow.quantile(1 - _THIN_SHARE), "flat": change < change.median()}
    rare = F.interpolate(rarity(features), size, mode="bilinear")[0, 0].double().cpu()
    tenths = rare.flatten().argsort(stable=True).tensor_split(len(DECILES))  # rows of positions, most certain first
    for name, positions in zip(DECILES, tenths, strict=True):
        where = torch.zeros(rare.numel(), dtype=torch.bool)
        where[positions] = True
        found[name] = where.unflatten(0, size)
    return {name: where for name, where in found.items() if where.any()}
