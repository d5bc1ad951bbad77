"""Moves images and features along optical flow, and tells which pixels are visible in both frames.

A flow is (B,2,H,W): the displacement (x, y) of each pixel to its place in another frame, in pixels of this grid; NaN
where the point is hidden there. Pixel (column i, row j) has its centre at (i + 0.5, j + 0.5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(other: Tensor, flow: Tensor) -> Tensor:
    """Fetches the other frame's values, bilinearly, from where the flow points: (B,C,H,W), (B,2,H,W) -> (B,C,H,W).

    Where the flow is NaN, the value is that of the same place. Beyond the outermost pixel centres values are constant.
    Half precision is interpolated in single precision, because it cannot tell apart neighbouring positions.
    """
    limits = flow.new_tensor([flow.shape[-1], flow.shape[-2]]).view(2, 1, 1)
    grid = 2 * _targets(flow.nan_to_num()) / limits - 1  # (B,2,H,W)
    wide = torch.promote_types(other.dtype, torch.float32)
    fetched = F.grid_sample(
        other.to(wide), grid.permute(0, 2, 3, 1).to(wide), padding_mode="border", align_corners=False
    )
    return fetched.to(other.dtype)


def inside(flow: Tensor) -> Tensor:
    """(B,1,H,W) bool: the flow is known and points into the other frame."""
    limits = flow.new_tensor([flow.shape[-1], flow.shape[-2]]).view(2, 1, 1)
    place = _targets(flow)
    return ((place >= 0) & (place <= limits)).all(1, keepdim=True)  # NaN fails


def round_trip(there: Tensor, back: Tensor) -> Tensor:
    """(B,1,H,W): how far a pixel is from home after following both flows, as a share of what is allowed; squared.

    Sundaram, Brox & Keutzer (ECCV 2010), equation 5: |there + back|² / (0.01 (|there|² + |back|²) + 0.5), where `back`
    is fetched from where `there` points. Above 1 the pixel counts as occluded. NaN where either flow is.

    Args:
        there: (B,2,H,W) flow from this frame to the other. back: (B,2,H,W) flow from the other frame to this one.
    """
    returned = warp(back, there)  # (B,2,H,W); bilinear, so that one NaN among four neighbours is NaN
    miss = (there + returned).square().sum(1, keepdim=True)
    allowed = 0.01 * (there.square() + returned.square()).sum(1, keepdim=True) + 0.5
    return miss / allowed


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,2,H,W) in pixels -> (B,2,*size) in pixels of that grid.

    Averages over the known values. A pixel is NaN if the nearest pixel of the given flow is.
    """
    if tuple(flow.shape[-2:]) == tuple(size):
        return flow
    known = flow.isfinite().all(1, keepdim=True)  # (B,1,H,W)
    share = _resized(known.to(flow.dtype), size)
    mean = _resized(torch.where(known, flow, 0), size) / share.clamp(min=torch.finfo(flow.dtype).eps)
    factor = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).view(2, 1, 1)
    nearest = F.interpolate(known.to(flow.dtype), size, mode="nearest-exact") > 0
    return torch.where(nearest, mean * factor, torch.nan)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def _targets(flow: Tensor) -> Tensor:
    """(B,2,H,W): x and y of the place that each pixel's flow points to."""
    rows, columns = (torch.arange(n, device=flow.device, dtype=flow.dtype) + 0.5 for n in flow.shape[-2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return flow + torch.stack([x, y])
