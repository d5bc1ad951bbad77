"""Baseline fillers of `attention`: AnyUp's windowed attention, exact in bounded memory, and the global ablation."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.hooks import Attention
from core.registry import register
from core.windows import Tiles, tiles

MAX_LOGITS = {"cpu": 2**20, "cuda": 2**26}  # held at once: on CPU they stay in cache


class CrossAttention(Attention):
    """Query-key attention that averages its heads' weights and applies them once, to the raw features.

    query -> 3x3 convolution -> RMSNorm -> projection; key -> RMSNorm -> projection; softmax per head over the keys
    in the query's window (AnyUp, sections 3.3 and 3.4; JAFAR applies the averaged weights the same way). There is
    no value or output projection and no key bias: none of them would change the result.

    Queries are worked on in tiles that share a run of keys (`core/windows.py`), a band of rows at a time: neither
    a mask nor the logits of all queries ever exist.
    """

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
            # as nn.MultiheadAttention draws its stacked query, key and value projections
            nn.init.uniform_(projection.weight, -math.sqrt(1.5 / embed_dim), math.sqrt(1.5 / embed_dim))
        nn.init.zeros_(self.project_query.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([band for _, band in self.bands(query, key, value)], 2)  # (B,C,Qh,Qw)
        batch, channels = value.shape[:2]
        output = value.new_empty(batch, *query.shape[-2:], channels)  # (B,Qh,Qw,C)
        for _ in self._bands(query, key, value, output):
            pass
        return output.permute(0, 3, 1, 2)  # (B,C,Qh,Qw)

    def bands(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return self._bands(query, key, value, None)

    def _bands(self, query, key, value, output):
        height, width = query.shape[-2:]
        down = tiles(height, key.shape[-2], self.window_ratio)
        across = tiles(width, key.shape[-1], self.window_ratio)
        keys = self.project_key(self.norm_key(key.permute(0, 2, 3, 1)))  # (B,h,w,D)
        values = value.permute(0, 2, 3, 1)  # (B,h,w,C)
        logits = len(key) * self.num_heads * down.size * across.size * down.keys.shape[1] * across.keys.shape[1]
        at_once = max(1, MAX_LOGITS.get(query.device.type, 2**20) // logits)  # tiles
        recompute = torch.is_grad_enabled() and at_once < len(down) * len(across)
        for some, rows, size in down.blocks(max(1, at_once // len(across))):
            halo = query[:, :, max(rows.start - 1, 0) : rows.stop + 1]
            halo = F.pad(halo, (0, 0, int(rows.start == 0), int(rows.stop == height)))  # (B,D,rows+2,Qw)
            target = None if output is None else output[:, rows]
            arguments = halo, keys, values, down.keys[some], down.visible[some, :size], across, at_once, target
            if recompute and not torch.compiler.is_compiling():
                band = checkpoint(self._band, *arguments, use_reentrant=False)
            else:
                band = self._band(*arguments)
            yield rows, band.permute(0, 3, 1, 2)  # (B,C,rows,Qw)

    def _band(self, halo, keys, values, key_rows, rows_visible, across: Tiles, at_once, target):
        """Rows of queries, m tiles of them -> (B,rows,Qw,C), written to `target` if there is one."""
        query = F.conv2d(halo, self.conv.weight, padding=(0, 1)).permute(0, 2, 3, 1)  # (B,rows,Qw,D)
        query = self.project_query(self.norm_query(query))
        query = query.unflatten(1, rows_visible.shape[:2])  # (B,m,R,Qw,D)
        keys, values = keys[:, key_rows], values[:, key_rows]  # (B,m,Kh,w,·)
        parts = []
        for some, columns, size in across.blocks(max(1, at_once // len(key_rows))):
            visible = rows_visible[:, None, :, None, :, None] & across.visible[some, None, :size, None]
            part = self._tiles(
                query[:, :, :, columns].unflatten(3, (-1, size)),  # (B,m,R,n,T,D)
                keys[:, :, :, across.keys[some]],  # (B,m,Kh,n,Kw,D)
                values[:, :, :, across.keys[some]],  # (B,m,Kh,n,Kw,C)
                visible.to(query.device),  # (m,n,R,T,Kh,Kw)
            )
            if target is None:
                parts.append(part.flatten(3, 4).flatten(1, 2))  # (B,rows,n·T,C)
            else:
                target.unflatten(1, rows_visible.shape[:2])[:, :, :, columns].unflatten(3, (-1, size)).copy_(part)
        return torch.cat(parts, 2) if target is None else target

    def _tiles(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """(B,m,R,n,T,D), (B,m,Kh,n,Kw,D), (B,m,Kh,n,Kw,C), (m,n,R,T,Kh,Kw) -> (B,m,R,n,T,C)."""
        batch, m, rows, n, columns, _ = query.shape
        heads, num_keys, channels = self.num_heads, visible.shape[-2:].numel(), values.shape[-1]
        query = query.unflatten(5, (heads, -1)).permute(0, 1, 3, 5, 2, 4, 6)  # (B,m,n,heads,R,T,d)
        keys = keys.unflatten(5, (heads, -1)).permute(0, 1, 3, 5, 6, 2, 4)  # (B,m,n,heads,d,Kh,Kw)
        query = query.reshape(batch * m * n * heads, rows * columns, -1)
        keys = keys.reshape(batch * m * n * heads, -1, num_keys) * query.shape[-1] ** -0.5
        logits = torch.bmm(query, keys).view(batch, m * n, heads, rows * columns, num_keys)
        hidden = ~visible.reshape(m * n, 1, rows * columns, num_keys)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(2)  # (B,m·n,R·T,K)
        values = values.permute(0, 1, 3, 2, 4, 5).reshape(-1, num_keys, channels)  # (B·m·n,K,C)
        weighted = torch.bmm(weights.flatten(0, 1).to(values.dtype), values)  # (B·m·n,R·T,C)
        return weighted.view(batch, m, n, rows, columns, channels).transpose(2, 3)


@register("window")
class WindowAttention(CrossAttention):
    """AnyUp's local attention.

    Args:
        num_heads: heads of the query-key similarity.
        window_ratio: half-width of the window as a fraction of the image, per axis (the paper's 20 % is the full
            width); 0 or less: no window.
    """

    def __init__(self, embed_dim: int, num_heads: int = 4, window_ratio: float = 0.1):
        super().__init__(embed_dim, num_heads)
        self.window_ratio = window_ratio


@register("global")
class GlobalAttention(CrossAttention):
    """The ablation without a window, which is JAFAR's attention: every query sees every key."""

    def __init__(self, embed_dim: int, num_heads: int = 4):
        super().__init__(embed_dim, num_heads)
