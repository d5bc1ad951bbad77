"""Rotary position code of the encoded image (AnyUp, section 3; RoFormer, Su et al. 2021), with learned frequencies."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIXELS_PER_BLOCK = 4096


class Rotary(nn.Module):
    """(B,D,H,W) -> (B,D,H,W): channels i and i + D/2 turn against each other by angles linear in the pixel's position.

    Positions run from 0 to 1, ends included, rows first; angle = position @ freqs with `freqs` (2,D) learned. At
    the start the first half of the channels turns with rows and the second with columns, at 2π·100^(-t).
    """

    def __init__(self, embed_dim: int, base: float = 100.0):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 for the rotary code, got {embed_dim}")
        per_axis = 2 * math.pi * base ** torch.linspace(0, -1, embed_dim // 4)
        axis = torch.cat([per_axis, per_axis])  # (D/2,)
        self.freqs = nn.Parameter(torch.block_diag(axis[None], axis[None]))  # (2,D)
        self.twice_differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        """Without gradients x is overwritten: it belongs to the caller's image encoder and nothing else reads it."""
        if self.twice_differentiable or torch.compiler.is_compiling():
            return self.plain(x, self.freqs)
        if torch.is_grad_enabled():
            return checkpoint(self.plain, x, self.freqs, use_reentrant=False)
        return self._in_place(x)

    def plain(self, x: Tensor, freqs: Tensor) -> Tensor:
        """The definition."""
        rows, columns = (torch.linspace(0, 1, n, device=x.device, dtype=freqs.dtype) for n in x.shape[-2:])
        angle = rows[:, None, None] * freqs[0] + columns[:, None] * freqs[1]  # (H,W,D)
        angle = angle.permute(2, 0, 1)  # (D,H,W)
        first, second = x.chunk(2, 1)
        turned = torch.cat([-second, first], 1)  # (B,D,H,W)
        return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)

    def _in_place(self, x: Tensor) -> Tensor:
        """The same through cos(a + b) and sin(a + b), so that only rows and columns need a cosine."""
        pixels = x.permute(0, 2, 3, 1)  # (B,H,W,D), a view
        _, height, width, dim = pixels.shape
        rows, columns = (torch.linspace(0, 1, n, device=x.device, dtype=self.freqs.dtype) for n in (height, width))
        by_row = (rows[:, None] * self.freqs[0])[:, None]  # (H,1,D)
        by_column = columns[:, None] * self.freqs[1]  # (W,D)
        row_cos, row_sin, column_cos, column_sin = by_row.cos(), by_row.sin(), by_column.cos(), by_column.sin()
        step = max(1, PIXELS_PER_BLOCK // width) if x.device.type == "cpu" else height
        half = dim // 2
        for start in range(0, height, step):
            some = slice(start, start + step)
            cos = torch.addcmul(row_cos[some] * column_cos, row_sin[some], column_sin, value=-1).to(x.dtype)
            sin = torch.addcmul(row_sin[some] * column_cos, row_cos[some], column_sin).to(x.dtype)  # (rows,W,D)
            for image in pixels[:, some]:
                turned = image * cos
                turned[..., :half].addcmul_(image[..., half:], sin[..., :half], value=-1)
                turned[..., half:].addcmul_(image[..., :half], sin[..., half:])
                image.copy_(turned)
        return x
