"""Weighted sums over near neighbours, with weights of its own for each position, as products of small matrices.

Positions are taken in square tiles. What a tile sees is gathered once, not once for each neighbour, and neighbours are
places in it. Taken neighbour by neighbour, the same sums read and write the whole output every time.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from core.fast.norm_act_conv import without_autocast


def tiles(x: Tensor, side: int) -> Iterator[Tensor]:
    """(B,c,H,W) -> (B,n,c,side²) of each row of tiles; beyond the last row and column are zeros."""
    bottom, right = (-length % side for length in x.shape[-2:])
    return _rows(F.pad(x, (0, right, 0, bottom)), side, side)


def seen_by_tiles(x: Tensor, side: int, reach: int, mode: str) -> Iterator[Tensor]:
    """(B,c,H,W) -> (B,n,c,(side + 2 reach)²) of each row of tiles; beyond the border x is continued by `mode`."""
    bottom, right = (-length % side for length in x.shape[-2:])
    padded = F.pad(F.pad(x, (reach,) * 4, mode=mode), (0, right, 0, bottom))
    return _rows(padded, side + 2 * reach, side)


def untiled(rows: Iterable[Tensor], side: int, size: tuple[int, int]) -> Tensor:
    """Rows of tiles, (B,n,c,side²) each -> (B,c,*size)."""
    bands = [row.unflatten(3, (side, side)).permute(0, 2, 3, 1, 4).flatten(3) for row in rows]  # (B,c,side,n·side)
    return torch.cat(bands, 2)[:, :, : size[0], : size[1]]


def places(offsets: Sequence[tuple[int, int]], side: int, reach: int, scale: int, device: torch.device) -> Tensor:
    """((scale·side)²,k) int64: where the neighbours of a tile's positions are in what the tile sees.

    The tile has side x side cells, each with scale x scale positions; neighbours are cells, `offsets` (rows, columns)
    away from a position's own, at most `reach`.
    """
    away = torch.tensor(offsets, device=device) + reach  # (k,2)
    own = torch.arange(scale * side, device=device) // scale
    rows, columns = (own[:, None] + away[:, axis] for axis in (0, 1))  # (scale·side,k)
    return (rows[:, None] * (side + 2 * reach) + columns[None]).flatten(0, 1)


def weighted_sums(weights: Tensor, values: Tensor, offsets: Sequence[tuple[int, int]], side: int, mode: str) -> Tensor:
    """The weighted sum of each position's neighbours.

    Args:
        weights: (B,k,s·h,s·w), s a whole number. values: (B,c,h,w).
        offsets: (rows, columns) of the k neighbours from the cell of `values` that a position lies in.
        side: rows and columns of `values` in a tile. mode: as for `seen_by_tiles`.

    Returns:
        (B,c,s·h,s·w), of the dtype of `values`.
    """
    size, reach = tuple(weights.shape[-2:]), max(abs(n) for offset in offsets for n in offset)
    scale = size[0] // values.shape[2]
    finer, near_places = scale * side, places(offsets, side, reach, scale, values.device)

    def sums() -> Iterator[Tensor]:
        for own, near in zip(tiles(weights, finer), seen_by_tiles(values, side, reach, mode), strict=True):
            blank = near.new_zeros(*own.shape[:2], len(near_places), near.shape[3])
            index = near_places.expand(*own.shape[:2], -1, -1)
            yield near @ blank.scatter(3, index, own.mT.to(near.dtype)).mT  # (B,n,c,(s·side)²)

    with without_autocast(values):  # which takes a sum for a layer's product
        return untiled(sums(), finer, size)


def _rows(x: Tensor, seen: int, step: int) -> Iterator[Tensor]:
    """(B,c,H,W) -> (B,n,c,seen²) of each row of windows, `step` apart."""
    windows = x.unfold(2, seen, step).unfold(3, seen, step)  # (B,c,m,n,seen,seen)
    return (row.permute(0, 2, 1, 3, 4).flatten(3) for row in windows.unbind(2))
