"""`decoder=inr`: an implicit decoder that corrects the explicit output beyond what a weighted mean can reach.

Attention returns convex combinations of feature vectors, with the same weights for all channels: no output leaves the
hull of its neighbours, and no channel may be sharper than another. This decoder adds, to every channel of every point,
a correction by one small network.

- Local ensemble (LIIF, Chen et al., arXiv 2012.09161, section 3): one prediction from each of the four nearest cells
  of the feature grid, averaged with area weights, so that it is continuous in the coordinates.
- Any C: the network that makes the correction is shared by all channels. It sees one channel at a time, in units of
  that channel's mean and deviation around the cell: the explicit output, the cell's own value and its two slopes.
- What it does there is said by a second network, which writes the first one's weights for each point and cell
  (hypernetwork, Ha et al., arXiv 1609.09106): it sees the guidance at the point (as JIIF does, Tang et al.,
  arXiv 2107.08717), the mean guidance of the cell, a Fourier code of the point's place in the cell with learned
  frequencies (LTE, Lee and Jin, arXiv 2111.08918), the cell's size in guidance pixels, and how the four inputs agree
  over all channels.
- The correction is blended in by a weight per point, which is zero everywhere at the start: pure explicit.

The output follows the features when they are scaled, shifted or their channels permuted. The size of an output pixel
(LIIF's cell decoding) is no input: points have none, and bands of rows do not tell.

Status: runs; not yet measured.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.attention import empty_output
from core.hooks import Decoder
from core.points import nearest_cells, pixel_centres, sample
from core.registry import register

MAX_HIDDEN = {"cpu": 2**19, "cuda": 2**26}
"""Values of the hidden layer held at once, of all channels: on CPU they stay in cache."""
MAX_EXPORTED = 2**26
"""The same under a compiler, which unrolls the blocks."""
MAX_POINTS = 2048
"""Points whose context is held at once."""
NUM_INPUTS = 5
"""What the shared network sees of a channel: explicit output, one, the cell's value, its slopes down and across."""
SAMPLES_PER_CELL = 4
"""Along each axis, to average the guidance of a cell."""
PICTURE_SIDE = 256


class Cells(NamedTuple):
    """What is known of each cell of the feature grid, once per forward."""

    channels: Tensor
    """(B,h·w,7,C), as of `local_channels`."""
    guidance: Tensor
    """(B,h·w,H): projected mean guidance."""
    size: tuple[int, int]
    """(h,w)."""
    pixels: Tensor
    """(2,): guidance pixels per cell along each axis, as log2."""


class Place(NamedTuple):
    """Where n points lie, and what is known there without looking at single channels."""

    near: Tensor
    """(n,4): the nearest cells."""
    weights: Tensor
    """(n,4): their area weights."""
    context: Tensor
    """(B,n,4,H)."""


@register("inr")
class INRDecoder(Decoder):
    """Adds blend · correction to the explicit output; see the module's docstring.

    Args:
        hidden_dim: H, width of the network that looks at guidance and coordinates.
        num_units: hidden units per cell of the network that is shared by all channels.
        num_frequencies: of the Fourier code, each along one learned direction.

    Raises:
        ValueError: one of them is below 1.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 64, num_units: int = 8, num_frequencies: int = 8):
        super().__init__()
        for name, number in (
            ("hidden_dim", hidden_dim),
            ("num_units", num_units),
            ("num_frequencies", num_frequencies),
        ):
            if number < 1:
                raise ValueError(f"decoder=inr: {name} must be at least 1, got {number}; decoder=none is no decoder")
        self.num_units = num_units
        self.project_point = nn.Linear(embed_dim, hidden_dim)
        self.project_cell = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.freqs = nn.Parameter(torch.randn(2, num_frequencies))  # turns per cell
        self.project_offset = nn.Linear(2 * num_frequencies + 2, hidden_dim, bias=False)
        self.project_products = nn.Linear(NUM_INPUTS**2, hidden_dim, bias=False)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU())
        self.head = nn.Linear(hidden_dim, num_units * (NUM_INPUTS + 1))
        nn.init.normal_(self.head.bias, std=0.5)  # a network of its own before any point changes it
        self.gate = nn.Parameter(torch.zeros(hidden_dim))
        self.blend: Tensor | None = None
        """(B,Qh,Qw) blending weights of the latest forward without gradients."""

    def forward(self, output: Tensor, features: Tensor, guidance: Tensor | None, coords: Tensor) -> Tensor:
        pixels = output.permute(0, 2, 3, 1).flatten(1, 2)  # (B,Q,C)
        cells = self._cells(features, guidance)
        compiling = torch.compiler.is_compiling()
        limit = MAX_EXPORTED if compiling else MAX_HIDDEN.get(output.device.type, 2**19)
        values = max(self.num_units * output.shape[1], self.head.in_features + NUM_INPUTS**2)  # a point and cell
        at_once = max(1, limit // (len(output) * 4 * values))
        blocks = zip(
            pixels.split(at_once, 1), self._places(guidance, coords.flatten(0, 1), cells, at_once), strict=True
        )
        if torch.is_grad_enabled() or compiling:
            correct = self._correct if compiling else partial(checkpoint, self._correct, use_reentrant=False)
            parts = [correct(block, place, cells.channels)[0] for block, place in blocks]
            return torch.cat(parts, 1).unflatten(1, output.shape[-2:]).permute(0, 3, 1, 2)  # (B,C,Qh,Qw)
        result = empty_output(output, tuple(output.shape[-2:]))
        targets = result.permute(0, 2, 3, 1).flatten(1, 2).split(at_once, 1)  # views
        blends = []
        for target, (block, place) in zip(targets, blocks, strict=True):
            corrected, blend = self._correct(block, place, cells.channels)
            target.copy_(corrected)
            blends.append(blend.abs())
        self.blend = torch.cat(blends, 1).unflatten(1, output.shape[-2:])  # (B,Qh,Qw)
        return result

    def pictures(self) -> dict[str, Tensor]:
        """The blending weight, from 0 (black, explicit) to 1 (white), and the same relative to its largest value."""
        if self.blend is None:
            return {}
        blend = self.blend[:1].float()
        size = [min(side, PICTURE_SIDE) for side in blend.shape[-2:]]
        picture = F.adaptive_avg_pool2d(blend, size).expand(3, -1, -1)
        largest = picture.max().item()
        return {"blend": picture, f"blend / {largest:.2g}": picture / max(largest, torch.finfo().tiny)}

    def _places(self, guidance: Tensor, points: Tensor, cells: Cells, at_once: int) -> Iterator[Place]:
        """(Q,2) points in blocks. With gradients the guidance is sampled once: each time costs a pass over it."""
        context, several = self._context, at_once * max(1, MAX_POINTS // at_once)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            several = len(points)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            context = partial(checkpoint, context, use_reentrant=False)
        for some in points.split(several):
            near, weights, offsets = nearest_cells(some, cells.size)  # (n,4), (n,4), (n,4,2)
            weights = weights.to(cells.channels.dtype)
            split = (
                near.split(at_once),
                weights.split(at_once),
                context(guidance, some, near, offsets, cells).split(at_once, 1),
            )
            yield from map(Place, *split)

    def _context(self, guidance: Tensor, points: Tensor, near: Tensor, offsets: Tensor, cells: Cells) -> Tensor:
        """Guidance at each point and in its cells, and where it lies in them: (B,n,4,H)."""
        at_point = self.project_point(_unit(sample(guidance, points)))  # (B,n,H)
        in_cells = cells.guidance.index_select(1, near.flatten()).unflatten(1, near.shape)  # (B,n,4,H)
        angle = 2 * math.pi * (offsets[..., None] * self.freqs.to(offsets.dtype)).sum(-2)  # (n,4,F); autocast spares it
        code = torch.cat([angle.cos(), angle.sin(), cells.pixels.to(angle).expand_as(offsets)], -1)
        return at_point[:, :, None] + in_cells + self.project_offset(code.to(in_cells.dtype))

    def _correct(self, pixels: Tensor, place: Place, channels: Tensor) -> tuple[Tensor, Tensor]:
        """(B,n,C) explicit output -> (B,n,C) corrected, (B,n) blending weights, of either sign."""
        near, weights, context = place
        local = channels.index_select(1, near.flatten()).unflatten(1, near.shape)  # (B,n,4,7,C)
        deviation, mean, inverse = local[..., :3, :].unbind(-2)  # (B,n,4,C)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            relative = (pixels[:, :, None] - mean) * inverse
            inputs = torch.cat([relative[..., None, :], local[..., 3:, :]], -2)  # (B,n,4,inputs,C)
        else:
            inverse.mul_(pixels[:, :, None] - mean)
            inputs = local[..., 2:, :]
        inputs = inputs.flatten(0, 2)  # (P,inputs,C), P = B·n·4
        products = inputs.new_zeros(()).expand(len(inputs), NUM_INPUTS, NUM_INPUTS)
        products = torch.baddbmm(products, inputs, inputs.mT, beta=0, alpha=1 / inputs.shape[-1])  # means over channels
        products = self.project_products(F.softsign(products.flatten(1)))  # (P,H)
        context = self.hidden(context + products.view_as(context))  # (B,n,4,H)
        first, last = self.head(context).flatten(0, 2).split([self.num_units * NUM_INPUTS, self.num_units], -1)
        units = torch.bmm(first.unflatten(-1, (-1, NUM_INPUTS)), inputs).relu_()  # (P,units,C)
        predicted = torch.bmm(last[:, None], units).view_as(mean) * deviation  # (B,n,4,C)
        correction = (weights[:, None] @ predicted).squeeze(2)  # (B,n,C)
        blend = ((context @ self.gate) * weights).sum(-1).tanh()  # (B,n)
        return pixels + (blend[..., None] * correction).to(pixels.dtype), blend

    def _cells(self, features: Tensor, guidance: Tensor) -> Cells:
        size = tuple(features.shape[-2:])
        inner = pixel_centres((SAMPLES_PER_CELL * size[0], SAMPLES_PER_CELL * size[1]), like=guidance).flatten(0, 1)
        averaged = sample(guidance, inner).mT.unflatten(-1, (size[0], SAMPLES_PER_CELL, size[1], SAMPLES_PER_CELL))
        averaged = averaged.mean((3, 5)).flatten(2).mT  # (B,h·w,D)
        pixels = [math.log2(image / grid) for image, grid in zip(guidance.shape[-2:], size, strict=True)]
        projected = self.project_cell(_unit(averaged))
        return Cells(local_channels(features), projected, size, guidance.new_tensor(pixels))


def local_channels(features: Tensor) -> Tensor:
    """(B,C,h,w) -> (B,h·w,7,C): deviation, mean and inverse deviation around each cell, one, and value and slopes.

    The last three are in deviations, the value from the mean.

    Mean and deviation are those of the 3x3 cells around it (fewer at the border), channel by channel. To a variance
    are added a hundredth of the channel's variance in the whole image, and 1e-8 of its mean square, below which
    values are rounding errors. A channel that is zero everywhere has a deviation of zero, and an inverse of zero.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    centre = wide.mean((2, 3), keepdim=True)
    centred = wide - centre
    floor = 1e-2 * centred.square().mean((2, 3), keepdim=True) + 1e-8 * wide.square().mean((2, 3), keepdim=True)
    mean, square = (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (centred, centred.square()))
    variance = (square - mean.square()).clamp(min=0) + floor  # (B,C,h,w)
    deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    inverse = torch.where(variance > 0, 1 / deviation, 0).clamp(max=torch.finfo(features.dtype).max)
    deviation = torch.where(variance > 0, deviation, 0)
    padded = F.pad(centred, (1, 1, 1, 1), mode="replicate")
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    normalised = ((x * inverse) for x in (centred - mean, down, across))
    channels = torch.stack([deviation, mean + centre, inverse, torch.ones_like(mean), *normalised], 1)  # (B,7,C,h,w)
    return channels.flatten(3).permute(0, 3, 1, 2).to(features.dtype).contiguous()


def _unit(x: Tensor) -> Tensor:
    """Vectors of root mean square 1."""
    return F.rms_norm(x, x.shape[-1:])
