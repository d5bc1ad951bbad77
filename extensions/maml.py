"""`learner=maml`: trains weights from which a few steps on a few images adapt the model to an encoder.

A task is one feature type: an encoder, seen through a random change of its channels, so that tasks are many although
encoders are few. The images of a batch are divided. The inner loop takes some gradient steps on the support; the loss
of the query, other images of the same feature type, is what the step minimises with respect to the weights before the
inner loop:

    adapted = model;  repeat inner_steps times:  adapted = adapted - inner_lr · gradient of support_loss(adapted)
    update the weights of model with the gradient of query_loss(adapted)

Papers: MAML (Finn et al., arXiv 1703.03400), with its first-order variant; ANIL, which adapts some parts only (Raghu et
al., arXiv 1909.09157); Meta-SGD, which learns the rates too (Li et al., arXiv 1707.09835). Cloning and updates are
learn2learn's (Arnold et al., arXiv 2008.12284).

Memory. The first order holds one inner step at a time, with the fast kernels. The second order needs kernels that can
be differentiated twice. It holds one inner step at a time as well: each is computed again when its gradient is
due, so the number of inner steps costs time, not memory.

`inner_steps=0` is the plain step, exactly. Status: runs; a first look shows nothing, after 12 steps
(docs/maml.md).
"""

import copy
from collections.abc import Mapping, Sequence
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from core.adaptation import gradients, recovery, weights_of
from core.batch import Batch, images_of
from core.channel_mixing import GROUP, random_rotation, with_features
from core.encoder import Encoder
from core.hooks import Objective
from core.registry import register
from core.training import PlainStep, all_losses

INNER_SCALE = 2.0**10
"""Of the inner loss in float16, whose small gradients would vanish; a power of two changes no other digits."""


class Rates(Enum):
    """What the inner loop's learning rates are."""

    fixed = "fixed"
    """`inner_lr`."""
    tensor = "tensor"
    """One learnt rate for each weight tensor (Antoniou et al., arXiv 1810.09502, without their rate for each step)."""
    element = "element"
    """One for each number (Meta-SGD)."""


@register("maml")
class MAML(PlainStep):
    """Model-agnostic meta-learning; see the module's docstring.

    Args:
        inner_steps: steps of the inner loop. inner_lr: their rate, or the learnt rates' first value.
        first_order: leave out the gradient through the inner steps' gradients.
        parts: what the inner loop adapts: parts of the model, such as "attention" or "unifier"; empty: everything.
            The step itself trains everything.
        rates: fixed; or learnt, one for each weight tensor or for each number.
        num_support: images of a batch that the inner loop sees, the first ones; 0: half of them.
        recover: scales at which the inner loop recovers the support's features from their averages, which is what
            adaptation does where no encoder is at hand (`core.adapt`); empty: it sees the support's targets.
        mixing: probability that a task's channels are mixed by a random orthogonal matrix. noise: how far the mixing
            is from orthogonal; the standard deviation of what is added to the matrix, for vectors of unit length.
        flips: probability that each channel's sign is drawn anew. normalising: probability that each channel is
            standardised by the batch's statistics.

    Raises:
        ModuleNotFoundError: learn2learn is not installed; the message says how to get it.
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        inner_steps: int = 3,
        inner_lr: float = 0.01,
        first_order: bool = False,
        parts: list[str] = [],  # noqa: B006  read only; Hydra wants a list
        rates: Rates = Rates.fixed,
        num_support: int = 0,
        recover: list[int] = [],  # noqa: B006
        mixing: float = 0.0,
        noise: float = 0.0,
        flips: float = 0.0,
        normalising: float = 0.0,
    ):
        super().__init__()
        for name, value in (("inner_steps", inner_steps), ("num_support", num_support), ("noise", noise)):
            if value < 0:
                raise ValueError(f"learner=maml: {name} must not be negative, got {value}")
        for name, value in (("mixing", mixing), ("flips", flips), ("normalising", normalising)):
            if not 0 <= value <= 1:
                raise ValueError(f"learner=maml: {name} is a probability, got {value}")
        if not inner_lr > 0 or any(scale < 2 for scale in recover):
            raise ValueError(
                f"learner=maml: inner_lr must be above 0 and scales to recover at least 2, got {inner_lr}, {recover}"
            )
        _learn2learn()
        self.inner_steps, self.inner_lr, self.first_order = inner_steps, inner_lr, first_order
        self.parts, self.rates, self.num_support, self.recover = list(parts), rates, num_support, list(recover)
        self.mixing, self.noise, self.flips, self.normalising = mixing, noise, flips, normalising
        self.learnt = nn.ParameterDict()
        """Rate of each adapted weight, by its name with / for . ; empty unless rates are learnt."""

    def prepare(self, model: nn.Module) -> None:
        """Makes the learnt rates, one for each adapted weight of the model; contract: `Learner.prepare`.

        Raises:
            ValueError: the model has no such part.
        """
        weights = weights_of(model, self.parts)
        if self.rates is not Rates.fixed:
            for name, weight in weights.items():
                like = weight.new_zeros(()) if self.rates is Rates.tensor else torch.zeros_like(weight)
                self.learnt[_key(name)] = nn.Parameter(like.detach().float() + self.inner_lr)

    def forward(self, model: nn.Module, objective: Objective, tasks: Sequence[Batch]) -> list[dict[str, Tensor]]:
        if not self.inner_steps:
            return super().forward(model, objective, tasks)
        found = []
        for batch in tasks:
            support, query = self.divide(self.changed(batch))
            found.append(all_losses(self.adapted(model, objective, support), objective, query))
        return found

    def adapt(self, model: nn.Module, objective: Objective, support: Sequence[Batch]) -> nn.Module:
        """Copies the model and takes `inner_steps` steps on all of the support; contract: `Learner.adapt`.

        Raises:
            ValueError: the support is empty, or of encoders with different numbers of channels.
        """
        channels = sorted({batch.features.shape[1] for batch in support})
        if len(channels) != 1:
            raise ValueError(f"learner=maml adapts to one encoder, got a support with {channels} channels")
        adapted = copy.deepcopy(model).train()
        weights = weights_of(adapted, self.parts)
        for _ in range(self.inner_steps):
            found = gradients(adapted, objective, support, list(weights.values()))
            with torch.no_grad():
                for (name, weight), gradient in zip(weights.items(), found, strict=True):
                    if gradient is not None:
                        weight -= self.learnt.get(_key(name), self.inner_lr) * gradient
        return adapted.train(model.training)

    def divide(self, batch: Batch) -> tuple[Batch, Batch]:
        """The batch -> support and query, of different images: a query that is in the support is left out.

        Raises:
            ValueError: the batch has too few different images.
        """
        count = len(batch.image)
        first = self.num_support or count // 2
        known = batch.image[:first]
        query = [i for i in range(first, count) if not any(torch.equal(batch.image[i], one) for one in known)]
        if not first or not query:
            raise ValueError(
                f"learner=maml needs other images for the query than for the support: a task has {count} images, "
                f"{first} of them are the support, and {len(query)} others are left; raise batch_size (each process "
                "needs its share), lower learner.num_support, or give more photographs"
            )
        return images_of(batch, range(first)), images_of(batch, query)

    def adapted(self, model: nn.Module, objective: Objective, support: Batch) -> nn.Module:
        """A functional copy of the model after the inner loop; its weights depend on the model's."""
        tasks = [recovery(support, scale) for scale in self.recover] or [support]
        all_of_it = nn.ModuleDict({"model": model, "objective": objective, "learnt": self.learnt})
        if self.first_order:
            copied = _clone(all_of_it, {})
            for _ in range(self.inner_steps):
                self.descend(copied, tasks, first_order=True)
            return copied["model"]
        names = [f"model.{name}" for name in weights_of(model, self.parts)]
        weights = dict(all_of_it.named_parameters())
        for _ in range(self.inner_steps):
            step = _Replay(self, all_of_it, list(weights), names, tasks)
            weights |= zip(names, _InnerStep.apply(step, *weights.values()), strict=True)
        return _clone(all_of_it, weights)["model"]

    def descend(self, copied: nn.ModuleDict, tasks: Sequence[Batch], first_order: bool) -> None:
        """One inner step on functional copies of the model, the objective and the learnt rates."""
        learn2learn, model, kind = _learn2learn(), copied["model"], tasks[0].image.device.type
        losses = [sum(all_losses(model, copied["objective"], task).values()) for task in tasks]
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        scale = INNER_SCALE if half else 1.0
        loss = sum(losses) * (scale / len(tasks))
        with torch.autocast(kind, enabled=False):  # as in every backward pass
            if self.rates is Rates.fixed:
                view = nn.ModuleList(map(model.get_submodule, self.parts)) if self.parts else model
                maml = learn2learn.algorithms.MAML(
                    view, self.inner_lr / scale, first_order, allow_unused=True, allow_nograd=True
                )
                maml.adapt(loss)
                return
            # Not its MetaSGD, which refuses frozen weights, and weights that the loss does not depend on.
            weights = weights_of(model, self.parts)
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=not first_order, allow_unused=True)
            for (name, weight), gradient in zip(weights.items(), found, strict=True):
                weight.update = None if gradient is None else -copied["learnt"][_key(name)] / scale * gradient
            learn2learn.update_module(model)

    def changed(self, batch: Batch) -> Batch:
        """The batch as another encoder might have given it: one random affine map for features and targets alike."""
        source = batch.generator or torch.default_generator
        mixes, normalises = (torch.rand(2, generator=source) < torch.tensor([self.mixing, self.normalising])).tolist()
        if not (mixes or normalises or self.flips):
            return batch
        channels = batch.features.shape[1]
        flip = torch.rand(channels, generator=source) < self.flips / 2  # half of the signs that are drawn are the old
        sign = (1 - 2.0 * flip).to(batch.features)  # (C,)
        shift, scale = torch.zeros_like(sign), sign
        if normalises:
            spread, shift = torch.std_mean(batch.features.float(), (0, 2, 3), correction=0)  # (C,) each
            scale = sign / (spread + 1e-6)
        order = torch.randperm(channels, generator=source).to(sign.device)
        matrices = [self._mixture(len(part), source).to(sign) for part in order.split(GROUP)] if mixes else []

        def change(x: Tensor) -> Tensor:
            """(…,C,·,·) -> the same shape."""
            x = (x - shift.view(-1, 1, 1)) * scale.view(-1, 1, 1)
            if not matrices:
                return x
            parts = zip(matrices, x.index_select(-3, order).split(GROUP, -3), strict=True)
            return torch.cat([torch.einsum("dc,...chw->...dhw", matrix, part) for matrix, part in parts], -3)

        return with_features(batch, change)

    def _mixture(self, channels: int, source: torch.Generator) -> Tensor:
        """(n,n): a random orthogonal matrix, with noise."""
        rotation = random_rotation(channels, source)
        return rotation + self.noise * torch.randn(channels, channels, generator=source) / channels**0.5


class _Replay:
    """One inner step as a function of all weights, which does the same when it is called again.

    Args:
        modules: model, objective and learnt rates. names: of their weights, in the order of the arguments of a call.
        adapted: names of the weights that a call returns.
    """

    def __init__(
        self, learner: MAML, modules: nn.ModuleDict, names: list[str], adapted: list[str], tasks: Sequence[Batch]
    ):
        self.learner, self.modules, self.names, self.adapted, self.tasks = learner, modules, names, adapted, tasks
        self.kind = tasks[0].image.device.type
        self.autocast = torch.get_autocast_dtype(self.kind), torch.is_autocast_enabled(self.kind)
        self.sources = [torch.default_generator] + [tasks[0].generator] * (tasks[0].generator is not None)
        self.states = [source.get_state() for source in self.sources]

    def __call__(self, weights: Sequence[Tensor], first_order: bool) -> list[Tensor]:
        """The adapted weights; random numbers go on from where they are."""
        copied = _clone(self.modules, dict(zip(self.names, weights, strict=True)))
        copied["model"].twice_differentiable(not first_order)
        self.learner.descend(copied, self.tasks, first_order)
        after = dict(copied.named_parameters())
        return [after[name] for name in self.adapted]

    def again(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The same under the same autocast and with the same random numbers, with a graph for second derivatives."""
        now = [source.get_state() for source in self.sources]
        try:
            for source, state in zip(self.sources, self.states, strict=True):
                source.set_state(state)
            with torch.enable_grad(), torch.autocast(self.kind, *self.autocast):
                return self(weights, first_order=False)
        finally:
            for source, state in zip(self.sources, now, strict=True):
                source.set_state(state)


class _InnerStep(torch.autograd.Function):
    """All weights -> the adapted ones after one inner step; the graph of the step exists only while it is needed."""

    @staticmethod
    def forward(ctx: Any, step: _Replay, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*weights)
        own = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
        with torch.enable_grad():
            return tuple(weight.detach() for weight in step(own, first_order=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        own = [weight.detach().requires_grad_(need) for weight, need in zip(ctx.saved_tensors, needed, strict=True)]
        asked = [weight for weight, need in zip(own, needed, strict=True) if need]
        found = iter(torch.autograd.grad(ctx.step.again(own), asked, gradients, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def _clone(modules: nn.ModuleDict, weights: Mapping[str, Tensor]) -> nn.ModuleDict:
    """learn2learn's functional copy, with some weights replaced by others, by name."""
    copied = _learn2learn().clone_module(modules)
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        copied.get_submodule(owner)._parameters[leaf] = weight
    for inner in copied.modules():
        if isinstance(inner, Encoder):
            inner.compiles = False  # each copy would be compiled anew
        for name in [name for name, child in inner._modules.items() if child is None]:
            del inner._modules[name]  # learn2learn's update stumbles over children that are None
            inner.__dict__[name] = None
    return copied


def _key(name: str) -> str:
    return name.replace(".", "/")


def _learn2learn() -> ModuleType:
    try:
        import learn2learn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "learner=maml needs learn2learn: run `uv sync --group maml` in the folder of this project (pip cannot "
            "build its last release), or use learner=sgd"
        ) from error
    return learn2learn
