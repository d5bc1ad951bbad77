"""Pictures of feature fidelity: image, features, target, result and error map."""

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.data.image_files import shrink
from experiments.measuring.metrics import FidelityCase
from experiments.reports.pictures import fit_colours, panel

_SIDE = 224
"""Largest side in pixels at which the image is shown."""
_TITLE_LENGTH = 26


def columns_of(case: FidelityCase, upsampled: Tensor, image_title: str, result_title: str) -> dict[str, Tensor]:
    """Title -> picture: image, low-resolution features, target, result (one PCA for all), and 1 - cosine (white: 1).

    Args:
        upsampled: (1,C,s·h,s·w), as the target. image_title, result_title: what is written above these two.
    """
    colours = fit_colours([case.features, case.target])
    error = (1 - F.cosine_similarity(upsampled.float(), case.target.float(), dim=1)).clamp(0, 1)  # (1,s·h,s·w)
    return {
        image_title[:_TITLE_LENGTH]: shrink(case.image, _SIDE),
        "features": colours.paint(case.features),
        "target": colours.paint(case.target),
        result_title[:_TITLE_LENGTH]: colours.paint(upsampled),
        "1 - cosine": error.expand(3, -1, -1),
    }


def comparison(case: FidelityCase, upsampled: Tensor, image_title: str, result_title: str) -> Image.Image:
    """`columns_of`, side by side."""
    return panel(columns_of(case, upsampled, image_title, result_title))
