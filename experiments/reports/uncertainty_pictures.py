"""Pictures of uncertainty."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from experiments.data.image_files import centre_square, shrink
from experiments.reports.style import heat

_SIDE = 224
"""Largest side in pixels at which the image is shown."""
_TITLE_LENGTH = 26


def columns_of(image: Tensor, side: int, maps: Mapping[str, np.ndarray], title: str) -> dict[str, Tensor | np.ndarray]:
    """Title -> picture: the central square of an image (1,3,H,W), and each (h,w) map in its own range."""
    return {title[:_TITLE_LENGTH]: shrink(centre_square(image, side), _SIDE)} | {
        name: heat(values) for name, values in maps.items()
    }
