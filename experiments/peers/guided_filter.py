"""`guided_filter`: features as a local linear function of colour, without any training."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.backbones import IMAGENET_STD
from experiments.peers.base import Peer, register_peer


@register_peer("guided_filter")
class GuidedFilter(Peer):
    """Fast guided filter (He & Sun, arXiv 1505.00996; He, Sun & Tang, TPAMI 2013, equations 11 to 19 for colour).

    In each window of low-resolution cells, features are the linear function of colour that fits them best. These
    functions are averaged over the windows that see a cell, interpolated bilinearly, and applied to the colours of the
    output. Windows are cut at the border.

    Args:
        radius: half a window, in low-resolution cells; the window has 2 radius + 1 rows and columns.
        ridge: penalty on the slope, a variance of RGB in [0,1]; the larger, the closer to a mean over the window.

    Raises:
        ValueError: a radius below 1, or a ridge that is not positive.
    """

    linear_in_values = True

    def __init__(self, radius: int = 1, ridge: float = 0.01):
        super().__init__()
        if radius < 1 or not ridge > 0:
            raise ValueError(f"guided_filter needs radius >= 1 and a positive ridge, got {radius} and {ridge}")
        self.radius, self.ridge = radius, ridge

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        wide = torch.promote_types(features.dtype, torch.float32)  # small variances are differences of large means
        rgb = image.to(wide) * torch.tensor(IMAGENET_STD, dtype=wide, device=image.device).view(3, 1, 1)
        fine, coarse = (F.interpolate(rgb, n, mode="area") for n in (size, features.shape[-2:]))  # (B,3,·,·)
        values = features.to(wide)
        colour, mean = self._mean(coarse), self._mean(values)  # (B,3,h,w), (B,C,h,w)
        products = coarse[:, :, None] * coarse[:, None]  # (B,3,3,h,w)
        covariance = self._mean(products.flatten(1, 2)).unflatten(1, (3, 3)) - colour[:, :, None] * colour[:, None]
        covariance = covariance + self.ridge * torch.eye(3, dtype=wide, device=image.device)[:, :, None, None]
        with_features = [self._mean(coarse[:, i, None] * values) - colour[:, i, None] * mean for i in range(3)]
        slopes = torch.einsum("bijyx,jbcyx->ibcyx", _inverse(covariance), torch.stack(with_features))  # (3,B,C,h,w)
        offset = mean - sum(colour[:, i, None] * slopes[i] for i in range(3))
        output = F.interpolate(self._mean(offset), size, mode="bilinear")
        for i in range(3):
            output += F.interpolate(self._mean(slopes[i]), size, mode="bilinear") * fine[:, i, None]
        return output.to(features.dtype)  # (B,C,Qh,Qw)

    def _mean(self, x: Tensor) -> Tensor:
        """Over the window around each cell, as far as it lies inside."""
        return F.avg_pool2d(x, 2 * self.radius + 1, 1, self.radius, count_include_pad=False)


def _inverse(matrices: Tensor) -> Tensor:
    """(B,3,3,h,w) -> their inverses."""
    return torch.linalg.inv(matrices.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)
