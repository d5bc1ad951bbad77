"""`featup_jbu`: learned joint bilateral upsampling, twice the size at a time (one encoder's)."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.peers.base import CannotUpsample, Peer, register_peer

RADIUS = 3
DIAMETER = 2 * RADIUS + 1
KEY_DIM = 32
TILE = 8
SEEN = TILE + 2 * RADIUS
"""Neighbours are looked up for tiles of 8 x 8 positions, which see 14 x 14: then it is a product of small matrices."""


@register_peer("featup_jbu")
class FeatUpJBU(Peer):
    """FeatUp's stack of learned joint bilateral filters (Fu et al., ICLR 2024, arXiv 2403.10516).

    Each stage enlarges the features bicubically to twice their size and filters them with a 7 x 7 kernel of each
    position: a learned range kernel of the image, times a Gaussian, and a learned correction. A last layer mixes the
    channels, so it is one encoder's. The authors' stacks have four stages, 16 times the size.

    Weights: the authors' `*_jbu_stack_cocostuff.ckpt` (MIT; the stack lies under `upsampler.`), or new ones. Stages and
    C are read from them. Checked beside mhamilton723/FeatUp @6b5a6c0 with its three published stacks, with PyTorch
    operations in the place of its compiled convolution: see docs/peers.md.

    Args:
        weights: a file; None: new weights.
        channels: C of new weights.
        stages: of new weights.
        any_size: other output sizes than 2^stages times the grid are resampled from that.
    """

    def __init__(
        self,
        weights: Path | None = None,
        channels: int | None = None,
        stages: int = 4,
        any_size: bool = False,
    ):
        super().__init__()
        self.channels = self.channels_of(weights, "fixup_proj.1.weight", channels)
        if weights is not None:
            stages = sum(bool(re.fullmatch(r"up\d+\.range_temp", name)) for name in self.read_weights(weights))
        if stages < 1:
            raise ValueError(f"featup_jbu needs at least one stage, got stages={stages}")
        self.factor, self.any_size = 2**stages, any_size
        self.stages = [f"up{number}" for number in range(1, stages + 1)]
        for name in self.stages:
            self.add_module(name, Stage())
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(self.channels, self.channels, 1))
        if weights is not None:
            self.load_weights(weights)

    @classmethod
    def own_names(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Their files may hold the encoder beside the stack."""
        stack = {name.removeprefix("upsampler."): one for name, one in state.items() if name.startswith("upsampler.")}
        return stack or state

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        if min(features.shape[-2:]) < 2:
            raise CannotUpsample(
                f"peer featup_jbu reflects {RADIUS} pixels at the borders of twice the grid: it needs features of at "
                f"least 2x2, got {'x'.join(map(str, features.shape[-2:]))}"
            )
        for name in self.stages:
            features = getattr(self, name)(features, image)
        return features + 0.1 * self.fixup_proj(features)  # (B,C,Qh,Qw)


class Stage(nn.Module):
    """(B,C,h,w), (B,3,H,W) image -> (B,C,2h,2w)."""

    def __init__(self):
        super().__init__()
        self.range_temp, self.sigma_spatial = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(1.0))
        self.range_proj = _two_layers(3, KEY_DIM, KEY_DIM)
        self.fixup_proj = _two_layers(3 + DIAMETER**2, DIAMETER**2, DIAMETER**2)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        size = tuple(2 * n for n in features.shape[-2:])
        guidance = F.adaptive_avg_pool2d(image, size)  # (B,3,2h,2w)
        kernel = self.range_kernel(guidance) * self.spatial_kernel()[:, None, None]  # (B,49,2h,2w)
        kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
        kernel = kernel + 0.1 * self.fixup_proj(torch.cat([kernel, guidance], 1))
        enlarged = F.interpolate(features, size, mode="bicubic")  # (B,C,2h,2w)
        return _applied(kernel, enlarged)

    def range_kernel(self, guidance: Tensor) -> Tensor:
        """(B,3,2h,2w) -> (B,49,2h,2w): how alike each neighbour's encoded colours are, with sum 1."""
        encoded = self.range_proj(guidance)  # (B,32,2h,2w)
        return (self.range_temp.exp().clamp(1e-4, 1e4) * _likeness(encoded)).softmax(1)

    def spatial_kernel(self) -> Tensor:
        """(49,): a Gaussian of the distance, in half windows."""
        axis = torch.linspace(-1, 1, DIAMETER, device=self.sigma_spatial.device, dtype=self.sigma_spatial.dtype)
        squared = axis[:, None] ** 2 + axis**2  # (7,7)
        return torch.exp(-squared / (2 * self.sigma_spatial**2)).flatten()


def _likeness(x: Tensor) -> Tensor:
    """(B,c,H,W) -> (B,49,H,W): products of each vector with those of its neighbours, row by row."""
    bands = []
    for own, near in zip(_tiles(x), _windows(x), strict=True):
        products = own.mT @ near  # (B,n,64,196)
        bands.append(_untiled(products.gather(3, _near(x).expand(*products.shape[:3], -1)).mT))
    return torch.cat(bands, 2)[:, :, : x.shape[2], : x.shape[3]]


def _applied(kernel: Tensor, x: Tensor) -> Tensor:
    """(B,49,H,W) weights of each position's neighbours, (B,c,H,W) -> (B,c,H,W)."""
    bands = []
    for own, near in zip(_tiles(kernel), _windows(x), strict=True):
        weights = own.new_zeros(*own.shape[:2], TILE**2, SEEN**2)
        weights = weights.scatter(3, _near(x).expand(*own.shape[:2], -1, -1), own.mT)  # (B,n,64,196)
        bands.append(_untiled(near @ weights.mT))
    return torch.cat(bands, 2)[:, :, : x.shape[2], : x.shape[3]]


def _tiles(x: Tensor) -> Iterator[Tensor]:
    """(B,c,H,W) -> (B,n,c,64) of each row of tiles; beyond the last row and column are zeros."""
    bottom, right = (-side % TILE for side in x.shape[-2:])
    return _rows(F.pad(x, (0, right, 0, bottom)).unfold(2, TILE, TILE).unfold(3, TILE, TILE))


def _windows(x: Tensor) -> Iterator[Tensor]:
    """(B,c,H,W) -> (B,n,c,196) of each row of tiles: what the tiles see; at the border the image is reflected."""
    bottom, right = (-side % TILE for side in x.shape[-2:])
    padded = F.pad(F.pad(x, (RADIUS,) * 4, mode="reflect"), (0, right, 0, bottom))
    return _rows(padded.unfold(2, SEEN, TILE).unfold(3, SEEN, TILE))


def _rows(parts: Tensor) -> Iterator[Tensor]:
    """(B,c,m,n,k,k) -> m times (B,n,c,k·k)."""
    return (row.permute(0, 2, 1, 3, 4).flatten(3) for row in parts.unbind(2))


def _untiled(band: Tensor) -> Tensor:
    """(B,n,c,64) -> (B,c,8,8·n)."""
    return band.unflatten(3, (TILE, TILE)).permute(0, 2, 3, 1, 4).flatten(3)


def _near(like: Tensor) -> Tensor:
    """(64,49) int64: places of each position's neighbours among what its tile sees."""
    own, away = torch.arange(TILE, device=like.device), torch.arange(DIAMETER, device=like.device)
    along = own[:, None] + away  # (8,7)
    return (along[:, None, :, None] * SEEN + along[None, :, None, :]).flatten(2).flatten(0, 1)


def _two_layers(channels: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(hidden, outputs, 1))
