"""`naf`: neighbourhood attention whose weights come from the image alone, for any encoder."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.peers.base import Peer, register_peer
from experiments.peers.blocks import blocks, grouped, seen, write_means
from experiments.peers.guidance import pooled

NUM_GROUPS = 8
MOST_PIXELS_PER_OUTPUT = 4
"""A larger image is first reduced to this many pixels for each output position, on both axes."""


@register_peer("naf")
class NAF(Peer):
    """NAF: neighbourhood attention filtering (arXiv 2511.18452, CVPR 2026): a joint bilateral filter that was learned.

    Two encoders look at single pixels and at their surroundings; pooled to the output grid, with a rotary embedding,
    they are the queries, and the same queries pooled to the feature grid are the keys. Features are values only. Each
    head filters a part of the channels of its own, in a window of cells.

    All positions within one cell see the same window, so attention is exact block attention in plain PyTorch; the
    authors need a compiled package (NATTEN). What differs from it: where the output is no whole number of times the
    grid, a position sees the window around the cell that contains its centre (theirs has a rounded dilation there); a
    grid smaller than the window is seen as a whole (theirs fails); if `num_heads` does not divide C, some heads
    filter one channel more (theirs fails); in training every call draws its own scale of the coordinates (theirs draws
    one for each image size). Checked beside valeoai/NAF @ad4e24d on equal random weights: see docs/peers.md.

    Args:
        weights: the authors' `naf_release.pth` (Apache-2.0), or a file that a training wrote; None: new weights.
        embed_dim: width of queries and keys, half of it for each encoder; a multiple of 16 and of 4 `num_heads`.
        num_heads: heads, each with its own channels.
        window: rows and columns of cells that a position sees; odd.
        num_blocks: blocks of each encoder.

    Raises:
        ValueError: widths that do not divide, or a window that is not odd.
    """

    def __init__(
        self,
        weights: Path | None = None,
        embed_dim: int = 256,
        num_heads: int = 4,
        window: int = 9,
        num_blocks: int = 2,
    ):
        super().__init__()
        if embed_dim % (2 * NUM_GROUPS) or num_heads < 1 or embed_dim % (4 * num_heads) or window < 1 or not window % 2:
            raise ValueError(
                f"naf needs embed_dim as a multiple of {2 * NUM_GROUPS} and of 4 num_heads, and an odd window, got "
                f"embed_dim={embed_dim}, num_heads={num_heads}, window={window}"
            )
        self.num_heads, self.window = num_heads, window
        self.image_encoder = GuidanceEncoder(embed_dim, num_heads, num_blocks)
        if weights is not None:
            self.load_weights(weights)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        query = self.image_encoder(image, size)  # (B,D,Qh,Qw)
        key = pooled(query, features.shape[-2:])  # (B,D,h,w)
        return block_attention(query, key, features, self.num_heads, self.window)


class GuidanceEncoder(nn.Module):
    """(B,3,H,W) -> (B,D,Qh,Qw): half of the channels from single pixels, half from their surroundings; then rotated."""

    def __init__(self, embed_dim: int, num_heads: int, num_blocks: int):
        super().__init__()
        self.encoder = _encoder(embed_dim // 2, 1, num_blocks)
        self.sem_encoder = _encoder(embed_dim // 2, 3, num_blocks)
        self.rope = AxialRotary(embed_dim // num_heads, num_heads)

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        limit = MOST_PIXELS_PER_OUTPUT * min(size)
        if any(n > MOST_PIXELS_PER_OUTPUT * q for n, q in zip(image.shape[-2:], size, strict=True)):
            image = F.interpolate(image, tuple(min(n, limit) for n in image.shape[-2:]), mode="bilinear")
        encoded = torch.cat([self.encoder(image), self.sem_encoder(image)], 1)  # (B,D,H,W)
        return self.rope(pooled(encoded, size))  # (B,D,Qh,Qw)


class ConvBlock(nn.Module):
    """(B,D,H,W) -> (B,D,H,W): twice GroupNorm, SiLU, convolution; no shortcut."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(NUM_GROUPS, channels) for _ in range(2))
        self.conv1, self.conv2 = (_conv(channels, channels, kernel_size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class AxialRotary(nn.Module):
    """(B,D,H,W) -> (B,D,H,W): turns channels i and i + d/2 of each head of d by angles linear in row or column.

    Rows and columns run from -1 to 1 between the image's borders, whatever its size (the field's axial RoPE). The first
    half of the d/2 angles is the row's, the other the column's, with periods 100^(4i/d). In train mode coordinates are
    stretched by a random factor, log-uniform between 1/2 and 2.
    """

    def __init__(self, head_dim: int, num_heads: int, base: float = 100.0, stretch: float = 2.0):
        super().__init__()
        self.num_heads, self.stretch = num_heads, stretch
        self.register_buffer("periods", base ** (4 * torch.arange(head_dim // 4) / head_dim))  # (d/4,)

    def forward(self, x: Tensor) -> Tensor:
        factor = math.exp(float(torch.empty(()).uniform_(-1, 1)) * math.log(self.stretch)) if self.training else 1.0
        wide = torch.promote_types(x.dtype, torch.float32)  # in half precision coordinates are off by a pixel
        turns = []
        for n in x.shape[-2:]:
            centre = (2 * torch.arange(n, device=x.device, dtype=wide) + 1) / n - 1  # (n,) in (-1,1)
            turns.append(2 * math.pi * factor * centre / self.periods.to(wide)[:, None])  # (d/4,n)
        rows, columns = turns[0][:, :, None].expand(-1, -1, x.shape[-1]), turns[1][:, None].expand(-1, x.shape[-2], -1)
        angle = torch.cat([rows, columns])  # (d/2,H,W)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.unflatten(1, (self.num_heads, -1)).chunk(2, 2)  # (B,heads,d/2,H,W)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 2).flatten(1, 2)


def block_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, window: int) -> Tensor:
    """Attention in windows of cells, in which each head filters its own contiguous part of the channels.

    (B,D,Qh,Qw), (B,D,h,w), (B,C,h,w) -> (B,C,Qh,Qw). Rows of cells are taken one after the other.
    """
    (rows, columns), output = (
        [blocks(n, q, window, query.device) for n, q in zip(key.shape[-2:], query.shape[-2:], strict=True)],
        value.new_empty(*value.shape[:2], *query.shape[-2:]),
    )
    key = key * (num_heads / query.shape[1]) ** 0.5
    for some, near in rows.bands():
        queries = grouped(query[:, :, some], columns)  # (B,m,D,n·n')
        keys, values = (seen(x, near, columns) for x in (key, value))  # (B,m,k·k',·)
        heads = (queries.chunk(num_heads, 2), keys.chunk(num_heads, 3), values.tensor_split(num_heads, 3))
        band, first = torch.empty_like(output[:, :, some]), 0  # a write costs its gradient a copy of what it is into
        for q, k, v in zip(*heads, strict=True):
            weights = (q.mT @ k.mT).softmax(-1).to(v.dtype)  # (B,m,n·n',k·k')
            write_means(band[:, first : first + v.shape[3]], weights, v, columns)
            first += v.shape[3]
        output[:, :, some] = band
    return output


def _encoder(channels: int, kernel_size: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(3, channels, kernel_size), *(ConvBlock(channels, kernel_size) for _ in range(num_blocks))
    )


def _conv(channels: int, outputs: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, kernel_size, padding=kernel_size // 2, padding_mode="reflect")
