"""`data=middlebury`: pairs of frames with measured or rendered flow (Baker et al., IJCV 2011)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.data.base import DataError, Sample, register_data
from experiments.data.files import IMAGES, Record
from experiments.data.labels import why
from experiments.data.video import Videos

FRAMES = ("frame10", "frame11")
_TAG = 202021.25
"""The first number of every .flo file."""
_UNKNOWN = 1e9
"""Larger displacements mean that the flow is unknown there."""


@register_data("middlebury")
class Middlebury(Videos):
    """Two frames of each sequence, and the flow from the first to the second; NaN where it is unknown.

    Args:
        path: a folder with `NAME/frame10.png`, `NAME/frame11.png` and `NAME/flow10.flo`; or the folder of the published
            archives, `other-data/NAME/frame10.png` and `other-gt-flow/NAME/flow10.flo`.

    Raises:
        DataError: files are missing, or damaged.
    """

    layout = "NAME/frame10.png, NAME/frame11.png and NAME/flow10.flo, or other-data/ and other-gt-flow/ with these"

    def __init__(self, path: str):
        root = Path(path).expanduser()
        apart = (root / "other-data").is_dir()
        images = self._folder(root, "other-data" if apart else ".")
        flows = self._folder(root, "other-gt-flow") if apart else images
        videos = {}
        for file in sorted(flows.glob("*/flow10.flo")):
            name = file.parent.name
            found = self._find(self._folder(images, name), IMAGES)
            if missing := [frame for frame in FRAMES if frame not in found]:
                raise DataError(f"data=middlebury: {images / name} lacks {' and '.join(missing)}: complete the copy")
            first, second = (Record(f"{name}/{frame}", found[frame]) for frame in FRAMES)
            videos[name] = [replace(first, flow=file), second]
        if not videos:
            raise DataError(f"data=middlebury: {root} has no flow; data.path must name a folder with {self.layout}")
        self._keep_videos(videos, {})

    def __getitem__(self, index: int) -> Sample:
        sample, file = super().__getitem__(index), self.records[index].flow
        if file is None:
            return sample
        flow = read_flow(file)
        if flow.shape[-2:] != sample.image.shape[-2:]:
            sizes = ("x".join(map(str, values.shape[-2:])) for values in (flow, sample.image))
            raise DataError("{} has {} pixels, its frame {}: one of the two was resized".format(file, *sizes))
        return replace(sample, flow=flow)


def read_flow(path: Path) -> Tensor:
    """(2,H,W) float32 displacement (x, y) in pixels from a .flo file; NaN where unknown.

    Raises:
        DataError: missing, damaged, or another kind of file.
    """
    try:
        values = path.read_bytes()
    except OSError as error:
        raise DataError(f"the flow {path} cannot be read: {why(error)}") from error
    if len(values) < 12 or np.frombuffer(values[:4], "<f4")[0] != np.float32(_TAG):
        raise DataError(f"{path} is not a .flo file: its first number is not {_TAG}")
    columns, rows = (int(side) for side in np.frombuffer(values[4:12], "<i4"))
    if min(rows, columns) < 1 or len(values) != 12 + 8 * rows * columns:
        raise DataError(f"{path} is damaged: {len(values)} bytes do not fit {rows} x {columns} pixels. Copy it again")
    flow = torch.from_numpy(np.frombuffer(values[12:], "<f4").reshape(rows, columns, 2).copy()).permute(2, 0, 1)
    known = (flow.abs() < _UNKNOWN).all(0)  # NaN fails
    return torch.where(known, flow, torch.nan).contiguous()
