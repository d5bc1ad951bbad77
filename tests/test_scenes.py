"""Procedural scenes: what the samples say must be true of the solids they show, checked from definitions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hydra import compose as compose_config
from hydra import initialize
from torch.nn import functional as F

from experiments.data import DataError, open_data
from experiments.data.scenes import Scenes, render
from experiments.data.scenes.bodies import KINDS
from experiments.data.scenes.geometry import Box, Ellipsoid, Frustum, Pose, Shape
from experiments.data.scenes.textures import PATTERNS, Material, albedo, noise
from experiments.data.scenes.world import CLASSES, Body, Light, Motion, Part, Scene

SKY = CLASSES.index("sky")
GREY = Material("plain", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 0.3, 0.0, 0.0, (0.0, 0.0, 0.0))
NOON = Light((0.0, -1.0, 0.0), 0.0, (1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (0.1, 0.2, 0.6), (0.6, 0.7, 0.8), 0.0, (0, 0, 0))


def small(**settings) -> Scenes:
    return Scenes(**{"size": [64, 80], "num": 6, "supersampling": 1, **settings})


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))


def assert_same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x == y if field.name == "name" else same(x, y), field.name


def back_project(data: Scenes, index: int, depth: torch.Tensor) -> torch.Tensor:
    """(3,H,W) float64 points in the camera's frame, from the intrinsics alone."""
    intrinsics, _ = data.camera(index)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in depth.shape), indexing="ij")
    rays = torch.linalg.inv(intrinsics) @ torch.stack((x, y, torch.ones_like(x))).flatten(1)
    return rays.reshape(3, *depth.shape) * depth.double()


def with_scene(monkeypatch, data: Scenes, change) -> Scenes:
    """`data` showing changed scenes."""
    original = data.scene
    monkeypatch.setattr(data, "scene", lambda number: change(original(number)))
    return data


def contains(shape: Shape, point: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """(N,) whether points (3,N) of its own frame lie in the solid, `margin` below the surface: from the definition."""
    x, y, z = point
    if isinstance(shape, Box):
        a, b, c = (half - margin for half in shape.half)
        return (abs(x) <= a) & (abs(y) <= b) & (abs(z) <= c)
    if isinstance(shape, Ellipsoid):
        a, b, c = (half - margin for half in shape.half)
        return (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 <= 1
    share = (y + shape.half_height) / (2 * shape.half_height)
    radius = shape.top + share * (shape.bottom - shape.top) - 2 * margin
    return (abs(y) <= shape.half_height - margin) & (np.hypot(x, z) <= radius)


def between_boundaries(labels: torch.Tensor, radius: int) -> torch.Tensor:
    """(H,W) whether all labels within `radius` pixels are equal."""
    window = F.pad(labels[None, None].float(), (radius,) * 4, mode="replicate")
    size = 2 * radius + 1
    return (F.max_pool2d(window, size, 1) == -F.max_pool2d(-window, size, 1))[0, 0]


# --- the data set ---


def test_samples_do_not_depend_on_order_or_instance():
    one, other = small(num=3, frames=2, supersampling=2), small(num=3, frames=2, supersampling=2)
    forward = [one[i] for i in range(len(one))]
    for i in reversed(range(len(other))):
        assert_same(forward[i], other[i])
    assert_same(one[-1], one[5])
    with pytest.raises(IndexError):
        one[6]


def test_every_sample_seed_and_split_is_another():
    pictures = [small()[0], small()[1], small(seed=1)[0], small(split="val")[0], small(split="test")[0]]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a.labels != b.labels).float().mean() > 0.05
    names = [set(small(split=split).names) for split in ("train", "val", "test")]
    assert len(names[0] | names[1] | names[2]) == 18
    assert small().names[5] == "scenes/train/000005"


def test_kinds_and_shapes_of_tensors():
    sample = small(frames=2)[0]
    assert sample.name == "scenes/train/000000/0000"
    for value, kind, shape in (
        (sample.image, torch.float32, (3, 64, 80)),
        (sample.labels, torch.int64, (64, 80)),
        (sample.depth, torch.float32, (64, 80)),
        (sample.normals, torch.float32, (3, 64, 80)),
        (sample.flow, torch.float32, (2, 64, 80)),
    ):
        assert value.dtype == kind
        assert tuple(value.shape) == shape
        assert value.is_contiguous()
    for value in (sample.image, sample.depth, sample.normals):
        assert value.isfinite().all()
    assert sample.image.min() >= 0
    assert sample.image.max() <= 1
    assert sample.image.flatten(1).std(1).min() > 0.03


def test_videos():
    data = small(num=2, frames=3)
    assert {name: list(frames) for name, frames in data.videos.items()} == {
        "scenes/train/000000": [0, 1, 2],
        "scenes/train/000001": [3, 4, 5],
    }
    assert data.names[4] == "scenes/train/000001/0001"
    assert [data[i].flow is None for i in range(6)] == [False, False, True] * 2
    assert small().videos is None
    assert small()[1].flow is None
    still, first = small()[1], data[3]
    assert_same(dataclasses.replace(first, name=still.name, flow=None), still)
    assert (data[3].image - data[4].image).abs().mean() > 1e-3


def test_the_fingerprint_covers_every_setting():
    base = small().fingerprint
    assert base == small().fingerprint
    changes = ({"size": [80, 64]}, {"num": 7}, {"seed": 1}, {"split": "val"}, {"frames": 2})
    changes += ({"num_objects": 3}, {"supersampling": 2})
    prints = {small(**change).fingerprint for change in changes}
    assert len(prints | {base}) == len(changes) + 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": [15, 64]}, r"size=\[15, 64\] must be \[rows, columns\], each at least 16"),
        ({"size": [64]}, r"size=\[64\] must be"),
        ({"num": 0}, "num=0 must be at least 1"),
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"supersampling": 0}, "supersampling=0 must be at least 1"),
        ({"num_objects": -1}, "num_objects=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"split": "valid"}, "no split 'valid'; there are: train, val, test"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused_by_name(setting, message):
    with pytest.raises(DataError, match=message):
        small(**setting)


def test_opened_through_the_configuration_group():
    with initialize(version_base=None):
        config = compose_config(overrides=["+data=scenes", "data.size=[16,24]", "data.split=test", "data.num=3"])
    data = open_data(config.data)
    assert isinstance(data, Scenes)
    assert (len(data), data.classes, data[2].name) == (3, CLASSES, "scenes/test/000002")
    assert data[2].image.shape == (3, 16, 24)
    assert data.fingerprint == Scenes([16, 24], 3, split="test").fingerprint
    with pytest.raises(DataError, match="no setting sise; it has: size, num, seed, split"):
        open_data({"name": "scenes", "sise": [16, 16]})


@pytest.mark.parametrize("objects", [0, 1])
def test_nearly_empty_scenes(objects):
    data = small(num_objects=objects)
    assert all(sample.image.isfinite().all() for sample in data)


def test_a_picture_of_nothing_but_sky(monkeypatch):
    up = Scene((), Pose.of(pitch=1.5), Motion(), 1.0, NOON)
    sample = with_scene(monkeypatch, small(), lambda _: up)[0]
    assert (sample.labels == SKY).all()
    assert sample.depth.abs().max() == sample.normals.abs().max() == 0


# --- resolution ---


def test_thrice_the_resolution_agrees_exactly_at_shared_positions():
    for i in range(4):
        coarse, fine = small()[i], small(size=[192, 240])[i]
        torch.testing.assert_close(coarse.depth, fine.depth[1::3, 1::3], rtol=1e-6, atol=0)
        assert torch.equal(coarse.labels, fine.labels[1::3, 1::3])
        torch.testing.assert_close(coarse.normals, fine.normals[:, 1::3, 1::3])


def test_twice_the_resolution_agrees_away_from_boundaries():
    for i in range(6):
        coarse, fine = small()[i], small(size=[128, 160])[i]
        sure = between_boundaries(fine.labels, 1)[::2, ::2]
        agree = (coarse.labels == fine.labels[::2, ::2])[sure]
        assert agree.float().mean() > 0.997  # what is thinner than half a pixel may pass between
        assert sure.float().mean() > 0.5


def test_another_proportion_shows_a_part_of_the_same():
    wide, square = small(size=[32, 64])[2], small(size=[64, 64])[2]
    assert torch.equal(wide.labels, square.labels[16:48])
    torch.testing.assert_close(wide.image, square.image[:, 16:48], atol=2e-3, rtol=0)


def test_supersampling_approaches_the_mean_over_the_pixel():
    fine = small(supersampling=9)[3].image
    error = [(small(supersampling=n)[3].image - fine).square().mean().sqrt() for n in (1, 2, 4)]
    assert error[1] < 0.7 * error[0]
    assert error[2] < 0.7 * error[1]


@pytest.mark.parametrize("supersampling", [1, 2, 3])
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_image_and_labels_lie_on_one_grid(monkeypatch, supersampling, axis):
    """What is symmetric about the optical axis is so in all that is sampled; half a pixel of shift would show."""
    ball = Body((Part("sphere", Ellipsoid((0.6, 0.6, 0.6)), GREY),), Pose.of((0.0, -1.0, 4.0)))
    post = Body((Part("pole", Box((0.07, 1.0, 0.07)), GREY),), Pose.of((0.0, -1.0, 2.5)))
    camera = Pose.of((0.0, -1.3, 0.0), roll=0.0 if axis == "columns" else math.pi / 2)
    scene = Scene((ball, post), camera, Motion(), 1.0, dataclasses.replace(NOON, clouds=-9.0))
    sample = with_scene(monkeypatch, small(size=[45, 45], supersampling=supersampling), lambda _: scene)[0]
    flip = -1 if axis == "columns" else -2
    torch.testing.assert_close(sample.image.flip(flip), sample.image, atol=1e-3, rtol=0)
    assert torch.equal(sample.labels.flip(flip), sample.labels)
    torch.testing.assert_close(sample.depth.flip(flip), sample.depth)
    assert len(sample.labels.unique()) == 3


# --- geometry ---


SHAPES = {
    "box": Box((0.4, 0.9, 0.2)),
    "sphere": Ellipsoid((0.7, 0.7, 0.7)),
    "ellipsoid": Ellipsoid((0.3, 0.8, 0.5)),
    "cylinder": Frustum(0.6, 0.4, 0.4),
    "cone": Frustum(0.7, 0.5),
    "frustum": Frustum(0.5, 0.3, 0.6),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rays_meet_solids_where_they_first_are_inside(name, dtype):
    shape, rng = SHAPES[name], np.random.default_rng(1)
    origins = rng.normal(size=(3, 400))
    origins *= 3 / np.linalg.norm(origins, axis=0)
    directions = rng.uniform(-0.9, 0.9, (3, 400)) - origins
    directions[:, :3], origins[:, :3] = -3 * np.eye(3), 3 * np.eye(3)  # along the axes: zeros in the direction
    t = shape.intersect(origins.astype(dtype), directions.astype(dtype))
    assert t.dtype == dtype
    steps = np.linspace(0, 3, 6001)
    hits = 0
    for i in range(400):
        inside = contains(shape, origins[:, i, None] + steps * directions[:, i, None])
        if inside.any():
            assert abs(t[i] - steps[inside.argmax()]) < 6e-4
        elif np.isfinite(t[i]):  # grazed, for no longer than the steps are apart
            assert contains(shape, origins[:, i] + t[i] * directions[:, i], -1e-4)
        hits += inside.any()
    assert 70 < hits < 395


def test_a_ray_along_a_face_of_a_box_is_no_error():
    origins, directions = np.array([[0.5, 0.0, -3.0], [0.5, 0.5, -3.0], [0.6, 0.0, -3.0]]).T, np.eye(3)[:, 2:]
    touched, edge, missed = Box((0.5, 0.5, 0.5)).intersect(origins, directions)
    assert {touched, edge} <= {2.5, np.inf}
    assert missed == np.inf


@pytest.mark.parametrize("name", SHAPES)
def test_normals_point_out_of_solids_at_right_angles(name):
    shape, rng = SHAPES[name], np.random.default_rng(2)
    origins = rng.normal(size=(3, 2000))
    origins *= 3 / np.linalg.norm(origins, axis=0)
    towards = rng.uniform(-0.5, 0.5, (3, 2000)) - origins
    t = shape.intersect(origins, towards)
    origins, towards, t = origins[:, t < np.inf], towards[:, t < np.inf], t[t < np.inf]
    points = origins + t * towards
    normals = shape.normals(points)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, rtol=1e-12)
    assert ((normals * towards).sum(0) < 0).all()
    # The plane through the points that neighbouring rays meet; not at edges, where they meet another face.
    step = 1e-6 * rng.normal(size=(2, 3, points.shape[1]))
    a, b = (origins + shape.intersect(origins, towards + d) * (towards + d) - points for d in step)
    plane = np.cross(a, b, axis=0)
    plane /= np.linalg.norm(plane, axis=0)
    agree = abs((plane * normals).sum(0)) > 1 - 1e-4
    assert agree.mean() > 0.98


def test_a_sphere_on_a_plane_against_a_loop(monkeypatch):
    """Depth, labels and normals from the textbook formulas, pixel by pixel in Python's own floats."""
    radius, height, distance, pitch = 0.8, 1.5, 4.0, 0.2
    ball = Body((Part("sphere", Ellipsoid((radius,) * 3), GREY),), Pose.of((0.3, -radius, distance), yaw=1.0))
    floor = Body((Part("floor", Box((100.0, 1.0, 100.0)), GREY, Pose.of((0, 1, 0))),))
    camera = Pose.of((0.0, -height, 0.0), pitch=-pitch)
    data = with_scene(monkeypatch, small(size=[24, 32]), lambda _: Scene((floor, ball), camera, Motion(), 0.8, NOON))
    sample = data[0]
    cos, sin = math.cos(pitch), math.sin(pitch)
    centre = [0.3, cos * (height - radius) - sin * distance, sin * (height - radius) + cos * distance]
    down = [0.0, cos, sin]  # gravity in the camera's frame; the floor is where point · down = height
    seen = set()
    for i in range(24):
        for j in range(32):
            ray = [(j + 0.5 - 16) / (0.8 * 32), (i + 0.5 - 12) / (0.8 * 32), 1.0]
            label, depth, normal = "sky", 0.0, [0.0, 0.0, 0.0]
            slope = sum(r * d for r, d in zip(ray, down, strict=True))
            if slope > 0 and height / slope < 90:
                label, depth, normal = "floor", height / slope, [-d for d in down]
            a = sum(r * r for r in ray)
            b = sum(r * c for r, c in zip(ray, centre, strict=True))
            inside = b * b - a * (sum(c * c for c in centre) - radius**2)
            if inside > 0:
                label, depth = "sphere", (b - math.sqrt(inside)) / a
                normal = [(depth * r - c) / radius for r, c in zip(ray, centre, strict=True)]
            seen.add(label)
            assert CLASSES[sample.labels[i, j]] == label, (i, j)
            assert sample.depth[i, j] == pytest.approx(depth, rel=1e-6), (i, j)
            assert sample.normals[:, i, j].tolist() == pytest.approx(normal, abs=1e-6), (i, j)
    assert seen == {"sky", "floor", "sphere"}


def test_normals_are_unit_face_the_camera_and_vanish_with_depth_in_the_sky():
    data = small()
    for i, sample in enumerate(data):
        sky = sample.labels == SKY
        assert torch.equal(sky, sample.depth == 0)
        assert (sample.depth[~sky] > 0.3).all()
        assert (sample.normals[:, sky] == 0).all()
        torch.testing.assert_close(sample.normals.norm(dim=0), (~sky).float(), atol=1e-6, rtol=0)
        points = back_project(data, i, sample.depth)
        assert ((points * sample.normals).sum(0)[~sky] < 0).all()


def test_normals_are_those_of_the_back_projected_depth():
    """Central differences over 2 pixels, where no edge lies between them and the view is not too flat."""
    data, checked = small(size=[240, 320]), 0
    for i in range(4):
        sample = data[i]
        points = back_project(data, i, sample.depth)
        across, along = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
        estimate = F.normalize(torch.linalg.cross(along, across, dim=0), dim=0)
        normals = sample.normals[:, 1:-1, 1:-1].double()
        patches = F.unfold(sample.normals[None].double(), 3).reshape(3, 9, *normals.shape[1:])
        depths = F.unfold(sample.depth[None, None].double(), 3).reshape(9, *normals.shape[1:])
        smooth = ((patches * normals[:, None]).sum(0).amin(0) > 0.99) & (sample.depth[1:-1, 1:-1] > 0)
        middle = depths[4]
        smooth &= ((depths - middle).abs().amax(0) < 0.03 * middle) & (depths.amin(0) > 0)
        cosine = (estimate * normals).sum(0)[smooth]
        assert (cosine > 0.99).float().mean() > 0.995
        checked += smooth.sum()
    assert checked > 100_000


def under_a_plate(light: Light) -> Scene:
    """A square plate that hangs in the air."""
    plate = Body((Part("box", Box((0.5, 0.02, 0.5)), GREY),), Pose.of((0.0, -1.0, 3.0)))
    floor = Body((Part("floor", Box((20.0, 1.0, 20.0)), GREY, Pose.of((0, 1, 0))),))
    return Scene((floor, plate), Pose.of((0.0, -2.0, 0.0), pitch=-0.4), Motion(), 0.8, light)


def test_shadows_fall_where_the_sun_is_hidden(monkeypatch):
    data = with_scene(monkeypatch, small(size=[96, 96]), lambda _: under_a_plate(NOON))
    sample, (_, pose) = data[0], data.camera(0)
    points = back_project(data, 0, sample.depth)
    x, _, z = torch.einsum("ij,jhw->ihw", pose[:3, :3], points) + pose[:3, 3, None, None]
    grey, on_floor = sample.image.mean(0), (sample.labels == CLASSES.index("floor")) & (sample.depth < 6)
    off_centre = torch.maximum(x.abs(), (z - 3).abs())  # the sun is overhead
    shadow, light = grey[on_floor & (off_centre < 0.45)], grey[on_floor & (off_centre > 0.55)]
    assert len(shadow) > 50
    assert shadow.max() + 0.1 < light.min()


def test_a_larger_sun_makes_softer_shadows(monkeypatch):
    def between(spread: float) -> int:
        scene = under_a_plate(dataclasses.replace(NOON, spread=spread))
        data = small(size=[96, 96], supersampling=4)
        monkeypatch.setattr(data, "scene", lambda _: scene)
        sample = data[0]
        floor = (sample.labels == CLASSES.index("floor")) & (sample.depth < 6)
        grey = sample.image.mean(0)[floor]
        dark, bright = grey.min(), grey.quantile(0.9)
        return ((grey - dark > 0.2 * (bright - dark)) & (bright - grey > 0.2 * (bright - dark))).sum()

    assert between(0.1) > 1.5 * between(0.0)


# --- motion ---


def moved_points(data: Scenes, index: int):
    """Where what each pixel shows is in the next frame's camera, (3,N) float64, with the parts that show it."""
    number, k = divmod(index, data.frames)
    now, then = data.scene(number).at(k), data.scene(number).at(k + 1)
    rays = render.camera_rays(data.size, now.focal, (0.5, 0.5), np.float64)
    part = render.look(now, rays).part
    points = back_project(data, index, data[index].depth).flatten(1).numpy()
    ahead = np.full_like(points, np.nan)
    for i in range(points.shape[1]):
        if part[i] >= 0:
            world = now.camera.rotation @ points[:, i] + now.camera.translation
            a, b = now.parts[part[i]].pose, then.parts[part[i]].pose
            world = b.rotation @ (a.rotation.T @ (world - a.translation)) + b.translation
            ahead[:, i] = then.camera.rotation.T @ (world - then.camera.translation)
    return ahead, part, then


def test_flow_of_a_static_scene_is_that_of_depth_and_camera(monkeypatch):
    def freeze(scene: Scene) -> Scene:
        return dataclasses.replace(scene, bodies=tuple(dataclasses.replace(b, motion=Motion()) for b in scene.bodies))

    data = with_scene(monkeypatch, small(frames=2), freeze)
    for i in range(0, 12, 2):
        sample = data[i]
        (intrinsics, a), (_, b) = data.camera(i), data.camera(i + 1)
        far = torch.where(sample.depth > 0, sample.depth, 1e9)  # the sky
        points = back_project(data, i, far).flatten(1)
        ahead = torch.linalg.inv(b) @ a @ torch.cat((points, torch.ones(1, points.shape[1])))
        pixels = intrinsics @ ahead[:3]
        start = (intrinsics @ points)[:2] / points[2]
        expected = (pixels[:2] / pixels[2] - start).reshape(2, 64, 80).float()
        visible = sample.flow.isfinite().all(0)
        assert visible.float().mean() > 0.8
        torch.testing.assert_close(sample.flow[:, visible], expected[:, visible], atol=1e-4, rtol=1e-4)
        assert sample.flow[:, visible].norm(dim=0).max() > 0.1


def test_flow_leads_to_the_same_surface_in_the_next_frame():
    data, matches, errors, objects_move = small(size=[128, 160], frames=2), [], [], 0
    for i in range(0, 12, 2):
        now, then = data[i], data[i + 1]
        rows, columns = now.labels.shape
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        u, v = x + now.flow[0], y + now.flow[1]
        visible = u.isfinite()
        assert torch.equal(visible, v.isfinite())
        assert (u[visible] >= 0).all()
        assert (u[visible] <= columns).all()
        assert (v[visible] >= 0).all()
        assert (v[visible] <= rows).all()
        column = u.nan_to_num(0).long().clamp(0, columns - 1)
        row = v.nan_to_num(0).long().clamp(0, rows - 1)
        sure = visible & between_boundaries(then.labels, 1)[row, column]
        matches.append((then.labels[row, column] == now.labels)[sure].float().mean())
        ahead, part, following = moved_points(data, i)
        expected = torch.from_numpy(ahead[2]).reshape(rows, columns)
        seen = then.depth[row, column].double()
        solid = sure & (now.labels != SKY)
        errors.append(((seen - expected).abs() / expected)[solid].quantile(0.95))
        # Exactly there, and not only at the nearest pixel: the same part, at the depth that rigid motion gives.
        focal = following.focal * max(data.size)
        rays = torch.stack(((u - columns / 2) / focal, (v - rows / 2) / focal, torch.ones_like(u)))
        rays = rays[:, visible].double().numpy()
        hit = render.look(following, rays)
        same_part = hit.part == part[visible.flatten().numpy()]
        assert same_part.mean() > 0.998  # float32 flow may miss an edge by a hair
        depth = expected[visible].numpy()[same_part & (hit.part >= 0)]
        difference = abs(hit.depth[same_part & (hit.part >= 0)] / depth - 1)
        assert np.quantile(difference, 0.99) < 1e-3
        objects_move += sum(body.motion != Motion() for body in data.scene(i // 2).bodies)
    assert min(matches) > 0.995
    assert max(errors) < 0.06
    assert objects_move > 6


def test_pixels_without_flow_are_hidden_and_those_with_it_are_not():
    """Along the line from the next frame's camera to the point, in small steps: is any solid in the way?"""
    data, rng = small(frames=2), np.random.default_rng(0)
    rows, columns = data.size
    hidden = shown = outside = 0
    for i in range(0, 12, 2):
        flow = data[i].flow.flatten(1).numpy()
        ahead, part, then = moved_points(data, i)
        focal = then.focal * max(data.size)
        u, v = focal * ahead[0] / ahead[2] + columns / 2, focal * ahead[1] / ahead[2] + rows / 2
        inside = (u >= 0) & (u <= columns) & (v >= 0) & (v <= rows) & (ahead[2] > 0)
        missing = np.isnan(flow[0])
        assert missing[(part >= 0) & ~inside].all()
        outside += (missing & ~inside & (part >= 0)).sum()
        candidates = np.flatnonzero((part >= 0) & inside)
        picked = np.concatenate([rng.permutation(candidates[missing[candidates] == m])[:60] for m in (False, True)])
        for p in picked:
            steps = np.concatenate((np.linspace(0.02, 0.99, 3000), 1 - np.geomspace(1e-2, 1e-4, 200)))
            line = ahead[:, p, None] * steps
            world = then.camera.apply(line)
            met = [contains(q.part.shape, q.pose.undo(world), 2e-4).any() for q in then.parts]
            if missing[p]:
                hidden += any(met)
                shown += not any(met)
            else:
                assert not any(met)
    assert outside > 100
    assert hidden > 100
    assert shown <= 0.05 * hidden  # grazed by less than the steps and the margin


def test_flow_of_the_sky_is_the_camera_turning(monkeypatch):
    swing = Motion((0.5, 0.0, 0.5), (0.0, 0.02, 0.0), period=4.0)  # a quarter of its period: fully out
    sky = Scene((), Pose.of(), swing, 1.0, NOON)
    flow = with_scene(monkeypatch, small(size=[64, 64], frames=2), lambda _: sky)[0].flow
    middle = flow[0, 31:33, 31:33]
    torch.testing.assert_close(middle, torch.full((2, 2), -64 * math.tan(0.02)), atol=1e-2, rtol=0)
    assert flow[0, :, 0].isnan().all()
    assert flow[0, :, 2:].isfinite().all()


def test_motion_is_rigid_and_bounded_over_any_number_of_frames():
    for number in range(6):
        scene = small().scene(number)
        for body in (*scene.bodies, Body((), scene.camera, scene.camera_motion)):
            assert np.array_equal(body.motion.move(body.pose, 0).translation, body.pose.translation)
            for k in (1, 17, 1000):
                pose = body.motion.move(body.pose, k)
                np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-12)
                assert np.linalg.norm(pose.translation - body.pose.translation) < 1.5


@pytest.mark.parametrize("frame", [0, 7, 15])
def test_the_camera_is_never_inside_a_solid_and_bodies_stay_apart(frame):
    data = small(num=40)
    for number in range(40):
        scene = data.scene(number)
        world = scene.at(frame)
        eye = world.camera.translation[:, None]
        assert eye[1] < -0.5
        assert not any(contains(placed.part.shape, placed.pose.undo(eye), -0.3).any() for placed in world.parts)
        walls = [placed.pose for placed in world.parts if placed.part.label == "wall"]
        discs = []
        for body in scene.bodies:
            if body.parts[0].label not in ("floor", "wall"):
                corners = np.concatenate([part.pose.apply(part.shape.corners) for part in body.parts], 1)
                pose = body.motion.move(body.pose, frame)
                assert all(wall.undo(pose.apply(corners))[2].max() < -0.15 for wall in walls)
                discs.append((*pose.translation[[0, 2]], np.hypot(corners[0], corners[2]).max()))
        for i, (x, z, radius) in enumerate(discs):
            assert all(math.hypot(x - u, z - v) > radius + other for u, v, other in discs[:i])


# --- what the pictures are like ---


@pytest.fixture(scope="module")
def fifty() -> list:
    return [*Scenes([112, 112], 50, split="val", supersampling=1)]


def test_every_class_occurs_and_none_is_everything(fifty):
    counts = torch.stack([torch.bincount(sample.labels.flatten(), minlength=len(CLASSES)) for sample in fifty])
    assert counts.shape[1] == len(CLASSES)
    assert ((counts > 0).float().mean(0) > 0.25).all()
    share = counts.sum(0) / counts.sum()
    assert share.min() > 0.003
    assert share.max() < 0.65
    assert set(CLASSES) == {"sky", "floor", "wall", *KINDS}


def test_bilinear_upsampling_of_coarse_labels_loses_at_boundaries():
    """Exact labels averaged over cells of 16x16 pixels: what a perfect probe of coarse features could know."""
    classes, everywhere, near = len(CLASSES), 0, 0
    for sample in Scenes([224, 224], 12, split="val", supersampling=1):
        one_hot = F.one_hot(sample.labels, classes).movedim(-1, 0)[None].float()
        guess = F.interpolate(F.avg_pool2d(one_hot, 16), scale_factor=16, mode="bilinear").argmax(1)[0]
        pairs = sample.labels * classes + guess
        everywhere = everywhere + torch.bincount(pairs.flatten(), minlength=classes**2)
        near = near + torch.bincount(pairs[~between_boundaries(sample.labels, 3)], minlength=classes**2)

    def mean_iou(counts: torch.Tensor) -> float:
        table = counts.reshape(classes, classes).double()
        return (table.diag() / (table.sum(0) + table.sum(1) - table.diag())).nanmean().item()

    assert 0.3 < mean_iou(everywhere) < 0.8
    assert mean_iou(near) < 0.6
    assert mean_iou(near) < mean_iou(everywhere) - 0.1


def test_colour_hints_at_the_class_without_telling_it(fifty):
    """The best guess from a pixel's colour alone, learned on half of the pictures, by class on the other half."""
    tables = []
    for half in (fifty[::2], fifty[1::2]):
        bins = torch.cat([(sample.image * 5.999).long().flatten(1) for sample in half], 1)
        labels = torch.cat([sample.labels.flatten() for sample in half])
        pairs = (bins * torch.tensor([[36], [6], [1]])).sum(0) * len(CLASSES) + labels
        tables.append(torch.bincount(pairs, minlength=216 * len(CLASSES)).reshape(216, -1).double())
    known, asked = tables
    guess = (known / known.sum(0)).argmax(1)
    recall = [asked[guess == c, c].sum() / asked[:, c].sum() for c in range(len(CLASSES))]
    assert 1.2 / len(CLASSES) < sum(recall) / len(CLASSES) < 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_vary_nearby_and_fade_to_their_mean_far_away(pattern):
    rng = np.random.default_rng(0)
    points = rng.uniform(-3, 3, (3, 4000)).astype(np.float32)
    material = Material(pattern, ((0.1, 0.2, 0.3), (0.8, 0.6, 0.4)), 0.5, 0.1, 0.0, (1.0, 2.0, 3.0))
    close = albedo(material, points, points[:2], np.full(4000, 1e-3, np.float32))
    distant = albedo(material, points, points[:2], np.full(4000, 2.0, np.float32))
    assert close.dtype == distant.dtype == np.float32
    assert close.min() > 0
    assert close.std(1).min() > 0.02
    assert distant.std(1).max() < 0.02


def test_noise_is_continuous_periodic_and_centred():
    points = np.random.default_rng(0).uniform(0, 64, (3, 20000))
    values = noise(points)
    assert abs(values.mean()) < 0.1
    assert 0.5 < values.std() < 1.2
    np.testing.assert_allclose(noise(points - 64), values, atol=1e-6)
    assert abs(noise(points + 1e-4) - values).max() < 1e-2
