"""Drawing a scene at random: a room or yard, bodies that stand apart on its floor, the light and the camera."""

import math

import numpy as np

from experiments.data.scenes.bodies import KINDS, MOVING, draw_material
from experiments.data.scenes.geometry import Box, Pose, floats
from experiments.data.scenes.world import Body, Light, Motion, Part, Scene


def compose(rng: np.random.Generator, num_objects: int) -> Scene:
    """Draws a scene with at most `num_objects` bodies on its floor, fewer if there is no room left."""
    pitch = -rng.uniform(0.03, 0.36)
    camera = Pose.of((0.0, -rng.uniform(0.9, 2.2), 0.0), pitch=pitch, roll=rng.normal(0, 0.02))
    focal = 0.5 / math.tan(math.radians(rng.uniform(50, 75)) / 2)
    walls, depth = _walls(rng)
    bodies, taken = [_floor(rng), *walls], [(0.0, 0.0, 1.2)]  # the camera's own place
    for _ in range(num_objects):
        kind = str(rng.choice(list(KINDS)))
        parts = KINDS[kind](rng)
        motion = _motion(rng) if kind in MOVING and rng.random() < 0.6 else Motion()
        corners = np.concatenate([part.pose.apply(part.shape.corners) for part in parts], 1)
        radius = np.hypot(corners[0], corners[2]).max() + 2 * math.hypot(motion.sway[0], motion.sway[2])
        for _ in range(30):
            z = math.exp(rng.uniform(math.log(1.7), math.log(min(depth, 9.5))))
            x = z * rng.uniform(-0.6, 0.6) / focal
            if _is_free(x, z, radius, taken, walls):
                taken.append((x, z, radius))
                bodies.append(Body(tuple(parts), Pose.of((x, 0.0, z), yaw=rng.uniform(-math.pi, math.pi)), motion))
                break
    sway = tuple(rng.uniform(-1, 1, 3) * (0.25, 0.06, 0.3))
    turn = tuple(rng.normal(0, 1, 3) * (0.015, 0.04, 0.01))
    drift = Motion(sway, turn, 0.0, rng.uniform(16, 40), rng.uniform(-0.8, 0.8))
    return Scene(tuple(bodies), camera, drift, focal, _light(rng))


def _is_free(x: float, z: float, radius: float, taken: list[tuple[float, float, float]], walls: list[Body]) -> bool:
    """Whether a disc touches no other disc and stays on the camera's side of each wall."""
    clear = all(math.hypot(x - u, z - v) > radius + other + 0.05 for u, v, other in taken)
    inside = (wall.pose.undo(np.array([[x], [0.0], [z]]))[2, 0] < -radius - 0.2 for wall in walls)
    return clear and all(inside)


def _floor(rng: np.random.Generator) -> Body:
    slab = Part("floor", Box((70.0, 0.5, 70.0)), draw_material(rng, "floor", 0.4, 1.5), Pose.of((0, 0.5, 0)))
    return Body((slab,))


def _walls(rng: np.random.Generator) -> tuple[list[Body], float]:
    """Walls around the scene, each facing it along its own -z, and the distance of the wall ahead."""
    depth = rng.uniform(6, 14)
    ahead = rng.uniform(-0.6, 0.6)
    height = float(rng.choice([rng.uniform(0.7, 1.6), rng.uniform(2.2, 3.5), 8.0]))
    material = draw_material(rng, "wall", 0.3, 1.0)
    walls = []
    for yaw, distance, chance in (
        (0.0, depth, 0.75),
        (-math.pi / 2, rng.uniform(2.5, 7), 0.45),
        (math.pi / 2, rng.uniform(2.5, 7), 0.45),
    ):
        if rng.random() < chance:
            pose = Pose.of(yaw=ahead + yaw) @ Pose.of((0.0, -height / 2, distance))
            slab = Part("wall", Box((30.0 if height > 4 else rng.uniform(4, 15), height / 2, 0.15)), material)
            walls.append(Body((slab,), pose))
    return walls, depth if walls else 16.0


def _motion(rng: np.random.Generator) -> Motion:
    sway = (rng.uniform(-0.5, 0.5), 0.0, rng.uniform(-0.5, 0.5))
    return Motion(sway, (0.0, 0.0, 0.0), rng.normal(0, 0.06), rng.uniform(12, 32), rng.uniform(-0.8, 0.8))


def _light(rng: np.random.Generator) -> Light:
    high, around = rng.uniform(0.35, 1.3), rng.uniform(-math.pi, math.pi)
    direction = (math.cos(high) * math.sin(around), -math.sin(high), math.cos(high) * math.cos(around))
    clouds, warm = rng.uniform(0, 1), rng.uniform(0, 0.35)
    strength = rng.uniform(0.6, 1.5) * (1.3 - clouds)
    ambient = rng.uniform(0.25, 0.5) + 0.25 * clouds
    zenith = np.array((0.10, 0.25, 0.65)) * rng.uniform(0.5, 1.3)
    horizon = np.array((0.62 + warm, 0.70, 0.80 - warm)) * rng.uniform(0.7, 1.1)
    return Light(
        direction,
        rng.uniform(0.005, 0.06),
        floats((strength, strength * (1 - 0.4 * warm), strength * (1 - warm))),
        floats(ambient * np.array((0.9, 0.97, 1.08))),
        floats(zenith),
        floats(horizon),
        clouds,
        floats(rng.uniform(0, 64, 3)),
    )
