"""`decoder=inr`: an implicit decoder that corrects the explicit output beyond what a weighted mean can reach.

Attention returns convex combinations of feature vectors, with the same weights for all channels: no output leaves the
hull of its neighbours, and no channel may be sharper than another. This decoder adds, to every channel of every point,
a correction by one small network.

- Any C: the correction is made by one small network, shared by all channels. It sees one channel at a time, in units
  of that channel's mean and deviation in the image: the explicit output, and of each of the four nearest cells of the
  feature grid the value and the mean around it.
- Local ensemble (LIIF, Chen et al., arXiv 2012.09161, section 3): the four cells count by their area weights, so that
  the correction is continuous in the coordinates. They are averaged in front of the network's one nonlinearity, which
  takes a quarter of the time of four predictions.
- What the network does is said by a second one, which writes its weights for each point and cell (hypernetwork, Ha et
  al., arXiv 1609.09106) and knows no single channel: it sees the guidance at the point (as JIIF does, Tang et al.,
  arXiv 2107.08717), the mean guidance of the cell, a Fourier code of the point's place in the cell with learned
  frequencies (LTE, Lee and Jin, arXiv 2111.08918), the cell's size in guidance pixels, and how explicit output, value
  and mean agree over all channels.
- The correction is blended in by a weight per point, which is zero everywhere at the start: pure explicit.

The output follows the features when they are scaled, shifted or their channels permuted. The size of an output pixel
(LIIF's cell decoding) is no input: points have none, and bands of rows do not tell.

Status: measured (docs/extensions.md): helps feature fidelity, hurts probes on CamVid.
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
from core.batch import Context
from core.hooks import Decoder
from core.points import nearest_cells, pixel_centres, sample
from core.registry import register

MAX_HIDDEN = {"cpu": 2**18, "cuda": 2**26}
"""Values of the hidden layer held at once, of all channels: on CPU they stay in cache."""
MAX_EXPORTED = 2**26
"""The same under a compiler, which unrolls the blocks."""
MAX_POINTS = 2048
"""Points whose context is held at once."""
PER_CELL = 2
"""What the shared network sees of a channel in a cell: its value, and the mean around the cell."""
NUM_PRODUCTS = 6
"""Mean products over the channels of explicit output, value and mean around the cell, each with each."""
SAMPLES_PER_CELL = 4
"""Along each axis, to average the guidance of a cell."""
PICTURE_SIDE = 256


class Channels(NamedTuple):
    """The unit in which each channel of an image is seen, and the features in it."""

    mean: Tensor
    """(B,1,C)."""
    deviation: Tensor
    """(B,1,C); zero where the channel is zero everywhere."""
    inverse: Tensor
    """(B,1,C): 1 / deviation; zero where that is zero."""
    values: Tensor
    """(B,h·w,2,C): each cell's value, and the mean of the 3x3 cells around it (fewer at the border)."""
    products: Tensor
    """(B,h·w,3): mean over the channels of value·value, value·mean and mean·mean."""


class Cells(NamedTuple):
    """What is known of each cell of the feature grid without looking at single channels."""

    guidance: Tensor
    """(B,h·w,H): projected mean guidance."""
    size: tuple[int, int]
    """(h,w)."""
    pixels: Tensor
    """(2,): guidance pixels per cell along each axis, as log2."""


class Place(NamedTuple):
    """Where n points lie, and what is known there of the guidance."""

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
        num_units: K, hidden units of the network that is shared by all channels.
        num_frequencies: of the Fourier code, each along one learned direction.

    Raises:
        ValueError: one of them is below 1.
    """

    needs_guidance = True

    def __init__(self, embed_dim: int, hidden_dim: int = 32, num_units: int = 4, num_frequencies: int = 8):
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
        self.project_products = nn.Linear(NUM_PRODUCTS, hidden_dim, bias=False)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU())
        self.head = nn.Linear(hidden_dim, num_units * (PER_CELL + 3))
        nn.init.normal_(self.head.bias, std=0.5)  # a network of its own before any point changes it
        self.gate = nn.Parameter(torch.zeros(hidden_dim))
        self.blend: Tensor | None = None
        """(B,Qh,Qw) blending weights of the latest forward without gradients."""

    def forward(self, output: Tensor, context: Context) -> Tensor:
        features, guidance, coords = context.features, context.guidance, context.coords
        pixels = output.permute(0, 2, 3, 1).flatten(1, 2)  # (B,Q,C)
        channels, cells = normalised(features), self._cells(guidance, tuple(features.shape[-2:]))
        compiling = torch.compiler.is_compiling()
        limit = MAX_EXPORTED if compiling else MAX_HIDDEN.get(output.device.type, 2**18)
        per_point = max(self.num_units * output.shape[1], 4 * self.head.in_features)
        at_once = max(1, limit // (len(output) * per_point))
        blocks = zip(
            pixels.split(at_once, 1), self._places(guidance, coords.flatten(0, 1), cells, at_once), strict=True
        )
        if torch.is_grad_enabled() or compiling:
            correct = self._correct if compiling else partial(checkpoint, self._correct, use_reentrant=False)
            parts = [correct(block, place, channels)[0] for block, place in blocks]
            return torch.cat(parts, 1).unflatten(1, output.shape[-2:]).permute(0, 3, 1, 2)  # (B,C,Qh,Qw)
        result = empty_output(output, tuple(output.shape[-2:]))
        targets = result.permute(0, 2, 3, 1).flatten(1, 2).split(at_once, 1)  # views
        blends = []
        for target, (block, place) in zip(targets, blocks, strict=True):
            _, blend = self._correct(block, place, channels, target)
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
            weights = weights.to(guidance.dtype)
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

    def _correct(
        self, pixels: Tensor, place: Place, channels: Channels, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B,n,C) explicit output -> (B,n,C) corrected, in `out`, (B,n) blending weights, of either sign."""
        near, weights, context = place
        own = (pixels - channels.mean) * channels.inverse  # (B,n,C)
        local = channels.values.index_select(1, near.flatten()).view(*own.shape[:2], 4 * PER_CELL, -1)  # (B,n,8,C)
        products = self._products(own, local, channels.products.index_select(1, near.flatten()))  # (B,n,4,6)
        context = self.hidden(context + self.project_products(products))  # (B,n,4,H)
        written = self.head(context) * weights[..., None]  # (B,n,4,5·K)
        of_cells, shared = written.split([self.num_units * PER_CELL, self.num_units * 3], -1)
        of_cells = of_cells.unflatten(-1, (-1, PER_CELL)).transpose(2, 3).flatten(3).flatten(0, 1)  # (P,K,8), P = B·n
        of_own, bias, last = shared.sum(2).flatten(0, 1)[..., None].chunk(3, 1)  # (P,K,1)
        units = torch.baddbmm(bias, of_cells, local.flatten(0, 1))  # (P,K,C)
        units.baddbmm_(of_own.to(units.dtype), own.flatten(0, 1)[:, None].to(units.dtype)).relu_()
        predicted = torch.bmm(last.mT, units).view_as(own)  # (B,n,C)
        blend = ((context @ self.gate) * weights).sum(-1).tanh()  # (B,n)
        correction = (predicted * channels.deviation).to(pixels.dtype)
        return torch.addcmul(pixels, correction, blend[..., None].to(pixels.dtype), out=out), blend

    def _products(self, own: Tensor, local: Tensor, of_cells: Tensor) -> Tensor:
        """Mean products over channels of (B,n,C), (B,n,8,C); (B,4·n,3) those of the cells -> (B,n,4,6), in (-1,1)."""
        scaled = own / own.shape[-1]  # (B,n,C)
        with_local = (scaled[:, :, None] @ local.mT).view(*own.shape[:2], 4, PER_CELL)
        with_own = torch.linalg.vecdot(own, scaled)[..., None, None].expand(-1, -1, 4, -1)  # (B,n,4,1)
        return F.softsign(torch.cat([with_own, with_local, of_cells.view(*with_local.shape[:3], 3).to(own.dtype)], -1))

    def _cells(self, guidance: Tensor, size: tuple[int, int]) -> Cells:
        inner = pixel_centres((SAMPLES_PER_CELL * size[0], SAMPLES_PER_CELL * size[1]), like=guidance).flatten(0, 1)
        averaged = sample(guidance, inner).mT.unflatten(-1, (size[0], SAMPLES_PER_CELL, size[1], SAMPLES_PER_CELL))
        averaged = averaged.mean((3, 5)).flatten(2).mT  # (B,h·w,D)
        pixels = [math.log2(image / grid) for image, grid in zip(guidance.shape[-2:], size, strict=True)]
        return Cells(self.project_cell(_unit(averaged)), size, guidance.new_tensor(pixels))


def normalised(features: Tensor) -> Channels:
    """(B,C,h,w) -> each channel in units of its mean and deviation in its image.

    To the variance 1e-8 of the channel's mean square is added: what lies below are rounding errors.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = wide.mean((2, 3), keepdim=True)  # (B,C,1,1)
    centred = wide - mean
    variance = centred.square().mean((2, 3), keepdim=True) + 1e-8 * wide.square().mean((2, 3), keepdim=True)
    root = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    deviation, inverse = (torch.where(variance > 0, x, 0) for x in (root, 1 / root))
    unit = centred * inverse
    around = F.avg_pool2d(unit, 3, 1, 1, count_include_pad=False)
    values = torch.stack([unit, around], 1).flatten(3).permute(0, 3, 1, 2).contiguous()  # (B,h·w,2,C)
    products = (values @ values.mT / values.shape[-1]).flatten(2)[..., [0, 1, 3]]  # (B,h·w,3)
    largest = torch.finfo(features.dtype).max
    units = (x.flatten(2).mT.clamp(max=largest).to(features.dtype) for x in (mean, deviation, inverse))  # (B,1,C)
    return Channels(*units, values.to(features.dtype), products)


def _unit(x: Tensor) -> Tensor:
    """Vectors of root mean square 1."""
    return F.rms_norm(x, x.shape[-1:])
