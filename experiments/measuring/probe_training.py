"""How probes are trained, on whole images or on drawn pixels.

`pixels_per_image=null` is the published protocol: each step upsamples its images, mirrored at random, and all pixels
count. With a number each training image is upsampled once, that many labelled pixels are drawn from it and kept in half
precision (in memory only), and the probe is trained on those: as many steps, many times faster, nothing mirrored.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.streams import named_stream
from experiments.measuring.bench import Bench, Case
from experiments.measuring.heads import HEADS, DPTHead, LinearHead, at_positions
from experiments.measuring.task import EvaluationError
from experiments.peers.interpolation import Bilinear
from experiments.progress import Progress
from experiments.settings import SettingError, check_choice
from experiments.training.optimiser import OptimiserSettings
from experiments.training.views import stream

if TYPE_CHECKING:
    from experiments.measuring.probes import ProbeTask

SCHEDULES = ("cosine", "legacy_jafar")
Batch = tuple[list[Tensor], Tensor]
"""Features of each layer, and targets."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is trained: AdamW, with the schedule over all steps.

    Args:
        lr, weight_decay: of AdamW. batch_size: images. epochs: passes over the training images.
        schedule: `cosine` to zero at the last step; `legacy_jafar`: the rate of JAFAR's released loop, which steps a
            cosine of `epochs` steps at every iteration, so that it oscillates and never anneals.
        warmup_epochs: over which the rate first rises linearly (of `cosine`).
        flip: share of training images that are mirrored (of `pixels_per_image=null`).
        pixels_per_image: drawn from each image; None: all of them, the published protocol.
        head: linear or dpt. hidden: width of the dpt head.

    Raises:
        SettingError: a value out of its range, or two that do not go together.
    """

    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    flip: float = 0.0
    pixels_per_image: int | None = None
    head: str = "linear"
    hidden: int = 512

    def __post_init__(self):
        check_choice("task.schedule", self.schedule, SCHEDULES)
        check_choice("task.head", self.head, HEADS)
        for name in ("batch_size", "epochs", "hidden"):
            if getattr(self, name) < 1:
                raise SettingError(f"task.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"task.{name} must not be negative, got {getattr(self, name)}")
        if self.pixels_per_image is not None and self.pixels_per_image < 1:
            raise SettingError(f"task.pixels_per_image must be null or at least 1, got {self.pixels_per_image}")
        if self.pixels_per_image is not None and self.head != "linear":
            raise SettingError(f"task.head={self.head} looks at neighbours: it needs task.pixels_per_image=null")
        if not 0 <= self.flip <= 1:
            raise SettingError(f"task.flip must lie between 0 and 1, got {self.flip}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise SettingError(
                f"task.warmup_epochs must be at least 0 and below task.epochs={self.epochs}, got {self.warmup_epochs}"
            )

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a step."""
        if self.schedule == "legacy_jafar":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.epochs))
        warmup = int(self.warmup_epochs * num_steps / self.epochs)
        return OptimiserSettings(self.lr, self.weight_decay, "cosine", warmup, 1, 0.0, 0.0).rate(step, num_steps)


def train_probe(task: "ProbeTask", model: nn.Module | None, scale: int, seed: int, bench: Bench) -> nn.Module:
    """Trains a head on the features that `model` upsamples; initial weights and batches depend on the seed alone.

    Args:
        model: None: on low-resolution features as they are, with the targets of whole cells (`ProbeTask.of_cells`).
        scale: of the encoder's input; more than 1 for the ceiling.

    Raises:
        EvaluationError: nothing to learn from, a loss that is not finite, or as `Bench.upsample`.
    """
    settings, usable = task.settings, task.usable(bench.train)
    num_steps = -(-len(usable) // settings.batch_size) * settings.epochs
    widths = [layer.shape[1] for layer in bench.train.get(usable[0], scale=scale).features]
    with named_stream(seed, f"probe/{task.choice}"):
        outputs = task.outputs(bench)
        head = DPTHead(widths, outputs, settings.hidden) if settings.head == "dpt" else LinearHead(widths, outputs)
    head.to(bench.device)
    enlarge = model is not None and settings.pixels_per_image is None
    if model is None:
        batches = _cells(task, seed, bench)
    else:
        batches = (_whole if enlarge else _drawn)(task, model, scale, seed, bench)
    adam = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for step, (features, target) in enumerate(Progress(batches, f"probe of {task.choice}", "step", num_steps)):
        adam.param_groups[0]["lr"] = settings.rate(step, num_steps)
        prediction = task.predict(head, features, bench) if enlarge else task.decode(head(features))
        loss = task.loss(prediction, target)
        if not torch.isfinite(loss):
            raise EvaluationError(f"the loss of the probe became {loss.item()} in step {step} of {num_steps}")
        adam.zero_grad()
        loss.backward()
        adam.step()
    return head.eval()


def features_for(head: str, model: nn.Module, cases: list[Case], bench: Bench) -> list[Tensor]:
    """What a head is given: upsampled features, (B,C,Qh,Qw) of each layer.

    To the linear head and bilinear interpolation, which commute, the low-resolution ones: `ProbeTask.predict` enlarges
    what comes out, which is the same and many times cheaper.
    """
    if isinstance(model, Bilinear) and head == "linear":
        return [torch.cat(layers).float() for layers in zip(*(case.features for case in cases), strict=True)]
    return bench.upsample(model, cases)


def _batches(usable: list[int], settings: ProbeSettings, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, positions in `usable`) of each step; each epoch is another permutation."""
    for epoch in range(settings.epochs):
        order = torch.randperm(len(usable), generator=stream(seed, "probe order", epoch))
        for chosen in order.split(settings.batch_size):
            yield epoch, chosen.tolist()


def _whole(task: "ProbeTask", model: nn.Module, scale: int, seed: int, bench: Bench) -> Iterator[Batch]:
    """Batches of whole images, upsampled on the way."""
    usable, settings = task.usable(bench.train), task.settings
    for epoch, chosen in _batches(usable, settings, seed):
        flips = torch.rand(len(usable), generator=stream(seed, "probe flip", epoch)) < settings.flip
        cases = [bench.train.get(usable[i], bool(flips[i]), scale) for i in chosen]
        yield features_for(settings.head, model, cases, bench), torch.cat([task.target(case) for case in cases])


def _cells(task: "ProbeTask", seed: int, bench: Bench) -> Iterator[Batch]:
    """Batches of low-resolution features, with one target for each cell."""
    usable = task.usable(bench.train)
    for _, chosen in _batches(usable, task.settings, seed):
        cases = [bench.train.get(usable[i]) for i in chosen]
        features = features_for("linear", Bilinear(), cases, bench)  # (B,C,h,w)
        size = tuple(features[0].shape[-2:])
        yield features, torch.cat([task.of_cells(task.target(case), size) for case in cases])


def _drawn(task: "ProbeTask", model: nn.Module, scale: int, seed: int, bench: Bench) -> Iterator[Batch]:
    """Batches of drawn pixels, as images of P rows and one column."""
    usable, settings = task.usable(bench.train), task.settings
    # On a grid other than the labels' the features are interpolated twice, which must not be done at once.
    direct = bench.sizes.output == bench.sizes.image
    features, targets = [], []
    for i in Progress(usable, "pixels", "image"):
        case = bench.train.get(i, scale=scale)
        (values,) = features_for(settings.head if direct else "", model, [case], bench)
        target = task.target(case)
        positions = _positions(task.known(target)[0], settings.pixels_per_image, (seed, "probe pixels", case.name))
        features.append(at_positions(values, positions, bench.sizes.image).half())  # (C,P)
        targets.append(at_positions(target, positions, bench.sizes.image))  # (K,P)
        if not torch.isfinite(features[-1]).all():
            raise EvaluationError(f"image {case.name}: upsampled features are too large for half precision (65504)")
    features, targets = torch.stack(features), torch.stack(targets)  # (N,C,P), (N,K,P)
    for _, chosen in _batches(usable, settings, seed):
        yield [features[chosen].float()[..., None]], targets[chosen][..., None]  # (B,C,P,1), (B,K,P,1)


def _positions(known: Tensor, count: int, key: tuple[object, ...]) -> Tensor:
    """(H,W) bool -> (count,2) rows and columns of known pixels; of fewer than `count`, each may come repeatedly."""
    places = known.nonzero()  # (K,2)
    if len(places) >= count:
        chosen = torch.randperm(len(places), generator=stream(*key))[:count]
    else:
        chosen = torch.randint(len(places), (count,), generator=stream(*key))
    return places[chosen.to(places.device)]
