"""Which keys a query may see (AnyUp, section 3.3), and how queries are grouped into tiles that share keys."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

MIN_TILE = 8  # queries per axis: below this the matrix products are too small to be fast


def window_bounds(num_queries: int, num_keys: int, window_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last visible key of each query along one axis, both (num_queries,) int64 in NumPy.

    A query at centre (i + 0.5)/num_queries sees the keys that overlap the interval of half-width `window_ratio`
    around it. This is computed in float32 and in this order of operations, as the published model was trained.
    `window_ratio` <= 0 means no window: all keys.

    Raises:
        ValueError: the window is so narrow that a query sees nothing.
    """
    if window_ratio <= 0:
        return np.zeros(num_queries, np.int64), np.full(num_queries, num_keys)
    centre = (np.arange(num_queries, dtype=np.float32) + np.float32(0.5)) / np.float32(num_queries)
    ratio, scale = np.float32(window_ratio), np.float32(num_keys)
    first = np.floor((centre - ratio).clip(0, 1) * scale).astype(np.int64)
    last = np.ceil((centre + ratio).clip(0, 1) * scale).astype(np.int64)
    if (last <= first).any():
        raise ValueError(
            f"window_ratio={window_ratio} leaves a query without a key; use a wider one, or 0 for no window"
        )
    return first, last


@dataclass(frozen=True)
class Tiles:
    """Tiles of consecutive queries along one axis, each sharing one run of keys.

    All tiles have `size` queries, with two exceptions: the first has `offset` queries if `offset` > 0, and the last
    has what is left.
    """

    num_queries: int
    size: int
    offset: int
    keys: Tensor
    """(tiles, K) int64: the keys of each tile's run. K is the number that the widest tile needs."""
    visible: Tensor
    """(tiles, size, K) bool: which of these keys each query sees."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "Tiles":
        """The same tiles with tensors on a device."""
        return replace(self, keys=self.keys.to(device), visible=self.visible.to(device))

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


def tiles(num_queries: int, num_keys: int, window_ratio: float, like: Tiles | None = None) -> Tiles:
    """Groups the queries of one axis into tiles as wide as one key cell (several cells if they hold few queries).

    Tiles may start anywhere in a cell; the start that needs the fewest keys is taken. With `like`, the queries are
    grouped as in those tiles, so that one tile of queries can look at several key grids.

    Raises:
        ValueError: as `window_bounds`.
    """
    bounds = window_bounds(num_queries, num_keys, window_ratio)
    if like is None:
        size = tile_size(num_queries, num_keys)
        offset = int(_keys_needed(*bounds, size).argmin())
    else:
        size, offset = like.size, like.offset
    keys, visible = runs_of_keys(*bounds, num_keys, size, offset)
    return Tiles(num_queries, size, offset, torch.from_numpy(keys), torch.from_numpy(visible))


def tile_size(num_queries: int, num_keys: int, cells: int = 1) -> int:
    """Queries per tile along one axis: of so many key cells, or more if they hold few queries."""
    cell = max(1, round(num_queries / num_keys))
    return min(num_queries, cell * max(cells, -(-MIN_TILE // cell)))


def runs_of_keys(
    first: np.ndarray, last: np.ndarray, num_keys: int, size: int, offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`Tiles.keys` and `Tiles.visible` in NumPy, for the `window_bounds` of the queries."""
    num_queries, width = len(first), int(_keys_needed(first, last, size)[offset])
    starts = np.arange(offset - size if offset else 0, num_queries, size)
    members = starts[:, None] + np.arange(size)  # (tiles,T)
    if offset:
        members[0] += size - offset  # the short tile's queries come first in its row
    members = members.clip(max=num_queries - 1)
    keys = first[starts.clip(min=0)].clip(max=num_keys - width)[:, None] + np.arange(width)  # (tiles,K)
    visible = (keys[:, None] >= first[members][..., None]) & (keys[:, None] < last[members][..., None])  # (tiles,T,K)
    return keys, visible


def _keys_needed(first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """(offsets,): the number of keys that the widest tile needs, for each offset. Bounds never decrease on an axis."""
    num_queries = len(first)
    ends = np.arange(size - 1, size - 1 + num_queries).clip(max=num_queries - 1)
    needed = np.pad(last[ends] - first, (0, -num_queries % size))  # by a tile that starts at each query
    width = needed.reshape(-1, size).max(0)  # (offsets,)
    width[1:] = np.maximum(width[1:], last[: size - 1] - first[0])
    return width
