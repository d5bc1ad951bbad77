"""`task=temporal`: whether features of a moving surface stay the same, and those of a changing scene change."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core.detail import detail
from core.optical_flow import tvl1
from core.warping import inside, round_trip, warp
from experiments.measuring.bench import Bench, Ceiling, EncodedImage, EvaluationError, checked
from experiments.measuring.detail import agreement
from experiments.measuring.metrics import same_everywhere
from experiments.measuring.task import Task, register_task
from experiments.peers.interpolation import Bilinear
from experiments.settings import SettingError, check_choice
from experiments.statistics.scores import Measure, image_rows, register_measures

FLOWS = ("exact", "estimated")
MEASURED = ("warping_error", "change_error", "reference_detail", "reference_cosine")


register_measures(
    {
        "warping_error": Measure(-1, "of the features' variance", "warping error"),
        "change_error": Measure(-1, "of 1 - cosine", "error of change"),
        "reference_detail": Measure(+1, title="detail of the encoder at high resolution"),
        "reference_cosine": Measure(+1, title="cosine to the encoder at high resolution"),
    }
)


@register_task("temporal")
class TemporalConsistency(Task):
    """Stability from frame to frame, beside what a frozen output would lose.

    Warping error (Lai et al., ECCV 2018): each frame's features against the next frame's, fetched from where the flow
    says they went. Squared difference, averaged over the positions that are visible in both frames, divided by the
    variance of the frame's low-resolution features (the same unit for all arms). Blurred or frozen features lower it.

    Three measures that they do not win compare with the encoder's own features at `ceiling_scale` times the resolution,
    enlarged to the output. Error of change: how far the change from frame to frame, 1 - cosine at each position, is
    from the encoder's change (as tLP of TecoGAN, Chu et al. 2020). Detail and cosine: those of each frame.

    A video model is called frame by frame with its state.

    Args:
        flow: `exact` as the data set knows it (data=scenes with frames > 1, data=rgbd with poses, data=middlebury), or
            `estimated` between the frames by TV-L1 (Zach, Pock & Bischof 2007; scikit-image) with a forward-backward
            check of what is visible.

    Raises:
        SettingError: another flow.
    """

    def __init__(self, flow: str = "exact"):
        super().__init__()
        check_choice("task.flow", flow, FLOWS)
        self.flow = flow

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`."""
        data = bench.val.data
        if not data.videos or max(map(len, data.videos.values())) < 2:
            raise SettingError(
                f"task=temporal needs videos, and val_data={data.choice} has none: use data@val_data=frames, or "
                "data@val_data=scenes with val_data.frames=2 or more"
            )
        if len(bench.val) < len(data):
            raise SettingError("task=temporal measures whole videos: max_val_images must be null")
        first = next(iter(data.videos.values()))[0]
        if self.flow == "exact" and bench.val.cut(first).flow is None:
            raise SettingError(f"val_data={data.choice} knows no exact flow: set task.flow=estimated")

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`: of each frame but the last of its video; the seed plays no part."""
        upsampler, scale = bench.arm(model)
        for frames in bench.val.data.videos.values():
            state, before = None, None
            for i in frames:
                case = bench.val.get(i, scale=scale)
                output, state = step(upsampler, case, state, bench)
                now = _Frame(i, case, output, self._reference(i, bench))
                if before is not None:
                    for row in image_rows(bench.val.names[before.index], self._pair(before, now, bench)):
                        yield {"task": self.choice} | row
                before = now

    def _reference(self, i: int, bench: Bench) -> Tensor:
        """(1,C,Qh,Qw): the encoder's features of a larger image."""
        (fine,) = bench.upsample(Bilinear(), [bench.val.get(i, scale=bench.ceiling_scale)])
        return fine

    def _pair(self, now: "_Frame", following: "_Frame", bench: Bench) -> dict[str, float]:
        """What a frame and the next one measure."""
        case, i = now.case, now.index
        flow = case.flow
        if self.flow == "estimated":
            flow = bench.memory.get((self, i), lambda: estimated_flow(case.rgb, following.case.rgb), lambda t: t.nbytes)
        low = bench.val.get(i).features[0].float()  # (1,C,h,w); also where `case` is a ceiling's
        variance = (low - low.mean((2, 3), keepdim=True)).square().sum(1).mean().item()
        if same_everywhere(low):
            raise EvaluationError(f"image {case.name}: its features are the same everywhere, so the error has no unit")
        ours, reference = now.output, now.reference
        change = F.cosine_similarity(ours, following.output)  # (1,Qh,Qw)
        wanted = F.cosine_similarity(reference, following.reference)
        measured = {"change_error": (change - wanted).abs().mean().item()}
        error, visible = warping_error(ours, following.output, on_grid(flow.to(ours.device), bench.sizes.output))
        if visible.any():
            measured["warping_error"] = error[visible].mean().item() / variance
        measured["reference_cosine"] = F.cosine_similarity(ours, reference).mean().item()
        grid = tuple(low.shape[-2:])
        if all(cells < side for cells, side in zip(grid, bench.sizes.output, strict=True)):
            found = agreement(detail(ours.double(), grid), detail(reference.double(), grid))
            measured |= {"reference_detail": found["correlation"]} if found else {}
        return {name: measured[name] for name in MEASURED if name in measured}


@dataclass(frozen=True)
class _Frame:
    """A frame that was upsampled."""

    index: int
    case: EncodedImage
    output: Tensor
    """(1,C,Qh,Qw)."""
    reference: Tensor
    """(1,C,Qh,Qw)."""


@torch.no_grad()
def step(model: nn.Module, case: EncodedImage, state: object | None, bench: Bench) -> tuple[Tensor, object | None]:
    """(1,C,Qh,Qw) features of the next frame, and the state of a model that has one.

    Raises:
        EvaluationError: as `Bench.upsample`.
    """
    guidance, features, size = bench.guidance(case), case.features[0].float(), bench.sizes.output
    if isinstance(model, core.AnyUp):
        output, state = model(guidance, features, size, state=state, return_state=True)
    else:
        output = model(guidance, features, size)
    return checked(output, features, size, [case]), state


def warping_error(ours: Tensor, following: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Squared difference between features and those of the next frame, fetched bilinearly along the flow.

    Args:
        ours, following: (1,C,Qh,Qw). flow: (1,2,Qh,Qw) in cells of this grid (x, y), NaN where hidden.

    Returns:
        (Qh,Qw) error, and (Qh,Qw) bool, where it means something: visible, and within the next frame.
    """
    fetched = warp(following, flow)
    return (ours - fetched).square().sum(1)[0], inside(flow)[0, 0]


def on_grid(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """(1,2,H,W) in pixels -> (1,2,*size) in cells of that grid; of the nearest pixel."""
    rows, columns = flow.shape[-2:]
    if (rows, columns) == tuple(size):
        return flow
    scale = flow.new_tensor([size[1] / columns, size[0] / rows]).view(2, 1, 1)
    return F.interpolate(flow, size, mode="nearest-exact") * scale


def estimated_flow(frame: Tensor, following: Tensor) -> Tensor:
    """(1,3,H,W) RGB each -> (1,2,H,W) displacement in pixels (x, y), NaN where forward and backward flow disagree.

    The check is that of Sundaram, Brox & Keutzer (ECCV 2010), equation 5.
    """
    there, back = tvl1(frame.float(), following.float()), tvl1(following.float(), frame.float())  # (1,2,H,W)
    return torch.where(round_trip(there, back) <= 1, there, torch.nan)
