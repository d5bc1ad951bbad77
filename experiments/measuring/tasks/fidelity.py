"""`task=fidelity`: upsampled features against those of high-resolution crops, without labels."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from experiments.data.image_files import centre_square
from experiments.measuring.bench import Bench, Ceiling, EvaluationError
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.metrics import FidelityCase, FidelityError, fidelity, fidelity_case
from experiments.measuring.task import Picture, Task, register_task
from experiments.reports.fidelity_pictures import columns_of
from experiments.settings import SettingError
from experiments.statistics.scores import Measure, image_rows, register_measures

log = logging.getLogger(__name__)


register_measures(
    {
        "cosine": Measure(+1),
        "error": Measure(-1, "of the target's variance"),
        "edge_cosine": Measure(+1, title="cosine at edges"),
        "edge_error": Measure(-1, "of the target's variance", "error at edges"),
    }
)


@register_task("fidelity")
class Fidelity(Task):
    """Feature fidelity at several scales; measures of a whole image and near its edges.

    The encoder sees squares of `view` pixels, so `image_size` and the other sizes of the evaluation play no part.

    Args:
        scales: of the target grid to the grid of the low-resolution features.
        view: side in pixels of what the encoder sees at once. guidance: of what the upsampler sees; None: view.

    Raises:
        SettingError: a value out of its range.
    """

    ceilings = tuple(CEILINGS)

    def __init__(self, scales: list[int] = [2], view: int = 224, guidance: int | None = None):  # noqa: B006  read only
        super().__init__()
        if not scales or min(scales) < 2 or len(set(scales)) < len(scales):
            raise SettingError(f"task.scales must be different whole numbers from 2, got {list(scales)}")
        if view < 1 or (guidance is not None and not 1 <= guidance <= min(scales) * view):
            raise SettingError(
                f"task.view must be at least 1, and task.guidance null or up to {min(scales) * view}, got {view}, "
                f"{guidance}"
            )
        self.scales, self.view, self.guidance_size = list(scales), view, guidance

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
        for i, name in enumerate(bench.val.names):
            for scale in self.scales:
                try:
                    measured, output = self._measured(model, i, scale, bench)
                except FidelityError as error:
                    raise EvaluationError(f"image {name} at {scale}x: {error}") from error
                for row in image_rows(name, measured):
                    yield {"task": f"fidelity/{scale}x"} | row
                badness = 1 - measured["cosine"]
                if not isinstance(model, Ceiling) and (scale not in worst or badness > worst[scale].badness):
                    worst[scale] = self._picture(i, scale, output, measured["cosine"], bench)
        self.worst = [worst[scale] for scale in self.scales if scale in worst]

    def _picture(self, i: int, scale: int, output: Tensor, cosine: float, bench: Bench) -> Picture:
        """Of the image on which the arm did worst so far at this scale."""
        name, case = bench.val.names[i], self._cached(i, scale, bench)
        image = centre_square(bench.val.sample(i).image[None].to(bench.device), scale * self.view)
        columns = columns_of(replace(case, image=image), output, name, f"{scale}x, cosine {cosine:.3f}")
        return Picture(f"{scale}x_{name}", 1 - cosine, columns)

    def _cached(self, i: int, scale: int, bench: Bench) -> FidelityCase:
        return bench.memory.get(
            (self, i, scale),
            lambda: replace(self._case(i, scale, bench), image=torch.empty(0)),  # the largest part, and read again
            lambda case: sum(t.nbytes for t in (case.guidance, case.features, case.target, case.edges)),
        )

    @torch.no_grad()
    def _measured(
        self, model: nn.Module | Ceiling, i: int, scale: int, bench: Bench
    ) -> tuple[dict[str, float], Tensor]:
        case = self._cached(i, scale, bench)
        if not isinstance(model, Ceiling):
            output = model(case.guidance, case.features, case.output_size)
            return fidelity(output, case), output
        if model.name == "encoder":
            image = bench.val.sample(i).image[None].to(bench.device)
            case = replace(case, image=centre_square(image, scale * self.view))
        output = CEILINGS[model.name](case, bench.encoder)
        return fidelity(output, case), output

    def _case(self, i: int, scale: int, bench: Bench) -> FidelityCase:
        image = bench.val.sample(i).image.to(bench.device)
        return fidelity_case(image, bench.encoder, scale, self.view, self.guidance_size)
