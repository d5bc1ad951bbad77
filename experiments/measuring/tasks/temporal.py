"""`task=temporal`: whether the features of a moving surface stay the same from frame to frame."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from experiments.measuring.bench import Bench, Ceiling, EncodedImage, EvaluationError, checked
from experiments.measuring.metrics import same_everywhere
from experiments.measuring.task import Task, register_task
from experiments.settings import SettingError, check_choice
from experiments.statistics.scores import Measure, image_rows, register_measures

FLOWS = ("exact", "estimated")


register_measures({"warping_error": Measure(-1, "of the features' variance", "warping error")})


@register_task("temporal")
class TemporalConsistency(Task):
    """Warping error: each frame's features against the next frame's, fetched from where the flow says they went.

    Squared difference, averaged over the positions that are visible in both frames, divided by the variance of the
    frame's low-resolution features (the same unit for all arms). Blurring lowers it too: read it beside fidelity. A
    video model is called frame by frame with its state.

    Args:
        flow: `exact` as the data set knows it (data=scenes with frames > 1), or `estimated` between the frames by
            TV-L1 (Zach, Pock & Bischof 2007; scikit-image) with a forward-backward check of what is visible.

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
                if before is not None:
                    measured = self._error(*before, case, output, bench)
                    for row in image_rows(bench.val.names[before[0]], measured):
                        yield {"task": self.choice} | row
                before = i, case, output

    def _error(
        self, i: int, case: EncodedImage, ours: Tensor, next_case: EncodedImage, following: Tensor, bench: Bench
    ) -> dict[str, float]:
        flow = case.flow
        if self.flow == "estimated":
            flow = bench.memory.get((self, i), lambda: estimated_flow(case.rgb, next_case.rgb), lambda t: t.nbytes)
        low = bench.val.get(i).features[0].float()  # (1,C,h,w); also where `case` is a ceiling's
        variance = (low - low.mean((2, 3), keepdim=True)).square().sum(1).mean().item()
        if same_everywhere(low):
            raise EvaluationError(f"image {case.name}: its features are the same everywhere, so the error has no unit")
        error, visible = warping_error(ours, following, on_grid(flow.to(ours.device), bench.sizes.output))
        return {"warping_error": error[visible].mean().item() / variance} if visible.any() else {}


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
    rows, columns = ours.shape[-2:]
    place = flow[0] + torch.stack(_centres(rows, columns, flow))  # (2,Qh,Qw) x, y of what is fetched
    limits = place.new_tensor([columns, rows]).view(2, 1, 1)
    visible = ((place >= 0) & (place <= limits)).all(0)  # NaN fails
    grid = (2 * place.nan_to_num() / limits - 1).permute(1, 2, 0)[None]  # (1,Qh,Qw,2)
    fetched = F.grid_sample(following, grid, padding_mode="border", align_corners=False)  # (1,C,Qh,Qw)
    return (ours - fetched).square().sum(1)[0], visible


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
    there, back = _tvl1(frame, following), _tvl1(following, frame)  # (1,2,H,W)
    rows, columns = there.shape[-2:]
    place = there[0] + torch.stack(_centres(rows, columns, there))
    limits = place.new_tensor([columns, rows]).view(2, 1, 1)
    returned = F.grid_sample(
        back, (2 * place / limits - 1).permute(1, 2, 0)[None], padding_mode="border", align_corners=False
    )  # (1,2,H,W)
    miss, length = (there + returned).square().sum(1), there.square().sum(1) + returned.square().sum(1)  # (1,H,W)
    return torch.where(miss[:, None] <= 0.01 * length[:, None] + 0.5, there, torch.nan)


def _tvl1(frame: Tensor, following: Tensor) -> Tensor:
    from skimage.color import rgb2gray
    from skimage.registration import optical_flow_tvl1

    grey = [rgb2gray(image[0].float().cpu().permute(1, 2, 0).numpy()) for image in (frame, following)]
    down, across = optical_flow_tvl1(*grey)
    return torch.stack([torch.from_numpy(across), torch.from_numpy(down)])[None].float()


def _centres(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (rows,columns) of the cells' centres."""
    y, x = torch.meshgrid(*(torch.arange(n, device=like.device) + 0.5 for n in (rows, columns)), indexing="ij")
    return x, y
