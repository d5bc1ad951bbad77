"""`guided_filter`: features as a local linear function of colour, without any training."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from core.backbones import IMAGENET_STD
from core.fast.norm_act_conv import without_autocast
from experiments.peers.base import Peer, register_peer
from experiments.peers.blocks import Blocks, blocks, grouped, seen, write_means


@register_peer("guided_filter")
class GuidedFilter(Peer):
    """Fast guided filter (He & Sun, arXiv 1505.00996; He, Sun & Tang, TPAMI 2013, equations 11 to 19 for colour).

    In each window of low-resolution cells, features are the linear function of colour that fits them best. These
    functions are averaged over the windows that see a cell, interpolated bilinearly, and applied to the colours of the
    output. Windows are cut at the border.

    The papers give no values for features. Of 22 pairs, (1, 1e-4) has the most detail at 2x on 24 photographs, or less
    by .007 at most, for ViT-Ti/16, MobileNetV2, SqueezeNet and HOG (docs/guided_filter.md).

    Args:
        radius: half a window, in low-resolution cells; the window has 2 radius + 1 rows and columns.
        ridge: penalty on the slope, a variance of RGB in [0,1]; the larger, the closer to a mean over the window.

    Raises:
        ValueError: a radius below 1, or a ridge that is not positive.
    """

    linear_in_values = True

    def __init__(self, radius: int = 1, ridge: float = 1e-4):
        super().__init__()
        if radius < 1 or not ridge > 0:
            raise ValueError(f"guided_filter needs radius >= 1 and a positive ridge, got {radius} and {ridge}")
        self.radius, self.ridge = radius, ridge

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        with without_autocast(features):  # small variances are differences of large means
            return self._filtered(image, features, size)

    def _filtered(self, image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
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
        functions = [self._mean(one) for one in (*slopes, offset)]  # of red, green, blue, and 1: 4 x (B,C,h,w)
        return _applied(functions, F.pad(fine, (0, 0, 0, 0, 0, 1), value=1.0), features.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """Over the window around each cell, as far as it lies inside."""
        return F.avg_pool2d(x, 2 * self.radius + 1, 1, self.radius, count_include_pad=False)


def _applied(functions: Sequence[Tensor], colours: Tensor, dtype: torch.dtype) -> Tensor:
    """4 x (B,C,h,w) coefficients of (B,4,Qh,Qw) colours -> (B,C,Qh,Qw), the coefficients interpolated bilinearly."""
    grid, size = functions[0].shape[-2:], colours.shape[-2:]
    rows, columns = (blocks(n, q, 3, colours.device) for n, q in zip(grid, size, strict=True))
    across = _bilinear(columns, columns.members, columns.windows).to(colours)  # (m,n',k')
    output = functions[0].new_empty(*functions[0].shape[:2], *size, dtype=dtype)
    for some, near in rows.bands():
        down = _bilinear(rows, some, near).to(colours)  # (n,k)
        space = (down[:, None, :, None] * across[:, None, :, None]).flatten(3).flatten(1, 2)  # (m,n·n',k·k')
        here = grouped(colours[:, :, some], columns).mT  # (B,m,n·n',4)
        weights = (here[..., None] * space[..., None, :]).flatten(3)  # (B,m,n·n',4·k·k')
        values = torch.cat([seen(one, near, columns) for one in functions], 2)  # (B,m,4·k·k',C)
        write_means(output[:, :, some], weights, values, columns)
    return output


def _bilinear(axis: Blocks, positions: Tensor | slice, cells: Tensor) -> Tensor:
    """(...,n) positions, (...,k) cells -> (...,n,k) weights; beyond the outermost centres the outermost cell counts."""
    places = axis.places[positions].clamp(min=0).minimum(axis.windows.max())
    return (1 - (places[..., None] - cells[..., None, :]).abs()).clamp(min=0)


def _inverse(matrices: Tensor) -> Tensor:
    """(B,3,3,h,w) -> their inverses."""
    return torch.linalg.inv(matrices.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)
