"""The seven hook points: what each may do, and where the model and the training step call it.

Shape letters, used everywhere in this project: B batch, C feature channels (ANY number), D guidance width
(`embed_dim`), (h, w) feature grid, (H, W) image grid, (Qh, Qw) output grid.

`AnyUp.forward` (core/anyup.py), with the hook points marked by `->`::

    guidance = rotary(image_encoder(image))                         # (B, D, H, W)
    unified  -> unifier(features, guidance)                         # (B, D, h, w)
    key      = aggregation(pool(key_encoder(guidance)), unified)    # (B, D, h, w)
    query    = pool(query_encoder(guidance))                        # (B, D, Qh, Qw)
    output   -> attention(query, key, features)                     # (B, C, Qh, Qw)
    output   -> decoder(output, context)                            # (B, C, Qh, Qw)
    output   -> refiner(output, context)                            # (B, C, Qh, Qw)
    output   -> temporal(output, context, state)                    # (B, C, Qh, Qw), next state

`context` is one object: image, features, coords, a random generator, and the guidance for who asks (core/batch.py).

One training step, `tasks` being one batch for each backbone of the step (core/training.py)::

    learner.step(trainable, tasks, optimizer)                       # backward and update, around:
    losses   -> learner(model, objective, tasks)                    # by default, of each batch:
                    output = model(image, features, output_size)    # the batch's own forward
                    filler.auxiliary_loss(output, batch)            # right after it, of every filler that has one
                 -> objective(model, batch, output)                 # dict of scalars

An idea is one class in one file: subclass the hook point, decorate it with `@register("name")`, and give its
settings as typed keyword arguments of `__init__`. Rules that every filler keeps:

- the same weights serve any number of feature channels C;
- it starts as the baseline (zero gate, one scale, zero steps), or has a setting that makes it the baseline;
- it never falls back silently: what it cannot do, it refuses, and says what to do instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from core.batch import Batch, Context
from core.points import sample_rows

GATE_LR_SCALE = 10.0
"""For `lr_scales` of a gate that starts closed: Adam's steps are as large as the learning rate, whatever the gradient,
and so open it within hundreds of steps and not thousands."""


class Filler(nn.Module, ABC):
    """Base of all hook points. Subclass one of the classes below, never this one."""

    hook: ClassVar[str] = ""
    """Name of the hook point: the attribute of the model and the Hydra group."""
    supplied: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that the core gives; all others are the filler's configuration."""
    changeable: ClassVar[tuple[str, ...]] = ()
    """Settings without weights that may be others after training than in it, such as a sampler's number of steps."""
    lr_scales: ClassVar[Mapping[str, float]] = {}
    """Parameters by name, as in `named_parameters`, or the first part of it -> times the learning rate."""
    batch_parts: frozenset[str] = frozenset()
    """Optional parts of `Batch` that it looks at in training (core/batch.py); may be set in `__init__`."""

    def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses of the filler's own, named `*_loss`; they are added to the objective's.

        Called once per training step and batch, right after the batch's own forward: what the filler kept of its
        latest forward is of this batch, whatever forwards the objective makes later.

        Args:
            output: (B,C,Qh,Qw), what the model made of the batch.
            batch: with the target; `core.batch.crops_of(x, batch)` are the regions of a (B,C,Qh,Qw) that it shows.
        """
        return {}

    def pictures(self) -> dict[str, Tensor]:
        """What the filler learnt, of the first image of its latest forward: title -> (3,height,width) RGB in [0,1].

        A forward with gradients or under a compiler need keep nothing for it. Training logs the pictures with each
        validation's own; in a notebook: `model(image, features)` without gradients, then `model.unifier.pictures()`.
        """
        return {}


class Unifier(Filler):
    """Turns features of any width into the D channels that the keys are made of.

    Called once per forward, before the keys are aggregated.
    """

    hook = "unifier"
    supplied = ("embed_dim",)

    @abstractmethod
    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """(B,C,h,w) features as the backbone gave them, (B,D,H,W) encoded image -> (B,D,h,w)."""


class Attention(Filler):
    """Looks up the features: every output vector is made of `value` vectors, weighted by query-key similarity.

    Called once per forward with all queries, or band by band when the output is streamed.
    """

    hook = "attention"
    supplied = ("embed_dim",)
    takes_out: ClassVar[bool] = False
    """True: `forward` has a fourth argument, `out`: None, or memory of the result's size and dtype to write it to."""

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B,D,Qh,Qw) query, (B,D,h,w) key, (B,C,h,w) value (the raw features) -> (B,C,Qh,Qw)."""

    def bands(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields the same output as `forward` in bands of rows, top to bottom: (rows, (B,C,rows,Qw)).

        An attention that can work in bounded memory overrides this; by default there is one band.
        """
        yield slice(0, query.shape[-2]), self(query, key, value)

    def at(self, query: Tensor, key: Tensor, value: Tensor, coords: Tensor) -> Tensor:
        """(N,2) points in the unit square of the image, (row, column), the same for all images -> (B,C,N).

        For `AnyUp.query`. At the centres of the query grid's pixels it must be what `forward` gives there. By default
        the output of that grid is interpolated bilinearly; an attention that can look from a point itself overrides
        this.
        """
        height = query.shape[-2]
        shares = (sample_rows(band, rows, height, coords) for rows, band in self.bands(query, key, value))
        return sum(shares).transpose(1, 2)  # (B,C,N)


class AfterAttention(Filler):
    """Base of the three hook points after attention, which see the output and a `Context`."""

    supplied = ("embed_dim",)
    needs_guidance: ClassVar[bool] = False
    """True: `context.guidance` is the encoded image. It is freed before attention when nobody needs it."""
    needs_whole_output: ClassVar[bool] = True
    """False only when `forward` may be called on bands of rows; otherwise a streamed output is refused."""
    linear_in_values: ClassVar[bool] = False
    """True only when the output is the same linear map of `output` for every channel, so that a linear head may come
    first (`AnyUp.readout`)."""


class Decoder(AfterAttention):
    """Corrects the explicit output at query coordinates, pointwise: no output pixel depends on another.

    Called after attention, on the whole output or on a band of its rows.
    """

    hook = "decoder"
    needs_whole_output = False

    @abstractmethod
    def forward(self, output: Tensor, context: Context) -> Tensor:
        """(B,C,Qh,Qw) explicit output -> (B,C,Qh,Qw)."""


class Refiner(AfterAttention):
    """Improves a finished output, looking at all of it. Called after the decoder."""

    hook = "refiner"

    @abstractmethod
    def forward(self, output: Tensor, context: Context) -> Tensor:
        """(B,C,Qh,Qw) -> (B,C,Qh,Qw). Random numbers come from `context.generator` and from nowhere else."""


class Temporal(AfterAttention):
    """Makes outputs of consecutive frames agree. Called last, once per frame, in order."""

    hook = "temporal"

    @abstractmethod
    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, object | None]:
        """(B,C,Qh,Qw), state after the last frame (None at the first) -> output, state for the next frame.

        The state may be anything. Frames of another size, or of another number of channels, begin a new video: the
        filler compares with what it kept, and refuses or starts again, as it says.
        """


class Objective(Filler):
    """Computes what training minimises. Its own parameters are trained and saved like the model's."""

    hook = "objective"
    needs_output: ClassVar[bool] = True
    """False: it makes its own forwards, and `output` is None unless some filler's auxiliary loss asked for it."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        """-> named scalar losses (`*_loss`), already weighted; their sum is minimised.

        Args:
            model: for forwards of its own; under mixed precision they give half precision.
            output: (B,C,Qh,Qw) of the batch's own forward, at least in single precision.
        """


class Learner(Filler):
    """Owns one optimisation step over the tasks of a step, and adaptation at test time.

    Its own parameters (learned rates, say) are trained and saved like the model's.
    """

    hook = "learner"

    @abstractmethod
    def forward(self, model: nn.Module, objective: Objective, tasks: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The losses of each task, whose sums are minimised: all that is differentiated in a step.

        `model` is the bare module, whatever precision and however many processes it is trained with: functional
        copies of it (`learn2learn.clone_module`) run their own weights. Under mixed precision autocast is on.
        """

    @abstractmethod
    def step(
        self, trainable: nn.Module, tasks: Sequence[Batch], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Tensor]]:
        """Updates the weights once -> the detached losses of each task, in order.

        Args:
            trainable: `core.training.Trainable`, maybe wrapped for several processes; `trainable(tasks)` is this
                learner's `forward`. Losses to differentiate come from there, so that all processes see them.
            tasks: one batch for each backbone of the step.
            optimizer: call `core.training.backward(loss, optimizer)` for the gradients that the update uses, so that
                half precision, accumulation over steps and several processes work without the learner knowing of them.
        """

    def adapt(self, model: nn.Module, objective: Objective, support: Sequence[Batch]) -> nn.Module:
        """The model for the tasks that `support` shows; the given one stays as it is. By default they are the same."""
        return model


HOOK_POINTS: dict[str, type[Filler]] = {
    base.hook: base for base in (Unifier, Attention, Decoder, Refiner, Temporal, Objective, Learner)
}
MODEL_HOOKS = ("unifier", "attention", "decoder", "refiner", "temporal")
AFTER_ATTENTION = ("decoder", "refiner", "temporal")
