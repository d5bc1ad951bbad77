"""Defines a scene: bodies of textured parts, their rigid motion, the camera, the light; and its state at a frame."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from experiments.data.scenes.geometry import Pose, Shape, Vector, turn
from experiments.data.scenes.textures import Material

CLASSES = (
    "sky",
    "floor",
    "wall",
    "box",
    "sphere",
    "cylinder",
    "cone",
    "pole",
    "fence",
    "table",
    "chair",
    "tree",
)


@dataclass(frozen=True)
class Motion:
    """A rigid motion about a body's own origin: swaying, which stays bounded over any number of frames, and spin."""

    sway: Vector = (0.0, 0.0, 0.0)
    """Amplitude in metres."""
    turn: Vector = (0.0, 0.0, 0.0)
    """Amplitude of pitch, yaw and roll in radians."""
    spin: float = 0.0
    """Yaw per frame in radians."""
    period: float = 24.0
    """Of swaying and turning, in frames."""
    phase: float = 0.0

    def move(self, pose: Pose, frame: int) -> Pose:
        """Where a body with `pose` at frame 0 is at `frame`."""
        swing = math.sin(2 * math.pi * frame / self.period + self.phase) - math.sin(self.phase)
        pitch, yaw, roll = (swing * angle for angle in self.turn)
        rotation = pose.rotation @ turn(pitch, yaw + self.spin * frame, roll)
        return Pose(rotation, pose.translation + swing * np.array(self.sway))


@dataclass(frozen=True)
class Part:
    """One solid of a body."""

    label: str
    """One of `CLASSES`."""
    shape: Shape
    material: Material
    pose: Pose = field(default_factory=Pose.of)
    """In the body's frame."""


@dataclass(frozen=True)
class Body:
    """Parts that move together."""

    parts: tuple[Part, ...]
    pose: Pose = field(default_factory=Pose.of)
    motion: Motion = field(default_factory=Motion)


@dataclass(frozen=True)
class Light:
    """A sun, the sky's own light, and the look of the sky."""

    direction: Vector
    """Unit vector towards the sun."""
    spread: float
    """Radius of the sun's disc in radians, which softens shadows."""
    sun: Vector
    ambient: Vector
    zenith: Vector
    horizon: Vector
    clouds: float
    """0: none, 1: overcast."""
    offset: Vector
    """Of the clouds' noise."""


@dataclass(frozen=True)
class Placed:
    """A part where it stands at one frame."""

    part: Part
    pose: Pose
    """To the world."""


@dataclass(frozen=True)
class Frame:
    """A scene at one moment."""

    bodies: tuple[tuple[Placed, ...], ...]
    camera: Pose
    """To the world."""
    focal: float
    light: Light

    @cached_property
    def parts(self) -> tuple[Placed, ...]:
        """Of all bodies, in an order that all frames of a scene share."""
        return tuple(itertools.chain.from_iterable(self.bodies))


@dataclass(frozen=True)
class Scene:
    """A world with its floor at y = 0 (y points down)."""

    bodies: tuple[Body, ...]
    camera: Pose
    """At frame 0, to the world."""
    camera_motion: Motion
    focal: float
    """Focal length over the longer side of the image."""
    light: Light

    def at(self, frame: int) -> Frame:
        """The whole scene at a frame."""
        bodies = []
        for body in self.bodies:
            pose = body.motion.move(body.pose, frame)
            bodies.append(tuple(Placed(part, pose @ part.pose) for part in body.parts))
        return Frame(tuple(bodies), self.camera_motion.move(self.camera, frame), self.focal, self.light)
