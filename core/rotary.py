"""Rotary position embedding of the encoded image, with learned frequencies.

AnyUp, section 3; RoFormer, Su et al. 2021.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from core.fast import launches
from core.fast.encoder import refuse_second_derivatives

PIXELS_PER_BLOCK = 1024
PIXELS_PER_LARGE_BLOCK = 2**17  # where launches dominate


class Rotary(nn.Module):
    """(B,D,H,W) -> (B,D,H,W): mixes channels i and i + D/2 by angles that are linear in the pixel's position.

    A position is (row, column), each from 0 to 1, ends included. angle = position @ freqs; `freqs` (2,D) is learned. At
    the start, the angles of the first half of the channels depend on the row, and those of the second half on the
    column. Both have the frequencies 2π·100^(-t), with t from 0 to 1.
    """

    def __init__(self, embed_dim: int, base: float = 100.0):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 for the rotary embedding, got {embed_dim}")
        per_axis = 2 * math.pi * base ** torch.linspace(0, -1, embed_dim // 4)
        axis = torch.cat([per_axis, per_axis])  # (D/2,)
        self.freqs = nn.Parameter(torch.block_diag(axis[None], axis[None]))  # (2,D)
        self.twice_differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        """Without gradients x is overwritten: it is the image encoder's result, and nothing else reads it."""
        if self.twice_differentiable or torch.compiler.is_compiling():
            return self.plain(x, self.freqs)
        if torch.is_grad_enabled():
            if launches.of_small_work_dominate(x, x.shape[1]):
                return self.plain(x, self.freqs)
            return _Rotate.apply(x, self.freqs)
        return _rotate(x, self.freqs, out=x)

    def plain(self, x: Tensor, freqs: Tensor) -> Tensor:
        """The definition."""
        rows, columns = _positions(x, freqs)
        angle = rows[:, None, None] * freqs[0] + columns[:, None] * freqs[1]  # (H,W,D)
        angle = angle.permute(2, 0, 1)  # (D,H,W)
        first, second = x.chunk(2, 1)
        turned = torch.cat([-second, first], 1)  # (B,D,H,W)
        return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


def _rotate(x: Tensor, freqs: Tensor, out: Tensor) -> Tensor:
    """`Rotary.plain` in blocks of rows, written into `out`, which may be x; both (B,D,H,W)."""
    half = x.shape[1] // 2
    for rows, cos, sin in _angles(x, freqs):
        for image, target in zip(*(t.permute(0, 2, 3, 1)[:, rows] for t in (x, out)), strict=True):  # (rows,W,D)
            turned = image * cos
            turned[..., :half].addcmul_(image[..., half:], sin[..., :half], value=-1)
            turned[..., half:].addcmul_(image[..., :half], sin[..., half:])
            target.copy_(turned)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, freqs):
        ctx.save_for_backward(x, freqs)
        return _rotate(x, freqs, torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        x, freqs = ctx.saved_tensors
        positions = _positions(x, freqs)
        wide = positions[0].dtype
        grad_x, grad_freqs, half = torch.empty_like(x), torch.zeros_like(freqs, dtype=wide), x.shape[1] // 2
        for rows, cos, sin in _angles(x, freqs):
            grad_angle = torch.zeros_like(cos, dtype=wide)  # (rows,W,D)
            for image, given, target in zip(*(t.permute(0, 2, 3, 1)[:, rows] for t in (x, grad, grad_x)), strict=True):
                along, across = given * cos, given * sin
                first, second = image[..., :half], image[..., half:]
                grad_angle[..., :half] -= first * across[..., :half] + second * along[..., :half]
                grad_angle[..., half:] -= second * across[..., half:] - first * along[..., half:]
                along[..., :half] += across[..., half:]
                along[..., half:] -= across[..., :half]
                target.copy_(along)
            grad_freqs[0] += positions[0][rows] @ grad_angle.sum(1)
            grad_freqs[1] += positions[1] @ grad_angle.sum(0)
        return grad_x, grad_freqs.to(freqs.dtype)


def _angles(x: Tensor, freqs: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields blocks of rows, with cosine and sine of their angles, (rows,W,D), in the dtype of x.

    Uses the formulas for cos(a + b) and sin(a + b), so cosines are computed once per row and once per column.
    """
    rows, columns = _positions(x, freqs)
    by_row = (rows[:, None] * freqs[0])[:, None]  # (H,1,D)
    by_column = columns[:, None] * freqs[1]  # (W,D)
    row_cos, row_sin, column_cos, column_sin = by_row.cos(), by_row.sin(), by_column.cos(), by_column.sin()
    pixels = PIXELS_PER_LARGE_BLOCK if launches.dominate(x) else PIXELS_PER_BLOCK
    step = max(1, pixels // len(columns))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        cos = torch.addcmul(row_cos[some] * column_cos, row_sin[some], column_sin, value=-1)
        sin = torch.addcmul(row_sin[some] * column_cos, row_cos[some], column_sin)
        yield some, cos.to(x.dtype), sin.to(x.dtype)


def _positions(x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the rows (H,) and of the columns (W,)."""
    wide = torch.promote_types(freqs.dtype, torch.float32)  # in half precision positions are off by several pixels
    return tuple(torch.linspace(0, 1, n, device=x.device, dtype=wide) for n in x.shape[-2:])
