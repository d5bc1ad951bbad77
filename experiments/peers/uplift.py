"""`uplift`: UPLiFT, steps that double the grid by means over 17 neighbours (one encoder's)."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.peers.base import Peer, register_peer
from experiments.peers.guidance import sized
from experiments.peers.tiles import weighted_sums

_WIDTHS = (16, 32, 64, 128, 128)  # channels of the image encoder's blocks
_GUIDE = 64  # channels of the decoder, from which the weights are predicted
_REACH = 2
_TILE = 4  # rows and columns of cells
OFFSETS = tuple(
    (i, j)
    for i in range(-_REACH, _REACH + 1)
    for j in range(-_REACH, _REACH + 1)
    if max(abs(i), abs(j)) < _REACH or {abs(i), abs(j)} <= {0, _REACH}
)
"""(row, column) of the 17 neighbours: the nine nearest, and eight at distance 2 in their directions; row by row."""


class _Conv(nn.Module):
    """`num` times 3x3 convolution, batch norm and ReLU; then 1x1; plus the input, cut or filled up with zeros."""

    def __init__(self, into: int, out: int, num: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num):
            layers += [nn.Conv2d(out if i else into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.conv = nn.Sequential(*layers, nn.Conv2d(out, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return _plus(x, self.conv(x))


class _Block(nn.Module):
    def __init__(self, into: int, out: int, num: int):
        super().__init__()
        self.blocks = nn.Sequential(_Conv(into, out, num))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        into = 3
        for i, out in enumerate(_WIDTHS):
            self.add_module(f"block_{i}", _Block(into, out, 1))
            into = out

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,H,W) -> (B,128,H,W) after the last block and after the one before."""
        x, before = image, image
        for block in self.children():
            x, before = block(x), x
        return x, before


class _Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(_GUIDE, _GUIDE, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class _Decoder(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_0 = _Block(channels + _WIDTHS[-1], _GUIDE, 2)
        self.up_1 = _Up()
        self.block_1 = _Block(_GUIDE + _WIDTHS[-2], _GUIDE, 2)

    def forward(self, features: Tensor, encoded: tuple[Tensor, Tensor]) -> Tensor:
        """(B,C,h,w) -> (B,64,2h,2w)."""
        guide = self.block_0(_joined(features, encoded[0]))  # (B,64,h,w)
        return self.block_1(_joined(self.up_1(guide), encoded[1]))


class _Attender(nn.Module):
    """Local Attender: every new cell is a mean over 17 neighbours of the cell that it lies in."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(_GUIDE, len(OFFSETS), 1)

    def forward(self, guide: Tensor, values: Tensor) -> Tensor:
        """(B,64,2h,2w), (B,C,h,w) -> (B,C,2h,2w)."""
        weights = _plus(guide, self.conv1(guide)).softmax(dim=1)  # (B,17,2h,2w)
        return weighted_sums(weights, values, OFFSETS, _TILE, "replicate")


@register_peer("uplift")
class UPLiFT(Peer):
    """UPLiFT (Walmer, Suri, Aggarwal & Shrivastava, arXiv 2601.17950, CVPR 2026), in its form for ViTs.

    One step doubles the grid, and every new feature is a mean of 17 old ones. The weights are predicted from image and
    features by convolutions, without keys. All steps share their weights and the encoded image. Here as many steps are
    made as reach the output size (four for 16 pixels a cell), and the result is resized bilinearly with antialiasing to
    the output size, as in the authors' code. The form for VAEs, which adds noise and is no mean, is left out.

    Parity: mwalmer-umd/UPLiFT @85f09ee (MIT), equal random weights and batch statistics, C 384, one to four steps,
    patches 14 and 16: largest error 1.2e-12 of the largest output in double precision. In single it is 6e-8 after one
    step; each further step with random weights multiplies roundings, up to 7e-4 after four.

    Args:
        weights: a file; None: new weights.
        channels: C of new weights.
        patch: pixels of the encoder's patches. 14: the image is enlarged 16/14 times first, as in the authors' code.
            Others make no difference.

    Raises:
        ValueError: no patch.
    """

    def __init__(self, weights: Path | None = None, channels: int | None = None, patch: int = 16):
        super().__init__()
        if patch < 1:
            raise ValueError(f"uplift needs a patch of at least one pixel, got patch={patch}")
        first = "decoder.block_0.blocks.0.conv.0.weight"  # of features and the encoded image
        self.channels = self.channels_of(weights, first, channels, others=_WIDTHS[-1])
        self.patch = patch
        self.encoder = _Encoder()
        self.decoder = _Decoder(self.channels)
        self.attender = _Attender()
        if weights is not None:
            self.load_weights(weights)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        if self.patch == 14:
            height, width = image.shape[-2:]
            image = sized(image, (height * 16 // 14, width * 16 // 14))
        encoded = self.encoder(image)  # 2 x (B,128,H,W)
        ratio = max(q / n for q, n in zip(size, features.shape[-2:], strict=True))
        for _ in range(max(1, math.ceil(math.log2(ratio)))):
            features = self.attender(self.decoder(features, encoded), features)  # (B,C,2h,2w), then (B,C,4h,4w), ...
        return sized(features, size)  # (B,C,Qh,Qw)


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """y plus as many channels as x has of them."""
    shared = min(x.shape[1], y.shape[1])
    return y + F.pad(x[:, :shared], (0, 0, 0, 0, 0, y.shape[1] - shared))


def _joined(x: Tensor, encoded: Tensor) -> Tensor:
    return torch.cat([x, F.interpolate(encoded, x.shape[-2:], mode="nearest")], dim=1)
