"""`lift`: LiFT, a small U-Net that doubles the grid and makes new features (one encoder's)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.peers.base import Peer, register_peer
from experiments.peers.guidance import sized

_WIDTH = 32  # channels of the encoded image


class _DoubleConv(nn.Module):
    def __init__(self, into: int, out: int):
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (into, out):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class _Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        into = channels + _WIDTH
        self.up = nn.ConvTranspose2d(into, into // 2, 2, stride=2)
        self.conv_1 = _DoubleConv(into // 2 + _WIDTH, channels // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B,C+32,h,w), (B,32,2h,2w) -> (B,C/2,2h,2w)."""
        return self.conv_1(torch.cat([self.up(x), skip], dim=1))


@register_peer("lift")
class LiFT(Peer):
    """LiFT (Suri, Walmer, Gupta & Shrivastava, "LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT
    Descriptors", ECCV 2024). Outputs are made by convolutions: they are no means of the features.

    One step doubles the grid. The image is encoded to twice the grid and to the grid itself, and joins the features at
    both. Several steps use the same weights, and each takes an image twice as large. Repeated, the method leaves the
    features' distribution (UPLiFT, arXiv 2601.17950), so one step is the default. Outputs of another size are refused,
    or resized with `any_size`. The authors' code takes images of exactly `patch` pixels for each feature; here images
    of other sizes are first resized to that.

    Parity: saksham-s/lift @fd6d929 (MIT), equal random weights and batch statistics, one step, C 384, patches 8 and
    16: no difference.

    Args:
        weights: a file; None: new weights.
        channels: C of new weights, from 2.
        patch: pixels of the encoder's patches, 8 or 16.
        num_steps: how often the grid is doubled.
        any_size: outputs of other sizes are resized from the last step's.

    Raises:
        ValueError: one channel, another patch, or no step.
    """

    def __init__(
        self,
        weights: Path | None = None,
        channels: int | None = None,
        patch: int = 16,
        num_steps: int = 1,
        any_size: bool = False,
    ):
        super().__init__()
        self.channels = channels = self.channels_of(weights, "outc.bias", channels, axis=0)
        if channels < 2 or patch not in (8, 16) or num_steps < 1:
            raise ValueError(
                "lift needs two channels, patch 8 or 16, and at least one step, got "
                f"channels={channels}, patch={patch}, num_steps={num_steps}"
            )
        self.patch, self.num_steps, self.factor, self.any_size = patch, num_steps, 2**num_steps, any_size
        self.up1 = _Up(channels)
        self.outc = nn.Conv2d(channels // 2, channels, 1)
        self.image_convs_1 = nn.Sequential(*_halving(3), *_halving(_WIDTH))
        self.image_convs_2 = nn.Sequential(*_halving(_WIDTH))
        if weights is not None:
            self.load_weights(weights)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        for _ in range(self.num_steps):
            features = self.step(image, features)  # (B,C,2h,2w), then (B,C,4h,4w), ...
        return features

    def step(self, image: Tensor, features: Tensor) -> Tensor:
        """(B,3,H,W), (B,C,h,w) -> (B,C,2h,2w)."""
        h, w = features.shape[-2:]
        fine = self.image_convs_1(
            sized(image, (self.patch * h, self.patch * w))
        )  # (B,32,4h,4w) or, with patch 8, (B,32,2h,2w)
        if self.patch == 16:
            fine = F.max_pool2d(fine, 2)  # (B,32,2h,2w)
        joined = torch.cat([features, self.image_convs_2(fine)], dim=1)  # (B,C+32,h,w)
        return self.outc(self.up1(joined, fine))


def _halving(into: int) -> list[nn.Module]:
    return [nn.Conv2d(into, _WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(_WIDTH), nn.ReLU()]
