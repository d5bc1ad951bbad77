"""The seven hook points: what each may do, and where the model and the training step call it.

Shape letters, used everywhere in this project: B batch, C feature channels (ANY number), D guidance width
(`embed_dim`), (h, w) feature grid, (H, W) image grid, (Qh, Qw) output grid.

`AnyUp.forward` (core/anyup.py), with the hook points marked by `->`::

    guidance = rotary(image_encoder(image))                         # (B, D, H, W)
    unified  -> unifier(features, guidance)                         # (B, D, h, w)
    key      = aggregation(pool(key_encoder(guidance)), unified)    # (B, D, h, w)
    query    = pool(query_encoder(guidance))                        # (B, D, Qh, Qw)
    output   -> attention(query, key, features)                     # (B, C, Qh, Qw)
    output   -> decoder(output, features, guidance, coords)         # (B, C, Qh, Qw)
    output   -> refiner(output, image, features)                    # (B, C, Qh, Qw)
    output   -> temporal(output, image, state)                      # (B, C, Qh, Qw), next state

One training step::

    losses   -> objective(model, batch)                             # dict of scalars
    step     -> learner.step(model, objective, batch, optimizer)    # forward, backward, update

An idea is one class in one file: subclass the hook point, decorate it with `@register("name")`, and give its
settings as typed keyword arguments of `__init__`. Rules that every filler keeps:

- the same weights serve any number of feature channels C;
- it starts as the baseline (zero gate, one scale, zero steps), or has a setting that makes it the baseline;
- it never falls back silently: what it cannot do, it refuses, and says what to do instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from core.points import sample_rows


class Filler(nn.Module, ABC):
    """Base of all hook points. Subclass one of the classes below, never this one."""

    hook: ClassVar[str] = ""
    """Name of the hook point: the attribute of the model and the Hydra group."""
    supplied: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that the core gives; all others are the filler's configuration."""

    def auxiliary_loss(self) -> dict[str, Tensor]:
        """Scalar losses of the filler's own, named `*_loss`, about its latest forward; the objective adds them."""
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


class Decoder(Filler):
    """Corrects the explicit output at query coordinates, pointwise: no output pixel depends on another.

    Called after attention, on the whole output or on a band of its rows.
    """

    hook = "decoder"
    supplied = ("embed_dim",)
    needs_guidance: ClassVar[bool] = True
    """False: the guidance is freed before attention, and `forward` gets None in its place."""

    @abstractmethod
    def forward(self, output: Tensor, features: Tensor, guidance: Tensor | None, coords: Tensor) -> Tensor:
        """(B,C,Qh,Qw) explicit output, (B,C,h,w), (B,D,H,W), (Qh,Qw,2) coords -> (B,C,Qh,Qw).

        `coords` are the centres of the output pixels, (row, column), in the unit square of the whole image.
        """


class Refiner(Filler):
    """Improves a finished output, looking at all of it. Called after the decoder."""

    hook = "refiner"
    supplied = ("embed_dim",)
    needs_whole_output: ClassVar[bool] = True
    """False only when `forward` may be called on bands of rows; otherwise a streamed output is refused."""

    @abstractmethod
    def forward(self, output: Tensor, image: Tensor, features: Tensor) -> Tensor:
        """(B,C,Qh,Qw), (B,3,H,W) ImageNet-normalised image, (B,C,h,w) -> (B,C,Qh,Qw)."""


class Temporal(Filler):
    """Makes outputs of consecutive frames agree. Called last, once per frame, in order."""

    hook = "temporal"
    supplied = ("embed_dim",)
    needs_whole_output: ClassVar[bool] = True

    @abstractmethod
    def forward(self, output: Tensor, frame: Tensor, state: object | None) -> tuple[Tensor, object | None]:
        """(B,C,Qh,Qw), (B,3,H,W) frame, state of the last frame (None at the first) -> output, state."""


@dataclass
class Batch:
    """What one training step sees. Targets are encoder features of high-resolution crops."""

    image: Tensor
    """(B,3,H,W) guidance, ImageNet-normalised."""
    features: Tensor
    """(B,C,h,w) encoder features of the whole image."""
    target: Tensor
    """(N,C,th,tw) encoder features of N = n·B crops, n consecutive crops for each image."""
    output_size: tuple[int, int]
    """(Qh,Qw): the grid of the whole image at the resolution of the targets."""
    corners: Tensor | None = None
    """(N,2) integer (row, column) of each crop's first vector in the output grid; None: targets are the whole."""
    augmented_image: Tensor | None = None
    """(B,3,H,W) photometrically augmented guidance, for self-consistency."""


class Objective(Filler):
    """Computes what training minimises. Called by the learner, once per step."""

    hook = "objective"

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """-> named scalar losses (`*_loss`), already weighted; their sum is minimised."""


class Learner(Filler):
    """Owns one optimisation or adaptation step. Called by the training loop, once per step."""

    hook = "learner"

    @abstractmethod
    def step(
        self, model: nn.Module, objective: Objective, batch: Batch, optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """Updates the weights of `model` once -> the detached losses of this step.

        Call `core.training.backward(loss, optimizer)` for the gradients that the update uses, so that half precision,
        accumulation over steps and several processes work without the learner knowing of them.
        """


HOOK_POINTS: dict[str, type[Filler]] = {
    base.hook: base for base in (Unifier, Attention, Decoder, Refiner, Temporal, Objective, Learner)
}
MODEL_HOOKS = ("unifier", "attention", "decoder", "refiner", "temporal")
