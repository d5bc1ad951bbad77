"""Pictures of feature fidelity: image, features, target, result and error map side by side; each arm's worst image."""

from collections.abc import Mapping

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.data.image_files import shrink
from experiments.measuring.metrics import FidelityCase
from experiments.reports.pictures import fit_colours, panel

_SIDE = 224
"""Largest side in pixels at which the image is shown."""
_TITLE_LENGTH = 26


def comparison(case: FidelityCase, upsampled: Tensor, image_title: str, result_title: str) -> Image.Image:
    """One row: the image, low-resolution features, target, result (one PCA for all), and 1 - cosine (white: 1).

    Args:
        upsampled: (1,C,s·h,s·w), as the target. image_title, result_title: what is written above these two.
    """
    colours = fit_colours([case.features, case.target])
    error = (1 - F.cosine_similarity(upsampled.float(), case.target.float(), dim=1)).clamp(0, 1)  # (1,s·h,s·w)
    return panel(
        {
            image_title[:_TITLE_LENGTH]: shrink(case.image, _SIDE),
            "features": colours.paint(case.features),
            "target": colours.paint(case.target),
            result_title[:_TITLE_LENGTH]: colours.paint(upsampled),
            "1 - cosine": error.expand(3, -1, -1),
        }
    )


class WorstImages:
    """Keeps, for each arm at each scale, a picture of the image with the lowest cosine so far."""

    def __init__(self) -> None:
        self._worst: dict[tuple[int, str], tuple[float, str, Image.Image]] = {}

    def offer(
        self, scale: int, arm: str, image: str, measured: Mapping[str, float], case: FidelityCase, upsampled: Tensor
    ) -> None:
        """Takes a result into account; `measured` is what `fidelity` gives of it."""
        cosine = measured["cosine"]
        known = self._worst.get((scale, arm))
        if known is None or cosine < known[0]:
            row = comparison(case, upsampled, image, f"{scale}x {arm} {cosine:.3f}")
            self._worst[scale, arm] = cosine, image, row

    @property
    def images(self) -> dict[tuple[int, str], str]:
        """(scale, arm) -> name of its worst image."""
        return {key: image for key, (_, image, _) in self._worst.items()}

    def sheet(self) -> Image.Image:
        """All of them, one row per scale and arm.

        Raises:
            ValueError: nothing was offered.
        """
        if not self._worst:
            raise ValueError("there are no results to show")
        rows = [row for _, _, row in (self._worst[key] for key in sorted(self._worst, key=lambda key: key[0]))]
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet
