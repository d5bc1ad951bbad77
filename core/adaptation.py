"""Adapts a model to one encoder from a few of its images, without labels: `core.adapt(model, images, features)`.

A universal upsampler cannot know what the detail of one encoder looks like; a few images of that encoder can tell.
What the steps try to reach is, for each image of the support:

- the given targets, finer features of the same image, where the encoder is at hand;
- otherwise the given features themselves. Their area average at a scale of 2 or 4 is upsampled with the image as
  guidance, and must give the features back (the zero-shot training of Shocher et al., arXiv 1712.06087, on features).

The model that was given is never changed. `core.delta` saves what changed as a small file.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batch import Batch
from core.hooks import Learner, Objective
from core.streams import generator
from core.training import CosineMSE, all_losses

Images = Tensor | Sequence[Tensor]
"""(N,·,·,·), or N tensors (·,·,·) or (1,·,·,·), which may have different heights and widths."""
LEAST_CELLS = 2
"""Rows and columns that features must have to be upsampled."""
LARGEST_NORM = 1.0
"""Of a step's gradient; a larger one is scaled down to it. Photographs gave 0.02 to 1.5. But a target vector whose
values are all alike, as HOG's of a flat cell, has a range of 0, which the squared error is divided by."""
DESCENTS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
AfterStep = Callable[[int, nn.Module], None]


def adapt(
    model: nn.Module,
    images: Images,
    features: Images,
    targets: Images | None = None,
    *,
    steps: int = 3,
    lr: float = 1.0,
    descent: str = "sgd",
    parts: Sequence[str] = (),
    scales: Sequence[int] = (2, 4),
    images_per_step: int = 4,
    objective: Objective | None = None,
    learner: Learner | None = None,
    after_step: AfterStep | None = None,
) -> nn.Module:
    """Copies the model and trains the copy on the support for a few steps -> the adapted copy, in the same mode.

    Args:
        model: an AnyUp on the device of the support.
        images: (N,3,H,W), ImageNet-normalised: the support.
        features: (N,C,h,w) of one encoder. All other arguments of a model call are its defaults.
        targets: (N,C,Qh,Qw) finer features of the same images, if the encoder is at hand; None: the features are
            recovered from their averages at `scales`.
        steps: 0 gives a copy that is equal to the model.
        lr, descent: learning rate, of `sgd` or of `adamw` (without weight decay). For a few steps `sgd` at a rate near
            1 was found best; 3 suits `targets`. With many photographs and 30 steps or more, `adamw` at 3e-4
            (docs/maml.md).
        parts: what is adapted: names of the model's parts, such as "attention"; empty: everything that has gradients.
        scales: see `targets`; those at which fewer than 2x2 cells would be left of an image's features are refused.
        images_per_step: a step sees that many images; each pass over the support is in another order.
        objective: None: `cosine_mse` without the self-consistency term, which needs augmented images.
        learner: one that knows how to adapt (`Learner.adapt`, such as `maml`, with its own steps and learnt rates).
            Then steps, lr, descent, parts and images_per_step play no part.
        after_step: called with the number of steps done (0 before the first) and the copy, for curves.

    Raises:
        TypeError, ValueError: the support, a part or a value cannot be used, or a gradient is not finite; the message
            says what may be done.
    """
    support = support_of(images, features, targets, scales)
    objective = (objective or default_objective()).to(next(model.parameters()).device)
    if learner is not None:
        return learner.adapt(model, objective, [batch for batches in support for batch in batches])
    if steps < 0 or not lr > 0 or images_per_step < 1:
        raise ValueError(
            f"adapt needs steps >= 0, lr > 0 and images_per_step >= 1, got {steps}, {lr} and {images_per_step}"
        )
    if descent not in DESCENTS:
        raise ValueError(f"descent must be one of {', '.join(DESCENTS)}, got {descent!r}")
    adapted = copy.deepcopy(model).train()
    weights = list(weights_of(adapted, parts).values())
    optimizer = DESCENTS[descent](weights, lr=lr, weight_decay=0.0)
    order = _order(len(support))
    tell = after_step or (lambda step, model: None)
    tell(0, adapted)
    for step in range(steps):
        chosen = [support[next(order)] for _ in range(min(images_per_step, len(support)))]
        batches = [batch for of_image in chosen for batch in of_image]
        for weight, gradient in zip(weights, gradients(adapted, objective, batches, weights), strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_(weights, LARGEST_NORM)
        if not norm.isfinite():
            raise ValueError(
                f"adapt: the gradient of step {step + 1} is not finite; lower lr={lr}, or look for images or features "
                "that are not finite"
            )
        optimizer.step()
        tell(step + 1, adapted)
    for weight in weights:
        weight.grad = None
    return adapted.train(model.training)


def gradients(
    model: nn.Module, objective: Objective, batches: Sequence[Batch], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of the mean of the batches' losses with respect to `weights`; one batch is held in memory at a time.

    None for a weight that the losses do not depend on.
    """
    total: list[Tensor | None] = [None] * len(weights)
    for batch in batches:
        with torch.enable_grad():
            loss = sum(all_losses(model, objective, batch).values()) / len(batches)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = zip(total, found, strict=True)
        total = [new if old is None else old if new is None else old + new for old, new in pairs]
    return total


def default_objective() -> Objective:
    """`cosine_mse` without the self-consistency term."""
    return CosineMSE(self_consistency=0.0)


def weights_of(model: nn.Module, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights with gradients of some parts of a model, by name; of the whole model without parts.

    A part is a child such as "attention", or a module inside it such as "attention.conv".

    Raises:
        ValueError: the model has no such part, or nothing in the parts has gradients.
    """
    modules = {name for name, _ in model.named_modules() if name}
    for part in parts:
        if part not in modules:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"parts={list(parts)}: the model has no part {part!r}; there are: {children}")
    chosen = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and (not parts or name.startswith(tuple(f"{part}." for part in parts)))
    }
    if not chosen:
        raise ValueError(f"parts={list(parts)}: nothing to adapt, the parts have no weights with gradients")
    return chosen


def support_of(
    images: Images, features: Images, targets: Images | None = None, scales: Sequence[int] = (2, 4)
) -> list[list[Batch]]:
    """What each image of the support is to teach: one batch with the target, or one for each scale.

    Arguments and errors as of `adapt`.
    """
    given = {"images": _single(images, "images"), "features": _single(features, "features")}
    if targets is not None:
        given["targets"] = _single(targets, "targets")
    counts = {name: len(several) for name, several in given.items()}
    if not counts["images"]:
        raise ValueError("adapt needs at least one image, got none")
    if len(set(counts.values())) > 1:
        raise ValueError(f"adapt needs features and targets of each image, got {counts}")
    channels = {one.shape[1] for name in ("features", "targets") for one in given.get(name, ())}
    if len(channels) > 1:
        raise ValueError(
            f"the features of a support must be of one encoder, got some of {', '.join(map(str, sorted(channels)))} "
            "channels: adapt to each encoder by itself"
        )
    if targets is not None:
        return [
            [Batch(image, coarse, target, tuple(target.shape[-2:]))]
            for image, coarse, target in zip(*given.values(), strict=True)
        ]
    if not scales or min(scales) < 2:
        raise ValueError(f"scales must be whole numbers from 2, got {list(scales)}")
    whole = [Batch(image, one, one, tuple(one.shape[-2:])) for image, one in zip(*given.values(), strict=True)]
    return [[recovery(batch, scale) for scale in scales] for batch in whole]


def recovery(batch: Batch, scale: int) -> Batch:
    """The task to recover a batch's features from their area averages over scale x scale cells.

    Raises:
        ValueError: fewer than 2x2 cells would be left; the message says what helps.
    """
    size = tuple(batch.features.shape[-2:])
    coarse = tuple(side // scale for side in size)
    if min(coarse) < LEAST_CELLS:
        raise ValueError(
            f"features of {size[0]}x{size[1]} cells are too small for scale {scale}: {LEAST_CELLS * scale} rows and "
            "columns are needed. Encode larger images, leave the scale out (scales=[2]), or give targets"
        )
    averaged = F.interpolate(batch.features, coarse, mode="area")
    images = batch.high_resolution
    if images is not None:  # at the resolution of the new targets, the given features
        sides = zip(images.shape[-2:], size, batch.output_size, strict=True)
        shrunk = [round(side * cells / finer) for side, cells, finer in sides]
        images = F.interpolate(images, shrunk, mode="bilinear", antialias=True).clamp(0, 1)
    parts = {"corners": None, "crops": None, "high_resolution": images}
    return replace(batch, features=averaged, target=batch.features, output_size=size, **parts)


def _single(given: Images, name: str) -> list[Tensor]:
    """N tensors (1,·,·,·)."""
    several = [one[None] if one.dim() == 3 else one for one in given]
    if any(one.dim() != 4 or len(one) != 1 for one in several):
        shapes = ", ".join(str(tuple(one.shape)) for one in several[:3])
        raise ValueError(f"{name} must be (N, channels, rows, columns), or N such tensors of one image, got {shapes}")
    return several


def _order(count: int) -> Iterator[int]:
    """Positions without end; each pass is another permutation."""
    drawn = generator("order of a support", count)
    while True:
        yield from torch.randperm(count, generator=drawn).tolist()
