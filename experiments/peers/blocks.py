"""Which output positions lie in one low-resolution cell, and which window of cells they see: block attention's indices.

All positions of a cell see the same cells. So their attention is a product of small matrices, and memory never holds a
window for each position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """One axis: m blocks, the cells with at least one output position, in order."""

    windows: Tensor
    """(m,k) int64: the cells that each block sees."""
    members: Tensor
    """(m,n) int64: its output positions; a block with fewer than n repeats its last."""
    slots: Tensor
    """(outputs,) int64: the place of each output position in `members`, counted row by row."""
    counts: list[int]
    """Of each block's positions; they follow each other."""
    cells: Tensor
    """(outputs,) int64: the cell that each position lies in."""
    places: Tensor
    """(outputs,) float64: the positions in units of cells; the centre of cell j is at j."""

    @property
    def is_even(self) -> bool:
        """Whether all blocks have as many positions, so that `slots` are in order."""
        return self.members.numel() == len(self.slots)

    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Of each block its positions, and (k,) the cells that it sees."""
        start = 0
        for count, window in zip(self.counts, self.windows, strict=True):
            yield slice(start, start + count), window
            start += count


def blocks(length: int, outputs: int, window: int, device: torch.device | str = "cpu") -> Blocks:
    """The blocks along one axis of `length` cells and `outputs` positions.

    A position belongs to the cell that contains its centre. A block sees the `window` cells around its own; at a border
    the window is moved inside, not cut; an axis with fewer cells is seen as a whole.
    """
    cells = (torch.arange(outputs) * 2 + 1) * length // (2 * outputs)  # (outputs,), exact, in order
    occupied, block, counts = cells.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts  # (m,)
    within = torch.arange(outputs) - first[block]  # (outputs,)
    most, seen = int(counts.max()), min(window, length)
    members = first[:, None] + torch.minimum(torch.arange(most), counts[:, None] - 1)  # (m,n)
    start = (occupied - seen // 2).clamp(0, length - seen)
    windows = start[:, None] + torch.arange(seen)  # (m,k)
    places = (torch.arange(outputs, dtype=torch.float64) + 0.5) * length / outputs - 0.5
    found = (windows, members, block * most + within, counts.tolist(), cells, places)
    return Blocks(*(one.to(device) if isinstance(one, Tensor) else one for one in found))


def grouped(band: Tensor, columns: Blocks) -> Tensor:
    """(B,c,n,outputs), the positions of one row of blocks -> (B,m,c,n·n'): those of each block."""
    parts = band.unflatten(3, columns.members.shape) if columns.is_even else band[..., columns.members]
    return parts.permute(0, 3, 1, 2, 4).flatten(3)


def seen(values: Tensor, rows: Tensor, columns: Blocks) -> Tensor:
    """(B,c,h,w), (k,) rows of cells -> (B,m,k·k',c): what each block of one row of blocks sees."""
    return values[:, :, rows][..., columns.windows].permute(0, 3, 2, 4, 1).flatten(2, 3)


def write_means(band: Tensor, weights: Tensor, values: Tensor, columns: Blocks) -> None:
    """Writes one row of blocks of the output, the view `band`: (B,m,n·n',k·k') weights and (B,m,k·k',c) values ->
    (B,c,n,outputs)."""
    means = (values.mT @ weights.mT).unflatten(3, (-1, columns.members.shape[1])).permute(0, 2, 3, 1, 4)  # (B,c,n,m,n')
    if columns.is_even:
        band.unflatten(3, columns.members.shape).copy_(means)
    else:
        band.copy_(means.flatten(3)[..., columns.slots])
