"""Whitened coordinates of an image's features: its principal directions, each divided by its standard deviation."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RANK_TOLERANCE = 1e-5
"""Directions with less variance than this share of the largest are rounding errors: they are left alone."""


class Basis(NamedTuple):
    """Whitened coordinates of an image's features."""

    mean: Tensor
    """(B,C,1)."""
    directions: Tensor
    """(B,C,K): orthonormal, leading first."""
    deviation: Tensor
    """(B,K): standard deviation of the cells along each direction; zero: the direction is not used."""


@torch.no_grad()
def basis_of(features: Tensor, num_directions: int) -> Basis:
    """The leading principal directions of each image's (B,C,h,w) features, in double precision."""
    with torch.autocast(features.device.type, enabled=False):
        vectors = features.flatten(2).double()  # (B,C,n)
        mean = vectors.mean(2, keepdim=True)
        centred = vectors - mean
        channels, cells = centred.shape[1:]
        few = min(num_directions, channels, cells - 1)
        wide = channels > cells
        gram = (centred.mT @ centred if wide else centred @ centred.mT) / cells  # of the smaller side
        variance, vectors = torch.linalg.eigh(gram)  # ascending
        variance, vectors = variance[:, -few:].flip(1), vectors[..., -few:].flip(2)
        used = variance > (RANK_TOLERANCE * variance[:, :1]).clamp(min=torch.finfo(torch.float32).tiny)
        deviation = torch.where(used, variance, 0).sqrt()
        if wide:
            inverse = torch.where(used, 1 / deviation, 0)
            vectors = centred @ vectors * (inverse / math.sqrt(cells))[:, None]
        dtype = torch.promote_types(features.dtype, torch.float32)
        return Basis(mean.to(dtype), (vectors * used[:, None]).to(dtype), deviation.to(dtype))


def coordinates(x: Tensor, basis: Basis) -> Tensor:
    """Whitened coordinates of (B,C,gh,gw) vectors -> (B,K,gh,gw); zero along unused directions."""
    with torch.autocast(x.device.type, enabled=False):
        inverse = torch.where(basis.deviation > 0, 1 / basis.deviation, 0)
        found = basis.directions.mT @ (x.flatten(2).to(basis.mean.dtype) - basis.mean)  # (B,K,gh·gw)
        return (found * inverse[..., None]).unflatten(2, x.shape[-2:])


def added(output: Tensor, along: Tensor, directions: Tensor) -> Tensor:
    """(B,C,Qh,Qw) output + (B,K,gh,gw) along (B,C,K) directions."""
    size = tuple(output.shape[-2:])
    if tuple(along.shape[-2:]) != size:
        along = F.interpolate(along, size, mode="bilinear", align_corners=False)
    pixels = output.permute(0, 2, 3, 1).flatten(1, 2)  # (B,Q,C), a view if the channels are last
    along, directions = along.flatten(2).mT.to(output.dtype), directions.mT.to(output.dtype)
    with torch.autocast(output.device.type, enabled=False):
        return torch.baddbmm(pixels, along, directions).unflatten(1, size).permute(0, 3, 1, 2)


def around(cells: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The side x side cells around the cell of each grid point: (B,K,h,w) -> (B,K,side²,gh,gw). Borders repeat."""
    size = cells.shape[-2:]
    padded = F.pad(cells, [side // 2] * 4, mode="replicate")
    found = padded.unfold(2, side, 1).unfold(3, side, 1).flatten(4).movedim(4, 2)  # (B,K,M,h,w)
    if tuple(size) == grid:
        return found
    rows, columns = (
        ((torch.arange(n, device=cells.device) + 0.5) * side_of / n).long()
        for n, side_of in zip(grid, size, strict=True)
    )
    return found.index_select(3, rows).index_select(4, columns)
