"""Windowed attention in a few large batched products, for GPUs: how queries and keys are laid out for them.

Queries are padded to whole tiles of one size. The keys of a tile are gathered by one table of numbers, padded to a
multiple of `ALIGNED`. No mask is built. Instead, queries and keys get further channels, one for each row and column of
a run of keys: a key has 1 in its own, a query has `_hidden` where it does not see the keys. So the product adds it
to the hidden logits, and their weights are exactly 0.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.fast.windows import runs_of_keys, tile_size, window_bounds

ALIGNED = 8  # matrix products of half precision are several times slower when sides are not multiples of this
GATHERED = 64  # queries per tile that cost as much as gathering the tile's keys and values
MIN_BYTES = {False: 2**26, True: 2**31}  # of a block: without and with gradients


class Plan(NamedTuple):
    """Tiles of (Qh,Qw) queries that each see a run of (h,w) keys. All tensors are on the device."""

    size: tuple[int, int]
    """(Qh,Qw)."""
    tile: tuple[int, int]
    """(R,T): rows and columns of a tile. The last tiles may reach beyond the queries."""
    keys: Tensor
    """(m,n,K) int64: numbers of the keys that each tile reads; h·w is a key that nobody sees."""
    of_rows: Tensor
    """(m,1,R,1,X): further channels of the queries that depend on the row."""
    of_columns: Tensor
    """(n,1,T,Y): those that depend on the column."""
    of_keys: Tensor
    """(h·w+1,X+Y): further channels of the keys."""

    def blocks(self, at_once: int) -> Iterator[tuple[slice, slice]]:
        """Runs of at most `at_once` rows of tiles: (rows of tiles, rows of queries)."""
        for start in range(0, len(self.keys), at_once):
            stop = min(start + at_once, len(self.keys))
            yield slice(start, stop), slice(start * self.tile[0], min(stop * self.tile[0], self.size[0]))

    def rows_at_once(self, query: Tensor, num_heads: int, channels: int) -> int:
        """Rows of tiles whose attention takes about as much memory as 2.5 times the queries (B,D,Qh,Qw).

        Less is not worth it below `MIN_BYTES`.
        """
        num_keys, further = self.keys.shape[2], self.of_keys.shape[1]
        wide = query.shape[1] + num_heads * further  # of queries and keys
        per_query = 3 * query.shape[1] + wide + (2 * num_heads + 1) * num_keys + channels
        per_tile = self.tile[0] * self.tile[1] * per_query + num_keys * (wide + channels)
        bytes_of_row = len(query) * self.keys.shape[1] * per_tile * query.element_size()
        room = max(MIN_BYTES[torch.is_grad_enabled()], int(2.5 * query.numel() * query.element_size()))
        return max(1, min(len(self.keys), room // bytes_of_row))

    def with_key_channels(self, keys: Tensor, num_heads: int) -> Tensor:
        """(B,h,w,D) -> (B,heads,h·w+1,D/heads+X+Y)."""
        keys = F.pad(keys.flatten(1, 2), (0, 0, 0, 1)).unflatten(2, (num_heads, -1)).transpose(1, 2)
        return torch.cat([keys, self.of_keys.expand(*keys.shape[:2], -1, -1)], -1)

    def tiled(self, queries: Tensor, some: slice, num_heads: int) -> Tensor:
        """Queries (B,rows,Qw,D) of some rows of tiles -> (B·heads·m·n, R·T, D/heads+X+Y)."""
        (rows, columns), m, n = self.tile, some.stop - some.start, self.keys.shape[1]
        queries = F.pad(queries, (0, 0, 0, n * columns - queries.shape[2], 0, m * rows - queries.shape[1]))
        queries = queries.view(len(queries), m, rows, n, columns, num_heads, -1).permute(0, 5, 1, 3, 2, 4, 6)
        further = [t.expand(*queries.shape[:-1], -1) for t in (self.of_rows[some], self.of_columns)]
        return torch.cat([queries, *further], -1).flatten(0, 3).flatten(1, 2)  # of (B,heads,m,n,R,T,·)

    def untiled(self, tiled: Tensor, rows: slice, target: Tensor | None) -> Tensor:
        """(B·m·n, R·T, C) of these rows of queries -> (B,rows,Qw,C), written into `target` if there is one."""
        (height, width), n, num_rows = self.tile, self.keys.shape[1], rows.stop - rows.start
        tiled = tiled.view(-1, -(-num_rows // height), n, height, width, tiled.shape[2]).transpose(2, 3)
        whole = num_rows % height == 0 and self.size[1] % width == 0
        if target is not None and whole:
            target.unflatten(2, (n, width)).unflatten(1, (-1, height)).copy_(tiled)  # (B,m,R,n,T,C)
            return target
        band = tiled.flatten(3, 4).flatten(1, 2)[:, :num_rows, : self.size[1]]
        return band if target is None else target.copy_(band)


def plan(query: Tensor, keys: Tensor, window_ratio: float, num_heads: int) -> Plan:
    """For (B,D,Qh,Qw) queries and (B,h,w,D) keys. Made once for each size.

    Raises:
        ValueError: as `core.fast.windows.window_bounds`.
    """
    fake = torch.compiler.is_compiling() or type(keys) is not Tensor
    make = _plan if fake else _cached  # what is traced with fake tensors must not be kept
    sizes = tuple(query.shape[-2:]), tuple(keys.shape[1:3])
    return Plan(*make(*sizes, window_ratio, keys.shape[3] // num_heads, keys.device, keys.dtype))


def _plan(size, grid, window_ratio: float, width: int, device: torch.device, dtype: torch.dtype) -> tuple:
    """The parts of a `Plan`; `width`: channels of a head."""
    tile, ((down, seen_down), (across, seen_across)) = _best_tiles(size, grid, window_ratio)
    keys = (down[:, None, :, None] * grid[1] + across[None, :, None]).reshape(len(down), len(across), -1)  # (m,n,K)
    keys = np.pad(keys, ((0, 0), (0, 0), (0, -keys.shape[2] % ALIGNED)), constant_values=grid[0] * grid[1])
    rows, by_row = _channels(down, seen_down, grid[0], _hidden(dtype))
    columns, by_column = _channels(across, seen_across, grid[1], _hidden(dtype))
    fill = -(width + 1 + rows.shape[2] + columns.shape[2]) % ALIGNED
    by_row, by_column = (np.broadcast_to(t, (*grid, t.shape[-1])) for t in (by_row[:, None], by_column))
    of_keys = np.concatenate([by_row, by_column], 2).reshape(grid[0] * grid[1], -1)
    of_keys = np.pad(of_keys, ((0, 1), (1 + fill, 0)))
    of_keys[-1, 0] = 1  # nobody sees the key after the last
    rows = np.pad(rows, ((0, 0), (0, 0), (1 + fill, 0)))
    rows[..., 0] = _hidden(dtype)
    tables = rows[:, None, :, None], columns[:, None], of_keys
    with torch.inference_mode(False):  # the tables may be used with gradients later
        tables = [torch.from_numpy(table).to(device, dtype) for table in tables]
        return size, tile, torch.from_numpy(keys).to(device), *tables


_cached = lru_cache(8)(_plan)
# What `torch.compiler.assume_constant_result` does; that call would import the compiler here, which takes seconds.
_plan._dynamo_marked_constant = True


def _channels(run: np.ndarray, seen: np.ndarray, num_keys: int, hidden: float) -> tuple[np.ndarray, np.ndarray]:
    """Further channels along one axis: of queries, (tiles,size,K), and of keys, (num_keys,K); none if all is seen."""
    width = run.shape[1]
    if seen.all():
        return np.zeros((*seen.shape[:2], 0)), np.zeros((num_keys, 0))
    order = np.argsort(run % width, 1)  # K consecutive numbers modulo K are 0 ... K - 1 in some order
    seen = np.take_along_axis(seen, order[:, None], 2)
    return np.where(seen, 0.0, hidden), np.eye(width)[np.arange(num_keys) % width]


def _best_tiles(size, grid, window_ratio: float):
    """(R,T), and for each axis its keys and which each query sees: tiles of one or two cells a side, the cheaper."""
    bounds = [window_bounds(n, cells, window_ratio) for n, cells in zip(size, grid, strict=True)]
    best = None
    for side in (1, 2):
        tile = tuple(tile_size(n, cells, side) for n, cells in zip(size, grid, strict=True))
        axes = [runs_of_keys(*known, cells, of) for known, cells, of in zip(bounds, grid, tile, strict=True)]
        cost = math.prod(keys.shape[1] for keys, _ in axes) * (1 + GATHERED / math.prod(tile))
        if best is None or cost < best[0]:
            best = cost, tile, axes
    return best[1:]


def _hidden(dtype: torch.dtype) -> float:
    """What hides a logit: twice this is finite, and the exponential of it is 0 beside any other logit."""
    return -(2.0**14) if dtype == torch.float16 else -(2.0**40)
