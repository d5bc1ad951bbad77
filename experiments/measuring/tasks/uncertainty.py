"""`task=uncertainty`: whether an upsampler knows where it errs, against the features of high-resolution crops."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch import nn

from experiments.measuring.bench import Bench, Ceiling, EvaluationError
from experiments.measuring.metrics import FidelityCase
from experiments.measuring.task import Picture, register_task
from experiments.measuring.tasks.fidelity import Fidelity
from experiments.measuring.uncertainty import KINDS, error_of, of_interpolation, uncertain_output
from experiments.reports.uncertainty_pictures import columns_of
from experiments.settings import SettingError
from experiments.statistics.calibration import (
    CannotCalibrate,
    ause,
    conformal_factor,
    coverage,
    fitted_exponent,
    rank_correlation,
)
from experiments.statistics.scores import Measure, image_rows, register_measures

LEVELS = (80, 90)
"""Per cent of the pixels that a bound of the error is to hold for."""

register_measures(
    {
        "error_rank": Measure(+1, title="Spearman with the error"),
        "ause": Measure(-1, "of a random order's", "AUSE"),
        "squared_error": Measure(-1, "of the low-resolution features' variance", "squared error"),
    }
    | {"exponent": Measure(+1, title="exponent of the bounds")}
    | {f"coverage_{level}": Measure(+1, title=f"coverage at {level} %") for level in LEVELS}
    | {f"factor_{level}": Measure(-1, title=f"factor for {level} %") for level in LEVELS}
)

_Maps = dict[str, np.ndarray]
"""Kind of uncertainty, or "error" -> one value for each pixel of an image."""


@register_task("uncertainty")
class UncertaintyTask(Fidelity):
    """Uncertainty of each kind (`experiments.measuring.uncertainty`) beside the true error, on the targets of fidelity.

    Of each image: Spearman's correlation with the squared error, the area under the sparsification error (AUSE), and
    the share of pixels whose error is within a bound that is calibrated on all other images.

    Args:
        scales, view, guidance, crop_step, num_crops: as of `task=fidelity`.
        calibration: [e, f, g] for bounds f·(uncertainty + 0.01)^e of 80 % of the pixels, and g·(...)^e of 90 %: the
            measures exponent, factor_80 and factor_90 of the same kind, of other images or another encoder. null:
            calibrated on the other images.
        kinds: of uncertainty, of `KINDS`.

    Raises:
        SettingError: a value out of its range.
    """

    def __init__(
        self,
        scales: list[int] = [2],  # noqa: B006  read only
        view: int = 224,
        guidance: int | None = None,
        crop_step: int | None = 2,
        num_crops: int | None = 256,
        calibration: list[float] | None = None,
        kinds: list[str] = list(KINDS),  # noqa: B006  read only
    ):
        super().__init__(scales, view, guidance, crop_step, num_crops)
        self.ceilings = ("encoder",)
        if calibration is not None and (len(calibration) != 1 + len(LEVELS) or min(calibration) < 0):
            raise SettingError(
                "task.calibration must be null or [exponent, factor for 80 %, factor for 90 %], none below 0, got "
                f"{calibration}"
            )
        if not kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
            raise SettingError(f"task.kinds must be different ones of {', '.join(KINDS)}, got {list(kinds)}")
        self.calibration, self.kinds = None if calibration is None else list(calibration), list(kinds)

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`; two images at least, one to calibrate on and one to measure."""
        super().check(bench)
        if self.calibration is None and len(bench.val) < 2:
            raise SettingError(
                "task=uncertainty calibrates on the other images: it needs two, got 1; take more images, or set "
                "task.calibration"
            )
        self.notes.append(
            "coverage is best where it is nominal, not where it is largest; arms that are not AnyUp have the "
            "uncertainty of bilinear interpolation"
        )

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`; the seed plays no part."""
        self.worst = []
        for scale in self.scales:
            maps = [self._maps(model, i, scale, bench) for i in range(len(bench.val))]
            for kind, (i, name) in product(self.kinds, enumerate(bench.val.names)):
                try:
                    measured = self._measured(maps, kind, i)
                except CannotCalibrate as error:
                    raise EvaluationError(f"image {name} at {scale}x, {kind}: {error}") from error
                for row in image_rows(name, measured):
                    yield {"task": f"uncertainty/{scale}x/{kind}"} | row
            self.worst.append(self._worst(model, maps, scale, bench))

    def _measured(self, maps: list[_Maps], kind: str, i: int) -> dict[str, float]:
        """All measures of one image."""
        uncertainty, error = maps[i][kind], maps[i]["error"]
        others = [(other[kind], other["error"]) for j, other in enumerate(maps) if j != i]
        found = {
            "error_rank": rank_correlation(uncertainty, error),
            "ause": ause(uncertainty, error),
            "squared_error": float(error.mean()),
        }
        if self.calibration is None:
            exponent = fitted_exponent(others)
            factors = [conformal_factor(others, level / 100, exponent) for level in LEVELS]
        else:
            exponent, *factors = self.calibration
        found["exponent"] = exponent
        for level, factor in zip(LEVELS, factors, strict=True):
            found[f"coverage_{level}"] = coverage(uncertainty, error, factor, exponent)
            found[f"factor_{level}"] = factor
        return found

    @torch.no_grad()
    def _maps(self, model: nn.Module | Ceiling, i: int, scale: int, bench: Bench) -> _Maps:
        case, output, found = self._uncertain(model, i, scale, bench)
        if not torch.isfinite(output).all():
            raise EvaluationError(f"image {bench.val.names[i]} at {scale}x: upsampled features are not finite")
        found = {kind: found[kind] for kind in self.kinds} | {"error": error_of(output, case.target, case.features)}
        return {kind: values.flatten().double().cpu().numpy() for kind, values in found.items()}

    def _uncertain(self, model: nn.Module | Ceiling, i: int, scale: int, bench: Bench):
        """What is measured, the output (1,C,s·h,s·w), and its uncertainty of each kind."""
        if isinstance(model, Ceiling):
            case, output = self._output(model, i, scale, bench)
            return case, output, of_interpolation(case.features, case.output_size)
        case: FidelityCase = self._cached(i, scale, bench)
        return case, *uncertain_output(model, case.guidance, case.features, case.output_size)

    def _worst(self, model: nn.Module | Ceiling, maps: list[_Maps], scale: int, bench: Bench) -> Picture:
        """Of the image whose errors the first kind tells worst."""
        ranks = [rank_correlation(found[self.kinds[0]], found["error"]) for found in maps]
        i = int(np.argmin(ranks))
        name, size = bench.val.names[i], self._cached(i, scale, bench).output_size
        image = bench.val.sample(i).image[None]
        drawn = {kind: maps[i][kind].reshape(size) for kind in (*self.kinds, "error")}
        return Picture(f"{scale}x_{name}", 1 - ranks[i], columns_of(image, scale * self.view, drawn, name))
