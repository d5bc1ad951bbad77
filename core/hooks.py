"""The seven hook points: what each may do, and where the model and the training step call it.

Shape letters, used everywhere in this project: B batch, C feature channels (ANY number), D guidance width
(`embed_dim`), (h, w) feature grid, (H, W) image grid, (Qh, Qw) output grid.

`AnyUp.forward` (core/anyup.py), with the hook points marked by `->`:

    guidance = rotary(image_encoder(image))                         # (B, D, H, W)
    unified  -> unifier(features, guidance)                         # (B, D, h, w)
    key      = aggregation(pool(key_encoder(guidance)), unified)    # (B, D, h, w)
    query    = pool(query_encoder(guidance))                        # (B, D, Qh, Qw)
    output   -> attention(query, key, features)                     # (B, C, Qh, Qw)
    output   -> decoder(output, context)                            # (B, C, Qh, Qw)
    output   -> refiner(output, context)                            # (B, C, Qh, Qw)
    output   -> temporal(output, context, state)                    # (B, C, Qh, Qw), next state

`context` is one object: image, features, coords, a random generator, and the guidance if a filler asks for it
(core/batch.py).

One training step (core/training.py); `tasks` has one batch for each backbone of the step:

    learner.step(trainable, tasks, optimizer)                       # backward and update; it calls:
    losses   -> learner(model, objective, tasks)                    # by default, for each batch:
                    output = model(image, features, output_size)    # the batch's own forward
                    filler.auxiliary_loss(output, batch)            # right after it, for every filler that has one
                 -> objective(model, batch, output)                 # dict of scalars

An idea is one class in one file: subclass the hook point, decorate it with `@register("name")`, and give its
settings as typed keyword arguments of `__init__`. Every filler keeps these rules:

- its weights do not depend on the number of feature channels C;
- it starts as the baseline (zero gate, one scale, zero steps), or has a setting that makes it the baseline;
- it never falls back silently: it raises an error for what it cannot do, and the message says what to do instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.batch import Batch, Context
from core.points import sample_rows

GATE_LR_SCALE = 10.0
"""For `lr_scales` of a gate that starts closed. Adam's steps are about as large as the learning rate, whatever the
gradient. With this factor a gate opens within hundreds of steps instead of thousands."""

_CELLS_AT_ONCE = 256  # whose weights are looked at together


class Filler(nn.Module, ABC):
    """Base of all hook points. Subclass one of the classes below, never this one."""

    hook: ClassVar[str] = ""
    """Name of the hook point: the attribute of the model and the Hydra group."""
    supplied: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that the core gives; all others are the filler's configuration."""
    changeable: ClassVar[tuple[str, ...]] = ()
    """Settings that may change after training because no weights depend on them, such as a sampler's step count."""
    lr_scales: ClassVar[Mapping[str, float]] = {}
    """Factors on the learning rate. Key: a parameter's name as in `named_parameters`, or the first part of it."""
    batch_parts: frozenset[str] = frozenset()
    """Optional parts of `Batch` that the filler needs in training (core/batch.py); may be set in `__init__`."""
    config: Mapping[str, object] | None = None
    """Name and settings of an objective or learner that `core.build_filler` built."""

    def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The filler's own scalar losses, named `*_loss`; they are added to the objective's.

        Called once per training step and batch, right after the batch's own forward. So anything that the filler
        stored in its latest forward belongs to this batch, whatever forwards the objective makes later.

        Args:
            output: (B,C,Qh,Qw), the model's output for the batch.
            batch: the batch with its target. `core.batch.crops_of(x, batch)` cuts the target's regions out of a
                (B,C,Qh,Qw) tensor.
        """
        return {}

    def pictures(self) -> dict[str, Tensor]:
        """Pictures of what the filler did to the first image of its latest forward: title -> (3,height,width) RGB.

        RGB is in [0,1]. A forward with gradients or under a compiler need not store anything for pictures. Training
        logs them at each validation. In a notebook, call `model(image, features)` without gradients, then
        `model.unifier.pictures()`.
        """
        return {}


class Unifier(Filler):
    """Maps features with any number of channels to D channels, from which the keys are computed.

    Called once per forward, before the keys are aggregated.
    """

    hook = "unifier"
    supplied = ("embed_dim",)

    @abstractmethod
    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """(B,C,h,w) raw backbone features, (B,D,H,W) encoded image -> (B,D,h,w)."""


class Attention(Filler):
    """Every output vector is a sum of `value` vectors, weighted by query-key similarity.

    Called once per forward with all queries, or band by band when the output is streamed.
    """

    hook = "attention"
    supplied = ("embed_dim",)
    takes_out: ClassVar[bool] = False
    """True: `forward` has a fourth argument `out`: None, or a tensor for the result, of its shape and dtype."""
    needs_image: ClassVar[bool] = False
    """True: all methods are called with `image`, (B,3,H,W), ImageNet-normalised. False: they need not have it."""
    linear_in_values: bool = True
    """False: a cell's weight is not the same in all channels. Then no linear head may be applied first
    (`AnyUp.readout`)."""

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B,D,Qh,Qw) query, (B,D,h,w) key, (B,C,h,w) value (the raw features) -> (B,C,Qh,Qw)."""

    def bands(
        self, query: Tensor, key: Tensor, value: Tensor, image: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields `forward`'s output in bands of rows, top to bottom: (rows, (B,C,rows,Qw)).

        By default there is one band. An attention that can work in bounded memory overrides this.
        """
        yield slice(0, query.shape[-2]), self(query, key, value, **self.seen(image))

    def bands_with_entropy(
        self, query: Tensor, key: Tensor, value: Tensor, image: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields `bands` with the entropy of each query's weights, -Σ α log α: (rows, (B,C,rows,Qw), (B,1,rows,Qw)).

        In nats: exp of it is the number of cells that would give it with equal weights. Used by
        `AnyUp.with_uncertainty`. By default the weights are read off values that are 1 in one cell and 0 in the
        others, some cells at a time. That is exact for every attention, but costs an attention with h·w channels. One
        that has its weights at hand overrides this.

        Raises:
            ValueError: a weight is negative, so that there is no entropy.
        """
        entropy, (batch, _, *grid) = 0.0, key.shape
        for cells in torch.arange(grid[0] * grid[1], device=key.device).split(_CELLS_AT_ONCE):
            alone = functional.one_hot(cells, grid[0] * grid[1]).to(value.dtype).unflatten(1, grid)  # (n,h,w)
            weights = self(query, key, alone.expand(batch, *alone.shape), **self.seen(image))  # (B,n,Qh,Qw)
            if (weights < -torch.finfo(weights.dtype).eps).any():
                raise ValueError(f"attention {type(self).__name__} has negative weights, which have no entropy")
            weights = weights.clamp(min=0)
            entropy = entropy - torch.special.xlogy(weights, weights).sum(1, keepdim=True)  # (B,1,Qh,Qw)
        for rows, band in self.bands(query, key, value, **self.seen(image)):
            yield rows, band, entropy[:, :, rows]

    def at(self, query: Tensor, key: Tensor, value: Tensor, coords: Tensor, image: Tensor | None = None) -> Tensor:
        """Attention at (N,2) points of the image, the same for all images -> (B,C,N); used by `AnyUp.query`.

        Points are (row, column) in the unit square. At the pixel centres of the query grid, the result must equal
        `forward`'s. By default the output on that grid is interpolated bilinearly. An attention that can work at any
        point overrides this.
        """
        height = query.shape[-2]
        bands = self.bands(query, key, value, **self.seen(image))
        return sum(sample_rows(band, rows, height, coords) for rows, band in bands).transpose(1, 2)  # (B,C,N)

    def weights_at(self, query: Tensor, key: Tensor, coords: Tensor, image: Tensor | None = None) -> Tensor:
        """The weight of every cell at (N,2) points of the image, as `at` uses them -> (B,N,h,w).

        Read off values that are 1 in one cell and 0 in the others, so exact for every attention that is linear in its
        values.
        """
        batch, _, *grid = key.shape
        parts = []
        for cells in torch.arange(grid[0] * grid[1], device=key.device).split(_CELLS_AT_ONCE):
            alone = functional.one_hot(cells, grid[0] * grid[1]).to(key.dtype).unflatten(1, grid)  # (n,h,w)
            parts.append(self.at(query, key, alone.expand(batch, *alone.shape), coords, **self.seen(image)))  # (B,n,N)
        return torch.cat(parts, 1).transpose(1, 2).unflatten(2, grid)

    def seen(self, image: Tensor | None) -> dict[str, Tensor]:
        """The argument `image` of a call, for an attention that needs it; no argument for others."""
        return {"image": image} if self.needs_image else {}


class AfterAttention(Filler):
    """Base of the three hook points after attention, which see the output and a `Context`."""

    supplied = ("embed_dim",)
    needs_guidance: ClassVar[bool] = False
    """True: `context.guidance` is the encoded image. If no filler needs it, it is freed before attention."""
    needs_whole_output: ClassVar[bool] = True
    """False only if `forward` may be called on bands of rows. True: the model refuses to stream its output."""
    linear_in_values: ClassVar[bool] = False
    """True only if the result is a linear map of `output`, the same one for every channel. Then a linear head may be
    applied first (`AnyUp.readout`)."""


class Decoder(AfterAttention):
    """Corrects attention's output (the explicit output) at each point: no output pixel depends on another.

    Called after attention, on the whole output or on a band of its rows.
    """

    hook = "decoder"
    needs_whole_output = False

    @abstractmethod
    def forward(self, output: Tensor, context: Context) -> Tensor:
        """(B,C,Qh,Qw) explicit output -> (B,C,Qh,Qw)."""


class Refiner(AfterAttention):
    """Improves the decoder's output, with the whole of it in view. Called after the decoder."""

    hook = "refiner"

    @abstractmethod
    def forward(self, output: Tensor, context: Context) -> Tensor:
        """(B,C,Qh,Qw) -> (B,C,Qh,Qw). All random numbers must come from `context.generator`."""


class Temporal(AfterAttention):
    """Makes outputs of consecutive frames agree. Called last, once per frame, in order."""

    hook = "temporal"
    state_type: ClassVar[type | None] = None
    """Class of its state, a `core.video_state.VideoState`: such a state can be saved, so that a stopped video goes on,
    and told of missing frames. None: any other object."""

    @abstractmethod
    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, object | None]:
        """(B,C,Qh,Qw), state of the previous frame (None at the first frame) -> output, state for the next frame.

        The state may be any object; `core.video_state.VideoState` is a base for one that can be saved, and that knows
        of missing frames. A frame with another size or number of channels begins a new video. The filler must detect
        this, and either raise an error or start again; its docstring says which.
        """


class Objective(Filler):
    """Computes the training losses. Its own parameters are trained and saved like the model's."""

    hook = "objective"
    needs_output: ClassVar[bool] = True
    """False: it makes its own forwards, and `output` is None unless a filler's auxiliary loss needs it."""
    needs_target: ClassVar[bool] = True
    """False: training makes no targets, and `batch.target` is empty, unless a filler's auxiliary loss needs one."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        """-> named scalar losses (`*_loss`), already weighted; their sum is minimised.

        Args:
            model: for further forwards; under mixed precision they return half precision.
            output: (B,C,Qh,Qw) from the batch's own forward, at least in single precision.
        """

    def diagnostics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Numbers about the model that are logged beside the losses, and not minimised; by default none.

        Called without gradients after a step that is logged, with a batch of it, and never in other steps.
        """
        return {}


class Learner(Filler):
    """Makes one optimisation step over several tasks, and adapts the model at test time.

    Its own parameters (for example learned learning rates) are trained and saved like the model's.
    """

    hook = "learner"

    def prepare(self, model: nn.Module) -> None:
        """Shows the model to be trained, once, before training: for parameters that depend on it, such as learnt rates.

        By default, nothing is prepared.
        """

    @abstractmethod
    def forward(self, model: nn.Module, objective: Objective, tasks: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The losses of each task; their sums are minimised. Everything that a step differentiates happens here.

        `model` is never wrapped for precision or several processes. So functional copies of it
        (`learn2learn.clone_module`) use their own weights. Under mixed precision autocast is on.
        """

    @abstractmethod
    def step(
        self, trainable: nn.Module, tasks: Sequence[Batch], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Tensor]]:
        """Updates the weights once -> the detached losses of each task, in order.

        Args:
            trainable: a `core.training.Trainable`, possibly wrapped for several processes. `trainable(tasks)` calls
                this learner's `forward`. Take the losses to differentiate from there, so that all processes see them.
            tasks: one batch for each backbone of the step.
            optimizer: compute the update's gradients with `core.training.backward(loss, optimizer)`. It takes care of
                half precision, accumulation over steps and several processes.
        """

    def adapt(self, model: nn.Module, objective: Objective, support: Sequence[Batch]) -> nn.Module:
        """Returns the model adapted to `support`; the given one stays unchanged. By default, returns `model` itself."""
        return model


HOOK_POINTS: dict[str, type[Filler]] = {
    base.hook: base for base in (Unifier, Attention, Decoder, Refiner, Temporal, Objective, Learner)
}
MODEL_HOOKS = ("unifier", "attention", "decoder", "refiner", "temporal")
AFTER_ATTENTION = ("decoder", "refiner", "temporal")
