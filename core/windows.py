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
        raise ValueError(
            f"window_ratio={window_ratio} leaves a query without a key; use a wider one, or 0 for no window"
        )
    return first, last


@dataclass(frozen=True)
class Tiles:
    """Tiles of consecutive queries along one axis, each sharing one run of keys.

    All tiles have `size` queries, except the first, which has `offset` of them unless that is 0, and the last.
    """

    num_queries: int
    size: int
    offset: int
    keys: Tensor
    """(tiles, K) int64: the keys of each tile's run, K being enough for the widest tile."""
    visible: Tensor
    """(tiles, size, K) bool: which of them each query sees."""

    def __len__(self) -> int:
        return len(self.keys)

    def blocks(self, at_once: int) -> Iterator[tuple[slice, slice, int]]:
        """Runs of at most `at_once` tiles of equal length: (tiles, queries, length of each tile)."""
        short = int(self.offset > 0)
        if short:
            yield slice(0, 1), slice(0, self.offset), self.offset
        whole, rest = divmod(self.num_queries - self.offset, self.size)
        for start in range(0, whole, at_once):
            stop = min(start + at_once, whole)
            queries = slice(self.offset + start * self.size, self.offset + stop * self.size)
            yield slice(short + start, short + stop), queries, self.size
        if rest:
            yield slice(short + whole, short + whole + 1), slice(self.num_queries - rest, self.num_queries), rest


def tiles(num_queries: int, num_keys: int, window_ratio: float) -> Tiles:
    """Groups the queries of one axis into tiles of one key cell (several where cells hold few queries).

    Tiles may start anywhere in a cell; the start that needs the fewest keys is taken.
    """
    first, last = window_bounds(num_queries, num_keys, window_ratio)
    cell = max(1, round(num_queries / num_keys))
    size = min(num_queries, cell * -(-MIN_TILE // cell))
    start, width = _best_start(first, last, size)
    starts = torch.arange(start - size if start else 0, num_queries, size)
    members = starts[:, None] + torch.arange(size)  # (tiles,T)
    if start:
        members[0] += size - start  # the short tile's queries come first in its row
    members.clamp_(max=num_queries - 1)
    keys = first[starts.clamp(min=0)].clamp(max=num_keys - width)[:, None] + torch.arange(width)  # (tiles,K)
    seen_from, seen_to = first[members][..., None], last[members][..., None]  # (tiles,T,1)
    visible = (keys[:, None] >= seen_from) & (keys[:, None] < seen_to)  # (tiles,T,K)
    return Tiles(num_queries, size, start, keys, visible)


def _best_start(first: Tensor, last: Tensor, size: int) -> tuple[int, int]:
    """(offset of the first whole tile, keys that the widest tile then needs); bounds never decrease along an axis."""
    num_queries = len(first)
    ends = torch.arange(num_queries).add_(size - 1).clamp_(max=num_queries - 1)
    needed = torch.nn.functional.pad(last[ends] - first, (0, -num_queries % size))  # by a tile from each query on
    width = needed.view(-1, size).amax(0)  # (offsets,)
    width[1:] = torch.maximum(width[1:], last[: size - 1] - first[0])
    best = int(width.argmin())
    return best, int(width[best])
