"""The residual encoder that AnyUp uses five times: a convolution and residual blocks of 1x1 convolutions.

`Encoder.forward` reads like its definition (UPSTREAM: GroupNorm(8), SiLU, 1x1 convolution, twice, plus identity).
It runs as plain PyTorch operations where they are wanted (export, compilation, second derivatives) and through
`core/norm_act_conv.py`, exact, streamed and with little memory, everywhere else.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import norm_act_conv as stream
from core.norm_act_conv import NUM_GROUPS

Stem = Callable[[Tensor], Tensor]


class ResBlock(nn.Module):
    """(B,in,H,W) -> (B,out,H,W): GroupNorm, SiLU, 1x1 convolution, twice, plus the input (AnyUp, section 3)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.shortcut(x)


class Encoder(nn.Sequential):
    """(B,in,H,W) -> (B,D,H,W), or pooled to (B,D,h,w): `stem`, then two residual blocks.

    Args:
        stem: what produces the blocks' input: a convolution, or a feature-agnostic layer.
        stem_channels: how many channels the stem returns.
        embed_dim: D, a multiple of 8.
    """

    def __init__(self, stem: nn.Module, stem_channels: int, embed_dim: int):
        super().__init__(stem, ResBlock(stem_channels, embed_dim), ResBlock(embed_dim, embed_dim))
        self.twice_differentiable = False
        self.compiled = None

    def forward(
        self,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
        buffers: stream.Buffers | None = None,
        stem: Stem | None = None,
    ) -> Tensor:
        """Encodes, then averages over the cells of `output_size` (adaptive average pooling) if one is given.

        `stem` runs in place of the first layer: that layer with more inputs bound to it than x, say.
        """
        if self.twice_differentiable or torch.compiler.is_compiling():
            return self.plain(x, output_size, stem)
        if self.compiled is not None and stem is None:
            return self.compiled(x, output_size)
        return self.streamed(x, output_size, buffers or stream.Buffers(), stem)

    def plain(self, x: Tensor, output_size: tuple[int, int] | None = None, stem: Stem | None = None) -> Tensor:
        """The definition, in operations that differentiate any number of times."""
        for layer in (stem or self[0], self[1], self[2]):
            x = layer(x.contiguous())  # PyTorch's GroupNorm loses digits in channels-last memory
        return x if output_size is None else F.adaptive_avg_pool2d(x, output_size)  # (B,D,h,w)

    def streamed(
        self, x: Tensor, output_size: tuple[int, int] | None, buffers: stream.Buffers, stem: Stem | None = None
    ) -> Tensor:
        """The same numbers with two image-sized buffers, or (with gradients) by recomputing what is cheap."""
        _, first, last = self
        pixels, moments = stream.stem(stem or self[0], x, buffers)  # (B,H,W,D)
        hidden, hidden_moments = _first_half(first, pixels, moments, buffers)
        shortcut = pixels
        if not isinstance(first.shortcut, nn.Identity):
            shortcut, _ = stream.linear(pixels, first.shortcut, buffers)
        norm, _, conv = first.block[3:]
        pixels, moments = stream.norm_act_conv(hidden, hidden_moments, norm, conv, out=shortcut, residual=shortcut)
        buffers.give_back(hidden)
        hidden, hidden_moments = _first_half(last, pixels, moments, buffers)
        norm, _, conv = last.block[3:]
        finish = partial(stream.norm_act_conv, hidden, hidden_moments, norm, want_moments=False)
        if output_size is None or output_size == tuple(pixels.shape[1:3]):
            pixels, _ = finish(conv, out=pixels, residual=pixels)
            buffers.give_back(hidden)
            return pixels.permute(0, 3, 1, 2)  # (B,D,H,W)
        # The last 1x1 convolution commutes with the average: apply it to the few pooled pixels.
        active, _ = finish(None, out=hidden)
        pooled, active_pooled = stream.pool(pixels, output_size), stream.pool(active, output_size)
        buffers.give_back(pixels)
        buffers.give_back(hidden)
        return pooled + conv(active_pooled)  # (B,D,h,w)


def _first_half(block: ResBlock, pixels: Tensor, moments: stream.Moments, buffers: stream.Buffers):
    norm, _, conv = block.block[:3]
    return stream.norm_act_conv(pixels, moments, norm, conv, out=buffers.take(pixels, conv.out_channels))
