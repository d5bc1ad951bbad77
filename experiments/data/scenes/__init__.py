"""`data=scenes`: ray-cast scenes of textured solids in rooms and yards, with exact annotations. Needs no download.

`composition` and `bodies` draw a random scene. `world` defines a scene, `geometry` and `textures` its parts. `render`
casts the rays.
"""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from experiments.data.base import DataError, DataSet, Sample, register_data
from experiments.data.scenes import render
from experiments.data.scenes.composition import compose
from experiments.data.scenes.geometry import Pose
from experiments.data.scenes.world import CLASSES, Scene

_FORMAT = 1
"""Must be increased with every change of the samples."""
_SPLITS = ("train", "val", "test")


@register_data("scenes")
class Scenes(DataSet):
    """Procedural scenes: sample i depends only on the settings and i, bit for bit on one machine.

    Labels, depth and normals are those of the surface at the centre of each pixel. The sky has depth 0 and normal 0,
    which mean unknown, and the flow of points at infinity. Flow is NaN where the point is occluded or outside the image
    in the next frame. The scene does not depend on `size`: images of one proportion show the same at any resolution,
    and the longer side always spans the same angle.

    Args:
        size: rows and columns of the images.
        num: number of scenes; with `frames` > 1 each is a video, and there are num * frames samples.
        seed: of all random numbers.
        split: train, val or test: independent scenes.
        frames: frames of each video; 1: single images, which are the first frames of the videos, without flow.
        num_objects: largest number of bodies on the floor.
        supersampling: rays per pixel along each axis for the image; labels have one, at the centre.

    Raises:
        DataError: a setting is out of range.
    """

    classes = CLASSES

    def __init__(
        self,
        size: list[int] = [224, 224],  # noqa: B006  read only; Hydra wants a list
        num: int = 1000,
        seed: int = 0,
        split: str = "train",
        frames: int = 1,
        num_objects: int = 14,
        supersampling: int = 2,
    ):
        if len(size) != 2 or min(size) < 16:
            raise DataError(f"data=scenes: size={list(size)} must be [rows, columns], each at least 16")
        for name, value, least in (
            ("num", num, 1),
            ("seed", seed, 0),
            ("frames", frames, 1),
            ("num_objects", num_objects, 0),
            ("supersampling", supersampling, 1),
        ):
            if value < least:
                raise DataError(f"data=scenes: {name}={value} must be at least {least}")
        if split not in _SPLITS:
            raise DataError(f"data=scenes has no split {split!r}; there are: {', '.join(_SPLITS)}")
        self.size, self.seed, self.split, self.frames = tuple(size), seed, split, frames
        self.num_objects, self.supersampling = num_objects, supersampling
        scenes = [f"scenes/{split}/{number:06d}" for number in range(num)]
        if frames == 1:
            self.names = scenes
        else:
            self.names = [f"{scene}/{frame:04d}" for scene in scenes for frame in range(frames)]
            self.videos = {scene: range(i * frames, (i + 1) * frames) for i, scene in enumerate(scenes)}
        settings = [_FORMAT, self.size, num, seed, split, frames, num_objects, supersampling]
        self.fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        scene, number = self._locate(index)
        frame = scene.at(number)
        rays = render.camera_rays(self.size, scene.focal, (0.5, 0.5), np.float64)
        seen = render.look(frame, rays)
        flow = None
        if number + 1 < self.frames:
            flow = self._tensor(render.flow(frame, scene.at(number + 1), seen, rays, self.size))
        return Sample(
            self.names[index],
            torch.from_numpy(render.colours(frame, self.size, self.supersampling)),
            torch.from_numpy(render.labels(frame, seen).reshape(self.size)),
            self._tensor(np.where(np.isinf(seen.depth), 0, seen.depth)),
            self._tensor(frame.camera.rotate_back(render.normals(frame, seen))),
            flow,
        )

    def camera(self, index: int) -> tuple[Tensor, Tensor]:
        """The camera of a sample, in float64.

        Returns:
            (3,3) intrinsic matrix in pixels, pixel (row i, column j) having its centre at x = j + 0.5, y = i + 0.5; and
            (4,4) pose, which takes points of the camera's frame to the world (metres, y down, the floor at y = 0).
        """
        scene, number = self._locate(index)
        pose: Pose = scene.at(number).camera
        focal = scene.focal * max(self.size)
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3], matrix[:3, 3] = torch.from_numpy(pose.rotation), torch.from_numpy(pose.translation)
        intrinsics = torch.tensor([[focal, 0, self.size[1] / 2], [0, focal, self.size[0] / 2], [0, 0, 1]])
        return intrinsics.double(), matrix

    def scene(self, number: int) -> Scene:
        """The description of scene (or video) `number`, from which every frame is rendered."""
        stream = (_FORMAT, self.seed, _SPLITS.index(self.split), number)
        return compose(np.random.default_rng(stream), self.num_objects)

    def _locate(self, index: int) -> tuple[Scene, int]:
        """The scene of a sample and the number of its frame."""
        number, frame = divmod(range(len(self.names))[index], self.frames)
        return self.scene(number), frame

    def _tensor(self, values: np.ndarray) -> Tensor:
        """(H*W,) or (C,H*W) float64 -> (H,W) or (C,H,W) float32."""
        return torch.from_numpy(values.astype(np.float32).reshape(*values.shape[:-1], *self.size))
