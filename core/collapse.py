"""Signs that representations collapse: how many directions they use, and how much they vary over an image.

All take (B,D,H,W) embeddings or outputs, and give one number for each image, (B,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the singular values, as shares of their sum (Roy and Vetterli, EUSIPCO 2007).

    The mean vector is taken away first. Between 1 and min(H·W - 1, D); 0 if all vectors of the image are the same.
    """
    vectors = x.flatten(2).mT  # (B,H·W,D)
    values = torch.linalg.svdvals(vectors - vectors.mean(1, keepdim=True))  # (B,min(H·W,D))
    shares = values / values.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    rounding = 10 * torch.finfo(x.dtype).eps * x.flatten(1).norm(dim=1)
    return torch.special.entr(shares).sum(1).exp() * (values[:, 0] > rounding)


def spatial_variance(x: Tensor) -> Tensor:
    """Mean squared distance of the vectors to the image's mean vector."""
    return x.var((2, 3), correction=0).sum(1)


def detail_variance(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Variance of what a coarser grid of (h,w) cells cannot carry: x minus its area averages, enlarged bilinearly."""
    carried = F.interpolate(F.interpolate(x, grid, mode="area"), x.shape[-2:], mode="bilinear")
    return spatial_variance(x - carried)
