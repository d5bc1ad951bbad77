"""Detail: what a fine grid of features shows beyond a coarse grid, `d(x) = x - bilinear(area_down(x))`.

Measured by `experiments/measuring/detail.py`, trained for by `extensions/detail.py`.
"""

import torch.nn.functional as F
from torch import Tensor


def detail(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B,C,H,W) -> (B,C,H,W): x without what a grid of (h,w) cells carries.

    Raises:
        ValueError: the grid is not coarser than x.
    """
    if any(cells >= side for cells, side in zip(grid, x.shape[-2:], strict=True)):
        raise ValueError(f"the coarse grid {tuple(grid)} must have fewer cells than the features {tuple(x.shape[-2:])}")
    return x - _carried(x, grid)


def octaves(x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The detail of (B,C,H,W) in bands of one octave, coarse to fine, which add up to `detail`: "1x-2x", "2x-4x", ...

    Band k is what a grid of 2^(k+1) times as many cells along each axis carries and one of 2^k times as many does not
    (a Laplacian pyramid, Burt and Adelson 1983, from area averages). The last one ends at the resolution of x.
    """
    bands, factor, below = {}, 1, _carried(x, grid)
    while any(2 * factor * cells < side for cells, side in zip(grid, x.shape[-2:], strict=True)):
        above = _carried(x, (2 * factor * grid[0], 2 * factor * grid[1]))
        bands[f"{factor}x-{2 * factor}x"] = above - below
        factor, below = 2 * factor, above
    return bands | {f"{factor}x-{2 * factor}x": x - below}


def _carried(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a grid carries of (B,C,H,W): area averages, enlarged bilinearly."""
    return F.interpolate(F.interpolate(x, grid, mode="area"), x.shape[-2:], mode="bilinear", align_corners=False)
