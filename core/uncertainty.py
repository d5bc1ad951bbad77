"""How uncertain upsampled features are, pixel by pixel: what attention knows of it, and the spread of samples.

Attention gives every output vector as y = Σ α_j v_j, with one weight α_j per cell for all channels and Σ α_j = 1. Any
quantity x_j of the cells is therefore carried to the output by one more value channel, Σ α_j x_j, in the same call:

- variance in the window: Σ α_j |v_j - y|² = Σ α_j |v_j - m|² - |y - m|², with m the image's mean vector;
- rarity: Σ α_j r_j, where r_j is the mean squared distance of cell j to the cells of the image that are most like it
  (the k-nearest-neighbour distance of novelty detection: Ramaswamy et al., SIGMOD 2000; Sun et al., ICML 2022);
- entropy: -Σ α_j log α_j, which attention gives itself (`Attention.bands_with_entropy`).

All but the entropy are divided by the variance of the image's features, so that they have no unit and need no number of
channels. How well each of them tells the error is measured in docs/uncertainty.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from core import checks
from core.fast.norm_act_conv import Buffers
from core.points import pixel_centres

NEAREST = 8
"""Cells that a cell is compared with, to tell how rare it is in its image."""
_PAIRS_AT_ONCE = 2**22  # distances held at once


@dataclass(frozen=True)
class Uncertainty:
    """Measures of uncertainty of one output, each (B,1,Qh,Qw), at least in single precision, and 0 or more.

    `variance`, `rarity` and `spread` are squared distances in units of the variance of the image's features: the mean
    over its cells of the squared distance from the mean vector. They are 0 where all cells are the same.
    """

    variance: Tensor
    """Of the vectors in the window, weighted by attention."""
    rarity: Tensor
    """Squared distance of the attended cells to the `NEAREST` cells most like them."""
    entropy: Tensor
    """Of the weights, in nats; exp of it is the number of cells that would give it with equal weights."""
    spread: Tensor | None = None
    """Variance over samples, summed over channels; None where no samples were asked for."""


def uncertain(
    model: nn.Module,
    image: Tensor,
    features: Tensor,
    output_size: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 0,
) -> tuple[Tensor, Uncertainty]:
    """`AnyUp.with_uncertainty`."""
    output_size = checks.check_inputs(model, image, features, output_size)
    if type(num_samples) is not int or num_samples < 0 or num_samples == 1:
        raise ValueError(f"num_samples must be 0 for no samples, or at least 2 for a spread, got {num_samples}")
    with torch.no_grad():
        guidance, query, key = model._guide(image, features, output_size, Buffers())
        coords = pixel_centres(output_size, like=query)
        context = model._context(image, features, coords, guidance, generator)
        output, measured = _attended(model, query, key, features, image)
        del query, key, guidance
        if not num_samples:
            return model._finish(output, context)[0], measured
        output, spread = _sampled(model, output, context, num_samples)
        return output, replace(measured, spread=spread / unit_variance(features))


@torch.no_grad()
def of_attention(
    model: nn.Module, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None
) -> Uncertainty:
    """As `AnyUp.with_uncertainty`, without the output, which may be larger than memory."""
    output_size = checks.check_inputs(model, image, features, output_size)
    _, query, key = model._guide(image, features, output_size, Buffers())
    bands = [measures for _, *measures in _bands(model, query, key, features, image)]
    return Uncertainty(*(torch.cat(parts, 2) for parts in zip(*bands, strict=True)))


def unit_variance(features: Tensor) -> Tensor:
    """(B,C,h,w) -> (B,1,1,1), above 0: mean over cells of the squared distance from the mean vector."""
    squares = _centred(features).square().sum(1, keepdim=True)  # (B,1,h,w)
    return squares.mean((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def rarity(features: Tensor, nearest: int = NEAREST) -> Tensor:
    """(B,C,h,w) -> (B,1,h,w): mean squared distance of each cell to the `nearest` others, in `unit_variance`.

    Where an image has fewer cells, all others count.
    """
    scaled = (_centred(features) / unit_variance(features).sqrt()).flatten(2).transpose(1, 2)  # (B,h·w,C)
    cells = scaled.shape[1]
    count, means = min(nearest, cells - 1), []
    for some in torch.arange(cells, device=features.device).split(max(1, _PAIRS_AT_ONCE // (len(scaled) * cells))):
        pairs = torch.cdist(scaled[:, some], scaled).square()  # (B,n,h·w)
        pairs[:, torch.arange(len(some)), some] = torch.inf  # a cell is not its own neighbour
        means.append(pairs.topk(count, largest=False).values.mean(2))  # (B,n)
    return torch.cat(means, 1).unflatten(1, features.shape[-2:])[:, None]


def _attended(
    model: nn.Module, query: Tensor, key: Tensor, features: Tensor, image: Tensor
) -> tuple[Tensor, Uncertainty]:
    """Attention's output (B,C,Qh,Qw), and what it says of itself."""
    output, *measures = (torch.cat(parts, 2) for parts in zip(*_bands(model, query, key, features, image), strict=True))
    checks.check_filled(model, "attention", output, (*features.shape[:2], *query.shape[-2:]))
    return output, Uncertainty(*measures)


def _bands(
    model: nn.Module, query: Tensor, key: Tensor, features: Tensor, image: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Yields attention's output (B,C,rows,Qw), variance, rarity and entropy, in bands from top to bottom."""
    channels, unit = features.shape[1], unit_variance(features)
    mean = _wide(features).mean((2, 3), keepdim=True)  # (B,C,1,1)
    energy = _centred(features).square().sum(1, keepdim=True) / unit  # (B,1,h,w)
    carried = torch.cat([energy, rarity(features), torch.ones_like(energy)], 1).to(features)  # (B,3,h,w)
    values, seen = torch.cat([features, carried], 1), model.attention.seen(image)
    for _, band, entropy in model.attention.bands_with_entropy(query, key, values, **seen):
        output, (energy, rare, total) = band[:, :channels], _wide(band[:, channels:]).split(1, 1)
        _check_average(model, total, band.dtype)
        kept = torch.linalg.vector_norm(_wide(output) - mean, dim=1, keepdim=True).square() / unit  # (B,1,rows,Qw)
        yield output, (energy - kept).clamp(min=0), rare.clamp(min=0), _wide(entropy).clamp(min=0)


def _sampled(model: nn.Module, output: Tensor, context: object, num_samples: int) -> tuple[Tensor, Tensor]:
    """Attention's output -> the first sample (B,C,Qh,Qw), and the variance over samples (B,1,Qh,Qw).

    Raises:
        ValueError: no filler drew random numbers.
    """
    generator = context.generator
    if generator is None:
        raise ValueError("samples cannot be drawn under a compiler; use num_samples=0")
    state, first = generator.get_state(), None
    for count in range(1, num_samples + 1):  # Welford: the samples are not kept
        sample = model._finish(output.clone(), replace(context))[0]
        if first is None:
            if torch.equal(generator.get_state(), state):
                raise ValueError(
                    "no filler of this model draws random numbers, so all samples would be the same: use num_samples=0"
                )
            first, mean = sample, _wide(sample)
            squares = torch.zeros_like(mean[:, :1])  # (B,1,Qh,Qw)
            continue
        change = _wide(sample) - mean
        mean = mean + change / count
        squares += (change * (_wide(sample) - mean)).sum(1, keepdim=True)
    return first, (squares / (num_samples - 1)).clamp(min=0)


def _check_average(model: nn.Module, total: Tensor, dtype: torch.dtype) -> None:
    """Refuses weights that do not sum to 1."""
    if (total - 1).abs().max() > min(0.1, 256 * torch.finfo(dtype).eps):
        raise ValueError(
            f"attention={type(model.attention).__name__} does not average: the weights of a query sum to "
            f"{total.flatten()[(total - 1).abs().argmax()].item():.4g}, not 1, so they have no variance; call the "
            "model itself, or use attention=window"
        )


def _wide(x: Tensor) -> Tensor:
    """At least in single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(features: Tensor) -> Tensor:
    features = _wide(features)
    return features - features.mean((2, 3), keepdim=True)
