"""`task=propagation`: whether features find the same objects again in the later frames of a video."""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import IGNORE
from experiments.measuring.bench import Bench, Ceiling, EvaluationError, Size
from experiments.measuring.task import Task, register_task
from experiments.measuring.tasks.temporal import step
from experiments.settings import SettingError, check_count
from experiments.statistics.scores import Measure, image_rows, register_measures

BOUND = 0.008
"""Of the image's diagonal: how far boundaries may lie apart, as DAVIS measures it."""
_MAX_PAIRS = 2**23
"""Pairs of cells that are compared at once."""

register_measures(
    {
        "j_and_f": Measure(+1, title="J&F"),
        "region_j": Measure(+1, title="region J"),
        "contour_f": Measure(+1, title="contour F"),
    }
)


@register_task("propagation")
class Propagation(Task):
    """Label propagation: the first frame's labels are carried to the later frames by the similarity of features.

    Jabri, Owens & Efros (NeurIPS 2020) and Caron et al. (ICCV 2021) on DAVIS: each cell takes the mean label of its
    `topk` most similar cells in the first frame and the `context` frames before, weighted by the softmax of cosine /
    temperature. They search a radius in cells. Here it is in pixels, so that finer features search the same region. A
    video model is called frame by frame with its state.

    Args:
        radius: pixels of `image_size`, in rows and in columns, within which a cell looks for similar ones.
        topk: cells that give their labels.
        context: previous frames that are searched besides the first one.
        temperature: of the softmax.

    Raises:
        SettingError: a value out of its range.
    """

    def __init__(self, radius: float = 48.0, topk: int = 5, context: int = 7, temperature: float = 0.1):
        super().__init__()
        for name, value in (("radius", radius), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise SettingError(f"task.{name} must be above 0 and finite, got {value}")
        check_count("task.topk", topk)
        check_count("task.context", context, 0)
        self.radius, self.topk, self.context, self.temperature = radius, topk, context, temperature

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`."""
        data, ways_out = bench.val.data, "use data@val_data=davis2017, or data@val_data=scenes val_data.frames=8"
        if not data.videos or max(map(len, data.videos.values())) < 2:
            raise SettingError(f"task=propagation needs videos, and val_data={data.choice} has none: {ways_out}")
        if not data.classes:
            raise SettingError(f"task=propagation needs labels, and val_data={data.choice} has none: {ways_out}")
        if len(bench.val) < len(data):
            raise SettingError("task=propagation measures whole videos: max_val_images must be null")
        if min(radius_in_cells(self.radius, bench.sizes.image, bench.sizes.output)) < 1:
            least = max(side / cells for side, cells in zip(bench.sizes.image, bench.sizes.output, strict=True))
            raise SettingError(
                f"task.radius={self.radius} pixels is less than a cell of the features: set at least "
                f"{math.ceil(least)}, or a larger output_size"
            )

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`: of each frame but the first of its video; the seed plays no part."""
        for video, frames in bench.val.data.videos.items():
            first = _labels(frames[0], bench)
            present = first.unique()
            present = present[present != IGNORE]  # (K,)
            objects = present[present != 0] if bench.val.data.classes[0] == "background" else present
            if not len(objects):
                self.note(f"the first frame of video {video} has no labelled object, so the video does not count")
                continue
            for i, predicted in self._propagated(model, frames, first, present, bench):
                measured = _measures(predicted, _labels(i, bench), objects)
                for row in image_rows(bench.val.names[i], measured):
                    yield {"task": self.choice} | row

    def _propagated(
        self, model: nn.Module | Ceiling, frames: Sequence[int], first: Tensor, present: Tensor, bench: Bench
    ) -> Iterator[tuple[int, Tensor]]:
        """Each frame after the first, and (H,W) int64, the labels that come out of it."""
        upsampler, scale = bench.arm(model)
        radius, size = radius_in_cells(self.radius, bench.sizes.image, bench.sizes.output), bench.sizes.output
        hot = (first == present[:, None, None]).float()[None].to(bench.device)  # (1,K,H,W)
        start, recent, state = None, deque(maxlen=self.context), None
        for i in frames:
            output, state = step(upsampler, bench.val.get(i, scale=scale), state, bench)
            unit = F.normalize(output, dim=1)
            if start is None:
                start = unit, F.interpolate(hot, size, mode="nearest-exact")
                continue
            soft = propagate(unit, [start, *recent], radius, self.topk, self.temperature)  # (1,K,Qh,Qw)
            recent.append((unit, soft))
            large = F.interpolate(soft, bench.sizes.image, mode="bilinear")  # (1,K,H,W)
            yield i, present[large.argmax(1)[0].cpu()]


@torch.no_grad()
def propagate(
    features: Tensor, before: Sequence[tuple[Tensor, Tensor]], radius: Size, topk: int, temperature: float
) -> Tensor:
    """Labels of a frame as the weighted mean of those of the most similar cells in other frames.

    Goes over square tiles of cells, and compares each with the part of the other frames that its cells may search. What
    lies outside a cell's own window is masked.

    Args:
        features: (1,C,Qh,Qw) of length 1. before: such features, and (1,K,Qh,Qw) labels, of each frame to search.
        radius: rows and columns of cells.

    Returns:
        (1,K,Qh,Qw).
    """
    rows, columns = features.shape[-2:]
    output = torch.empty_like(before[0][1])
    side = _tile_side(radius, (rows, columns))
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            tile = (..., slice(top, top + side), slice(left, left + side))
            area, outside = _searched(top, left, side, radius, (rows, columns), features.device)
            query = features[tile].flatten(2)[0].T  # (n,C)
            cosines, labels = [], []
            for keys, values in before:
                cosine = (query @ keys[area].flatten(2)[0]).masked_fill_(outside, -math.inf)  # (n,m)
                best = cosine.topk(min(topk, cosine.shape[1]), 1)
                cosines.append(best.values)  # (n,k)
                labels.append(values[area].flatten(2)[0].T[best.indices])  # (n,k,K)
            best = torch.cat(cosines, 1)  # (n,frames*k)
            best = best.topk(min(topk, best.shape[1]), 1)
            weights = (best.values / temperature).softmax(1)  # (n,k)
            chosen = best.indices[..., None].expand(-1, -1, labels[0].shape[-1])  # (n,k,K)
            mean = (weights[..., None] * torch.cat(labels, 1).gather(1, chosen)).sum(1)  # (n,K)
            output[tile] = mean.T.reshape(output[tile].shape)
    return output


def radius_in_cells(radius: float, image: Size, output: Size) -> Size:
    """Pixels of an image of size `image` -> rows and columns of the grid `output`, rounded."""
    return int(radius * output[0] / image[0] + 0.5), int(radius * output[1] / image[1] + 0.5)


def _tile_side(radius: Size, size: Size) -> int:
    """Cells of a tile's side, so that not too many pairs are compared at once."""
    for side in (32, 16, 8, 4, 2):
        searched = (min(side + 2 * reach, cells) for reach, cells in zip(radius, size, strict=True))
        if side**2 * math.prod(searched) <= _MAX_PAIRS:
            return side
    return 1


def _searched(
    top: int, left: int, side: int, radius: Size, size: Size, device: torch.device
) -> tuple[tuple[object, slice, slice], Tensor]:
    """The part of a frame that the cells of a tile may search, and (n,m) bool, where it is outside a cell's window."""
    parts, far = [], []
    for first, reach, cells in zip((top, left), radius, size, strict=True):
        part = slice(max(0, first - reach), min(cells, first + side + reach))
        own = torch.arange(first, min(cells, first + side), device=device)
        others = torch.arange(part.start, part.stop, device=device)
        parts.append(part)
        far.append((own[:, None] - others).abs() > reach)  # (cells of the tile, cells of the part)
    outside = far[0][:, None, :, None] | far[1][None, :, None, :]  # (rows,columns,rows,columns)
    return (..., *parts), outside.flatten(2).flatten(0, 1)


def region_j(predicted: np.ndarray, true: np.ndarray) -> float:
    """(H,W) bool each -> intersection over union, 1 if both are empty (Perazzi et al., CVPR 2016)."""
    either = (predicted | true).sum()
    return float((predicted & true).sum() / either) if either else 1.0


def contour_f(predicted: np.ndarray, true: np.ndarray) -> float:
    """F of the contours of two masks, as DAVIS measures it (Perazzi et al., CVPR 2016).

    A pixel is on the contour if its right, lower or lower right neighbour is on the other side. It is found if the
    other contour has a pixel within `BOUND` of the diagonal, rounded up.

    Args:
        predicted, true: (H,W) bool.

    Returns:
        Between 0 and 1; 1 if neither has a contour, 0 if one has none.
    """
    from scipy.ndimage import distance_transform_edt

    ours, theirs = _contour(predicted), _contour(true)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    reach = math.ceil(BOUND * math.hypot(*true.shape))
    precision = (distance_transform_edt(~theirs)[ours] <= reach).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= reach).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """(H,W) bool -> bool; at the lower and right border there is only one neighbour to compare with."""
    beyond = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != beyond[:-1, 1:]) | (mask != beyond[1:, :-1]) | (mask != beyond[1:, 1:])


def _labels(i: int, bench: Bench) -> Tensor:
    """(H,W) int64, on the CPU."""
    image = bench.val.cut(i)
    if image.labels is None:
        raise EvaluationError(f"image {image.name} has no labels")
    return image.labels[0, 0].cpu().long()


def _measures(predicted: Tensor, labels: Tensor, objects: Tensor) -> dict[str, float]:
    """(H,W) int64 each -> mean J and F over the first frame's objects; nothing of a frame without known labels."""
    known = labels != IGNORE
    if not known.any():
        return {}
    masks = [[((x == one) & known).numpy() for x in (predicted, labels)] for one in objects]
    region, contour = (float(np.mean([score(*pair) for pair in masks])) for score in (region_j, contour_f))
    return {"j_and_f": (region + contour) / 2, "region_j": region, "contour_f": contour}
