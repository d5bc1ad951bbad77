"""Solids and where they stand: rigid poses, and closed-form intersections of rays with boxes, ellipsoids and frustums.

In every frame of reference x points right, y down and z forward; lengths are in metres. Points and directions are
arrays of shape (3,N). Results have the precision of the inputs: float64 for labels and geometry, float32 for colours.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Vector = tuple[float, float, float]
"""Three Python floats; unlike NumPy's, they keep float32 arrays float32."""

NEAR = 1e-3
"""Hits with a smaller ray parameter do not count."""


def floats(values: Iterable[float]) -> Vector:
    """Three numbers of NumPy as a vector."""
    x, y, z = (float(value) for value in values)
    return x, y, z


def turn(pitch: float, yaw: float, roll: float) -> np.ndarray:
    """(3,3) rotation by angles in radians about x (up positive), then y (right positive), then z (clockwise)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos((pitch, yaw, roll)), np.sin((pitch, yaw, roll))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@dataclass(frozen=True)
class Pose:
    """A rigid motion p -> rotation p + translation, from a body's (or camera's) own frame to the one around it."""

    rotation: np.ndarray
    """(3,3) float64."""
    translation: np.ndarray
    """(3,) float64."""

    @classmethod
    def of(cls, translation: Vector = (0.0, 0.0, 0.0), pitch: float = 0.0, yaw: float = 0.0, roll: float = 0.0):
        return cls(turn(pitch, yaw, roll), np.array(translation, dtype=np.float64))

    def __matmul__(self, other: "Pose") -> "Pose":
        """First `other`, then this one."""
        return Pose(self.rotation @ other.rotation, self.rotation @ other.translation + self.translation)

    def apply(self, points: np.ndarray) -> np.ndarray:
        return self.rotate(points) + self.translation.astype(points.dtype)[:, None]

    def undo(self, points: np.ndarray) -> np.ndarray:
        return self.rotate_back(points - self.translation.astype(points.dtype)[:, None])

    def rotate(self, directions: np.ndarray) -> np.ndarray:
        return self.rotation.astype(directions.dtype) @ directions

    def rotate_back(self, directions: np.ndarray) -> np.ndarray:
        return self.rotation.astype(directions.dtype).T @ directions


class Shape(ABC):
    """A closed convex solid around the origin of its own frame; rays start outside it."""

    half: Vector
    """Half the sides of its bounding box."""

    @cached_property
    def corners(self) -> np.ndarray:
        """(3,8) float64, of the bounding box."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
        return signs.T * np.array(self.half)[:, None]

    @abstractmethod
    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """(N,) smallest t > NEAR where origin + t direction enters the solid, inf where it never does.

        `origins` is (3,N) or (3,1), `directions` (3,1) or (3,N).
        """

    @abstractmethod
    def normals(self, points: np.ndarray) -> np.ndarray:
        """(3,N) outward unit normals at points of the surface."""

    @abstractmethod
    def unfold(self, points: np.ndarray) -> np.ndarray:
        """(2,N) coordinates along the surface in metres, for textures; the second runs down the sides."""


@dataclass(frozen=True)
class Box(Shape):
    half: Vector

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        enter, leave = np.array(-np.inf, directions.dtype), np.array(np.inf, directions.dtype)
        for axis, half in enumerate(self.half):
            with np.errstate(divide="ignore"):
                inverse = np.clip(1 / directions[axis], -1e30, 1e30)  # parallel to the face: 0 * inf would be NaN
            a, b = (-half - origins[axis]) * inverse, (half - origins[axis]) * inverse
            enter, leave = np.maximum(enter, np.minimum(a, b)), np.minimum(leave, np.maximum(a, b))
        return np.where((enter < leave) & (enter > NEAR), enter, np.inf)

    def _face(self, points: np.ndarray) -> np.ndarray:
        return np.abs(points / np.array(self.half, points.dtype)[:, None]).argmax(0)

    def normals(self, points: np.ndarray) -> np.ndarray:
        face = self._face(points)
        return np.where(np.arange(3)[:, None] == face, np.sign(points), points.dtype.type(0))

    def unfold(self, points: np.ndarray) -> np.ndarray:
        face = self._face(points)
        x, y, z = points
        return np.stack((np.where(face == 0, z, x), np.where(face == 1, z, y)))


@dataclass(frozen=True)
class Ellipsoid(Shape):
    half: Vector
    """Its semi-axes; all equal: a sphere."""

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        axes = np.array(self.half, directions.dtype)[:, None]
        o, d = origins / axes, directions / axes
        a, b = (d * d).sum(0), (o * d).sum(0)
        # Computed from the line's distance to the centre, because b² - a c would lose digits for a distant solid.
        foot = o - (b / a) * d
        inside = 1 - (foot * foot).sum(0)
        t = (-b - np.sqrt(np.maximum(inside, 0) * a)) / a
        return np.where((inside > 0) & (t > NEAR), t, np.inf)

    def normals(self, points: np.ndarray) -> np.ndarray:
        n = points / np.square(np.array(self.half, points.dtype))[:, None]
        return n / np.sqrt((n * n).sum(0))

    def unfold(self, points: np.ndarray) -> np.ndarray:
        x, y, z = points
        width, height, _ = self.half
        return np.stack((np.arctan2(x, z) * width, np.arcsin(np.clip(y / height, -1, 1)) * height))


@dataclass(frozen=True)
class Frustum(Shape):
    """A cone about y, cut at y = ±half_height: equal radii make a cylinder, `top` 0 a cone."""

    half_height: float
    bottom: float
    """Radius at y = +half_height, which is below."""
    top: float = 0.0

    @cached_property
    def half(self) -> Vector:
        radius = max(self.bottom, self.top)
        return radius, self.half_height, radius

    @cached_property
    def _slope(self) -> tuple[float, float]:
        """The radius at y is the first plus y times the second."""
        return (self.bottom + self.top) / 2, (self.bottom - self.top) / (2 * self.half_height)

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        (ox, oy, oz), (dx, dy, dz) = origins, directions
        middle, slope = self._slope
        radius, widening = middle + slope * oy, slope * dy
        a = dx * dx + dz * dz - widening * widening
        b = ox * dx + oz * dz - radius * widening
        c = ox * ox + oz * oz - radius * radius
        root = np.sqrt(np.maximum(b * b - a * c, 0))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # The two roots of a t² + 2 b t + c, computed without subtracting nearly equal numbers.
            q = -(b + np.copysign(root, b))
            sides = (q / a, c / q)
            caps = [(y - oy) / dy for y in (-self.half_height, self.half_height)]
        nearest = np.full(np.broadcast_shapes(a.shape, c.shape), np.inf, directions.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            for t in sides:
                y = oy + t * dy
                valid = (b * b > a * c) & (np.abs(y) <= self.half_height)
                nearest = np.where(valid & (t > NEAR) & (t < nearest), t, nearest)
            for t, r in zip(caps, (self.top, self.bottom), strict=True):
                valid = np.square(ox + t * dx) + np.square(oz + t * dz) < r * r
                nearest = np.where(valid & (t > NEAR) & (t < nearest), t, nearest)
        return nearest

    def _on_side(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) whether the side is nearer than a cap, and the distance from the axis."""
        middle, slope = self._slope
        x, y, z = points
        around = np.sqrt(x * x + z * z)
        return np.abs(around - middle - slope * y) < np.abs(self.half_height - np.abs(y)), around

    def normals(self, points: np.ndarray) -> np.ndarray:
        side, around = self._on_side(points)
        _, slope = self._slope
        scale = 1 / (np.maximum(around, 1e-12) * (1 + slope * slope) ** 0.5)
        x, y, z = points
        along = np.full_like(y, -slope / (1 + slope * slope) ** 0.5)
        return np.stack((np.where(side, x * scale, 0), np.where(side, along, np.sign(y)), np.where(side, z * scale, 0)))

    def unfold(self, points: np.ndarray) -> np.ndarray:
        side, _ = self._on_side(points)
        x, y, z = points
        return np.stack((np.where(side, np.arctan2(x, z) * self._slope[0], x), np.where(side, y, z)))
