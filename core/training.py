"""The training step: `Trainable`, `all_losses`, and the baseline fillers `objective=cosine_mse` and `learner=sgd`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batch import Batch, check_parts, crops_of
from core.checks import check_losses
from core.hooks import Filler, Learner, Objective
from core.registry import register


class Trainable(nn.Module):
    """Model, objective and learner as one module, to be moved, wrapped for several processes, averaged and saved.

    Everything that a step differentiates happens in its forward. So mixed precision and several processes cover it all.
    """

    def __init__(self, model: nn.Module, objective: Objective, learner: Learner):
        super().__init__()
        self.model, self.objective, self.learner = model, objective, learner
        learner.prepare(model)

    def forward(self, tasks: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The losses of each task, as the learner computes them."""
        return self.learner(self.model, self.objective, tasks)

    @property
    def batch_parts(self) -> frozenset[str]:
        """The optional parts of a `Batch` that at least one filler needs.

        Raises:
            ValueError: a filler asks for a part that no batch has.
        """
        return check_parts((filler, filler.batch_parts) for filler in fillers_of(self))

    @property
    def needs_target(self) -> bool:
        """Whether a target must be made: for the objective, or for the auxiliary loss of some filler."""
        return self.objective.needs_target or bool(_asking(self.model))


def lr_scale(module: nn.Module, name: str) -> float:
    """Factor on the learning rate of the parameter `name` of a module, from `Filler.lr_scales`; 1 by default."""
    for prefix, filler in module.named_modules():
        if isinstance(filler, Filler) and name.startswith(f"{prefix}." if prefix else ""):
            own = name.removeprefix(f"{prefix}.")
            for part, scale in filler.lr_scales.items():
                if own == part or own.startswith(f"{part}."):
                    return scale
    return 1.0


def cosine_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, plus squared error relative to each target vector's range (AnyUp's and JAFAR's released loss).

    Both (N,C,h,w) -> scalar. Prediction and target are shifted by the target vector's minimum and divided by its
    range before the squared error.
    """
    return cosine_loss(prediction, target) + squared_loss(prediction, target)


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, averaged over positions: both (N,C,h,w) -> scalar."""
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


def squared_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error in units of each target vector's range, averaged: both (N,C,h,w) -> scalar."""
    low, high = target.aminmax(dim=1, keepdim=True)  # (N,1,h,w)
    return ((prediction - target) / (high - low + 1e-6)).square().mean()


@register("cosine_mse")
class CosineMSE(Objective):
    """AnyUp's training objective (section 3.4).

    Args:
        self_consistency: weight of the loss between the outputs for guidance with and without photometric
            augmentation. 0: nothing is computed for it.
        input_consistency: weight of the loss between the area-downsampled output and the input features.
        self_consistency_size: side of the square output for the self-consistency loss, in pixels.
    """

    def __init__(self, self_consistency: float = 0.1, input_consistency: float = 0.1, self_consistency_size: int = 224):
        super().__init__()
        self.self_consistency = self_consistency
        self.input_consistency = input_consistency
        self.self_consistency_size = self_consistency_size
        self.batch_parts = frozenset({"augmented_image"} if self_consistency > 0 else ())

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        losses = self.reconstruction(output, batch)
        if self.input_consistency > 0:
            pooled = F.interpolate(output, batch.features.shape[-2:], mode="area")  # (B,C,h,w)
            losses["input_consistency_loss"] = self.input_consistency * cosine_mse(pooled, batch.features)
        if self.self_consistency > 0:
            if batch.augmented_image is None:
                raise ValueError(
                    "objective.self_consistency > 0 needs batch.augmented_image: add it to the batch, or set "
                    "objective.self_consistency=0"
                )
            size = (self.self_consistency_size,) * 2
            with torch.no_grad():
                clean = widened(model(batch.image, batch.features, size))
            augmented = widened(model(batch.augmented_image, batch.features, size))
            losses["self_consistency_loss"] = self.self_consistency * cosine_mse(augmented, clean)
        return losses

    def reconstruction(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The losses between the output and the target; a subclass may have others."""
        return {"reconstruction_loss": cosine_mse(crops_of(output, batch), batch.target)}


@register("sgd")
class PlainStep(Learner):
    """One gradient step on the mean over the tasks; one task is held in memory at a time."""

    def forward(self, model: nn.Module, objective: Objective, tasks: Sequence[Batch]) -> list[dict[str, Tensor]]:
        return [all_losses(model, objective, batch) for batch in tasks]

    def step(
        self, trainable: nn.Module, tasks: Sequence[Batch], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Tensor]]:
        optimizer.zero_grad()
        found = []
        for batch in tasks:
            [losses] = trainable([batch])
            backward(sum(losses.values()) / len(tasks), optimizer)
            found.append({name: loss.detach() for name, loss in losses.items()})
        optimizer.step()
        return found


def backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Computes gradients, by `optimizer.backward` if it exists: that one averages over processes too."""
    getattr(optimizer, "backward", Tensor.backward)(loss)


def all_losses(model: nn.Module, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """The losses of the objective and the auxiliary losses of the model's fillers; their sum is minimised.

    Raises:
        TypeError, ValueError: losses are not a dict of scalars, there are none, or two have the same name.
    """
    asking = _asking(model)
    output, auxiliary = None, []
    if objective.needs_output or asking:
        own = model(batch.image, batch.features, batch.output_size, generator=batch.generator)
        output = widened(own)  # (B,C,Qh,Qw)
        auxiliary = [(filler, check_losses(filler, filler.auxiliary_loss(output, batch))) for filler in asking]
    losses = dict(check_losses(objective, objective(model, batch, output)))
    if not losses:
        raise ValueError(f"objective {type(objective).__name__} returned no loss")
    for filler, more in auxiliary:
        for name, loss in more.items():
            if name in losses:
                raise ValueError(
                    f"{filler.hook} {type(filler).__name__}: there is already a loss called {name}: rename this one"
                )
            losses[name] = loss
    return losses


def _asking(model: nn.Module) -> list[Filler]:
    """The fillers that have an auxiliary loss."""
    return [filler for filler in fillers_of(model) if type(filler).auxiliary_loss is not Filler.auxiliary_loss]


def fillers_of(module: nn.Module) -> list[Filler]:
    """All fillers in a module, itself included."""
    return [inner for inner in module.modules() if isinstance(inner, Filler)]


def widened(x: Tensor) -> Tensor:
    """Casts to at least single precision, in which outputs of mixed precision are compared."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
