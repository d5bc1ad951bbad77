"""What several peers do with the image before they use it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.backbones import IMAGENET_MEAN, IMAGENET_STD


def sized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,N,H,W) resized bilinearly with antialiasing; the same tensor if it has that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    wide = image.to(torch.promote_types(image.dtype, torch.float32))  # the CPU has no half precision for it
    return F.interpolate(wide, tuple(size), mode="bilinear", antialias=True).to(image.dtype)


def pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,N,H,W) averaged over cells; the same tensor if it has that size, which PyTorch would copy slowly."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.adaptive_avg_pool2d(x, size)


def rgb_of(image: Tensor) -> Tensor:
    """(B,3,H,W) normalised with ImageNet's mean and deviation -> RGB in [0,1]."""
    mean, std = (image.new_tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (image * std + mean).clamp(0, 1)


def scaled_colours(image: Tensor) -> Tensor:
    """(B,3,H,W) -> each image's channels scaled linearly to [-0.5, 0.5]."""
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    return (image - low) / (high - low).clamp_min(1e-4) - 0.5


def centre_coords(size: tuple[int, int], like: Tensor) -> Tensor:
    """(h,w,2) centres of a grid's cells, (row, column) in the unit square, with the device and dtype of `like`."""
    axes = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
