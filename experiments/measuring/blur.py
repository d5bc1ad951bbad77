"""Blurred controls: how much of a cosine or an error is nothing but smoothness.

Blur raises the cosine to noisy targets by as much as the gains that upsamplers are published for (docs/evidence.md).
So an arm is also measured blurred, by the width that is best for it *on other images*, and an arm is only said to help
where it beats the best blurred baseline (`experiments.statistics.verdicts`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

WIDTHS = (0.0, 0.175, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Standard deviations of the Gaussian, in cells of the low-resolution grid; 0: not blurred."""


def blurred(features: Tensor, grid: tuple[int, int], width: float) -> Tensor:
    """(1,C,Qh,Qw) -> the same shape, blurred by `width` cells of the (h,w) `grid`, borders reflected."""
    sigma = width * features.shape[-2] / grid[0]
    if not sigma:
        return features
    size = min(2 * math.ceil(3 * sigma) + 1, *(2 * side - 1 for side in features.shape[-2:]))
    down, across = (_along(side, size, sigma).to(features) for side in features.shape[-2:])
    return down @ features @ across.mT


@lru_cache(64)
def _along(side: int, size: int, sigma: float) -> Tensor:
    """(side,side) float64: the blur along one axis as a matrix; two products are faster than a kernel of two axes."""
    return gaussian_blur(torch.eye(side, dtype=torch.float64)[None], [1, size], [1.0, sigma])[0]


def at_best_width(
    measured: Mapping[str, Sequence[Mapping[str, float]]], better: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """For each image and each measure its value at the width that is best on the other images.

    Args:
        measured: image -> measure -> value, for each of `WIDTHS`.
        better: measure -> +1 where more is better, -1 where less is.

    Returns:
        image -> measure -> value. A measure that only one image has is left out: there are no others.
    """
    found: dict[str, dict[str, float]] = {image: {} for image in measured}
    for measure, sign in better.items():
        images = [image for image, values in measured.items() if measure in values[0]]
        if len(images) < 2:
            continue
        table = np.array([[values[measure] for values in measured[image]] for image in images])  # (images,widths)
        others = (table.sum(0) - table) * sign
        for image, values, choice in zip(images, table, others.argmax(1), strict=True):
            found[image][measure] = float(values[choice])
    return found
