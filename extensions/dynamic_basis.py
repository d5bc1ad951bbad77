"""`unifier=dynamic_basis`: AnyUp's feature-agnostic layer, with filters that depend on the image.

AnyUp's filters are the same for every image and every encoder, and their number hardly matters (from 8 to 256 filters
the paper's mIoU goes from 61.97 to 62.19). Here a small meta network sees statistics of the features and of the
guidance, and changes each filter. It adds a mixture of a small filter bank, and scales the filter up or down.

Papers: dynamic filter networks (De Brabandere et al., arXiv 1605.09673) generate filters from the input. CondConv
(Yang et al., arXiv 1904.04971) mixes them from a bank, with one mixture per image. The network treats the channels as
a set (Zaheer et al., arXiv 1703.06114), so their number and order do not matter.

Status: measured (docs/extensions.md): no help shown, from scratch or from published weights.
"""

import math
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.hooks import GATE_LR_SCALE
from core.registry import register
from core.unifiers import LearnedBasis, Ordering

MAX_RESPONSES = {"cpu": 2**18, "cuda": 2**26}  # filter responses held at once, with filters per location
NUM_MOMENTS = 5
CHANNEL_DIM = 16  # width of the code of a single channel, before the mean over channels
EPSILON = 1e-6  # added to mean squares, which are about 1, so that the gradient of their root is finite


class Conditioning(Enum):
    """What the meta network sees."""

    features = "features"
    guidance = "guidance"
    both = "both"


class MetaNetwork(nn.Module):
    """Maps moments of features and guidance to a code, from which filters are computed.

    Args:
        conditioning: what the network sees.
        embed_dim: D, width of the guidance.
        hidden_dim: width of the code.
    """

    def __init__(self, conditioning: Conditioning, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.of_channel, self.of_features, self.of_guidance = None, None, None
        if conditioning is not Conditioning.guidance:
            self.of_channel = nn.Linear(NUM_MOMENTS, CHANNEL_DIM)
            self.of_features = nn.Linear(CHANNEL_DIM, hidden_dim)
        if conditioning is not Conditioning.features:
            self.of_guidance = nn.Linear(2 * embed_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.mix = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, features: Tensor, guidance: Tensor, radius: int | None) -> Tensor:
        """(B,C,h,w), (B,D,H,W) -> (B,h,w,hidden) codes of neighbourhoods; radius None: (B,1,1,hidden), of the image."""
        seen = []
        if self.of_features is not None:
            moments = feature_moments(features, radius).to(self.mix.weight.dtype)  # (B,h',w',C,5)
            seen.append(self.of_features(F.silu(self.of_channel(moments)).mean(-2)))
        if self.of_guidance is not None:
            pooled = F.adaptive_avg_pool2d(guidance, features.shape[-2:])
            seen.append(self.of_guidance(guidance_moments(pooled, radius).to(self.mix.weight.dtype)))
        return F.silu(self.mix(F.silu(self.norm(sum(seen)))))  # (B,h',w',hidden)


def feature_moments(features: Tensor, radius: int | None) -> Tensor:
    """Moments of each channel over the image or around each cell: (B,C,h,w) -> (B,h',w',C,5).

    The features of each image are first scaled to a mean square of 1. The moments are the mean, the mean magnitude,
    and the root mean squares of the values, of their vertical differences and of their horizontal differences.
    """
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    x = (F.normalize(exact.flatten(1), dim=1) * math.sqrt(exact[0].numel())).view_as(exact)
    x = x.permute(0, 2, 3, 1).contiguous()  # (B,h,w,C): averages of neighbourhoods are several times faster there
    down, across = F.pad(x.diff(dim=1), (0, 0, 0, 0, 0, 1)), F.pad(x.diff(dim=2), (0, 0, 0, 1))
    moments = torch.stack([x, x.abs(), x.square(), down.square(), across.square()], -1).flatten(3)  # (B,h,w,5·C)
    moments = _averages(moments.permute(0, 3, 1, 2), radius).permute(0, 2, 3, 1).unflatten(3, (-1, NUM_MOMENTS))
    return torch.cat([moments[..., :2], (moments[..., 2:] + EPSILON).sqrt()], -1)


def guidance_moments(pooled: Tensor, radius: int | None) -> Tensor:
    """Mean and standard deviation of each guidance channel, over the image or around each cell -> (B,h',w',2·D)."""
    exact = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    mean, square = _averages(torch.cat([exact, exact.square()], 1), radius).chunk(2, 1)
    deviation = ((square - mean.square()).clamp(min=0) + EPSILON).sqrt()
    return torch.cat([mean, deviation], 1).permute(0, 2, 3, 1)


def _averages(x: Tensor, radius: int | None) -> Tensor:
    """(B,N,h,w) -> means over the image, (B,N,1,1), or over the part of each neighbourhood inside it, (B,N,h,w)."""
    if radius is None:
        return x.mean((2, 3), keepdim=True)
    return F.avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


@register("dynamic_basis")
class DynamicBasis(LearnedBasis):
    """The learned basis, changed for each image (or each cell) according to its features and guidance.

    Filter m of an image is `exp(g_m·(log(C)/2 + s_m)) · (basis_m + g_m·Σ_r a_mr·bank_r)`. The meta network gives the
    mixture a and the sensitivity s; g_m is a gate. Feature vectors have unit length, so their entries shrink with
    C^(-1/2). log(C)/2 compensates for this: with an open gate, the sensitivity does not depend on C.

    `contrast` is a second gate. The responses are all close to their mean 1/M. Their variance is 3e-11 (with this
    package's trained weights and features of its embedded backbone), and the GroupNorm that follows adds 1e-5 to it.
    So the filters have little effect in the baseline. The gate enlarges the differences from 1/M, up to M times.

    All gates are 0 at the start. Then the filler equals `learned_basis` (without gradients, bit for bit), with the same
    weights under the same names.

    Args:
        num_basis, kernel_size, ordering: as for `learned_basis`.
        conditioning: the meta network sees `features`, `guidance` or `both`.
        per_location: True: filters for each cell, from a neighbourhood of the filters' size. False: for each image.
            With True the unifier takes twice as long (a few per cent of a forward).
        bank_size: number R of filters in the bank.
        hidden_dim: width of the meta network.
        contrast: False: without the second gate.
        open_at_start: how far the gates are open at the start, from 0 to below 1. Above 0, the filler does not start
            as the baseline.

    Raises:
        ValueError: a setting is out of its range.
    """

    lr_scales: ClassVar[Mapping[str, float]] = {"gates": GATE_LR_SCALE, "contrast_gates": GATE_LR_SCALE}

    def __init__(
        self,
        embed_dim: int,
        num_basis: int = 128,
        kernel_size: int = 5,
        ordering: Ordering = Ordering.paper,
        conditioning: Conditioning = Conditioning.both,
        per_location: bool = False,
        bank_size: int = 8,
        hidden_dim: int = 64,
        contrast: bool = True,
        open_at_start: float = 0.0,
    ):
        super().__init__(embed_dim, num_basis, kernel_size, ordering)  # draws the shared weights as the baseline does
        for name, size in (("bank_size", bank_size), ("hidden_dim", hidden_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1 (unifier=learned_basis changes no filter), got {size}")
        if not 0 <= open_at_start < 1:
            raise ValueError(f"open_at_start must be from 0 to below 1, got {open_at_start}")
        self.radius = kernel_size // 2 if per_location else None
        self.meta = MetaNetwork(_conditioning(conditioning), embed_dim, hidden_dim)
        self.head = nn.Linear(hidden_dim, num_basis * (bank_size + 1))
        self.bank = nn.Parameter(torch.randn(bank_size, kernel_size**2))
        start = torch.full((num_basis,), math.atanh(open_at_start))
        self.gates = nn.Parameter(start)
        self.contrast_gates = nn.Parameter(start.clone()) if contrast else None
        self._seen: tuple[Tensor, int] | None = None

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        code = self.meta(features, guidance, self.radius)  # (B,h',w',hidden)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._seen = code[0], features.shape[1]
        return self._encoded(features, partial(self._responses, code)).to(guidance.dtype)

    def filters(self, code: Tensor, channels: int) -> Tensor:
        """The filters for features of that many channels: (…,hidden) -> (…,k²,M)."""
        made = self.head(code).unflatten(-1, (-1, len(self.gates)))  # (…,R+1,M)
        mixture, sensitivity = made[..., :-1, :], made[..., -1:, :]
        gate = self.gates.tanh()  # (M,)
        gain = (gate * (math.log(channels) / 2 + sensitivity)).exp()  # (…,1,M)
        return gain * (self.encoder[0].basis.flatten(1).t() + gate * (self.bank.t() @ mixture))

    def _responses(self, code: Tensor, features: Tensor) -> Tensor:
        """(B,h',w',hidden), (B,C,h,w) of unit length -> (B,M,h,w)."""
        if self._closed():
            responses = self.encoder[0](features)
        elif self.radius is None:
            filters = self.filters(code[:, 0, 0], features.shape[1]).mT  # (B,M,k²)
            filters = filters.reshape(-1, *self.encoder[0].basis.shape)  # (B,M,1,k,k)
            each = zip(features.split(1), filters, strict=True)
            responses = torch.cat([self.encoder[0](image, basis=own) for image, own in each])
        else:
            responses = self._local_responses(code, features)
        if self.contrast_gates is None:
            return responses
        log_factor = self.contrast_gates.tanh() * math.log(len(self.contrast_gates))
        return responses + (responses - 1 / len(self.contrast_gates)) * log_factor.expm1()[:, None, None]

    def _closed(self) -> bool:
        """Whether all gates are closed; False with gradients or under a compiler, where a gate may open."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.gates.any())

    def _local_responses(self, code: Tensor, features: Tensor) -> Tensor:
        """As `BasisConvolution`, with filters of each cell; works on a few rows at a time, to hold few filters."""
        stem, size = self.encoder[0], 2 * self.radius + 1
        channels, height, width = features.shape[1:]
        taps = features.new_ones(1, 1, size, size)
        inside = F.conv2d(features.new_ones(1, 1, height, width), taps, padding=self.radius)[0, 0]  # (h,w)
        patches = F.pad(features, (self.radius,) * 4).unfold(2, size, 1).unfold(3, size, 1)  # (B,C,h,w,k,k), a view
        budget = MAX_RESPONSES.get(features.device.type, 2**18)
        step = max(1, budget // (width * channels * len(self.gates)))
        band = self._band
        if torch.is_grad_enabled() and not (stem.twice_differentiable or torch.compiler.is_compiling()):
            band = partial(checkpoint, band, use_reentrant=False)
        images = []
        for image, own in zip(patches, code, strict=True):
            blocks = zip(image.split(step, 1), own.split(step), inside.split(step), strict=True)
            images.append(torch.cat([band(*block, budget) for block in blocks]))  # (h,w,M)
        return torch.stack(images).permute(0, 3, 1, 2)  # (B,M,h,w)

    def _band(self, patches: Tensor, code: Tensor, inside: Tensor, budget: int) -> Tensor:
        """Rows of cells of one image: (C,rows,w,k,k), (rows,w,hidden), (rows,w) -> (rows,w,M)."""
        channels, num_basis = len(patches), len(self.gates)
        patches = (patches / inside[..., None, None]).permute(1, 2, 0, 3, 4).flatten(3).flatten(0, 1)  # (N,C,k²)
        parts, at_once = [], max(1, budget // (channels * num_basis))
        for some, codes in zip(patches.split(at_once), code.flatten(0, 1).split(at_once), strict=True):
            responses = some @ self.filters(codes, channels)  # (n,C,M)
            if self.encoder[0].ordering is Ordering.released:
                responses = responses.flatten(1).unflatten(1, (num_basis, channels)).mT  # read as (M,C)
            parts.append(_mean_of_softmaxes(responses))
        return torch.cat(parts).unflatten(0, inside.shape)

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """Learned filters, generated filters (of the image or of its central cell), and their difference.

        All share one colour scale: red positive, blue negative. With `per_location`, also a map of how much the filters
        of each cell were changed.
        """
        if self._seen is None:
            return {}
        code, channels = self._seen
        code = code.to(self.head.weight)  # (h',w',hidden)
        learned = self.encoder[0].basis.flatten(1).t()  # (k²,M)
        centre = self.filters(code[code.shape[0] // 2, code.shape[1] // 2], channels)
        shown = {"learned filters": learned, "generated filters": centre, "their difference": centre - learned}
        limit = torch.stack([*shown.values()]).abs().amax()
        pictures = {title: _mosaic(filters / limit) for title, filters in shown.items()}
        if self.radius is not None:
            change = torch.stack([(self.filters(row, channels) - learned).norm(dim=(1, 2)) for row in code])  # (h,w)
            pictures["change of the filters"] = (change / change.amax().clamp(min=1e-12)).expand(3, -1, -1)
        return {title: picture.float().cpu() for title, picture in pictures.items()}


def _mean_of_softmaxes(responses: Tensor) -> Tensor:
    """`responses.softmax(2).mean(1)`, (n,C,M) -> (n,M); several times faster where PyTorch's softmax is slow."""
    exps = (responses - responses.detach().amax(2, keepdim=True)).exp()
    return (exps / exps.sum(2, keepdim=True)).mean(1)


def _mosaic(filters: Tensor) -> Tensor:
    """(k²,M) in [-1,1] -> (3,height,width): up to 64 filters in rows of 8, red positive, blue negative."""
    size = math.isqrt(len(filters))
    tiles = F.pad(filters.t()[:64].unflatten(1, (size, size)), (1, 1, 1, 1))  # (m,k+2,k+2)
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, -len(tiles) % 8)).unflatten(0, (-1, 8))  # (rows,8,k+2,k+2)
    values = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (height,width)
    return torch.stack([1 - values.clamp(max=0).abs(), 1 - values.abs(), 1 - values.clamp(min=0)])


def _conditioning(conditioning: Conditioning) -> Conditioning:
    try:
        return Conditioning(conditioning)
    except ValueError:
        known = ", ".join(choice.name for choice in Conditioning)
        raise ValueError(f"conditioning must be one of {known}, got {conditioning!r}") from None
