"""Peers that do not look at the image: `nearest`, `bilinear`, `bicubic`, `lanczos`, `area_bilinear`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.peers.base import Peer, register_peer, resampled

LOBES = 3
"""Of the Lanczos kernel on each side, in cells."""


class Interpolation(Peer):
    """PyTorch's interpolation, with cell i of h centred at (i + 0.5) / h (`align_corners=False`), not antialiased."""

    mode = ""
    linear_in_values = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        return F.interpolate(features, size, mode=self.mode)  # (B,C,Qh,Qw)


@register_peer("nearest")
class Nearest(Interpolation):
    """Each output takes the cell that contains its centre."""

    mode = "nearest-exact"


@register_peer("bilinear")
class Bilinear(Interpolation):
    """Linear in both directions; the reference that evaluations compare with."""

    mode = "bilinear"


@register_peer("bicubic")
class Bicubic(Interpolation):
    """Cubic convolution with a = -0.75. Some weights are negative, so outputs may leave the features' convex hull."""

    mode = "bicubic"


@register_peer("lanczos")
class Lanczos(Peer):
    """The window of a sinc by its own central lobe, three cells to each side (Lanczos; Turkowski 1990).

    Not antialiased; cells outside the image have no weight, and the others' sum is 1. Some weights are negative.
    """

    linear_in_values = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        rows, columns = (_lanczos(n, q).to(features) for n, q in zip(features.shape[-2:], size, strict=True))
        return rows @ features @ columns.T  # (B,C,Qh,Qw)


@register_peer("area_bilinear")
class AreaBilinear(Peer):
    """Bilinear interpolation of features that were averaged to a coarser grid first: a control without detail.

    A measure on which it beats `bilinear` rewards smoothness.

    Args:
        shrink: how many times coarser each axis gets, rounded up to whole cells.

    Raises:
        ValueError: `shrink` is below 1.
    """

    linear_in_values = True

    def __init__(self, shrink: int = 2):
        super().__init__()
        if shrink < 1:
            raise ValueError(f"area_bilinear needs shrink of at least 1, got {shrink}")
        self.shrink = shrink

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        coarse = tuple(-(-n // self.shrink) for n in features.shape[-2:])
        return F.interpolate(resampled(features, coarse), size, mode="bilinear")  # (B,C,Qh,Qw)


def _lanczos(length: int, outputs: int) -> Tensor:
    """(outputs,length) float64 weights of the cells for each output position along an axis."""
    position = (torch.arange(outputs, dtype=torch.float64) + 0.5) * length / outputs
    distance = torch.arange(length) + 0.5 - position[:, None]
    weights = torch.sinc(distance) * torch.sinc(distance / LOBES) * (distance.abs() < LOBES)
    return weights / weights.sum(1, keepdim=True)
