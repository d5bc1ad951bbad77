"""Ray casting: exact geometry at the centres of pixels, and colours averaged over several rays per pixel.

A ray is intersected with a part only inside the bounds of the part's projection, for the camera and for the sun alike.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.data.scenes.geometry import NEAR, Pose, turn
from experiments.data.scenes.textures import albedo, noise
from experiments.data.scenes.world import CLASSES, Frame, Light, Placed

SKY = -1
"""Stands for the part number of rays that hit no part."""
_HAZE = 90.0  # metres after which 1/e of a colour is left
_EXPOSURE = 1.5
_BLOCK = 65536  # rays at a time, so that their arrays stay in the CPU cache
_Outline = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Geometry:
    """What the rays through N points of the image see."""

    part: np.ndarray
    """(N,) number of the part, or `SKY`."""
    depth: np.ndarray
    """(N,) along the optical axis, inf for the sky."""
    points: np.ndarray
    """(3,N) in the world; for the sky NaN."""


def camera_rays(size: Sequence[int], focal: float, offset: Sequence[float], dtype: type) -> np.ndarray:
    """(3,H*W) rays (x, y, 1) in the camera's frame through `offset` (right, down) in each pixel.

    (0.5, 0.5) is a pixel's centre; `focal` is the focal length over the longer side of the image, whose centre is the
    principal point.
    """
    rows, columns = size
    x = (np.arange(columns) + offset[0] - columns / 2) / (focal * max(size))
    y = (np.arange(rows) + offset[1] - rows / 2) / (focal * max(size))
    rays = np.ones((3, rows, columns), dtype)
    rays[0], rays[1] = x, y[:, None]
    return rays.reshape(3, -1)


def first_hit(
    bodies: Sequence[Sequence[Placed]],
    origins: np.ndarray,
    directions: np.ndarray,
    plane: np.ndarray,
    outline: _Outline,
) -> tuple[np.ndarray, np.ndarray]:
    """The first part that each ray hits (N,), and the ray's parameter there (N,); `SKY` and inf where there is none.

    Parts are numbered through all bodies. `origins` and `directions` are (3,N) or (3,1) in the world. `plane` (2,N) are
    the rays on a plane of projection, and `outline` projects points (3,M) of the world to the lower and upper bounds
    (2,), (2,) of their hull on it.
    """
    count = plane.shape[1]
    nearest, which = np.full(count, np.inf, plane.dtype), np.full(count, SKY)
    number = -1
    for body in bodies:
        corners = [placed.pose.apply(placed.part.shape.corners) for placed in body]
        near_body = _covered(plane, *outline(np.concatenate(corners, 1)))
        for placed, hull in zip(body, corners, strict=True):
            number += 1
            at = near_body if len(body) == 1 else near_body[_covered(plane.take(near_body, 1), *outline(hull))]
            if not at.size:
                continue
            o = placed.pose.undo(origins if origins.shape[1] == 1 else origins.take(at, 1))
            d = placed.pose.rotate_back(directions if directions.shape[1] == 1 else directions.take(at, 1))
            t = placed.part.shape.intersect(o, d)
            closer = t < nearest[at]
            at = at[closer]
            nearest[at], which[at] = t[closer], number
    return which, nearest


def _covered(plane: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Indices of the points (2,N) within bounds."""
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    x, y = plane
    across = np.flatnonzero((x >= left) & (x <= right))
    y = y[across]
    return across[(y >= top) & (y <= bottom)]


def camera_outline(camera: Pose) -> _Outline:
    """Bounds on the plane z = 1 of the camera's frame; unbounded for what reaches behind the camera."""

    def outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y, z = camera.undo(corners)
        if z.min() < NEAR:
            return np.full(2, -np.inf), np.full(2, np.inf)
        seen = np.stack((x, y)) / z
        return seen.min(1) - 1e-5, seen.max(1) + 1e-5

    return outline


def look(frame: Frame, rays: np.ndarray) -> Geometry:
    """What is seen along rays (3,N) in the camera's frame, with z = 1."""
    directions = frame.camera.rotate(rays)
    origin = frame.camera.translation.astype(rays.dtype)[:, None]
    part, depth = first_hit(frame.bodies, origin, directions, rays[:2], camera_outline(frame.camera))
    with np.errstate(invalid="ignore"):
        points = origin + depth * directions
    return Geometry(part, depth, np.where(part == SKY, rays.dtype.type(np.nan), points))


def normals(frame: Frame, seen: Geometry) -> np.ndarray:
    """(3,N) unit normals in the world, 0 for the sky."""
    result = np.zeros_like(seen.points)
    for number, at in _by_part(seen.part):
        placed = frame.parts[number]
        result[:, at] = placed.pose.rotate(placed.part.shape.normals(placed.pose.undo(seen.points.take(at, 1))))
    return result


def labels(frame: Frame, seen: Geometry) -> np.ndarray:
    """(N,) classes."""
    names = [placed.part.label for placed in frame.parts]
    table = np.array([CLASSES.index(name) for name in [*names, "sky"]])
    return table[seen.part]  # SKY is the last


def flow(frame: Frame, following: Frame, seen: Geometry, rays: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(2,N) displacement in pixels to the following frame; NaN where the point is hidden or outside the image there.

    A point moves with its part. The sky is infinitely far, so only a rotation of the camera moves it.
    """
    moved = np.zeros_like(seen.points)
    for number, at in _by_part(seen.part):
        moved[:, at] = following.parts[number].pose.apply(frame.parts[number].pose.undo(seen.points.take(at, 1)))
    ahead = following.camera.undo(moved)
    sky = seen.part == SKY
    ahead[:, sky] = following.camera.rotate_back(frame.camera.rotate(rays[:, sky]))
    visible = ahead[2] > NEAR
    scale = following.focal * max(size)
    limit = np.array([[size[1]], [size[0]]]) / (2 * scale)
    arrived = np.full_like(rays[:2], np.nan)
    arrived[:, visible] = ahead[:2, visible] / ahead[2, visible]
    visible &= (np.abs(np.where(visible, arrived, np.inf)) <= limit).all(0)
    aim = np.concatenate((arrived[:, visible], np.ones((1, visible.sum()))))
    depth = np.where(sky, np.inf, ahead[2])[visible]
    visible[visible] = look(following, aim).depth >= depth * (1 - 1e-7)  # nothing in front of it
    return np.where(visible, scale * (arrived - rays[:2]), np.nan)


def colours(frame: Frame, size: Sequence[int], supersampling: int) -> np.ndarray:
    """(3,H,W) float32 RGB in [0,1]: mean of supersampling² rays per pixel, each lit by its own point of the sun."""
    steps = (np.arange(supersampling) + 0.5) / supersampling
    total = np.zeros((3, size[0] * size[1]), np.float32)
    for down, right in itertools.product(steps, steps):
        rays = camera_rays(size, frame.focal, (right, down), np.float32)
        sun = _point_of_sun(frame.light, (2 * right - 1, 2 * down - 1))
        for start in range(0, rays.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            seen = look(frame, rays[:, block])
            total[:, block] += _shade(frame, seen, rays[:, block], sun, 1 / (frame.focal * max(size)))
    total *= np.float32(-_EXPOSURE / supersampling**2)
    return (1 - np.exp(total)).reshape(3, *size) ** np.float32(1 / 2.2)  # bright light saturates, as on film


def _by_part(part: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(number of a part, the rays that hit it), for all parts that are hit."""
    order = np.argsort(part, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(part[order])) + 1)
    return [(int(part[at[0]]), at) for at in groups if at.size and part[at[0]] != SKY]


def _point_of_sun(light: Light, where: Sequence[float]) -> Pose:
    """A frame of reference with its z axis from a point of the sun's disc, `where` in [-1,1]², to the scene."""
    forward = -np.array(light.direction)
    right = np.cross((0, 0, 1) if abs(forward[1]) > 0.9 else (0, 1, 0), forward)
    right /= np.linalg.norm(right)
    centre = np.stack((right, np.cross(forward, right), forward), 1)
    return Pose(centre @ turn(light.spread * where[1], light.spread * where[0], 0.0), np.zeros(3))


def _lit(frame: Frame, points: np.ndarray, sun: Pose) -> np.ndarray:
    """(N,) whether nothing stands between points (3,N) and the sun."""
    to_sun = -sun.rotation[:, 2:].astype(points.dtype)

    def outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shadow = sun.rotate_back(corners)[:2]
        return shadow.min(1), shadow.max(1)

    casting = [body for body in frame.bodies if body[0].part.label != "floor"]
    return first_hit(casting, points, to_sun, sun.rotate_back(points)[:2], outline)[0] == SKY


def _shade(frame: Frame, seen: Geometry, rays: np.ndarray, sun: Pose, pixel: float) -> np.ndarray:
    """(3,N) linear RGB of what rays see; `pixel` is the side of a pixel at depth 1."""
    light = frame.light
    result = _sky(light, frame.camera.rotate(rays))
    hit = np.flatnonzero(seen.part != SKY)
    seen = Geometry(seen.part[hit], seen.depth[hit], seen.points.take(hit, 1))
    outward = normals(frame, seen)
    towards = -frame.camera.rotate(rays.take(hit, 1))
    towards /= np.sqrt((towards * towards).sum(0))
    footprint = seen.depth * np.float32(pixel) / np.maximum((outward * towards).sum(0), 0.1)

    colour, gloss = np.empty_like(seen.points), np.empty_like(seen.depth)
    for number, at in _by_part(seen.part):
        part, pose = frame.parts[number].part, frame.parts[number].pose
        local = pose.undo(seen.points.take(at, 1))
        colour[:, at] = albedo(part.material, local, part.shape.unfold(local), footprint[at])
        gloss[at] = part.material.gloss

    to_sun = -sun.rotation[:, 2:].astype(np.float32)
    facing = np.maximum((outward * to_sun).sum(0), 0)
    facing[facing > 0] *= _lit(frame, (seen.points + 4e-3 * outward).compress(facing > 0, 1), sun)
    half = towards + to_sun
    highlight = np.maximum((outward * half).sum(0), 0) ** 2 / (half * half).sum(0)
    for _ in range(4):
        highlight *= highlight  # to the 32nd power of the cosine
    highlight *= gloss * (facing > 0)
    above = np.float32(0.65) - np.float32(0.35) * outward[1]  # more of the sky is seen from surfaces that face up
    above *= np.float32(0.65) + np.float32(0.35) * np.clip(-2.5 * seen.points[1], 0, 1) ** 0.5  # less of it near ground
    above[outward[1] < -0.99] = 1
    sunlight, ambient, horizon = (
        np.array(rgb, np.float32)[:, None] for rgb in (light.sun, light.ambient, light.horizon)
    )
    colour = colour * (ambient * above + sunlight * facing) + sunlight * highlight
    result[:, hit] = horizon + np.exp(-seen.depth / np.float32(_HAZE)) * (colour - horizon)
    return result


def _sky(light: Light, directions: np.ndarray) -> np.ndarray:
    """(3,N) linear RGB of the sky along directions of the world."""
    x, y, z = directions / np.sqrt((directions * directions).sum(0))
    height = np.maximum(-y, 0)
    zenith, horizon = (np.array(rgb, np.float32)[:, None] for rgb in (light.zenith, light.horizon))
    result = horizon + np.minimum(1.6 * height, 1) ** np.float32(0.7) * (zenith - horizon)
    at = np.stack((x, np.zeros_like(y), z)) * (3.0 / (height + 0.15)) + np.array(light.offset, np.float32)[:, None]
    cover = np.clip(0.5 * noise(at) + 1.6 * light.clouds - 0.8, 0, 1) * np.minimum(6 * height, 1)
    return result + 0.85 * cover * (1.0 - result)
