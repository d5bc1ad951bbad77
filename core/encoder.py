"""The residual encoder that AnyUp uses five times: a convolution, then residual blocks of 1x1 convolutions.

`Encoder.plain` is the definition, in plain PyTorch operations; it runs for export, compilation, second derivatives, and
small images on a GPU. Otherwise `core/fast/encoder.py` computes the same result to rounding, with little memory.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.fast import launches
from core.fast.encoder import Weights, encode, refuse_transforms
from core.fast.norm_act_conv import NUM_GROUPS, Buffers, Step, under_autocast

Stem = Callable[[Tensor], Tensor]


class ResBlock(nn.Module):
    """(B,in,H,W) -> (B,out,H,W): twice GroupNorm(8), SiLU, 1x1 convolution; plus the input (AnyUp, section 3)."""

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
        stem: the first layer: a convolution, or the feature-agnostic layer.
        stem_channels: number of channels that the stem returns.
        embed_dim: D, a multiple of 8.
    """

    def __init__(self, stem: nn.Module, stem_channels: int, embed_dim: int):
        super().__init__(stem, ResBlock(stem_channels, embed_dim), ResBlock(embed_dim, embed_dim))
        self.embed_dim = embed_dim
        self.twice_differentiable = False
        self.compiles = False
        """True: `forward` runs `plain` through `torch.compile`."""
        self._compiled: tuple[Encoder, Stem] | None = None  # with its owner, because copies have other weights

    def __getstate__(self) -> dict:
        """Leaves the compiled function out: a copy, in this process or another, compiles its own."""
        return {**self.__dict__, "_compiled": None}

    def forward(
        self,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
        buffers: Buffers | None = None,
        stem: Stem | None = None,
    ) -> Tensor:
        """Encodes; with `output_size`, then averages over its cells (adaptive average pooling).

        `stem` replaces the first layer, for example by the same layer with further inputs bound to it.

        Raises:
            RuntimeError: under `torch.func`, unless `twice_differentiable` is set.
        """
        plain = self.twice_differentiable or torch.compiler.is_compiling()
        if plain or (not self.compiles and launches.of_small_work_dominate(x, self.embed_dim)):
            return self.plain(x, output_size, stem)
        if self.compiles and stem is None:
            return self._compiled_plain()(x, output_size)
        refuse_transforms()
        return self.fast(x, output_size, buffers or Buffers(), stem)

    def _compiled_plain(self) -> Stem:
        if self._compiled is None or self._compiled[0] is not self:
            # Older versions of PyTorch lack these two: they compile for 8 sizes, and run others uncompiled.
            limits = {"recompile_limit": 64, "isolate_recompiles": True}
            known = inspect.signature(torch.compile).parameters
            compiled = torch.compile(self.plain, dynamic=False, **{k: v for k, v in limits.items() if k in known})
            object.__setattr__(self, "_compiled", (self, compiled))  # not registered as a child
        return self._compiled[1]

    def plain(self, x: Tensor, output_size: tuple[int, int] | None = None, stem: Stem | None = None) -> Tensor:
        """The definition, in operations that can be differentiated any number of times."""
        for layer in (stem or self[0], self[1], self[2]):
            x = layer(x.contiguous())  # PyTorch's GroupNorm loses digits in channels-last memory
        return x if output_size is None else F.adaptive_avg_pool2d(x, output_size)  # (B,D,h,w)

    def fast(
        self, x: Tensor, output_size: tuple[int, int] | None, buffers: Buffers, stem: Stem | None = None
    ) -> Tensor:
        """As `plain`, in two image-sized buffers. With gradients, `backward` recomputes what is cheap."""
        stem = stem or self[0]
        weights = Weights(_matrix(stem), _matrix(self[1].shortcut), (*_steps(self[1]), *_steps(self[2])))
        pixels = x if weights.stem is not None else stem(x)
        pixels = under_autocast(pixels.permute(0, 2, 3, 1).contiguous())  # (B,H,W,·)
        return encode(pixels, weights, output_size, buffers)


def _steps(block: ResBlock) -> tuple[Step, Step]:
    norm, _, conv, next_norm, _, next_conv = block.block
    return tuple(Step(n.weight, n.bias, _matrix(c), n.eps) for n, c in ((norm, conv), (next_norm, next_conv)))


def _matrix(layer: Stem) -> Tensor | None:
    """(out,in) of a 1x1 convolution without bias; None for other layers."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return under_autocast(layer.weight.flatten(1))
    return None
