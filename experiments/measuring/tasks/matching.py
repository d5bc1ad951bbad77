"""`task=matching`: whether features find the same place again in another view, under a warp that is known exactly.

No labels are needed. Smooth features do well here, sharp ones make neighbours alike (docs/evidence.md): read it beside
detail.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.points import pixel_centres
from core.streams import generator
from experiments.data.image_files import resized
from experiments.measuring.bench import Bench, Ceiling, Size
from experiments.measuring.task import Task, register_task
from experiments.measuring.tasks.temporal import on_grid, step
from experiments.settings import SettingError, check_choice
from experiments.statistics.scores import Measure, image_rows, register_measures

Place = Callable[[Tensor], Tensor]
"""(...,2) points, (row, column) in the unit square -> (...,2)."""
WARPS = ("homography", "tps", "flow")
WITHIN = (1, 2, 4, 8)
"""Distances in pixels of the image."""
TIE = 1e-6
"""Cosines that differ by less are equal, up to rounding."""
_AT_ONCE = 2**22
"""Similarities held at once."""

register_measures(
    {"matching_auc": Measure(+1, title="matching, area under the curve")}
    | {f"within_{d}px": Measure(+1, "of the points", f"matched within {d} px") for d in WITHIN}
)


@dataclass(frozen=True)
class Pair:
    """Upsampled features of two views of one scene."""

    name: str
    """Of the image that is asked."""
    asked: Tensor
    """(1,C,Qh,Qw)."""
    searched: Tensor
    """(1,C,Qh,Qw)."""
    places: Tensor
    """(Qh,Qw,2): where each cell of the asked view lies in the searched one, (row, column) in the unit square; NaN
    where it is hidden."""


@register_task("matching")
class Matching(Task):
    """Each of some points of one view is looked for among all cells of another, by the cosine of upsampled features.

    Measures: the share of points whose nearest neighbour lies within 1, 2, 4, 8 pixels (of `image_size`) of the true
    place, and the area under that curve from 0 to 8 pixels. Cells that are equally similar share the point. A video
    model is called frame by frame with its state.

    Args:
        warp: `homography` or `tps`, a thin-plate spline (Bookstein 1989), of each photograph, drawn by its name and so
            the same for all arms; `flow`: a frame and the next one, with the exact flow of data=scenes, or of data=rgbd
            with data.poses.
        strength: how far corners, or the spline's control points, move, as a share of the image's side.
        num_points: points of each pair, spread evenly.

    Raises:
        SettingError: a value out of its range.
    """

    def __init__(self, warp: str = "homography", strength: float = 0.15, num_points: int = 400):
        super().__init__()
        check_choice("task.warp", warp, WARPS)
        if not 0 < strength < 0.5:
            raise SettingError(f"task.strength must lie between 0 and 0.5, got {strength}")
        if num_points < 1:
            raise SettingError(f"task.num_points must be at least 1, got {num_points}")
        self.warp, self.strength, self.num_points = warp, strength, num_points

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`; for `flow`, a data set with exact flow."""
        if self.warp != "flow":
            return
        data = bench.val.data
        videos = [frames for frames in (data.videos or {}).values() if len(frames) > 1]
        if not videos or len(bench.val) < len(data) or bench.val.cut(videos[0][0]).flow is None:
            raise SettingError(
                f"task.warp=flow needs videos with exact flow, all of them, and val_data={data.choice} gives none: use "
                "data@val_data=scenes val_data.frames=2, or data@val_data=rgbd val_data.poses=true, and "
                "max_val_images=null; or task.warp=homography"
            )

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`: of each photograph, or of each frame but the last; the seed plays no part."""
        upsampler, scale = bench.arm(model)
        pairs = self._videos if self.warp == "flow" else self._photographs
        for pair in pairs(upsampler, scale, bench):
            for row in image_rows(pair.name, self._measures(pair, bench.sizes.image)):
                yield {"task": f"matching/{self.warp}"} | row

    def _photographs(self, model: nn.Module, scale: int, bench: Bench) -> Iterator[Pair]:
        """A photograph warped, and as it is."""
        for i in range(len(bench.val)):
            searched = bench.val.get(i, scale=scale)
            of_pixels = pixel_centres(tuple(searched.rgb.shape[-2:]), searched.rgb.float())  # (H,W,2)
            place = self._place(searched.name)
            rgb = fetched(searched.rgb.float(), place(of_pixels)).clamp(0, 1)  # (1,3,H,W)
            size = tuple(scale * side for side in bench.sizes.encoder)
            features = bench.memory.get(
                (self, i, scale),
                lambda rgb=rgb, case=searched, size=size: bench.encoder.layers(resized(rgb, size), case.name),
                lambda tensors: sum(t.nbytes for t in tensors),
            )
            asked = replace(searched, rgb=rgb.half(), features=features)
            outputs = [bench.upsample(model, [case])[0] for case in (asked, searched)]
            yield Pair(searched.name, *outputs, place(pixel_centres(bench.sizes.output, rgb)))

    def _videos(self, model: nn.Module, scale: int, bench: Bench) -> Iterator[Pair]:
        """A frame, and the next one."""
        height, width = bench.sizes.output
        for frames in bench.val.data.videos.values():
            state, before = None, None
            for i in frames:
                case = bench.val.get(i, scale=scale)
                output, state = step(model, case, state, bench)
                if before is not None:
                    flow = on_grid(before[0].flow, bench.sizes.output)[0].permute(1, 2, 0)  # (Qh,Qw,2): x, y in cells
                    moved = flow.flip(-1) / flow.new_tensor([height, width])
                    places = pixel_centres(bench.sizes.output, flow) + moved
                    yield Pair(before[0].name, before[1], output, places)
                before = case, output

    def _place(self, name: str) -> Place:
        """(...,2) points of the warped photograph -> (...,2) where they come from, in unit squares."""
        drawn = generator("matching", self.warp, name)
        return (homography if self.warp == "homography" else thin_plate_spline)(self.strength, drawn)

    def _measures(self, pair: Pair, image: Size) -> dict[str, tuple[float, float]]:
        """The measures of a pair, each as a sum over points and their number; empty if no point is visible."""
        places = pair.places.to(pair.asked).flatten(0, 1)  # (N,2)
        asked, searched = (F.normalize(x[0].flatten(1).float(), dim=0) for x in (pair.asked, pair.searched))  # (C,N)
        inside = ((places >= 0) & (places <= 1)).all(-1).nonzero()[:, 0]  # NaN fails
        if not len(inside):
            return {}
        count = min(self.num_points, len(inside))
        chosen = inside[torch.linspace(0, len(inside) - 1, count, device=inside.device).round().long()]  # (P,)
        pixels = places.new_tensor(image)
        centres = pixel_centres(tuple(pair.searched.shape[-2:]), places).flatten(0, 1) * pixels  # (N,2)
        sums: Counter[str] = Counter()
        for some in chosen.split(max(1, _AT_ONCE // len(centres))):
            share = shares(asked[:, some].T @ searched)  # (p,N)
            distances = torch.cdist(places[some] * pixels, centres, compute_mode="donot_use_mm_for_euclid_dist")
            sums.update(curve(distances, share))
        return {name: (total, float(count)) for name, total in sums.items()}


def shares(cosines: Tensor) -> Tensor:
    """(p,N) -> (p,N): 1 for the cell with the largest cosine to each point; cells equal up to `TIE` share it."""
    equal = (cosines >= cosines.amax(1, keepdim=True) - TIE).float()
    return equal / equal.sum(1, keepdim=True)


def curve(distances: Tensor, share: Tensor) -> dict[str, float]:
    """(p,N) distances in pixels, (p,N) shares of each point -> the measures, summed over points."""
    area = (share * (1 - distances / WITHIN[-1]).clamp(min=0)).sum().item()
    return {"matching_auc": area} | {f"within_{d}px": share[distances <= d].sum().item() for d in WITHIN}


def fetched(image: Tensor, places: Tensor) -> Tensor:
    """(1,3,H,W), (h,w,2) places in the unit square -> (1,3,h,w): the image there, bilinear."""
    grid = 2 * places.flip(-1) - 1  # x, y
    return F.grid_sample(image, grid[None].to(image), padding_mode="border", align_corners=False)


def homography(strength: float, drawn: torch.Generator) -> Place:
    """A map of the unit square onto a quadrilateral in it, whose corners lie up to `strength` inside."""
    corners = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    inward = strength * torch.rand(4, 2, generator=drawn).double().numpy()
    targets = corners + np.where(corners == 0, inward, -inward)
    rows = []
    for (r, c), (u, v) in zip(corners, targets, strict=True):
        rows += [[r, c, 1, 0, 0, 0, -u * r, -u * c], [0, 0, 0, r, c, 1, -v * r, -v * c]]
    matrix = torch.from_numpy(np.append(np.linalg.solve(np.array(rows), targets.flatten()), 1.0).reshape(3, 3))

    def place(points: Tensor) -> Tensor:
        lifted = torch.cat([points, torch.ones_like(points[..., :1])], -1).double() @ matrix.T.to(points.device)
        return (lifted[..., :2] / lifted[..., 2:]).to(points.dtype)

    return place


def thin_plate_spline(strength: float, drawn: torch.Generator) -> Place:
    """A map of the unit square whose 4 x 4 control points move by up to a third of `strength`, more would fold it."""
    from scipy.interpolate import RBFInterpolator

    axis = np.linspace(0, 1, 4)
    control = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    moved = control + strength / 3 * (2 * torch.rand(16, 2, generator=drawn).double().numpy() - 1)
    spline = RBFInterpolator(control, moved, kernel="thin_plate_spline")

    def place(points: Tensor) -> Tensor:
        found = spline(points.reshape(-1, 2).double().cpu().numpy())
        return torch.from_numpy(found).to(points).reshape(points.shape)

    return place
