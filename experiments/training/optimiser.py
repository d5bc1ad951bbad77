"""The optimiser that a learner is given: AdamW with schedule, accumulation, clipping and a moving average of weights.

It has the three calls a learner makes, `zero_grad`, `backward` and `step`, and does at each of them what the settings
and the number of processes ask for (through accelerate).
"""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.training import lr_scale
from experiments.schedule import SCHEDULES, rate
from experiments.settings import SettingError, check_choice


@dataclass(frozen=True)
class OptimiserSettings:
    """How weights are updated; the defaults stand in configs/train.yaml.

    Args:
        lr: peak learning rate. weight_decay: of AdamW.
        schedule: `cosine` to zero at the last step, or `constant`, both after the warm-up.
        warmup: steps over which the rate rises linearly.
        accumulate: steps whose gradients are averaged for one update.
        clip: largest norm of the gradient; 0: not clipped.
        ema: decay of the moving average of the weights, which is what is evaluated and kept; 0: none.
    """

    lr: float
    weight_decay: float
    schedule: str
    warmup: int
    accumulate: int
    clip: float
    ema: float

    def __post_init__(self):
        check_choice("optimiser.schedule", self.schedule, SCHEDULES)
        for name in ("lr", "weight_decay", "warmup", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"optimiser.{name} must not be negative, got {getattr(self, name)}")
        if self.accumulate < 1 or not 0 <= self.ema < 1:
            raise SettingError(
                f"optimiser.accumulate must be at least 1 and 0 <= optimiser.ema < 1, got {self.accumulate}, {self.ema}"
            )

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a step."""
        return rate(self.lr, step, num_steps, self.warmup, self.schedule)


class Optimiser:
    """AdamW over the trainable weights of a `core.training.Trainable`, as `settings` say.

    Weights with a learning-rate scale of their own (`Filler.lr_scales`) decay as slowly as all others.

    Args:
        trainable: as the accelerator prepared it. accelerator: scales losses, and knows the other processes.
    """

    def __init__(self, trainable: nn.Module, settings: OptimiserSettings, num_steps: int, accelerator: Accelerator):
        self.settings, self.num_steps, self.accelerator, self.trainable = settings, num_steps, accelerator, trainable
        inner = accelerator.unwrap_model(trainable)
        self.weights = {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}
        if not self.weights:
            raise SettingError("freeze leaves no weight to train")
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.weights.items():
            groups.setdefault(lr_scale(inner, name), []).append(weight)
        adam = torch.optim.AdamW(
            [
                {"params": weights, "lr_scale": scale, "weight_decay": settings.weight_decay / scale}
                for scale, weights in groups.items()
            ],
            lr=settings.lr,
        )
        self.adam = accelerator.prepare_optimizer(adam)
        self.step_number = 0
        """Of the next call of `step`; decides on the learning rate and on when an accumulated update is due."""
        self.ema = {name: weight.detach().clone() for name, weight in self.weights.items()} if settings.ema else {}
        self.grad_norm = math.nan
        self.lr = settings.lr
        """Of the latest update."""
        self._gather_when_due()

    @property
    def updates(self) -> bool:
        """Whether the current step ends a group of accumulated ones."""
        return (self.step_number + 1) % self.settings.accumulate == 0 or self.step_number + 1 == self.num_steps

    def zero_grad(self) -> None:
        """Forgets the gradients, unless they are being accumulated."""
        if self.step_number % self.settings.accumulate == 0:
            self.adam.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, averaged over the steps of one update and, with its last, the processes."""
        first = self.step_number - self.step_number % self.settings.accumulate
        together = min(self.settings.accumulate, self.num_steps - first)  # the last group may be smaller
        loss = loss / together
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def step(self) -> None:
        """Updates the weights with the rate of this step, where an update is due."""
        if self.updates:
            self.lr = self.settings.rate(self.step_number, self.num_steps)
            for group in self.adam.param_groups:
                group["lr"] = self.lr * group["lr_scale"]
            clip = self.settings.clip or math.inf
            self.grad_norm = float(self.accelerator.clip_grad_norm_(list(self.weights.values()), clip))
            self.adam.step()
            if not self.adam.step_was_skipped:  # by the scaler, of gradients too large for half precision
                with torch.no_grad():
                    for name, average in self.ema.items():
                        average.lerp_(self.weights[name], 1 - self.settings.ema)
        self.step_number += 1
        self._gather_when_due()

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next update depends on besides the weights: moments, moving averages, pending gradients.

        All processes must call it together: gradients that are being accumulated, (processes, ...), differ among them.
        """
        found = {f"ema/{name}": tensor for name, tensor in self.ema.items()}
        for name, weight in self.weights.items():
            for key, value in self.adam.optimizer.state.get(weight, {}).items():
                found[f"adam/{key}/{name}"] = value
            if weight.grad is not None and self.step_number % self.settings.accumulate:
                found[f"grad/{name}"] = self.accelerator.gather(weight.grad[None])
        return found

    def restore(self, tensors: dict[str, Tensor], step_number: int) -> None:
        """Takes back what `tensors` gave."""
        self.step_number = step_number
        for name, weight in self.weights.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam/{key}/{name}" in tensors]
            if keys:
                self.adam.optimizer.state[weight] = {
                    key: tensors[f"adam/{key}/{name}"].to("cpu" if key == "step" else weight.device) for key in keys
                }
            if f"grad/{name}" in tensors:
                weight.grad = tensors[f"grad/{name}"][self.accelerator.process_index].to(weight.device)
            if name in self.ema:
                self.ema[name].copy_(tensors[f"ema/{name}"])
        self._gather_when_due()

    def averaged(self) -> "_Averaged":
        """Within the block the model has its moving average for weights."""
        return _Averaged(self)

    def _gather_when_due(self) -> None:
        """Gradients go between processes with the last of the accumulated steps only.

        What `DistributedDataParallel.no_sync` does, which would have to surround the learner's forward as well.
        """
        if isinstance(self.trainable, nn.parallel.DistributedDataParallel):
            self.trainable.require_backward_grad_sync = self.updates


class _Averaged:
    def __init__(self, optimiser: Optimiser):
        self.optimiser = optimiser

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.optimiser.ema.items():
            weight = self.optimiser.weights[name]
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
