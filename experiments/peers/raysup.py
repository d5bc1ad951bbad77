"""`raysup`: RaysUp, NAF with a lighter encoder and an embedding of viewing rays, for any encoder."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.peers.base import Peer, register_peer
from experiments.peers.guidance import pooled
from experiments.peers.naf import block_attention

NUM_GROUPS = 8
_PERIOD = 8.0  # longest, of a ray's direction
_PERIOD_RATIO = 3.0  # between neighbouring frequencies
_KINDS = 6  # angles at each frequency: three of the ray's origin, three of its direction


class _Block(nn.Module):
    """Twice group norm, SiLU and convolution; no shortcut."""

    def __init__(self, channels: int, kernel_size: tuple[int, int], dilation: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(NUM_GROUPS, channels) for _ in range(2))
        self.conv1, self.conv2 = (_conv(channels, channels, kernel_size, dilation) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class _Encoder(nn.Module):
    """Four branches, each with a quarter of the channels: single pixels, rows, columns, and corners."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.enc_center = _branch(embed_dim // 4, (1, 1), num_blocks=2)
        self.enc_horiz = _branch(embed_dim // 4, (1, 3))
        self.enc_vert = _branch(embed_dim // 4, (3, 1))
        self.enc_corners = _branch(embed_dim // 4, (2, 2), dilation=2)

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([branch(image) for branch in self.children()], dim=1)


@register_peer("raysup")
class RaysUp(Peer):
    """RaysUp (arXiv 2606.22749, ECCV 2026): weights come from the image alone, features are only averaged.

    The image is encoded pixel by pixel and in rows, columns and corners, and pooled to the output grid (queries) and to
    the feature grid (keys). Both are turned by the direction in which a camera would see them. Each head filters a part
    of the channels of its own, in a window of 6x6 cells: 3 before the own cell, 2 after it.

    The camera's pose is not in the interface. Here it is the authors' for single images: at the origin, with focal
    lengths equal to the image's width and height. The origin's angles are then 0. Block attention is NAF's, with the
    same differences from the authors' compiled package: ratios that are not whole, grids below the window, and C that
    the heads do not divide (`experiments/peers/naf.py`). The authors have not released weights.

    Parity: MAP-RaysUp/RaysUp @a320000 (Apache-2.0), equal random weights, 2, 3 and 4 times the grid, NATTEN replaced by
    a loop over its window rule: largest error 2.3e-6 of the largest output.

    Args:
        weights: a file; None: new weights.
        embed_dim: width of queries and keys; a multiple of 32.
        num_heads: heads, each with its own channels; 2 num_heads divide embed_dim.
        window: rows and columns of cells that a position sees.

    Raises:
        ValueError: widths that do not divide, or no window.
    """

    linear_in_values = False  # each head filters its own channels
    nests = ("raysup", "state_dict", "model")

    def __init__(self, weights: Path | None = None, embed_dim: int = 256, num_heads: int = 4, window: int = 6):
        super().__init__()
        if embed_dim % (4 * NUM_GROUPS) or num_heads < 1 or embed_dim % (2 * num_heads) or window < 1:
            raise ValueError(
                f"raysup needs embed_dim as a multiple of {4 * NUM_GROUPS} and of 2 num_heads, and a window of at "
                f"least one cell, got embed_dim={embed_dim}, num_heads={num_heads}, window={window}"
            )
        self.num_heads, self.window = num_heads, window
        self.image_tokenizer = nn.ModuleDict({"img_encoder": _Encoder(embed_dim)})
        if weights is not None:
            self.load_weights(weights)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        guidance = self.image_tokenizer["img_encoder"](image)  # (B,D,H,W)
        query, key = (
            turned(pooled(guidance, grid), self.num_heads) for grid in (size, features.shape[-2:])
        )  # (B,D,Qh,Qw), (B,D,h,w)
        return block_attention(query, key, features, self.num_heads, self.window)


def turned(x: Tensor, num_heads: int) -> Tensor:
    """(B,D,h,w) -> the same, where channels i and i + d/2 of each head of d are turned by angles of the viewing ray."""
    wide = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    angles = ray_angles(tuple(x.shape[-2:]), x.shape[1] // num_heads // 2, wide)  # (d/2,h,w)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.unflatten(1, (num_heads, -1)).chunk(2, dim=2)  # (B,heads,d/2,h,w)
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine], dim=2).flatten(1, 2)


def ray_angles(grid: tuple[int, int], num: int, like: Tensor) -> Tensor:
    """(num,h,w): for each frequency three zeros of the origin, and the angles of the direction's x, y and z; then 0.

    Device and dtype are those of `like`.
    """
    rows, columns = ((torch.arange(n, device=like.device).to(like) + 0.5) / n - 0.5 for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    direction = F.normalize(torch.stack([x, y, torch.ones_like(x)]), dim=0)  # (3,h,w)
    freqs = 2 * math.pi / _PERIOD * _PERIOD_RATIO ** torch.arange(num // _KINDS, device=like.device).to(like)
    turns = freqs[:, None, None, None] * direction  # (freqs,3,h,w)
    angles = torch.cat([torch.zeros_like(turns), turns], dim=1).flatten(0, 1)
    return torch.cat([angles, angles.new_zeros(num - len(angles), *grid)])


def _branch(channels: int, kernel_size: tuple[int, int], num_blocks: int = 1, dilation: int = 1) -> nn.Sequential:
    blocks = (_Block(channels, kernel_size, dilation) for _ in range(num_blocks))
    return nn.Sequential(_conv(3, channels, kernel_size, dilation), *blocks)


def _conv(channels: int, outputs: int, kernel_size: tuple[int, int], dilation: int) -> nn.Conv2d:
    padding = tuple(dilation * (k - 1) // 2 for k in kernel_size)
    return nn.Conv2d(channels, outputs, kernel_size, padding=padding, dilation=dilation, padding_mode="reflect")
