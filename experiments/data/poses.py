"""Exact flow between two frames of a depth camera whose pose was recorded."""

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from experiments.data.base import DataError
from experiments.data.labels import why
from experiments.data.normals import Intrinsics

TOLERANCE = 0.02
"""A point is hidden in the other frame if its depth there differs from the recorded one by more than this fraction."""


def read_pose(path: Path) -> Tensor:
    """(4,4) float64 from a text file: takes points of the camera's frame to the world, in metres.

    Raises:
        DataError: missing, or not a rotation and a translation (7-Scenes marks lost frames by values that are not).
    """
    try:
        values = [float(word) for word in path.read_text(encoding="utf-8").split()]
    except OSError as error:
        raise DataError(f"the pose {path} cannot be read: {why(error)}") from error
    except ValueError as error:
        raise DataError(f"{path} is not a pose: {error}") from error
    if len(values) != 16:
        raise DataError(f"{path} has {len(values)} numbers: a pose is a 4x4 matrix, camera to world")
    pose = torch.tensor(values, dtype=torch.float64).view(4, 4)
    rotation, last = pose[:3, :3], pose.new_tensor([0.0, 0.0, 0.0, 1.0])
    square = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max()
    if not (
        torch.isfinite(pose).all() and square < 1e-3 and torch.linalg.det(rotation) > 0 and (pose[3] == last).all()
    ):
        raise DataError(f"{path} is no rotation and translation: remove the frame, its camera was lost")
    return pose


def flow_from_depth(depth: Tensor, following: Tensor, camera: Intrinsics, motion: Tensor) -> Tensor:
    """Displacement of each pixel's point to the next frame, if nothing but the camera moves.

    Args:
        depth, following: (H,W) metres along the optical axis of both frames, 0 where unknown.
        camera: of both frames.
        motion: (4,4) takes points of the first camera's frame to the second's.

    Returns:
        (2,H,W) float32 (x, y) in pixels; NaN where the depth is unknown, or the point is hidden or outside the next
        frame. A point counts as hidden if its depth and the next frame's differ by more than `TOLERANCE`.
    """
    rows, columns = depth.shape
    z = depth.double().numpy()
    y, x = np.mgrid[:rows, :columns].astype(np.float64)  # the centre of the first pixel is (0, 0)
    points = np.stack([(x - camera.cx) * z / camera.fx, (y - camera.cy) * z / camera.fy, z])  # (3,H,W)
    rotation, shift = motion[:3, :3].numpy(), motion[:3, 3].numpy()
    moved = np.tensordot(rotation, points, 1) + shift[:, None, None]  # (3,H,W)
    ahead = (z > 0) & (moved[2] > 0)
    behind = np.where(ahead, moved[2], 1)
    there = moved[0] / behind * camera.fx + camera.cx, moved[1] / behind * camera.fy + camera.cy
    inside = (there[0] >= -0.5) & (there[0] <= columns - 0.5) & (there[1] >= -0.5) & (there[1] <= rows - 0.5)
    seen = map_coordinates(following.double().numpy(), there[::-1], order=0, mode="nearest")  # (H,W) nearest pixel
    visible = ahead & inside & (abs(seen - moved[2]) <= TOLERANCE * moved[2])  # unknown depth (0) fails
    return torch.from_numpy(np.where(visible, np.stack(there) - (x, y), np.nan)).float()
