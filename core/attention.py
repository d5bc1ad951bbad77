"""Baseline fillers of `attention`: AnyUp's windowed attention, exact in bounded memory, and the global ablation."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import points
from core.fast import launches, winograd
from core.fast.blocks_of_tiles import Plan, plan
from core.fast.norm_act_conv import under_autocast
from core.fast.windows import Tiles, tiles
from core.hooks import Attention
from core.prior import Prior
from core.registry import register

FEW_POINTS = 8
"""If the grid has more than this many cells per point, only the cells around the points are convolved."""
MAX_LOGITS = {"cpu": 2**20, "cuda": 2**26, "meta": 2**60}  # logits held at once; on CPU this many stay in cache


class CrossAttention(Attention):
    """Query-key attention; the heads' weights are averaged and applied once, to the raw features.

    query -> 3x3 convolution -> RMSNorm -> projection; key -> RMSNorm -> projection; softmax per head over the keys
    in the query's window (AnyUp, sections 3.3 and 3.4; JAFAR applies the averaged weights the same way). There is
    no value or output projection and no key bias: none of them would change the result.

    Queries are processed one band of rows at a time, in tiles that share a run of keys (`core/fast/windows.py`). So
    memory never holds a full mask, or the logits of all queries.
    """

    takes_out = True
    window_ratio: float = 0.0

    def __init__(self, embed_dim: int, num_heads: int = 4):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False)
        self.norm_query = nn.RMSNorm(embed_dim)
        self.norm_key = nn.RMSNorm(embed_dim)
        self.project_query = nn.Linear(embed_dim, embed_dim)
        self.project_key = nn.Linear(embed_dim, embed_dim, bias=False)
        for projection in (self.project_query, self.project_key):
            # the initialisation of nn.MultiheadAttention's stacked query, key and value projections
            nn.init.uniform_(projection.weight, -math.sqrt(1.5 / embed_dim), math.sqrt(1.5 / embed_dim))
        nn.init.zeros_(self.project_query.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        value = under_autocast(value)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            bands = self.bands(query, key, value, **self.seen(image))
            return torch.cat([band for _, band in bands], 2)  # (B,C,Qh,Qw)
        if out is None:
            out = empty_output(value, tuple(query.shape[-2:]))
        for _ in self._bands(query, key, value, out.permute(0, 2, 3, 1), image=image):
            pass
        return out

    def bands(
        self, query: Tensor, key: Tensor, value: Tensor, image: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        return self._bands(query, key, value, image=image)

    def bands_with_entropy(
        self, query: Tensor, key: Tensor, value: Tensor, image: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As `Attention.bands_with_entropy`, in one pass over the weights, and so at almost no cost."""
        if _changed(self, _WEIGHTS_MADE_IN):
            yield from super().bands_with_entropy(query, key, value, image)  # a subclass has other weights
            return
        with_room = F.pad(under_autocast(value), (0, 0, 0, 0, 0, 1))  # (B,C+1,h,w): the last one is for the entropy
        for rows, band in self._bands(query, key, with_room, mix=_mixed_with_entropy, image=image):
            yield rows, band[:, :-1], band[:, -1:]  # (B,C,rows,Qw), (B,1,rows,Qw)

    def at(self, query: Tensor, key: Tensor, value: Tensor, coords: Tensor, image: Tensor | None = None) -> Tensor:
        """As `Attention.at`, with each window centred on its point."""
        prior = self.prior(tuple(query.shape[-2:]), tuple(key.shape[-2:]), image)
        if len(coords) * FEW_POINTS < query.shape[2] * query.shape[3]:
            convolved = points.sample_convolved(query, under_autocast(self.conv.weight), coords)  # (B,N,D)
        else:
            grid = self.convolved_rows(query)(slice(0, query.shape[2])).permute(0, 3, 1, 2)  # (B,D,Qh,Qw)
            convolved = points.sample(grid, coords)
        queries = self.project_query(normed(self.norm_query, convolved))  # (B,N,D)
        values = under_autocast(value).permute(0, 2, 3, 1)  # (B,h,w,C)
        return points.attend(queries, self._keys(key), values, coords, self.window_ratio, self.num_heads, prior)

    def prior(self, size: tuple[int, int], grid: tuple[int, int], image: Tensor | None) -> Prior | None:
        """What a subclass adds to the logits for queries on a (Qh,Qw) and keys on an (h,w) grid; None: nothing.

        `image` is (B,3,H,W) for a subclass with `needs_image`, None for all others.
        """
        return None

    def _keys(self, key: Tensor) -> Tensor:
        """(B,D,h,w) -> (B,h,w,D): projected keys, scaled so that a head's logits are plain products."""
        head_scale = (self.num_heads / key.shape[1]) ** 0.5
        return self.project_key(normed(self.norm_key, key.permute(0, 2, 3, 1))) * head_scale

    def _bands(self, query, key, value, output=None, mix=torch.bmm, image=None):
        height, width = query.shape[-2:]
        prior = self.prior((height, width), tuple(key.shape[-2:]), image)
        if prior is None and launches.dominate(query) and not _changed(self, _DONE_IN_TILES):
            yield from self._large_bands(query, key, value, output, mix)
            return
        down = tiles(height, key.shape[-2], self.window_ratio).to(query.device)
        across = tiles(width, key.shape[-1], self.window_ratio).to(query.device)
        keys = self._keys(key)  # (B,h,w,D)
        values = value.permute(0, 2, 3, 1)  # (B,h,w,C)
        logits = len(key) * self.num_heads * down.size * across.size * down.keys.shape[1] * across.keys.shape[1]
        at_once = max(1, MAX_LOGITS.get(query.device.type, 2**20) // logits)  # tiles
        recompute = torch.is_grad_enabled() and at_once < len(down) * len(across)
        convolve = self.convolved_rows(query)
        for some, rows, size in down.blocks(max(1, at_once // len(across))):
            target = None if output is None else output[:, rows]
            given = {"across": across, "at_once": at_once, "target": target, "mix": mix, "prior": prior}
            band = partial(self._band, convolve, rows, **given)
            arguments = keys, values, down.keys[some], down.visible[some, :size]
            if recompute and not torch.compiler.is_compiling():
                band = checkpoint(band, *arguments, use_reentrant=False)
            else:
                band = band(*arguments)
            yield rows, band.permute(0, 3, 1, 2)  # (B,C,rows,Qw)

    def _large_bands(self, query, key, value, output, mix):
        """`_bands` in a few large products (`core/fast/blocks_of_tiles.py`)."""
        keys = self._keys(key)  # (B,h,w,D)
        layout = plan(query, keys, self.window_ratio, self.num_heads)
        keys = layout.with_key_channels(keys, self.num_heads)  # (B,heads,h·w+1,D/heads+·)
        values = F.pad(value.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 0, 1))  # (B,h·w+1,C)
        at_once = layout.rows_at_once(query, self.num_heads, value.shape[1])
        recompute = torch.is_grad_enabled() and at_once < len(layout.keys) and not torch.compiler.is_compiling()
        convolve = self.convolved_rows(query)
        for some, rows in layout.blocks(at_once):
            target = None if output is None else output[:, rows]
            band = partial(self._large_band, layout, some, rows, convolve, target=target, mix=mix)
            band = checkpoint(band, keys, values, use_reentrant=False) if recompute else band(keys, values)
            yield rows, band.permute(0, 3, 1, 2)  # (B,C,rows,Qw)

    def _large_band(self, layout: Plan, some, rows, convolve, keys, values, target, mix):
        """Attention for some rows of tiles -> (B,rows,Qw,C), written into `target` if there is one."""
        query = self.project_query(normed(self.norm_query, convolve(rows)))  # (B,rows,Qw,D)
        seen = layout.keys[some]  # (m,n,K)
        keys = keys[:, :, seen].flatten(0, 3).transpose(1, 2)  # (B·heads·m·n,·,K)
        weights = torch.bmm(layout.tiled(query, some, self.num_heads), keys).softmax(-1)  # (B·heads·m·n,M,K)
        mean = weights.unflatten(0, (len(values), self.num_heads, -1)).mean(1).flatten(0, 1)  # (B·m·n,M,K)
        mixed = mix(mean.to(values.dtype), values[:, seen].flatten(0, 2))  # (B·m·n,M,C)
        return layout.untiled(mixed, rows, target)

    def convolved_rows(self, query: Tensor) -> Callable[[slice], Tensor]:
        """Returns a function: slice of rows -> (B,rows,Qw,D), the convolved query there."""
        if winograd.usable(query):
            return winograd.Winograd(self.conv.weight, query.permute(0, 2, 3, 1).contiguous()).rows
        return partial(winograd.direct_rows, self.conv.weight, query)

    def _band(self, convolve, rows, keys, values, key_rows, rows_visible, across: Tiles, at_once, target, mix, prior):
        """Attention for the rows of m tiles -> (B,rows,Qw,C), written into `target` if there is one."""
        query = normed(self.norm_query, convolve(rows))  # (B,rows,Qw,D)
        query = query.unflatten(1, rows_visible.shape[:2])  # (B,m,R,Qw,D)
        keys, values = (grid[:, key_rows].transpose(2, 3).contiguous() for grid in (keys, values))  # (B,m,w,Kh,·)
        parts = []
        for some, columns, size in across.blocks(max(1, at_once // len(key_rows))):
            run = across.keys[some].flatten()
            where = rows, columns, (key_rows, across.keys[some])
            terms = None if prior is None else (prior.of_tiles(*where), prior.share)
            part = self._tiles(
                query[:, :, :, columns].unflatten(3, (-1, size)),  # (B,m,R,n,T,D)
                keys.index_select(2, run).unflatten(2, (-1, across.keys.shape[1])),  # (B,m,n,Kw,Kh,D)
                values.index_select(2, run).unflatten(2, (-1, across.keys.shape[1])),  # (B,m,n,Kw,Kh,C)
                rows_visible[:, None, :, None, None] & across.visible[some, None, :size, :, None],  # (m,n,R,T,Kw,Kh)
                mix,
                terms,
            )
            if target is None:
                parts.append(part.flatten(3, 4).flatten(1, 2))  # (B,rows,n·T,C)
            else:
                target.unflatten(1, rows_visible.shape[:2])[:, :, :, columns].unflatten(3, (-1, size)).copy_(part)
        return torch.cat(parts, 2) if target is None else target

    def _tiles(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        mix: Callable[[Tensor, Tensor], Tensor] = torch.bmm,
        terms: tuple[Iterator[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B,m,R,n,T,D), (B,m,n,Kw,Kh,D), (B,m,n,Kw,Kh,C), (m,n,R,T,Kw,Kh) -> (B,m,R,n,T,C).

        Args:
            mix: (P,M,K) weights, (P,K,C) values -> (P,M,C).
            terms: of a `Prior`: what its `of_tiles` gives, and its share.
        """
        batch, m, rows, n, columns, _ = query.shape
        query = query.transpose(2, 3).reshape(batch * m * n, rows * columns, -1)  # (P,M,D), P = B·m·n tiles
        query = self.project_query(query)
        keys, values = keys.flatten(3, 4).flatten(0, 2), values.flatten(3, 4).flatten(0, 2)  # (P,K,D), (P,K,C)
        bias = None
        unknown = torch.compiler.is_compiling() or visible.device.type != "cpu"  # all() would wait for a GPU
        if unknown or not visible.all():
            hidden = ~visible.reshape(m * n, rows * columns, -1)
            bias = torch.zeros(hidden.shape, dtype=query.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            bias = bias.repeat(batch, 1, 1)  # (P,M,K)
        if terms is None:
            weighted = self._mixed(self._weights(query, keys, bias), values, mix)  # (P,M,C)
        else:
            of_heads, share = terms
            weights = self._weights(query, keys, bias, of_heads)
            weighted = self._mixed(weights, values, mix, (share, bias, of_heads))
        return weighted.view(batch, m, n, rows, columns, -1).transpose(2, 3)

    def _weights(
        self, query: Tensor, keys: Tensor, bias: Tensor | None, terms: Iterator[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """(P,M,D), (P,K,D), (P,M,K), and a term for each head -> the weights of each head in turn, (P,M,K)."""
        for q, k in zip(query.chunk(self.num_heads, 2), keys.chunk(self.num_heads, 2), strict=True):
            k = k.transpose(1, 2)  # (P,D/heads,K)
            added = bias if terms is None else _with(bias, next(terms), q.dtype)
            logits = torch.bmm(q, k) if added is None else torch.baddbmm(added, q, k)  # (P,M,K)
            yield logits.softmax(-1)

    def _mixed(
        self,
        weights: Iterator[Tensor],
        values: Tensor,
        mix: Callable[[Tensor, Tensor], Tensor],
        further: tuple[Tensor, Tensor | None, Iterator[Tensor]] | None = None,
    ) -> Tensor:
        """The weights of each head, (P,M,K), and (P,K,C) values -> (P,M,C): the heads' mean, applied once.

        `further`: share of one more head, mask, and the terms that are left, of which it takes the next.
        """
        mean = 0
        for one in weights:
            mean += one
        mean = mean / self.num_heads
        if further is not None:
            share, bias, terms = further
            alone = _with(bias, next(terms), mean.dtype).softmax(-1)
            mean = mean + share.to(mean.dtype) * (alone - mean)
        return mix(mean.to(values.dtype), values)


_DONE_IN_TILES = ("_band", "_tiles", "_weights", "_mixed")
_WEIGHTS_MADE_IN = ("forward", "bands", "_bands", "_large_bands", "_large_band", *_DONE_IN_TILES)


def _changed(attention: CrossAttention, methods: tuple[str, ...]) -> bool:
    """Whether a subclass has its own version of one of these methods."""
    return any(getattr(type(attention), name) is not getattr(CrossAttention, name) for name in methods)


def _with(bias: Tensor | None, term: Tensor, dtype: torch.dtype) -> Tensor:
    """(P,M,K) masks, if any, and (P,M,K) logits -> their sum in the dtype."""
    return term.to(dtype) if bias is None else bias + term.to(dtype)


def _mixed_with_entropy(weights: Tensor, values: Tensor) -> Tensor:
    """(P,M,K) weights, (P,K,C) values -> (P,M,C): the weighted sums, and last the entropy of the weights in nats."""
    mixed = torch.bmm(weights, values)
    mixed[..., -1] = -torch.special.xlogy(weights, weights).sum(-1)
    return mixed


def empty_output(value: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,C,Qh,Qw), uninitialised, in the memory layout that attention writes fastest."""
    return value.new_empty(len(value), *size, value.shape[1]).permute(0, 3, 1, 2)


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Applies the norm in the dtype of x, which differs from the weight's under autocast."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


@register("window")
class WindowAttention(CrossAttention):
    """AnyUp's local attention (section 3.3).

    Args:
        num_heads: heads of the query-key similarity.
        window_ratio: half-width of the window as a fraction of the image, per axis (the paper's 20 % is the full
            width); 0 or less: no window.
    """

    changeable = ("window_ratio",)

    def __init__(self, embed_dim: int, num_heads: int = 4, window_ratio: float = 0.1):
        super().__init__(embed_dim, num_heads)
        if math.isnan(window_ratio):
            raise ValueError("window_ratio must be a number, got nan; 0 means no window")
        self.window_ratio = window_ratio


@register("global")
class GlobalAttention(CrossAttention):
    """The ablation without a window, as in JAFAR: every query sees every key."""

    def __init__(self, embed_dim: int, num_heads: int = 4):
        super().__init__(embed_dim, num_heads)
