"""Baseline fillers of `unifier`: AnyUp's feature-agnostic layer, and the ablation without a feature path."""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.encoder import Encoder
from core.hooks import Unifier
from core.registry import register

MAX_RESPONSES = 2**22  # filter responses held at once: 16 MB in float32


class Ordering(Enum):
    """Which reading of AnyUp's feature-agnostic layer: see `BasisConvolution`."""

    paper = "paper"
    released = "released"


class BasisConvolution(nn.Module):
    """(B,C,h,w) -> (B,num_basis,h,w): every channel is convolved with the same learned filters.

    The filters are normalised by how many of their taps lie inside the feature grid. With `paper` (AnyUp, eq. 1) a
    softmax over the filters and a mean over the channels follow, so the order of channels does not matter. The
    released code reads the responses, laid out (channel, filter), as (filter, channel) instead, and its
    checkpoints were trained that way: `released`.
    """

    def __init__(self, num_basis: int, kernel_size: int, ordering: Ordering):
        super().__init__()
        self.ordering = ordering
        self.basis = nn.Parameter(torch.randn(num_basis, 1, kernel_size, kernel_size))
        self.twice_differentiable = False

    def forward(self, features: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        num_basis, _, kernel_size, _ = self.basis.shape
        padding = kernel_size // 2
        inside = F.conv2d(
            features.new_ones(1, 1, height, width), features.new_ones(1, 1, kernel_size, kernel_size), padding=padding
        )  # (1,1,h,w): taps inside the grid
        padded = F.pad(features, (padding,) * 4)
        rows = max(1, MAX_RESPONSES // (batch * width * channels * num_basis))
        keep_little = torch.is_grad_enabled() and not (self.twice_differentiable or torch.compiler.is_compiling())
        bands = []
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            band = padded[:, :, top : bottom + 2 * padding], inside[:, :, top:bottom], self.basis
            bands.append(checkpoint(self._band, *band, use_reentrant=False) if keep_little else self._band(*band))
        return torch.cat(bands, 2)  # (B,M,h,w)

    def _band(self, padded: Tensor, inside: Tensor, basis: Tensor) -> Tensor:
        batch, channels = padded.shape[:2]
        num_basis, _, kernel_size, _ = basis.shape
        rows, width = inside.shape[-2:]
        patches = padded.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1)  # (B,C,rows,w,k,k)
        patches = (patches / inside[..., None, None]).permute(0, 2, 3, 1, 4, 5)  # (B,rows,w,C,k,k)
        responses = patches.reshape(-1, kernel_size**2) @ basis.flatten(1).t()  # (B·rows·w·C,M)
        if self.ordering is Ordering.released:
            unified = responses.view(-1, num_basis, channels).softmax(1).mean(2)
        else:
            unified = responses.view(-1, channels, num_basis).softmax(2).mean(1)
        return unified.view(batch, rows, width, num_basis).permute(0, 3, 1, 2)  # (B,M,rows,w)


@register("learned_basis")
class LearnedBasis(Unifier):
    """AnyUp's feature path: L2 normalisation over channels, the feature-agnostic layer, two residual blocks.

    Args:
        num_basis: number M of filters; a multiple of 8.
        kernel_size: of the filters, in cells of the feature grid; odd.
        ordering: `paper` (eq. 1, indifferent to the order of channels) or `released` (what published weights need).
    """

    def __init__(
        self, embed_dim: int, num_basis: int = 128, kernel_size: int = 5, ordering: Ordering = Ordering.paper
    ):
        super().__init__()
        if num_basis < 8 or num_basis % 8:
            raise ValueError(f"num_basis must be a positive multiple of 8 (unifier=none has no filters), got {num_basis}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.encoder = Encoder(BasisConvolution(num_basis, kernel_size, Ordering(ordering)), num_basis, embed_dim)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        return self.encoder(F.normalize(features, dim=1))


@register("none")
class NoUnifier(Unifier):
    """The paper's ablation without a feature path: keys come from the image alone."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        return guidance.new_zeros(batch, self.embed_dim, height, width)
