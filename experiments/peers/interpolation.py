"""Peers that do not look at the image: `nearest`, `bilinear`, `bicubic`."""

from torch import Tensor
from torch.nn import functional as F

from experiments.peers.base import Peer, register_peer


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
