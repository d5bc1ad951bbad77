"""`data=rgbd`: images of depth cameras, with metric depth; if the camera and its poses are known, normals and flow."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.data.base import DataError, Sample, register_data
from experiments.data.files import IMAGES, PNG, FileSet
from experiments.data.labels import read_ids
from experiments.data.normals import Intrinsics, normals_from_depth
from experiments.data.poses import flow_from_depth, read_pose


def read_depth(path: Path, depth_scale: float) -> Tensor:
    """(H,W) float32 metres from a 16-bit PNG with `depth_scale` units per metre; 0 and 65535 (unknown) become 0.

    Raises:
        DataError: damaged, or not 16-bit.
    """
    values = read_ids(path)
    if values.dtype.itemsize < 2:
        raise DataError(f"{path} has 8 bits per pixel: this is a picture of depth; expected are 16-bit numbers")
    values = values.astype(np.int64)
    return torch.from_numpy(np.where(values == 65535, 0, values) / depth_scale).float()


def check_depth_scale(depth_scale: float) -> float:
    """Returns a positive number unchanged. Raises DataError for anything else."""
    if not (math.isfinite(depth_scale) and depth_scale > 0):
        raise DataError(f"data.depth_scale={depth_scale}: give the units per metre, such as 1000 for millimetres")
    return depth_scale


TEXT = frozenset((".txt",))


@register_data("rgbd")
class RGBD(FileSet):
    """Folders of colour and depth: `NAME.color.jpg|png` beside `NAME.depth.png` (7-Scenes), or `rgb/` and `depth/`
    with equal names.

    Normals are computed from depth if the intrinsics are given. These must be of the camera that colour and depth are
    aligned to. They are never taken from a file in the folder by themselves, because published depth is often
    reprojected into another camera.

    Args:
        path: the folder; `NAME.color` files may lie in folders inside it.
        depth_scale: units per metre in the depth files (7-Scenes and most: 1000; TUM: 5000).
        intrinsics: `[fx, fy, cx, cy]` in pixels.
        intrinsics_file: instead of `intrinsics`, a text file with these four numbers or a camera matrix; relative to
            `path`, or absolute.
        normal_window: side in pixels of the window that a normal is fitted to.
        poses: the images of each folder are the frames of a video, and `NAME.pose.txt` (or `poses/NAME.txt`) has the
            pose of each, camera to world. Samples then have the flow to the next frame, NaN where a point is hidden or
            its depth is unknown. It is as exact as depth and poses are, and nothing but the camera may move.

    Raises:
        DataError: folders or files are missing or do not belong together, or a setting makes no sense.
    """

    layout = "NAME.color.jpg (or .png) and NAME.depth.png, or rgb/NAME.jpg (or .png) and depth/NAME.png"

    def __init__(
        self,
        path: str,
        depth_scale: float = 1000.0,
        intrinsics: list[float] | None = None,
        intrinsics_file: str | None = None,
        normal_window: int = 7,
        poses: bool = False,
    ):
        root = Path(path).expanduser()
        self.depth_scale = check_depth_scale(depth_scale)
        if intrinsics is not None and intrinsics_file is not None:
            raise DataError("data=rgbd: both data.intrinsics and data.intrinsics_file are given: keep one")
        self.camera = None if intrinsics is None else Intrinsics.of(intrinsics, "data.intrinsics")
        if intrinsics_file is not None:
            self.camera = Intrinsics.read(root / intrinsics_file)
        if normal_window < 3 or normal_window % 2 == 0:
            raise DataError(f"data.normal_window={normal_window}: give an odd number of pixels, 3 or more")
        self.normal_window = normal_window
        if poses and self.camera is None:
            raise DataError("data=rgbd: data.poses needs the camera: give data.intrinsics or data.intrinsics_file")
        if (root / "rgb").is_dir():
            images = self._find(self._folder(root, "rgb"), IMAGES)
            parts = {"depth": self._find(self._folder(root, "depth"), PNG)}
            if poses:
                parts["pose"] = self._find(self._folder(root, "poses"), TEXT)
        else:
            images = self._find(self._folder(root, "."), IMAGES, ".color", nested=True)
            parts = {"depth": self._find(self._folder(root, "."), PNG, ".depth", nested=True)}
            if poses:
                parts["pose"] = self._find(self._folder(root, "."), TEXT, ".pose", nested=True)
        settings = {"depth_scale": depth_scale, "camera": self.camera, "normal_window": normal_window}
        self._keep(self._match(images, parts), settings)
        if poses:
            self.videos = {}
            for i, name in enumerate(self.names):
                inside = Path(name).parent.as_posix()
                self.videos.setdefault(root.resolve().name if inside == "." else inside, []).append(i)
            self._next = {i: j for frames in self.videos.values() for i, j in pairwise(frames)}

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if self.camera is None:
            return sample
        normals = normals_from_depth(sample.depth, self.camera, self.normal_window)
        following = None if self.videos is None else self._next.get(range(len(self.records))[index])
        flow = None if following is None else self._flow(index, following, sample.depth)
        return replace(sample, normals=normals, flow=flow)

    def _flow(self, index: int, following: int, depth: Tensor) -> Tensor:
        """(2,H,W) from one sample to another."""
        first, second = self.records[index], self.records[following]
        there = self._read_depth(second.depth)
        if there.shape != depth.shape:
            raise DataError(f"{second.depth} has another size than {first.depth}: the frames of a video have one size")
        motion = torch.linalg.inv(read_pose(second.pose)) @ read_pose(first.pose)
        return flow_from_depth(depth, there, self.camera, motion)

    def _read_depth(self, path: Path) -> Tensor:
        return read_depth(path, self.depth_scale)
