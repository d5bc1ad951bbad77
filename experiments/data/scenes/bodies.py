"""The bodies of a scene, drawn at random: boxes, balls, furniture, trees and the like, and how their surfaces look.

Each class prefers some patterns, colours and sizes but may have any, so neither colour nor texture alone tells the
class.
"""

import colorsys
import math
from collections.abc import Callable

import numpy as np

from experiments.data.scenes.geometry import Box, Ellipsoid, Frustum, Pose, Vector, floats
from experiments.data.scenes.textures import PATTERNS, Material
from experiments.data.scenes.world import Part

_TYPICAL = 0.65
"""Probability that a surface has a pattern that its class prefers, and (independently) such colours."""

_WOOD = ((30, 0.5, 0.45), (28, 0.55, 0.6), (22, 0.6, 0.3), (35, 0.35, 0.75))
_STONE = ((30, 0.1, 0.6), (40, 0.2, 0.75), (15, 0.5, 0.5), (210, 0.05, 0.5))
_GREEN = ((95, 0.55, 0.4), (110, 0.5, 0.3), (80, 0.6, 0.5), (60, 0.6, 0.5))
_METAL = ((210, 0.08, 0.7), (210, 0.12, 0.4), (0, 0.0, 0.85), (40, 0.05, 0.3))
_BRIGHT = ((5, 0.8, 0.8), (50, 0.8, 0.85), (215, 0.75, 0.7), (140, 0.7, 0.55), (25, 0.85, 0.9), (300, 0.5, 0.6))

_LOOKS = {
    "floor": (("checker", "planks", "tiles", "plain", "leaves"), _STONE + _GREEN + _WOOD),
    "wall": (("bricks", "plain", "stripes", "tiles", "planks"), _STONE + _METAL[2:]),
    "box": (("wood", "plain", "tiles", "checker"), _WOOD + _BRIGHT[2:4]),
    "sphere": (("plain", "dots", "stripes", "marble"), _BRIGHT),
    "cylinder": (("bands", "plain", "marble"), _METAL + _BRIGHT[:2]),
    "cone": (("bands", "plain"), _BRIGHT[-2:] + _BRIGHT[:2]),
    "pole": (("plain", "bands"), _METAL + _WOOD[2:]),
    "fence": (("wood", "plain"), _WOOD + _METAL),
    "table": (("wood", "planks"), _WOOD),
    "chair": (("wood", "plain", "stripes"), _WOOD + _BRIGHT[:4]),
    "trunk": (("wood", "plain"), _WOOD),
    "leaves": (("leaves", "plain"), _GREEN),
}
"""Kind of surface -> preferred patterns, and colours as hue in degrees, saturation, value."""


def draw_material(rng: np.random.Generator, surface: str, shortest: float = 0.12, longest: float = 0.5) -> Material:
    """Draws a material for a kind of surface; the period of its pattern lies between two lengths in metres."""
    patterns, palette = _LOOKS[surface]
    pattern = str(rng.choice(patterns if rng.random() < _TYPICAL else list(PATTERNS)))
    if rng.random() < _TYPICAL:
        first, second = (palette[i] for i in rng.integers(len(palette), size=2))
    else:
        first, second = ((rng.uniform(0, 360), rng.uniform(0, 0.8), rng.uniform(0.2, 0.95)) for _ in range(2))
    jitter = rng.normal(0, 1, (2, 3)) * (12, 0.1, 0.1)
    return Material(
        pattern,
        tuple(_linear(np.array(colour) + shift) for colour, shift in zip((first, second), jitter, strict=True)),
        float(np.exp(rng.uniform(np.log(shortest), np.log(longest)))),
        float(rng.uniform(0.04, 0.22)),
        float(rng.choice([0.0, 0.1, 0.5])),
        floats(rng.uniform(0, 64, 3)),
    )


def _linear(hsv: np.ndarray) -> Vector:
    saturation, value = np.clip(hsv[1:], (0, 0.08), (1, 0.97))
    return floats(np.array(colorsys.hsv_to_rgb(hsv[0] / 360 % 1, saturation, value)) ** 2.2)


# Bodies stand on y = 0 of their own frame. Each of the following functions makes the parts of one body.


def _box(rng: np.random.Generator) -> list[Part]:
    half = floats(rng.uniform(0.15, 0.6, 3))
    parts = [Part("box", Box(half), draw_material(rng, "box"), Pose.of((0, -half[1], 0)))]
    if rng.random() < 0.4:
        parts += _on_top(rng, -2 * half[1], min(half[0], half[2]))
    return parts


def _sphere(rng: np.random.Generator) -> list[Part]:
    radius = rng.uniform(0.15, 0.65)
    pose = Pose.of((0, -radius, 0), pitch=rng.uniform(-3, 3), roll=rng.uniform(-3, 3))
    return [Part("sphere", Ellipsoid((radius,) * 3), draw_material(rng, "sphere"), pose)]


def _cylinder(rng: np.random.Generator) -> list[Part]:
    radius, half = rng.uniform(0.12, 0.4), rng.uniform(0.15, 0.7)
    lying = rng.random() < 0.3
    pose = Pose.of((0, -radius, 0), pitch=math.pi / 2) if lying else Pose.of((0, -half, 0))
    parts = [Part("cylinder", Frustum(half, radius, radius), draw_material(rng, "cylinder"), pose)]
    if not lying and rng.random() < 0.3:
        parts += _on_top(rng, -2 * half, radius)
    return parts


def _cone(rng: np.random.Generator) -> list[Part]:
    radius, half = rng.uniform(0.15, 0.5), rng.uniform(0.2, 0.7)
    top = float(rng.choice([0.0, 0.15])) * radius
    shape = Frustum(half, radius, top)
    return [Part("cone", shape, draw_material(rng, "cone"), Pose.of((0, -half, 0)))]


def _on_top(rng: np.random.Generator, height: float, room: float) -> list[Part]:
    """A small sphere, cylinder, cone or box on a surface at y = `height` that is `room` wide to each side."""
    r = rng.uniform(0.35, 0.8) * min(room, 0.4)
    kind, shape = (
        ("sphere", Ellipsoid((r, r, r))),
        ("cylinder", Frustum(1.3 * r, 0.7 * r, 0.7 * r)),
        ("cone", Frustum(1.3 * r, 0.8 * r)),
        ("box", Box((0.7 * r, 0.6 * r, 0.7 * r))),
    )[rng.integers(4)]
    pose = Pose.of((0, height - shape.half[1], 0), yaw=rng.uniform(-3, 3))
    return [Part(kind, shape, draw_material(rng, kind, 0.05, 0.2), pose)]


def _pole(rng: np.random.Generator) -> list[Part]:
    radius, half = rng.uniform(0.015, 0.06), rng.uniform(0.7, 2.2)
    pose = Pose.of(pitch=rng.normal(0, 0.03), roll=rng.normal(0, 0.03)) @ Pose.of((0, 0.05 - half, 0))
    return [Part("pole", Frustum(half, radius, radius), draw_material(rng, "pole"), pose)]


def _fence(rng: np.random.Generator) -> list[Part]:
    posts, gap, height = int(rng.integers(6, 13)), rng.uniform(0.1, 0.25), rng.uniform(0.5, 1.2)
    thick = rng.uniform(0.012, 0.035)
    material = draw_material(rng, "fence")
    length = (posts - 1) * gap / 2
    parts = [
        Part("fence", Box((thick, height / 2, thick)), material, Pose.of((i * gap - length, -height / 2, 0)))
        for i in range(posts)
    ]
    rail = Box((length + thick, 0.8 * thick, 0.5 * thick))
    return parts + [Part("fence", rail, material, Pose.of((0, -s * height, -thick))) for s in (0.25, 0.8)]


def _legs(label: str, material: Material, half: Vector, thick: float) -> list[Part]:
    """Four legs under the corners of a plate; `half` has half of its sides (x, z) and of the legs' height (y)."""
    x, y, z = half[0] - thick, half[1], half[2] - thick
    leg = Box((thick, y, thick))
    return [Part(label, leg, material, Pose.of((i * x, -y, j * z))) for i in (-1, 1) for j in (-1, 1)]


def _table(rng: np.random.Generator) -> list[Part]:
    x, z = rng.uniform(0.35, 0.8), rng.uniform(0.3, 0.5)
    height, thick = rng.uniform(0.5, 0.85), rng.uniform(0.015, 0.035)
    material = draw_material(rng, "table")
    plate = Part("table", Box((x, 0.025, z)), material, Pose.of((0, -height - 0.025, 0)))
    parts = [plate, *_legs("table", material, (x, height / 2, z), thick)]
    return parts + (_on_top(rng, -height - 0.05, z) if rng.random() < 0.6 else [])


def _chair(rng: np.random.Generator) -> list[Part]:
    side, seat = rng.uniform(0.2, 0.28), rng.uniform(0.4, 0.5)
    back, thick = rng.uniform(0.4, 0.6), rng.uniform(0.012, 0.03)
    material = draw_material(rng, "chair")
    plate = Part("chair", Box((side, 0.02, side)), material, Pose.of((0, -seat - 0.02, 0)))
    stile, edge = Box((thick, back / 2, thick)), side - thick
    stiles = [Part("chair", stile, material, Pose.of((x, -seat - back / 2, edge))) for x in (-edge, edge)]
    rail = Box((side, 0.04, 0.6 * thick))
    rails = [Part("chair", rail, material, Pose.of((0, -seat - s * back, edge))) for s in (0.5, 0.95)]
    legs = _legs("chair", material, (side, seat / 2, side), thick)
    return [plate, *legs, *stiles, *rails]


def _tree(rng: np.random.Generator) -> list[Part]:
    height, radius = rng.uniform(0.6, 1.6), rng.uniform(0.3, 0.8)
    bark, leaves = draw_material(rng, "trunk"), draw_material(rng, "leaves", 0.06, 0.3)
    thick = rng.uniform(0.03, 0.1)
    half = (height + radius) / 2
    trunk = Part("tree", Frustum(half, thick, 0.6 * thick), bark, Pose.of((0, -half, 0)))
    crown = [
        Part(
            "tree",
            Ellipsoid(floats(radius * rng.uniform(0.4, 0.75, 3))),
            leaves,
            Pose.of(floats((0, -height - radius, 0) + radius * rng.uniform(-0.5, 0.5, 3))),
        )
        for _ in range(rng.integers(3, 7))
    ]
    return [trunk, *crown]


KINDS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "box": _box,
    "sphere": _sphere,
    "cylinder": _cylinder,
    "cone": _cone,
    "pole": _pole,
    "fence": _fence,
    "table": _table,
    "chair": _chair,
    "tree": _tree,
}
MOVING = ("box", "sphere", "cylinder", "cone", "table", "chair")
