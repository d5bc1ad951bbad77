"""Baseline fillers of the training step: `objective=cosine_mse` and `learner=sgd`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.hooks import Batch, Filler, Learner, Objective
from core.registry import register
from core.validation import check_losses


def cosine_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, plus squared error relative to each target vector's range (AnyUp's and JAFAR's released loss).

    Both (N,C,h,w) -> scalar. Prediction and target are shifted by the target vector's minimum and divided by its
    range before the squared error.
    """
    low, high = target.aminmax(dim=1, keepdim=True)  # (N,1,h,w)
    squared = ((prediction - target) / (high - low + 1e-6)).square().mean()
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean() + squared


@register("cosine_mse")
class CosineMSE(Objective):
    """AnyUp's training objective (section 3.4).

    Args:
        self_consistency: weight of the agreement between guidance with and without photometric augmentation, at
            `self_consistency_size`; 0 leaves it out, and nothing is computed for it.
        input_consistency: weight of the agreement of the area-downsampled output with the input features.
        self_consistency_size: side of the square output on which self-consistency is measured, in pixels.
    """

    def __init__(self, self_consistency: float = 0.1, input_consistency: float = 0.1, self_consistency_size: int = 224):
        super().__init__()
        self.self_consistency = self_consistency
        self.input_consistency = input_consistency
        self.self_consistency_size = self_consistency_size

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch.image, batch.features, batch.output_size)  # (B,C,Qh,Qw)
        losses = {"reconstruction_loss": cosine_mse(crops_of(output, batch), batch.target)}
        if self.input_consistency > 0:
            pooled = F.interpolate(output, batch.features.shape[-2:], mode="area")  # (B,C,h,w)
            losses["input_consistency_loss"] = self.input_consistency * cosine_mse(pooled, batch.features)
        if self.self_consistency > 0:
            if batch.augmented_image is None:
                raise ValueError("objective.self_consistency > 0 needs batch.augmented_image; give it, or set it to 0")
            size = (self.self_consistency_size,) * 2
            with torch.no_grad():
                clean = model(batch.image, batch.features, size)
            augmented = model(batch.augmented_image, batch.features, size)
            losses["self_consistency_loss"] = self.self_consistency * cosine_mse(augmented, clean)
        return losses


def crops_of(output: Tensor, batch: Batch) -> Tensor:
    """(B,C,Qh,Qw) -> (N,C,th,tw): the regions that `batch.target` shows.

    Raises:
        ValueError: the targets are not that many regions of the output.
    """
    target, corners = batch.target, batch.corners
    if corners is None:
        if target.shape != output.shape:
            raise ValueError(
                f"target {tuple(target.shape)} is not the whole output {tuple(output.shape)}: give corners of crops"
            )
        return output
    if target.dim() != 4 or target.shape[1] != output.shape[1]:
        raise ValueError(f"target must be (N, {output.shape[1]}, th, tw) as the features, got {tuple(target.shape)}")
    height, width = target.shape[-2:]
    per_image = len(corners) // len(output)
    if per_image * len(output) != len(target) or len(corners) != len(target):
        raise ValueError(
            f"{len(target)} targets and {len(corners)} corners are no equal number of crops for each of "
            f"{len(output)} images"
        )
    last = corners.new_tensor(output.shape[-2:]) - corners.new_tensor([height, width])
    if (corners < 0).any() or (corners > last).any():
        raise ValueError(
            f"a crop of {height}x{width} at one of the corners {corners.tolist()} lies outside the output grid "
            f"{tuple(output.shape[-2:])}"
        )
    return torch.stack(
        [
            output[i // per_image, :, row : row + height, column : column + width]
            for i, (row, column) in enumerate(corners.tolist())
        ]
    )


@register("sgd")
class PlainStep(Learner):
    """One gradient step: every loss once, backward once, update once."""

    def step(
        self, model: nn.Module, objective: Objective, batch: Batch, optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        losses = all_losses(model, objective, batch)
        optimizer.zero_grad()
        backward(sum(losses.values()), optimizer)
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


def backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Computes gradients; through `optimizer.backward` where it has one, to scale losses and gather from processes."""
    getattr(optimizer, "backward", Tensor.backward)(loss)


def all_losses(model: nn.Module, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """The losses of an objective and the auxiliary ones of the model's fillers; their sum is to be minimised.

    Raises:
        TypeError, ValueError: what is no dict of scalars, no loss at all, or two losses of one name.
    """
    losses = dict(check_losses(objective, objective(model, batch)))
    if not losses:
        raise ValueError(f"objective {type(objective).__name__} returned no loss")
    for filler in (module for module in model.modules() if isinstance(module, Filler)):
        for name, loss in check_losses(filler, filler.auxiliary_loss()).items():
            if name in losses:
                raise ValueError(f"{filler.hook} {type(filler).__name__}: there is another loss called {name}")
            losses[name] = loss
    return losses
