"""What filters through the hook points besides features: `Context` after attention, `Batch` and `Clip` in training.

Shape letters as in `core/hooks.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Context:
    """What a filler after attention may look at. Read only."""

    image: Tensor
    """(B,3,H,W), ImageNet-normalised: of this frame, when the images are a video."""
    features: Tensor
    """(B,C,h,w), as the backbone gave them."""
    coords: Tensor
    """(Qh,Qw,2) centres of the output pixels at hand, (row, column), in the unit square of the whole image."""
    guidance: Tensor | None = None
    """(B,D,H,W) encoded image, for fillers with `needs_guidance`; None for all others."""
    generator: torch.Generator | None = None
    """For all random numbers, on the CPU: the stream that the caller gave, or else the same fixed one in every call.
    None under a compiler, which cannot follow it."""

    def noise_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of `x`, the same ones on every device.

        Raises:
            RuntimeError: under a compiler, where there is no generator.
        """
        if self.generator is None:
            raise RuntimeError("random numbers cannot be drawn under torch.compile or torch.export: call the model")
        return torch.randn(x.shape, generator=self.generator).to(x)


@dataclass
class Clip:
    """Consecutive frames of B videos."""

    image: Tensor
    """(B,T,3,H,W) guidance of each frame, ImageNet-normalised."""
    features: Tensor
    """(B,T,C,h,w) encoder features of each frame."""
    flow: Tensor | None
    """(B,T-1,2,H,W) displacement (x, y) to the next frame in pixels of the guidance, NaN where hidden there; None where
    the data do not know it."""


OPTIONAL_PARTS = ("augmented_image", "whole", "crops", "encoder", "clip")
"""Of a `Batch`: there for fillers that name them in `batch_parts`, and for nobody else."""


@dataclass
class Batch:
    """What one training step sees of one backbone. Targets are encoder features of high-resolution crops."""

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
    backbone: str = ""
    """Name of the encoder."""
    generator: torch.Generator | None = None
    """For the random numbers of this step, on the CPU; None: the fixed stream of an evaluation."""
    augmented_image: Tensor | None = None
    """(B,3,H,W) photometrically augmented guidance, for self-consistency."""
    whole: Tensor | None = None
    """(B,3,s,s) RGB in [0,1]: what `features` are of."""
    crops: Tensor | None = None
    """(N,3,s,s) RGB in [0,1]: what `target` is of."""
    encoder: Callable[[Tensor], Tensor] | None = None
    """The frozen encoder, (b,3,H,W) RGB in [0,1] -> (b,C,h,w); what it has seen before comes from the cache."""
    clip: Clip | None = None
    """Frames that follow one another, with the first of them in `image`."""

    def part(self, name: str, who: object) -> object:
        """The optional part `name`.

        Raises:
            ValueError: it is not there; says that `who` must ask for it.
        """
        found = getattr(self, name)
        if found is None:
            kind = type(who).__name__
            raise ValueError(f"{kind} needs batch.{name}: name it in {kind}.batch_parts, or give it with the batch")
        return found


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


def check_parts(asked: Iterable[tuple[object, Iterable[str]]]) -> frozenset[str]:
    """All optional parts that fillers ask for: (filler, its `batch_parts`) each.

    Raises:
        ValueError: one asks for something that a batch cannot have; names it.
    """
    parts = [(who, name) for who, names in asked for name in names]
    for who, name in parts:
        if name not in OPTIONAL_PARTS:
            raise ValueError(f"{type(who).__name__}.batch_parts names {name!r}; it may be {', '.join(OPTIONAL_PARTS)}")
    return frozenset(name for _, name in parts)
