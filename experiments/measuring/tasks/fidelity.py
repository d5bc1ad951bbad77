"""`task=fidelity`: upsampled features against those of high-resolution crops, without labels."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from experiments.data.feature_cache import CachedBackbone
from experiments.data.image_files import centre_square
from experiments.measuring.bench import Bench, Ceiling, EvaluationError
from experiments.measuring.blur import WIDTHS, at_best_width, blurred
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.metrics import FidelityCase, FidelityError, closeness, correlation, fidelity, fidelity_case
from experiments.measuring.regions import REGIONS, regions_of
from experiments.measuring.targets import CropSettings
from experiments.measuring.task import Picture, Task, register_task
from experiments.reports.fidelity_pictures import columns_of
from experiments.settings import SettingError
from experiments.statistics.scores import Measure, image_rows, register_measures

log = logging.getLogger(__name__)

SMOOTH = {"cosine": +1, "error": -1, "edge_cosine": +1, "edge_error": -1} | {f"{name}_error": -1 for name in REGIONS}
"""Measures that blur always improves -> +1 where more is better."""
CONTROLLED = {"detail": +1} | SMOOTH
"""Measures that are also measured at the best blur. Blur lowers detail that is mostly right, and raises it where most
is wrong: so the control of detail is a measure of its own, each arm at its best blur; it decides no verdict."""
_OF_VARIANCE = "of the target's variance"


def _in(region: str) -> str:
    return {"thin": "thin structures", "flat": "flat parts"}.get(region, f"{region.replace('_', ' ')} of uncertainty")


register_measures(
    {
        "detail": Measure(+1, title="detail correlation"),
        "detail_blurred": Measure(+1, title="detail correlation at best blur"),
        "detail_error": Measure(-1, "of the detail's energy", "detail error at best amplitude"),
        "edge_detail": Measure(+1, title="detail correlation at edges"),
        "cosine": Measure(+1, blurred="cosine_blurred"),
        "error": Measure(-1, _OF_VARIANCE, blurred="error_blurred"),
        "edge_cosine": Measure(+1, title="cosine at edges", blurred="edge_cosine_blurred"),
        "edge_error": Measure(-1, _OF_VARIANCE, "error at edges", blurred="edge_error_blurred"),
        "cosine_blurred": Measure(+1, title="cosine, blurred"),
        "error_blurred": Measure(-1, _OF_VARIANCE, "error, blurred"),
        "edge_cosine_blurred": Measure(+1, title="cosine at edges, blurred"),
        "edge_error_blurred": Measure(-1, _OF_VARIANCE, "error at edges, blurred"),
    }
    | {f"{name}_detail": Measure(+1, title=f"detail, {_in(name)}") for name in REGIONS}
    | {
        f"{name}_error": Measure(-1, _OF_VARIANCE, f"error, {_in(name)}", blurred=f"{name}_error_blurred")
        for name in REGIONS
    }
    | {f"{name}_error_blurred": Measure(-1, _OF_VARIANCE, f"error, {_in(name)}, blurred") for name in REGIONS}
    | {f"detail_{2**i}x-{2 ** (i + 1)}x": Measure(+1, title=f"detail, {2**i}x to {2 ** (i + 1)}x") for i in range(5)}
)


@register_task("fidelity")
class Fidelity(Task):
    """Feature fidelity at several scales: detail first, then cosine and error with their blurred controls.

    The encoder sees squares of `view` pixels, so `image_size` and the other sizes of the evaluation play no part.

    Args:
        scales: of the target grid to the grid of the low-resolution features.
        view: side in pixels of what the encoder sees at once. guidance: of what the upsampler sees; None: view.
        crop_step: cells of the target grid between neighbouring crops, whose features are averaged; None: side by side.
        num_crops: at most so many crops of an image; None: all.
        regions: also measure thin structures, flat parts and deciles of uncertainty (`experiments.measuring.regions`).

    Raises:
        SettingError: a value out of its range.
    """

    ceilings = tuple(CEILINGS)

    def __init__(
        self,
        scales: list[int] = [2],  # noqa: B006  read only
        view: int = 224,
        guidance: int | None = None,
        crop_step: int | None = 2,
        num_crops: int | None = 256,
        regions: bool = False,
    ):
        super().__init__()
        if not scales or min(scales) < 2 or len(set(scales)) < len(scales):
            raise SettingError(f"task.scales must be different whole numbers from 2, got {list(scales)}")
        if view < 1 or (guidance is not None and not 1 <= guidance <= min(scales) * view):
            raise SettingError(
                f"task.view must be at least 1, and task.guidance null or up to {min(scales) * view}, got {view}, "
                f"{guidance}"
            )
        self.scales, self.view, self.guidance_size = list(scales), view, guidance
        self.crops, self.regions = CropSettings(crop_step, num_crops), regions
        if crop_step is None:  # nothing overlaps
            self.ceilings = tuple(name for name in CEILINGS if name != "split_half")

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`; any images will do."""
        if self.view < (least := bench.encoder.least):
            raise SettingError(f"task.view={self.view}: backbone={bench.encoder.name} needs at least {least} pixels")
        sides = bench.val.shorter_sides
        for scale in self.scales:
            wanted = scale * self.view
            if small := sum(side < wanted for side in sides):
                typical = wanted / sorted(sides)[len(sides) // 2]
                self.notes.append(
                    f"at {scale}x {small} of {len(sides)} images are smaller than {wanted} pixels ({scale} x view) and "
                    f"are enlarged, in the median {typical:.1f} times: targets show no more detail than the images have"
                )
                log.warning("task=fidelity: %s; a smaller task.view, or larger images, avoid it", self.notes[-1])

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`; the seed plays no part."""
        worst: dict[int, Picture] = {}
        at_widths: dict[int, dict[str, list[dict[str, float]]]] = {scale: {} for scale in self.scales}
        for i, name in enumerate(bench.val.names):
            for scale in self.scales:
                try:
                    case, output = self._output(model, i, scale, bench)
                    measured = fidelity(output, case)
                    if not isinstance(model, Ceiling):
                        grid = tuple(case.features.shape[-2:])
                        widths = (blurred(output, grid, width) for width in WIDTHS)
                        at_widths[scale][name] = [
                            {"detail": correlation(one, case)} | closeness(one, case) for one in widths
                        ]
                except FidelityError as error:
                    raise EvaluationError(f"image {name} at {scale}x: {error}") from error
                for row in image_rows(name, measured):
                    yield {"task": f"fidelity/{scale}x"} | row
                badness = 1 - measured["detail"]
                if not isinstance(model, Ceiling) and (scale not in worst or badness > worst[scale].badness):
                    worst[scale] = self._picture(i, scale, output, measured["detail"], bench)
        for scale, measured in at_widths.items():
            for name, values in at_best_width(measured, CONTROLLED).items():
                for row in image_rows(name, {f"{measure}_blurred": value for measure, value in values.items()}):
                    yield {"task": f"fidelity/{scale}x"} | row
        self.worst = [worst[scale] for scale in self.scales if scale in worst]

    def _picture(self, i: int, scale: int, output: Tensor, detail: float, bench: Bench) -> Picture:
        """Of the image on which the arm did worst so far at this scale."""
        name, case = bench.val.names[i], self._cached(i, scale, bench)
        image = centre_square(bench.val.sample(i).image[None].to(bench.device), scale * self.view)
        columns = columns_of(replace(case, image=image), output, name, f"{scale}x, detail {detail:.3f}")
        return Picture(f"{scale}x_{name}", 1 - detail, columns)

    def _cached(self, i: int, scale: int, bench: Bench) -> FidelityCase:
        return bench.memory.get(
            (self, i, scale),
            lambda: replace(self._case(i, scale, bench), image=torch.empty(0)),  # the largest part, and read again
            lambda case: sum(t.nbytes for t in (case.guidance, case.features, case.target, *(case.halves or ()))),
        )

    @torch.no_grad()
    def _output(self, model: nn.Module | Ceiling, i: int, scale: int, bench: Bench) -> tuple[FidelityCase, Tensor]:
        """What to measure, and with what."""
        case = self._cached(i, scale, bench)
        if not isinstance(model, Ceiling):
            return case, model(case.guidance, case.features, case.output_size)
        if model.name in ("encoder", "encoder_equal_cost"):
            image = bench.val.sample(i).image[None].to(bench.device)
            case = replace(case, image=centre_square(image, scale * self.view))
        output, case = CEILINGS[model.name](case, bench.encoder)
        return case, output

    def _case(self, i: int, scale: int, bench: Bench) -> FidelityCase:
        image, name = bench.val.sample(i).image.to(bench.device), f"image {bench.val.names[i]}"
        encoder = CachedBackbone(bench.encoder.views[0], bench.encoder.cache, name)
        with bench.encoder.refusals_told(name):
            case = fidelity_case(image, encoder, scale, self.view, self.guidance_size, self.crops)
        return replace(case, regions=regions_of(case.image, case.features, case.output_size)) if self.regions else case
