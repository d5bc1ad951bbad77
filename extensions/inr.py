"""`decoder=inr`: an implicit decoder that corrects attention's output (the explicit output) at every point.

Attention returns convex combinations of feature vectors, with the same weights for all channels. So no output leaves
the convex hull of its neighbours, and no channel can be sharper than another. This decoder adds a correction to every
channel of every point.

- Any C: one small network, shared by all channels, makes the correction. It sees one channel at a time, normalised by
  that channel's mean and standard deviation in the image. Its inputs are the explicit output and, for each of the four
  nearest cells of the feature grid, the value and the mean around the cell.
- Local ensemble (LIIF, Chen et al., arXiv 2012.09161, section 3): the four cells have area weights, so the correction
  is continuous in the coordinates. They are averaged before the network's only nonlinearity, which takes a quarter of
  the time of four predictions.
- Hypernetwork (Ha et al., arXiv 1609.09106): a second network writes the weights of the first for each point and cell.
  It sees no single channel. Its inputs are the guidance at the point (as in JIIF, Tang et al., arXiv 2107.08717), the
  mean guidance of the cell, a Fourier code of the point's position in the cell with learned frequencies (LTE, Lee and
  Jin, arXiv 2111.08918), the cell's size in guidance pixels, and how well explicit output, value and mean agree over
  all channels.
- Each point has a blending weight for the correction. It is zero at the start: then the output is the explicit one.

If the features are scaled or shifted, or their channels permuted, so is the output. The size of an output pixel (LIIF's
cell decoding) is not an input: single points have no size, and it is unknown in a band of rows.

Status: measured (docs/extensions.md): no gain on tuned published weights; from scratch more detail,
mostly on convolutional encoders.
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
"""Values of the hidden layer held at once, over all channels; on CPU this many stay in cache."""
MAX_EXPORTED = 2**26
"""The same under a compiler, which unrolls the loop over blocks."""
MAX_POINTS = 2048
"""Points whose inputs of the hypernetwork are held at once."""
PER_CELL = 2
"""Inputs of the shared network for each channel and cell: the value, and the mean around the cell."""
NUM_PRODUCTS = 6
"""Products, averaged over the channels, of all pairs of explicit output, value and mean around the cell."""
SAMPLES_PER_CELL = 4
"""Samples along each axis, to average the guidance of a cell."""
PICTURE_SIDE = 256


class Channels(NamedTuple):
    """The normalised channels of an image, and their statistics."""

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
    """Inputs of the hypernetwork for each cell of the feature grid."""

    guidance: Tensor
    """(B,h·w,H): projected mean guidance."""
    size: tuple[int, int]
    """(h,w)."""
    pixels: Tensor
    """(2,): guidance pixels per cell along each axis, as log2."""


class Place(NamedTuple):
    """Positions of n points, and inputs of the hypernetwork there."""

    near: Tensor
    """(n,4): the nearest cells."""
    weights: Tensor
    """(n,4): their area weights."""
    inputs: Tensor
    """(B,n,4,H): projected guidance and positions, for each point and cell."""


@register("inr")
class INRDecoder(Decoder):
    """Adds blend · correction to the explicit output; see the module's docstring.

    Args:
        hidden_dim: H, width of the hypernetwork, which sees guidance and coordinates.
        num_units: K, hidden units of the network that all channels share.
        num_frequencies: number of frequencies of the Fourier code, each with a learned direction.

    Raises:
        ValueError: a setting is below 1.
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
                raise ValueError(f"decoder=inr: {name} must be at least 1, got {number}; decoder=none leaves it out")
        self.num_units = num_units
        self.project_point = nn.Linear(embed_dim, hidden_dim)
        self.project_cell = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.freqs = nn.Parameter(torch.randn(2, num_frequencies))  # turns per cell
        self.project_offset = nn.Linear(2 * num_frequencies + 2, hidden_dim, bias=False)
        self.project_products = nn.Linear(NUM_PRODUCTS, hidden_dim, bias=False)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU())
        self.head = nn.Linear(hidden_dim, num_units * (PER_CELL + 3))
        nn.init.normal_(self.head.bias, std=0.5)  # a random network, the same everywhere; each point then changes it
        self.gate = nn.Parameter(torch.zeros(hidden_dim))
        self.blend: Tensor | None = None
        """(B,Qh,Qw): magnitude of the blending weights of the latest forward without gradients."""

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
        """Magnitude of the blending weight, 0 (black) to 1 (white); and the same divided by its largest value."""
        if self.blend is None:
            return {}
        blend = self.blend[:1].float()
        size = [min(side, PICTURE_SIDE) for side in blend.shape[-2:]]
        picture = F.adaptive_avg_pool2d(blend, size).expand(3, -1, -1)
        largest = picture.max().item()
        return {"blend": picture, f"blend / {largest:.2g}": picture / max(largest, torch.finfo().tiny)}

    def _places(self, guidance: Tensor, points: Tensor, cells: Cells, at_once: int) -> Iterator[Place]:
        """Yields (Q,2) points in blocks.

        With gradients the guidance is sampled only once, because each time costs a pass over it.
        """
        inputs, several = self._inputs, at_once * max(1, MAX_POINTS // at_once)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            several = len(points)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = partial(checkpoint, inputs, use_reentrant=False)
        for some in points.split(several):
            near, weights, offsets = nearest_cells(some, cells.size)  # (n,4), (n,4), (n,4,2)
            weights = weights.to(guidance.dtype)
            split = (
                near.split(at_once),
                weights.split(at_once),
                inputs(guidance, some, near, offsets, cells).split(at_once, 1),
            )
            yield from map(Place, *split)

    def _inputs(self, guidance: Tensor, points: Tensor, near: Tensor, offsets: Tensor, cells: Cells) -> Tensor:
        """Guidance at each point and in its four cells, and the point's position in them: (B,n,4,H)."""
        at_point = self.project_point(_unit(sample(guidance, points)))  # (B,n,H)
        in_cells = cells.guidance.index_select(1, near.flatten()).unflatten(1, near.shape)  # (B,n,4,H)
        angle = 2 * math.pi * (offsets[..., None] * self.freqs.to(offsets.dtype)).sum(-2)  # (n,4,F), kept from autocast
        code = torch.cat([angle.cos(), angle.sin(), cells.pixels.to(angle).expand_as(offsets)], -1)
        return at_point[:, :, None] + in_cells + self.project_offset(code.to(in_cells.dtype))

    def _correct(
        self, pixels: Tensor, place: Place, channels: Channels, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B,n,C) explicit output -> (B,n,C) corrected output, in `out` if given; (B,n) blending weights in (-1,1)."""
        near, weights, inputs = place
        own = (pixels - channels.mean) * channels.inverse  # (B,n,C)
        local = channels.values.index_select(1, near.flatten()).view(*own.shape[:2], 4 * PER_CELL, -1)  # (B,n,8,C)
        products = self._products(own, local, channels.products.index_select(1, near.flatten()))  # (B,n,4,6)
        code = self.hidden(inputs + self.project_products(products))  # (B,n,4,H)
        written = self.head(code) * weights[..., None]  # (B,n,4,5·K)
        of_cells, shared = written.split([self.num_units * PER_CELL, self.num_units * 3], -1)
        of_cells = of_cells.unflatten(-1, (-1, PER_CELL)).transpose(2, 3).flatten(3).flatten(0, 1)  # (P,K,8), P = B·n
        of_own, bias, last = shared.sum(2).flatten(0, 1)[..., None].chunk(3, 1)  # (P,K,1)
        units = torch.baddbmm(bias, of_cells, local.flatten(0, 1))  # (P,K,C)
        units.baddbmm_(of_own.to(units.dtype), own.flatten(0, 1)[:, None].to(units.dtype)).relu_()
        predicted = torch.bmm(last.mT, units).view_as(own)  # (B,n,C)
        blend = ((code @ self.gate) * weights).sum(-1).tanh()  # (B,n)
        correction = (predicted * channels.deviation).to(pixels.dtype)
        return torch.addcmul(pixels, correction, blend[..., None].to(pixels.dtype), out=out), blend

    def _products(self, own: Tensor, local: Tensor, of_cells: Tensor) -> Tensor:
        """Mean products over channels: (B,n,C), (B,n,8,C), the cells' own (B,4·n,3) -> (B,n,4,6), in (-1,1)."""
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
    """Normalises each channel of (B,C,h,w) features by its mean and standard deviation in its image.

    The variance is increased by 1e-8 of the channel's mean square, because smaller variances are rounding errors.
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
    """Scales vectors to root mean square 1."""
    return F.rms_norm(x, x.shape[-1:])
