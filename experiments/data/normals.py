"""Surface normals from depth, and the pinhole camera needed for them."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from experiments.data.base import DataError
from experiments.data.labels import read_png

JUMP = 0.01
"""A window whose inverse depths deviate from a plane by more than this fraction (rms) shows more than one surface."""


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera: focal lengths and principal point, in pixels, the centre of the first pixel being (0, 0)."""

    fx: float
    fy: float
    cx: float
    cy: float

    @classmethod
    def of(cls, values: list[float], where: str) -> "Intrinsics":
        """From `[fx, fy, cx, cy]`.

        Raises:
            DataError: not four finite numbers with positive focal lengths; begins with `where`.
        """
        if len(values) != 4 or not all(map(math.isfinite, values)) or min(values[:2]) <= 0:
            raise DataError(f"{where}: {values} is not fx, fy, cx, cy in pixels (finite, fx > 0, fy > 0)")
        return cls(*map(float, values))

    @classmethod
    def read(cls, path: Path) -> "Intrinsics":
        """From a text file: `fx fy cx cy`, or a 3x3 or 4x4 camera matrix; `#` begins a comment.

        Raises:
            DataError: missing, or of another form.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            values = [float(word) for line in lines for word in line.partition("#")[0].replace(",", " ").split()]
        except OSError as error:
            raise DataError(f"the file of intrinsics {path} cannot be read: {error.strerror.lower()}") from error
        except ValueError as error:
            raise DataError(f"{path} is not a file of intrinsics (fx fy cx cy, or a camera matrix): {error}") from error
        if len(values) in (9, 16):
            side = math.isqrt(len(values))
            matrix = np.array(values).reshape(side, side)
            rest = matrix - np.diag(np.diag(matrix))
            rest[:2, 2] = 0
            if rest.any() or matrix[2, 2] != 1:
                raise DataError(f"{path} is not a camera matrix without skew, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
            values = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        return cls.of(values, str(path))


def decode_normals(path: Path, signs: list[int]) -> Tensor:
    """(3,H,W) float32 unit normals of an RGB PNG that stores (n + 1) / 2 * 255; 0 where a pixel is not a unit vector.

    Args:
        signs: three numbers, 1 or -1, that turn the file's axes into x right, y down, z forward.

    Raises:
        DataError: damaged, not RGB, or most normals would point away from the camera.
    """
    values, mode = read_png(path)
    if mode != "RGB":
        raise DataError(f"{path} has the mode {mode}: normals are expected as 8-bit RGB, (n + 1) / 2 * 255")
    normals = (values / 127.5 - 1) * signs  # (H,W,3)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    known = abs(length - 1) < 0.1
    normals = np.where(known, normals / np.where(known, length, 1), 0)
    if (normals[..., 2] > 0).sum() > (normals[..., 2] < 0).sum():
        raise DataError(
            f"{path}: most normals point away from the camera (z forward): set data.normal_signs, which is [1, -1, -1] "
            "for files with y up and z towards the camera"
        )
    return torch.from_numpy(normals).permute(2, 0, 1).float().contiguous()  # (3,H,W)


def normals_from_depth(depth: Tensor, camera: Intrinsics, window: int = 7) -> Tensor:
    """(H,W) metres -> (3,H,W) float32 unit normals towards the camera (x right, y down, z forward), 0 where unknown.

    The inverse depth of a plane is linear in the pixel coordinates. It is fitted by least squares to the `window` x
    `window` pixels around each pixel, so planes are exact and sensor noise is averaged. A normal is unknown where the
    pixel has no depth, where less than a third of its window is known, or at a jump of depth (`JUMP`).

    Raises:
        ValueError: `window` is not an odd number of at least 3.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window={window}: give an odd number of pixels, 3 or more")
    z = depth.double().numpy()
    known = (z > 0).astype(np.float64)  # (H,W)
    inverse = np.divide(1, z, out=np.zeros_like(z), where=z > 0)
    one = np.ones(window)
    i = np.arange(window) - window // 2.0

    def over(values: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(values, across, axis=1, mode="constant"), down, axis=0, mode="constant")

    n, sx, sy = over(known, one, one), over(known, i, one), over(known, one, i)
    sxx, sxy, syy = over(known, i * i, one), over(known, i, i), over(known, one, i * i)
    d, dx, dy = over(inverse, one, one), over(inverse, i, one), over(inverse, one, i)
    enough = (known > 0) & (n >= max(window + 1, window * window / 3))
    system = np.stack([n, sx, sy, sx, sxx, sxy, sy, sxy, syy], -1).reshape(*z.shape, 3, 3)[enough]  # (K,3,3)
    right = np.stack([d, dx, dy], -1)[enough]  # (K,3)
    level, slope_x, slope_y = (fit := np.linalg.solve(system, right[..., None])[..., 0]).T  # (K,) each
    squares = over(inverse * inverse, one, one)[enough] - (fit * right).sum(-1)  # (K,) squared residuals
    smooth = (level > 0) & (squares <= n[enough] * (JUMP * level) ** 2)
    rows, columns = np.nonzero(enough)
    across, down = slope_x * camera.fx, slope_y * camera.fy
    forward = level - slope_x * (columns - camera.cx) - slope_y * (rows - camera.cy)
    normals = -np.stack([across, down, forward])  # (3,K), n·P = -1 on the plane: it looks at the camera
    normals = np.where(smooth, normals / np.linalg.norm(normals, axis=0), 0)
    full = np.zeros((3, *z.shape), dtype=np.float32)
    full[:, rows, columns] = normals
    return torch.from_numpy(full)  # (3,H,W)
