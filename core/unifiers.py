"""Baseline fillers of `unifier`: AnyUp's feature-agnostic layer, and the ablation without a feature path."""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.encoder import Encoder
from core.hooks import Unifier
from core.registry import register

MAX_RESPONSES = {"cpu": 2**18, "cuda": 2**26}  # filter responses held at once: on CPU they stay in cache


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

    def forward(self, features: Tensor, basis: Tensor | None = None) -> Tensor:
        """`basis`: filters for this call, (num_basis,1,k,k), in place of the learned ones."""
        basis = self.basis if basis is None else basis
        batch, channels, height, width = features.shape
        num_basis, _, kernel_size, _ = basis.shape
        padding = kernel_size // 2
        taps = features.new_ones(1, 1, kernel_size, kernel_size)
        inside = F.conv2d(features.new_ones(1, 1, height, width), taps, padding=padding)  # (1,1,h,w)
        padded = F.pad(features, (padding,) * 4)
        keep_little = torch.is_grad_enabled() and not (self.twice_differentiable or torch.compiler.is_compiling())
        budget = MAX_RESPONSES.get(features.device.type, 2**18)
        step = max(1, budget // (batch * width * channels * num_basis))
        bands = []
        for top in range(0, height, step):
            bottom = min(top + step, height)
            band = padded[:, :, top : bottom + 2 * padding], inside[:, :, top:bottom], basis, budget
            bands.append(checkpoint(self._band, *band, use_reentrant=False) if keep_little else self._band(*band))
        return torch.cat(bands, 2)  # (B,M,h,w)

    def _band(self, padded: Tensor, inside: Tensor, basis: Tensor, budget: int) -> Tensor:
        """Rows of cells: (B,C,rows+k-1,w+k-1), (1,1,rows,w) -> (B,M,rows,w)."""
        batch, channels = padded.shape[:2]
        num_basis, _, kernel_size, _ = basis.shape
        patches = padded.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1) / inside[..., None, None]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, kernel_size**2)  # (B·rows·w,C,k²)
        unified = []
        for some in patches.split(max(1, budget // (channels * num_basis))):
            responses = some.flatten(0, 1) @ basis.flatten(1).t()  # (cells·C,M)
            if self.ordering is Ordering.released:
                unified.append(responses.view(-1, num_basis, channels).softmax(1).mean(2))
            else:
                unified.append(responses.view(-1, channels, num_basis).softmax(2).mean(1))
        return torch.cat(unified).view(batch, *inside.shape[-2:], num_basis).permute(0, 3, 1, 2)


@register("learned_basis")
class LearnedBasis(Unifier):
    """AnyUp's feature path: L2 normalisation over channels, the feature-agnostic layer, two residual blocks.

    Args:
        num_basis: number M of filters; a multiple of 8.
        kernel_size: of the filters, in cells of the feature grid; odd.
        ordering: `paper` (eq. 1, indifferent to the order of channels) or `released` (what published weights need).
    """

    def __init__(self, embed_dim: int, num_basis: int = 128, kernel_size: int = 5, ordering: Ordering = Ordering.paper):
        super().__init__()
        if num_basis < 8 or num_basis % 8:
            raise ValueError(
                f"num_basis must be a positive multiple of 8 (unifier=none has no filters), got {num_basis}"
            )
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
