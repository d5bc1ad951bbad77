"""`attention=pyramid_window`: windows of several sizes, fused for each query, so attention is both local and wide.

AnyUp's window hides distant keys that look alike, but also distant keys that a query would need. Sharp depth edges and
large uniform surfaces need windows of different sizes. Here each query has the baseline's window and several more. Keys
and values in larger windows are pooled, so that each window has about as many keys as the smallest. The query decides
how much each window counts.

Papers: windowed attention with learned relative positions, Swin (Liu et al., arXiv 2103.14030). Fine keys nearby and
pooled keys far away, Focal attention (Yang et al., arXiv 2107.00641). Gates that start closed, ReZero (Bachlechner et
al., arXiv 2003.04887).

Status: measured (docs/extensions.md): +.001 to +.003 of detail on tuned published weights, nothing in a probe;
from scratch +.010 to +.023, but not at equal compute.
"""

import math
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.attention import WindowAttention, empty_output, normed
from core.fast.norm_act_conv import under_autocast
from core.fast.windows import Tiles, tiles
from core.hooks import GATE_LR_SCALE, Attention
from core.registry import register

MAX_LOGITS = {"cpu": 2**20, "cuda": 2**26}  # logits held at once; on CPU this many stay in cache
MAP_SIDE = 128  # largest side of the fusion maps that are kept for pictures


class Unit(Enum):
    """The unit of `scales`."""

    cells = "cells"
    ratio = "ratio"


class Axis(NamedTuple):
    """One axis of a level: the keys of each tile of queries, and what is added to the logits."""

    keys: Tensor
    """(tiles,K) int64."""
    bias: Tensor
    """(tiles,size,K): relative position; -inf where a query does not see a key."""
    plain: bool
    """Whether all of `bias` is 0 or -inf: no relative position."""


class Level(NamedTuple):
    """Keys and values at one scale."""

    keys: Tensor
    """(B,h,w,D), projected and scaled so that a head's logits are plain products; h and w after pooling."""
    values: Tensor
    """(B,h,w,C)."""
    down: Axis
    across: Axis


@register("pyramid_window")
class PyramidWindowAttention(WindowAttention):
    """Windowed attention at several scales, fused per query.

    Each scale has its own softmax over its window, with logits `exp(t_s)·q·k/√d + position_s(Δ)`. t_s is a log
    temperature. position_s is quadratic in the offset Δ from key to query, per axis, in units of the window's
    half-width. The weight of a scale is `w_s = |g_s|·sigmoid(a_s·q + b_s)`, with a gate g_s and the query q after its
    convolution, which includes its surroundings. The weight of the baseline's window is 1. The output
    `(A_0 + Σ w_s·A_s)/(1 + Σ w_s)` is a convex combination of feature vectors.

    All gates are 0 at the start. Then the filler equals `window`, with the same weights under the same names. Without
    gradients a closed scale costs nothing.

    Args:
        num_heads, window_ratio: as for `window`, which is always the finest level.
        scales: sizes of further windows, in any order.
        unit: `cells`: scales are full widths in cells of the feature grid. `ratio`: scales are half-widths as fractions
            of the image, like `window_ratio`. A window as wide as the image, or wider, shows all of it.
        keys_per_side: keys and values are averaged over blocks of cells, so that about this many cover the width of the
            window. 0: no pooling.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    lr_scales: ClassVar[Mapping[str, float]] = {"gates": GATE_LR_SCALE}

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 4,
        window_ratio: float = 0.1,
        scales: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0),
        unit: Unit = Unit.cells,
        keys_per_side: int = 4,
    ):
        super().__init__(embed_dim, num_heads, window_ratio)  # draws the shared weights as the baseline does
        self.scales, self.unit, self.keys_per_side = _checked_scales(scales), _checked_unit(unit), keys_per_side
        if keys_per_side < 0:
            raise ValueError(f"keys_per_side must be positive, or 0 for keys that are not pooled, got {keys_per_side}")
        self.fusion = nn.Linear(embed_dim, len(self.scales))
        self.gates = nn.Parameter(torch.zeros(len(self.scales)))
        self.log_temperature = nn.Parameter(torch.zeros(len(self.scales)))
        self.position = nn.Parameter(torch.zeros(len(self.scales), 2, 2))  # (scale, axis, power - 1)
        self._maps: list[Tensor] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None = None) -> Tensor:
        value = under_autocast(value)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([band for _, band in self.bands(query, key, value)], 2)  # (B,C,Qh,Qw)
        if not self._open():
            return super().forward(query, key, value, out)
        if out is None:
            out = empty_output(value, tuple(query.shape[-2:]))
        for _ in self._fused_bands(query, key, value, out.permute(0, 2, 3, 1)):
            pass
        return out

    def bands(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if not self._open():
            return super().bands(query, key, value)
        return self._fused_bands(query, key, value, None)

    def at(self, query: Tensor, key: Tensor, value: Tensor, coords: Tensor) -> Tensor:
        """As `window` while all gates are closed; otherwise interpolates the grid's output bilinearly."""
        if not self._open():
            return super().at(query, key, value, coords)
        return Attention.at(self, query, key, value, coords)

    def _open(self) -> list[int]:
        """Indices of the scales with open gates; with gradients or under a compiler all, because a gate may open."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return list(range(len(self.scales)))
        self._maps = []
        return self.gates.nonzero().flatten().tolist()

    def fusion_weights(self, query: Tensor) -> Tensor:
        """(…,D) convolved and normalised queries -> (…,S+1): weights of the baseline's window and each scale; sum 1."""
        weights = torch.where(self.gates >= 0, self.gates, -self.gates) * self.fusion(query).sigmoid()
        weights = F.pad(weights, (1, 0), value=1.0)  # not abs(): the slope of `where` at 0 is 1, so a gate can open
        return weights / weights.sum(-1, keepdim=True)

    def _levels(self, query: Tensor, key: Tensor, value: Tensor, chosen: list[int]) -> tuple[Tiles, Tiles, list[Level]]:
        """The tiles of queries, down and across; the baseline's level, followed by those of the chosen scales."""
        size, grid = query.shape[-2:], key.shape[-2:]
        groups = [tiles(num, cells, self.window_ratio) for num, cells in zip(size, grid, strict=True)]
        plain = [Axis(group.keys.to(key.device), _hidden(group).to(key), True) for group in groups]
        levels = [Level(self._keys_of(key), value.permute(0, 2, 3, 1), *plain)]
        for scale in chosen:
            half = [self.scales[scale] / (2 * n) if self.unit is Unit.cells else self.scales[scale] for n in grid]
            pooled = [self._pooled(n, share) for n, share in zip(grid, half, strict=True)]
            keys, values = (F.adaptive_avg_pool2d(x, pooled) if pooled != [*grid] else x for x in (key, value))
            axes = [
                self._axis(group, cells, share, self.position[scale, axis])
                for axis, (group, cells, share) in enumerate(zip(groups, pooled, half, strict=True))
            ]
            keys = self._keys_of(keys) * self.log_temperature[scale].exp()
            levels.append(Level(keys, values.permute(0, 2, 3, 1), *axes))
        return *groups, levels

    def _keys_of(self, key: Tensor) -> Tensor:
        head_scale = (self.num_heads / key.shape[1]) ** 0.5
        return self.project_key(normed(self.norm_key, key.permute(0, 2, 3, 1))) * head_scale  # (B,h,w,D)

    def _pooled(self, num_cells: int, half: float) -> int:
        """Number of keys along an axis, for about `keys_per_side` in a window of that half-width."""
        if not self.keys_per_side:
            return num_cells
        return -(-num_cells // max(1, round(2 * half * num_cells / self.keys_per_side)))

    def _axis(self, group: Tiles, num_keys: int, half: float, position: Tensor) -> Axis:
        """The axis of one scale; `half` is the window's half-width as a fraction of the image."""
        own = tiles(group.num_queries, num_keys, 0.0 if 2 * half >= 1 else half, like=group)
        first = (torch.arange(len(own), dtype=torch.float64) * own.size - (-own.offset % own.size)).clamp(min=0)
        members = first[:, None] + torch.arange(own.size)  # (tiles,T)
        queries, keys = (members + 0.5) / group.num_queries, (own.keys.double() + 0.5) / num_keys
        offset = ((queries[..., None] - keys[:, None]) / half).to(position)  # (tiles,T,K)
        bias = position[0] * offset + position[1] * offset**2
        return Axis(own.keys.to(position.device), bias + _hidden(own).to(position), False)

    def _fused_bands(self, query, key, value, output):
        chosen = self._open()
        down, across, levels = self._levels(query, key, value, chosen)
        keys = sum(level.down.keys.shape[1] * level.across.keys.shape[1] for level in levels)
        logits = len(key) * self.num_heads * down.size * across.size * keys
        at_once = max(1, MAX_LOGITS.get(query.device.type, 2**20) // logits)  # tiles
        recompute = torch.is_grad_enabled() and at_once < len(down) * len(across)
        convolve, maps = self.convolved_rows(query), []
        keep_maps = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if keep_maps:
            self._maps = maps
        step = -(-max(query.shape[-2:]) // MAP_SIDE)
        for some, rows, size in down.blocks(max(1, at_once // len(across))):
            target = None if output is None else output[:, rows]

            def band(rows=rows, some=some, size=size, target=target):
                queries = normed(self.norm_query, convolve(rows))  # (B,rows,Qw,D)
                shares = self.fusion_weights(queries)  # (B,rows,Qw,S+1)
                if keep_maps:
                    maps.append(shares[0, -rows.start % step :: step, ::step])
                shares = shares[..., [0, *(scale + 1 for scale in chosen)]]
                queries = self.project_query(queries)
                return _band(queries, shares, levels, some, size, across, at_once, self.num_heads, target)

            if recompute and not torch.compiler.is_compiling():
                band = partial(checkpoint, band, use_reentrant=False)
            yield rows, band().permute(0, 3, 1, 2)  # (B,C,rows,Qw)

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """Maps of each window's weight at each query, white for 1; none while all gates are closed."""
        if not self._maps:
            return {}
        shares = torch.cat(self._maps).float().cpu()  # (rows,columns,S+1)
        unit = "cells" if self.unit is Unit.cells else "of the image"
        titles = ["window", *(f"{scale:g} {unit}" for scale in self.scales)]
        return {title: share.expand(3, -1, -1) for title, share in zip(titles, shares.unbind(-1), strict=True)}


def _band(query, shares, levels: list[Level], some: slice, size: int, across: Tiles, at_once, num_heads, target):
    """Rows of m tiles: (B,rows,Qw,D), (B,rows,Qw,L) -> (B,rows,Qw,C), written into `target` if there is one."""
    m = some.stop - some.start
    query, shares = query.unflatten(1, (m, size)), shares.unflatten(1, (m, size))  # (B,m,R,Qw,·)
    near = []
    for level in levels:
        rows = level.down.keys[some]
        near.append([grid[:, rows].transpose(2, 3).contiguous() for grid in (level.keys, level.values)])  # (B,m,w,Kh,·)
    parts = []
    for tile, columns, length in across.blocks(max(1, at_once // m)):
        seen = []
        for level, grids in zip(levels, near, strict=True):
            run = level.across.keys[tile]  # (n,Kw)
            keys, values = (
                grid.index_select(2, run.flatten()).unflatten(2, run.shape).flatten(3, 4).flatten(0, 2)
                for grid in grids
            )  # (P,K,D), (P,K,C)
            seen.append((keys, values, _bias(level, some, size, tile, length, len(query))))
        own, share = (_by_tile(x[:, :, :, columns], length) for x in (query, shares))  # (P,M,·)
        part = _attend(own, share, seen, num_heads)  # (P,M,C)
        part = part.view(len(query), m, -1, size, length, part.shape[-1]).transpose(2, 3)  # (B,m,R,n,T,C)
        if target is None:
            parts.append(part.flatten(3, 4).flatten(1, 2))  # (B,rows,n·T,C)
        else:
            target.unflatten(1, (m, size))[:, :, :, columns].unflatten(3, (-1, length)).copy_(part)
    return torch.cat(parts, 2) if target is None else target


def _attend(query: Tensor, shares: Tensor, seen: list[tuple[Tensor, Tensor, Tensor | None]], num_heads: int) -> Tensor:
    """(P,M,D), (P,M,L), for each of L levels (P,K,D) keys, (P,K,C) values and (P,M,K) bias -> (P,M,C)."""
    heads = query.chunk(num_heads, 2)
    weights = []
    for (keys, _, bias), share in zip(seen, shares.unbind(2), strict=True):
        total = 0
        for q, k in zip(heads, keys.chunk(num_heads, 2), strict=True):
            logits = torch.bmm(q, k.mT) if bias is None else torch.baddbmm(bias, q, k.mT)  # (P,M,K)
            total = total + logits.softmax(-1)
        weights.append(total * (share / num_heads)[..., None])
    values = torch.cat([values for _, values, _ in seen], 1)  # (P,ΣK,C)
    return torch.bmm(torch.cat(weights, 2).to(values.dtype), values)


def _bias(level: Level, some: slice, size: int, tile: slice, length: int, batch: int) -> Tensor | None:
    """The bias (P,M,K) of m x n tiles; None if there is nothing to add."""
    down, across = level.down.bias[some, :size], level.across.bias[tile, :length]  # (m,R,Kh), (n,T,Kw)
    compiling = torch.compiler.is_compiling()
    if level.down.plain and level.across.plain and not compiling and not (down.any() or across.any()):
        return None
    bias = down[:, None, :, None, None] + across[None, :, None, :, :, None]  # (m,n,R,T,Kw,Kh)
    return bias.flatten(4).flatten(2, 3).flatten(0, 1).repeat(batch, 1, 1)


def _by_tile(x: Tensor, length: int) -> Tensor:
    """(B,m,R,n·T,D) -> (P,M,D), P = B·m·n tiles of M = R·T queries."""
    return x.unflatten(3, (-1, length)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _hidden(group: Tiles) -> Tensor:
    """(tiles,T,K): 0 where a query sees a key, -inf elsewhere."""
    return torch.zeros(group.visible.shape).masked_fill_(~group.visible, -torch.inf)


def _checked_scales(scales: tuple[float, ...]) -> tuple[float, ...]:
    """The scales as a tuple of floats.

    Raises:
        ValueError: there are none, or some are repeated, not positive or not finite.
    """
    scales = tuple(float(scale) for scale in scales)
    if not scales:
        raise ValueError("scales is empty: give at least one window size, or use attention=window")
    wrong = [scale for scale in scales if not 0 < scale < math.inf]
    if wrong:
        raise ValueError(f"scales must be positive and finite, got {', '.join(f'{scale:g}' for scale in wrong)}")
    repeated = sorted({scale for scale in scales if scales.count(scale) > 1})
    if repeated:
        raise ValueError(f"scales must differ, got {', '.join(f'{scale:g}' for scale in repeated)} more than once")
    return scales


def _checked_unit(unit: Unit) -> Unit:
    try:
        return Unit(unit)
    except ValueError:
        raise ValueError(f"unit must be one of {', '.join(choice.name for choice in Unit)}, got {unit!r}") from None
