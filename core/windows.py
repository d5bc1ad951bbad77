"""Which keys a query may see (AnyUp, section 3.3), and how queries are grouped into tiles that share keys."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TILE = 8  # queries per axis: below this the matrix products are too small to be fast


def window_bounds(num_queries: int, num_keys: int, window_ratio: float) -> tuple[Tensor, Tensor]:
    """First and one-past-last visible key of each query along one axis, both (num_queries,) int64.

    A query at centre (i + 0.5)/num_queries sees the keys that overlap the interval of half-width `window_ratio`
    around it, in float32 and in this order of operations, as the published model was trained. No window
    (`window_ratio` <= 0): all keys.

    Raises:
        ValueError: the window is so narrow that a query sees nothing.
    """
    if window_ratio <= 0:
        return torch.zeros(num_queries, dtype=torch.int64), torch.full((num_queries,), num_keys)
    centre = (torch.arange(num_queries, dtype=torch.float32) + 0.5) / num_queries
    first = ((centre - window_ratio).clamp(0, 1) * num_keys).floor().long()
    last = ((centre + window_ratio).clamp(0, 1) * num_keys).ceil().long()
    if not torch.compiler.is_compiling() and bool((last <= first).any()):
        raise ValueError(f"window_ratio={window_ratio} leaves a query without a key; use a wider one, or 0 for no window")
    return first, last


@dataclass(frozen=True)
class Tiles:
    """Tiles of `size` consecutive queries along one axis (the last may be shorter), each sharing one run of keys."""

    num_queries: int
    size: int
    keys: Tensor
    """(tiles, K) int64: the keys of each tile's run, K being enough for the widest tile."""
    visible: Tensor
    """(tiles, size, K) bool: which of them each query sees."""

    def __len__(self) -> int:
        return len(self.keys)

    def blocks(self, at_once: int) -> Iterator[tuple[slice, slice, int]]:
        """Runs of at most `at_once` tiles of equal length: (tiles, queries, length of each tile)."""
        whole, rest = divmod(self.num_queries, self.size)
        for start in range(0, whole, at_once):
            stop = min(start + at_once, whole)
            yield slice(start, stop), slice(start * self.size, stop * self.size), self.size
        if rest:
            yield slice(whole, whole + 1), slice(whole * self.size, self.num_queries), rest


def tiles(num_queries: int, num_keys: int, window_ratio: float) -> Tiles:
    """Groups the queries of one axis by the key cell they fall in (several cells where cells hold few queries)."""
    first, last = window_bounds(num_queries, num_keys, window_ratio)
    cell = max(1, round(num_queries / num_keys))
    size = min(num_queries, cell * -(-MIN_TILE // cell))
    members = torch.arange(0, num_queries, size)[:, None] + torch.arange(size)  # (tiles,T)
    first, last = first[members.clamp(max=num_queries - 1)], last[members.clamp(max=num_queries - 1)]
    width = int((last.amax(1) - first.amin(1)).max())
    keys = first.amin(1).clamp(max=num_keys - width)[:, None] + torch.arange(width)  # (tiles,K)
    visible = (keys[:, None] >= first[..., None]) & (keys[:, None] < last[..., None])  # (tiles,T,K)
    return Tiles(num_queries, size, keys, visible)
