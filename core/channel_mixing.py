"""Random changes of an encoder's channels: what an upsampler for any encoder must not depend on.

Attention gives each cell one weight for all channels. So if features and target are changed by the same matrix, a
perfect output is changed by it too, and the batch is one that another encoder might have given.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from core.batch import Batch

GROUP = 128
"""Channels that are mixed with each other: a random orthogonal matrix of 2048 channels would take a second."""


def random_rotation(size: int, source: torch.Generator) -> Tensor:
    """(size,size) float32: a random orthogonal matrix, uniform over all (Mezzadri, math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=source))
    return q * r.diagonal().sign()


def mixing(channels: int, source: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A random rotation of `channels` channels, in random groups of at most `GROUP`: (…,C,h,w) -> the same shape."""
    order = torch.randperm(channels, generator=source)
    matrices = [random_rotation(len(part), source) for part in order.split(GROUP)]

    def mixed(x: Tensor) -> Tensor:
        parts = x.index_select(-3, order.to(x.device)).split(GROUP, -3)
        turned = [torch.einsum("dc,...chw->...dhw", m.to(x), part) for m, part in zip(matrices, parts, strict=True)]
        return torch.cat(turned, -3)

    return mixed


def dropping(channels: int, largest_share: float, source: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Drops a random share of the channels, up to `largest_share`; one at least stays: (…,C,h,w) -> (…,K,h,w)."""
    share = largest_share * torch.rand((), generator=source).item()
    kept = torch.randperm(channels, generator=source)[: max(1, round(channels * (1 - share)))].sort().values
    return lambda x: x.index_select(-3, kept.to(x.device))


def with_features(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `change` of all its features: those of the whole, the target, the clip, and of its encoder."""
    clip, encoder = batch.clip, batch.encoder
    return replace(
        batch,
        features=change(batch.features),
        target=change(batch.target),
        clip=clip and replace(clip, features=change(clip.features)),
        encoder=encoder and (lambda images: change(encoder(images))),
    )
