"""`featup_jbu`: learned joint bilateral upsampling, twice the size at a time (one encoder's)."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.fast.norm_act_conv import without_autocast
from experiments.peers.base import CannotUpsample, Peer, register_peer
from experiments.peers.tiles import places, seen_by_tiles, tiles, untiled, weighted_sums

RADIUS = 3
DIAMETER = 2 * RADIUS + 1
OFFSETS = tuple(itertools.product(range(-RADIUS, RADIUS + 1), repeat=2))
KEY_DIM = 32
TILE = 8


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
        return weighted_sums(kernel, enlarged, OFFSETS, TILE, "reflect")

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
    near = places(OFFSETS, TILE, RADIUS, 1, x.device)  # (64,49)

    def products() -> Iterator[Tensor]:
        for own, others in zip(tiles(x, TILE), seen_by_tiles(x, TILE, RADIUS, "reflect"), strict=True):
            alike = own.mT @ others  # (B,n,64,196)
            yield alike.gather(3, near.expand(*alike.shape[:2], -1, -1)).mT  # (B,n,49,64)

    with without_autocast(x):
        return untiled(products(), TILE, tuple(x.shape[-2:]))


def _two_layers(channels: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(hidden, outputs, 1))
