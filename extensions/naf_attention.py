"""`attention=naf`: the baseline's attention with three switches, in each of which NAF differs from AnyUp.

NAF (arXiv 2511.18452, CVPR 2026) makes three claims about attention: the queries themselves, pooled, are the best keys;
a convolution on top of queries hurts; and each head should filter channels of its own, where AnyUp averages the heads'
weights. Its fourth claim, that features are not needed as guidance, is `unifier=none`. Here each claim is one switch of
the baseline's attention, so that each is one ablation (configs/experiment/parts.yaml). NAF as a whole, with its
own encoders, is the peer `naf` (experiments/peers/naf.py).

Status: measured from scratch (docs/peers.md): the three lose detail on most encoders; the fourth holds.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from core import points
from core.attention import WindowAttention, normed
from core.fast.norm_act_conv import under_autocast
from core.registry import register


@register("naf")
class NAFAttention(WindowAttention):
    """The baseline's window attention; with all switches at their default, the baseline itself.

    Args:
        num_heads, window_ratio: as for `window`.
        value_groups: each head filters a contiguous part of the channels with its own weights, instead of all channels
            with the mean of the heads' weights. Parts differ by one channel if `num_heads` does not divide C. Then a
            linear head cannot be applied first, and there is no one entropy of the weights.
        pooled_keys: keys are the queries, averaged over each cell, so that neither the key's encoder nor the features
            take part. In training over several processes freeze what then has no effect:
            freeze=[unifier,key_encoder,aggregation].
        convolve: queries pass a 3x3 convolution before attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 4,
        window_ratio: float = 0.1,
        value_groups: bool = False,
        pooled_keys: bool = False,
        convolve: bool = True,
    ):
        super().__init__(embed_dim, num_heads, window_ratio)
        self.value_groups, self.pooled_keys, self.convolve = value_groups, pooled_keys, convolve
        self.linear_in_values = not value_groups
        if not convolve:
            self.conv = None

    def bands_with_entropy(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Contract: `Attention.bands_with_entropy`; refused (ValueError) with groups of channels."""
        if self.value_groups:
            raise ValueError(
                "attention=naf with value_groups: heads have weights of their own, and no entropy in common"
            )
        yield from super().bands_with_entropy(query, key, value)

    def at(self, query: Tensor, key: Tensor, value: Tensor, coords: Tensor) -> Tensor:
        """Contract: `Attention.at`, with each window centred on its point."""
        key = self._pooled(query, key)
        if not self.value_groups and self.convolve:
            return super().at(query, key, value, coords)
        grid = self.convolved_rows(query)(slice(0, query.shape[2])).permute(0, 3, 1, 2)  # (B,D,Qh,Qw)
        queries = self.project_query(normed(self.norm_query, points.sample(grid, coords)))  # (B,N,D)
        keys, values = self._keys(key), under_autocast(value).permute(0, 2, 3, 1)  # (B,h,w,·)
        if not self.value_groups:
            return points.attend(queries, keys, values, coords, self.window_ratio, self.num_heads)
        parts = zip(*(x.tensor_split(self.num_heads, -1) for x in (queries, keys, values)), strict=True)
        return torch.cat([points.attend(q, k, v, coords, self.window_ratio, 1) for q, k, v in parts], 1)

    def convolved_rows(self, query: Tensor) -> Callable[[slice], Tensor]:
        if self.convolve:
            return super().convolved_rows(query)
        return lambda rows: query[:, :, rows].permute(0, 2, 3, 1)  # (B,rows,Qw,D)

    def _bands(self, query, key, value, output=None, mix=torch.bmm, image=None):
        return super()._bands(query, self._pooled(query, key), value, output, mix, image)

    def _pooled(self, query: Tensor, key: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(query, key.shape[-2:]) if self.pooled_keys else key  # (B,D,h,w)

    def _mixed(self, weights, values, mix, further=None):
        if not self.value_groups:
            return super()._mixed(weights, values, mix, further)
        parts = values.tensor_split(self.num_heads, -1)  # (P,K,C/heads)
        return torch.cat([mix(one.to(part.dtype), part) for one, part in zip(weights, parts, strict=True)], -1)
