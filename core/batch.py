"""The data that fillers see beside the features: `Context` after attention, `Batch` and `Clip` in training.

Shape letters as in `core/hooks.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Context:
    """What a filler after attention may look at. Read only."""

    image: Tensor
    """(B,3,H,W), ImageNet-normalised; for video, the current frame."""
    features: Tensor
    """(B,C,h,w) raw backbone features."""
    coords: Tensor
    """(Qh,Qw,2) centres of the output pixels that the filler gets: (row, column) in the unit square of the image.
    A band of the output has fewer rows than Qh."""
    guidance: Tensor | None = None
    """(B,D,H,W) encoded image, for fillers with `needs_guidance`; None for all others."""
    generator: torch.Generator | None = None
    """Source of all random numbers, on the CPU: the caller's generator, or else one with the same seed in every call.
    None under a compiler if the caller gave none."""

    def noise_like(self, x: Tensor) -> Tensor:
        """Standard normal noise with the shape, dtype and device of `x`; the values are the same on every device.

        Raises:
            RuntimeError: there is no generator, as under a compiler.
        """
        if self.generator is None:
            raise RuntimeError(
                "random numbers cannot be drawn under torch.compile or torch.export: call the model without them"
            )
        return torch.randn(x.shape, generator=self.generator).to(x)


@dataclass
class Clip:
    """Consecutive frames of B videos."""

    image: Tensor
    """(B,T,3,H,W) guidance of each frame, ImageNet-normalised."""
    features: Tensor
    """(B,T,C,h,w) encoder features of each frame."""
    flow: Tensor | None
    """(B,T-1,2,H,W) displacement (x, y) to the next frame, in pixels of the guidance; NaN where the point is hidden in
    the next frame. None if the data set has no flow."""


OPTIONAL_PARTS = ("augmented_image", "whole", "crops", "high_resolution", "encoder", "clip")
"""Parts of a `Batch` that exist only if a filler names them in `batch_parts`."""


@dataclass
class Batch:
    """The data of one training step for one backbone. Targets are encoder features of high-resolution crops."""

    image: Tensor
    """(B,3,H,W) guidance, ImageNet-normalised."""
    features: Tensor
    """(B,C,h,w) encoder features of the whole image."""
    target: Tensor
    """(N,C,th,tw) encoder features of N = n·B crops, n consecutive for each image; N is 0 if nobody needs them."""
    output_size: tuple[int, int]
    """(Qh,Qw): the grid of the whole image at the resolution of the targets."""
    corners: Tensor | None = None
    """(N,2) integer (row, column) of each crop's first vector in the output grid; None: the targets are not cropped."""
    backbone: str = ""
    """Name of the encoder."""
    generator: torch.Generator | None = None
    """Source of this step's random numbers, on the CPU; None: the default generator of a model call."""
    augmented_image: Tensor | None = None
    """(B,3,H,W) photometrically augmented guidance, for self-consistency."""
    whole: Tensor | None = None
    """(B,3,s,s) RGB in [0,1]: the images that `features` were computed from."""
    crops: Tensor | None = None
    """(N,3,s,s) RGB in [0,1]: the images that `target` was computed from."""
    high_resolution: Tensor | None = None
    """(B,3,S,S) RGB in [0,1]: the whole images at the resolution of the targets."""
    encoder: Callable[[Tensor], Tensor] | None = None
    """The frozen encoder, (b,3,H,W) RGB in [0,1] -> (b,C,h,w). Features of images seen before come from a cache."""
    clip: Clip | None = None
    """Consecutive frames of each video. `image` is one of them: the first, unless the video ends too soon after it."""

    def part(self, name: str, who: object) -> object:
        """The optional part `name`, for the filler `who`.

        Raises:
            ValueError: the batch does not have it; the message says how `who` must ask for it.
        """
        found = getattr(self, name)
        if found is None:
            kind = type(who).__name__
            raise ValueError(f"{kind} needs batch.{name}: name it in {kind}.batch_parts, or add it to the batch")
        return found


def crops_of(output: Tensor, batch: Batch) -> Tensor:
    """Cuts the regions of `batch.target` out of the output: (B,C,Qh,Qw) -> (N,C,th,tw).

    Raises:
        ValueError: targets, corners and output do not fit together.
    """
    target, corners = batch.target, batch.corners
    if not len(target):
        raise ValueError("the batch has no target: set needs_target = True in the objective that looks at it")
    if corners is None:
        if target.shape != output.shape:
            raise ValueError(
                f"without corners, target {tuple(target.shape)} must have the output's shape {tuple(output.shape)}: "
                "give the corners of the crops"
            )
        return output
    if target.dim() != 4 or target.shape[1] != output.shape[1]:
        raise ValueError(
            f"target must be (N, {output.shape[1]}, th, tw), with the features' channels, got {tuple(target.shape)}"
        )
    height, width = target.shape[-2:]
    per_image = len(corners) // len(output)
    if per_image * len(output) != len(target) or len(corners) != len(target):
        raise ValueError(
            f"got {len(target)} targets and {len(corners)} corners for {len(output)} images: give one corner for each "
            "target, and the same number of crops for each image"
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


def images_of(batch: Batch, positions: Sequence[int]) -> Batch:
    """The part of a batch that shows some of its images, with all that belongs to them."""

    def of(x: Tensor | None) -> Tensor | None:
        if x is None or not len(x):  # targets that nobody needs
            return x
        per_image = len(x) // len(batch.image)
        return x.unflatten(0, (-1, per_image))[list(positions)].flatten(0, 1)

    clip = batch.clip and Clip(of(batch.clip.image), of(batch.clip.features), of(batch.clip.flow))
    tensors = {name: of(part) for name, part in vars(batch).items() if isinstance(part, Tensor)}
    return replace(batch, clip=clip, **tensors)


def check_parts(asked: Iterable[tuple[object, Iterable[str]]]) -> frozenset[str]:
    """The set of optional parts in `asked`, which are pairs (filler, its `batch_parts`).

    Raises:
        ValueError: a filler asks for a part that no batch has; the message names both.
    """
    parts = [(who, name) for who, names in asked for name in names]
    for who, name in parts:
        if name not in OPTIONAL_PARTS:
            raise ValueError(f"{type(who).__name__}.batch_parts names {name!r}; it may be {', '.join(OPTIONAL_PARTS)}")
    return frozenset(name for _, name in parts)
