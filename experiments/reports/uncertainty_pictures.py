"""Pictures of uncertainty: one colour map for maps of one value per pixel."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from experiments.data.image_files import centre_square, shrink

_SIDE = 224
"""Largest side in pixels at which the image is shown."""
_TITLE_LENGTH = 26


def heat(values: np.ndarray, percentile: float = 1.0) -> np.ndarray:
    """(h,w) -> (h,w,3) RGB in [0,1]; the range leaves out `percentile` per cent of the values at either end.

    A map that is the same everywhere is dark.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"expected finite values of shape (h,w), got {values.shape}")
    low, high = np.percentile(values, (percentile, 100 - percentile))
    share = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    return colormaps["inferno"](share)[..., :3]  # its brightness rises evenly: dark is certain


def columns_of(image: Tensor, side: int, maps: Mapping[str, np.ndarray], title: str) -> dict[str, Tensor | np.ndarray]:
    """Title -> picture: the central square of an image (1,3,H,W), and each (h,w) map in its own range."""
    return {title[:_TITLE_LENGTH]: shrink(centre_square(image, side), _SIDE)} | {
        name: heat(values) for name, values in maps.items()
    }
