"""Kinds of uncertainty that an evaluation compares, for every arm, and the error that they are to tell."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import core
from core.uncertainty import rarity, unit_variance

KINDS = ("rarity", "variance", "entropy", "local", "rarity_enlarged")
"""The first three are those of `core.Uncertainty`. The other two are controls, the same for every arm, which know the
low-resolution features only: their variance in 3 x 3 cells, and the rarity of the cells; both enlarged bilinearly."""


@torch.no_grad()
def uncertain_output(
    model: nn.Module, guidance: Tensor, features: Tensor, size: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of an upsampler (1,C,Qh,Qw), and its uncertainty of each kind, (1,1,Qh,Qw).

    An upsampler that is not AnyUp says nothing of itself: it has the variance, rarity and entropy of bilinear
    interpolation.
    """
    if isinstance(model, core.AnyUp):
        output, found = model.with_uncertainty(guidance, features, size)
        own = {name: getattr(found, name) for name in ("rarity", "variance", "entropy")}
        return output, own | controls(features, size)
    return model(guidance, features, size), of_interpolation(features, size)


def of_interpolation(features: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """(1,C,h,w) -> each kind, (1,1,Qh,Qw), with the weights of bilinear interpolation in place of attention's."""
    grid, unit = features.shape[-2:], unit_variance(features)
    centred = features.float() - features.float().mean((2, 3), keepdim=True)
    energy, kept = (
        values.square().sum(1, keepdim=True) / unit for values in (centred, _enlarged(centred, size))
    )  # (1,1,h,w), (1,1,Qh,Qw)
    weights = _enlarged(torch.eye(grid.numel(), device=features.device).unflatten(1, grid)[None], size)  # (1,h·w,Qh,Qw)
    known = controls(features, size)
    own = {
        "rarity": known["rarity_enlarged"],
        "variance": (_enlarged(energy, size) - kept).clamp(min=0),
        "entropy": -torch.special.xlogy(weights, weights).sum(1, keepdim=True).clamp(max=0),
    }
    return own | known


def controls(features: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """(1,C,h,w) -> the kinds that need no upsampler, (1,1,Qh,Qw)."""
    centred = features.float() - features.float().mean((2, 3), keepdim=True)
    near = F.unfold(F.pad(centred, [1] * 4, mode="replicate"), 3).unflatten(1, (-1, 9))  # (1,C,9,h·w)
    local = near.var(2, correction=0).sum(1).view(1, 1, *features.shape[-2:]) / unit_variance(features)
    return {"local": _enlarged(local, size), "rarity_enlarged": _enlarged(rarity(features), size)}


def error_of(output: Tensor, target: Tensor, features: Tensor) -> Tensor:
    """(1,C,Qh,Qw) twice, (1,C,h,w) -> (1,1,Qh,Qw): squared error in units of the variance of the low-res features.

    That unit is known where there is no target, so that a calibrated bound can be used there.
    """
    return (output.float() - target.float()).square().sum(1, keepdim=True) / unit_variance(features)


def _enlarged(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values, size, mode="bilinear")
