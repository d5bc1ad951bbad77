"""What heads and drawn pixels need of an upsampler, without making all of its features.

A method that mixes features with weights that do not depend on them commutes with a linear head, W·up(F) = up(W·F), so
that a head's few outputs are upsampled in place of many channels. Of AnyUp a few pixels are asked as points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import core
from experiments.measuring.bench import Bench, EncodedImage, Size, checked
from experiments.measuring.blur import blurred
from experiments.measuring.heads import Head, at_positions
from experiments.measuring.upsamplers import Blurred, MeanOf
from experiments.peers import Peer
from experiments.peers.interpolation import Bilinear


@torch.no_grad()
def raw_outputs(model: nn.Module, case: EncodedImage, heads: Sequence[Head], bench: Bench) -> list[Tensor]:
    """What each head gives on upsampled features: (1,outputs,Qh,Qw), and of heads before interpolation coarser grids.

    Raises:
        EvaluationError: as `Bench.upsample`.
    """
    affine = [head.affine() for head in heads]
    if not commutes(model) or None in affine:
        features = bench.upsample(model, [case])
        return [head(features) for head in heads]
    weight, bias = (torch.cat(parts) for parts in zip(*affine, strict=True))  # (K,C), (K,) of all heads
    output = _after_head(model, bench.guidance(case), case.features[0].float(), weight, bias, bench.sizes.output)
    checked(output, output, bench.sizes.output, [case])
    return list(output.split([len(own) for own, _ in affine], 1))


def _after_head(
    model: nn.Module, guidance: Tensor, features: Tensor, weight: Tensor, bias: Tensor, size: Size
) -> Tensor:
    """(1,C,h,w), (K,C), (K,) -> (1,K,*size): a linear head's outputs, upsampled."""
    if isinstance(model, MeanOf):
        return sum(_after_head(each, guidance, features, weight, bias, size) for each in model.models) / len(
            model.models
        )
    if isinstance(model, Blurred):
        sharp = _after_head(model.model, guidance, features, weight, bias, size)
        return blurred(sharp, tuple(features.shape[-2:]), model.width)
    if isinstance(model, core.AnyUp):
        return model.readout(guidance, features, (weight, bias), size)
    return model(guidance, torch.einsum("kc,bchw->bkhw", weight, features) + bias[:, None, None], size)


@torch.no_grad()
def at_pixels(model: nn.Module, case: EncodedImage, positions: Tensor, bench: Bench) -> Tensor:
    """(P,2) rows and columns on the grid of the labels -> (C,P) upsampled features there.

    Raises:
        EvaluationError: as `Bench.upsample`.
    """
    if isinstance(model, MeanOf):
        return sum(at_pixels(each, case, positions, bench) for each in model.models) / len(model.models)
    # On a grid other than the labels' the features are interpolated twice, which must not be done at once.
    same_grid = bench.sizes.output == bench.sizes.image
    if same_grid and isinstance(model, Bilinear):
        return at_positions(case.features[0].float(), positions, bench.sizes.image)
    if same_grid and isinstance(model, core.AnyUp) and model.answers_points:
        features, size = case.features[0].float(), bench.sizes.output
        coords = (positions + 0.5) / torch.tensor(size, device=positions.device)
        values = model.query(bench.guidance(case), features, coords, size)  # (1,C,P)
        return checked(values[..., None], features, (len(positions), 1), [case])[0, :, :, 0]
    (values,) = bench.upsample(model, [case])
    return at_positions(values, positions, bench.sizes.image)


def commutes(model: nn.Module) -> bool:
    """Whether a linear head may be applied before upsampling."""
    if isinstance(model, MeanOf):
        return all(commutes(each) for each in model.models)
    if isinstance(model, Blurred):
        return commutes(model.model)
    return isinstance(model, core.AnyUp | Peer) and model.linear_in_values
