"""Data sets from files: each layout built in miniature and read back, everything that does not fit, fingerprints."""

import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hydra import compose, initialize
from hydra.errors import ConfigCompositionException, MissingConfigException
from PIL import Image
from scipy.io import savemat

from core.registry import add_root
from experiments.data import IGNORE, DataError, data_sets, files, open_data
from experiments.data.image_files import NoImages
from experiments.data.normals import Intrinsics, normals_from_depth
from experiments.data.poses import flow_from_depth
from experiments.data.scenes import Scenes

H, W = 8, 12


def save(path: Path, values: np.ndarray, palette: bool = False, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image = Image.frombytes("P", image.size, values.tobytes())
        image.putpalette([i for k in range(256) for i in (k, 255 - k, k * 7 % 256)])
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    """What a file stores, to be changed at will."""
    with Image.open(path) as image:
        return np.array(image)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (H, W)) -> Path:
    return save(path, np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def ids(path: Path, allowed: list[int], seed: int = 0, palette: bool = False) -> Path:
    """A label file in which each of the `allowed` ids occurs."""
    values = np.resize(np.random.default_rng(seed).permutation(np.resize(allowed, max(H * W, len(allowed)))), (H, W))
    values.flat[: min(len(allowed), H * W)] = allowed[: H * W]
    return save(path, values.astype(np.uint8), palette)


def camvid(root):
    return [
        ("a", picture(root / "train/a.jpg", 1), ids(root / "trainannot/a.png", list(range(12)), 1)),
        ("b", picture(root / "train/b.png", 2), ids(root / "trainannot/b.png", list(range(12)), 2)),
    ]


def voc2012(root):
    inside = root / "VOCdevkit/VOC2012"
    (inside / "ImageSets/Segmentation").mkdir(parents=True)
    (inside / "ImageSets/Segmentation/train.txt").write_text("2007_2\n2007_1\n")
    picture(inside / "JPEGImages/unlabelled.jpg")  # most of VOC's images have no segmentation
    return [
        (n, picture(inside / f"JPEGImages/{n}.jpg", s), ids(inside / f"SegmentationClass/{n}.png", known, s, True))
        for s, n, known in ((2, "2007_2", [*range(21), 255]), (1, "2007_1", [0, 255, 20]))
    ]


def ade20k(root):
    return [
        (f"ADE_train_{s}", picture(root / f"images/training/ADE_train_{s}.jpg", s), ids(file, known, s))
        for s, known in ((1, list(range(96))), (2, [0, *range(95, 151)]))
        for file in [root / f"annotations/training/ADE_train_{s}.png"]
    ]


def cocostuff27(root):
    return [
        (f"00{s}", picture(root / f"images/train2017/00{s}.jpg", s), ids(file, known, s))
        for s, known in ((1, [0, 71, 168, 156, 255]), (2, [148, 181, 120, 58, 90]))
        for file in [root / f"annotations/train2017/00{s}.png"]
    ]


def cityscapes(root):
    save(root / "gtFine/train/ulm/ulm_1_gtFine_color.png", np.zeros((H, W, 3), np.uint8))  # not read
    return [
        (
            name,
            picture(root / f"leftImg8bit/train/{name}_leftImg8bit.png", s),
            ids(root / f"gtFine/train/{name}_gtFine_labelIds.png", list(range(34)), s),
        )
        for s, name in enumerate(("bonn/bonn_1", "ulm/ulm_1"))
    ]


def davis2017(root):
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/train.txt").write_text("swing\nbear\n")
    picture(root / "JPEGImages/480p/not_listed/00000.jpg")
    return [
        (name, picture(root / f"JPEGImages/480p/{name}.jpg", s), ids(file, [0, 1, 2, 255], s, True))
        for s, name in enumerate(("swing/00000", "swing/00001", "bear/00000"))
        for file in [root / f"Annotations/480p/{name}.png"]
    ]


def davis2016(root):
    (root / "ImageSets/480p").mkdir(parents=True)
    names = ("swing/00000", "swing/00001", "bear/00000")
    lines = (f"/JPEGImages/480p/{name}.jpg /Annotations/480p/{name}.png" for name in names)
    (root / "ImageSets/480p/train.txt").write_text("\n".join(lines))
    picture(root / "JPEGImages/480p/not_listed/00000.jpg")
    return [
        (name, picture(root / f"JPEGImages/480p/{name}.jpg", s), ids(file, [0, 255], s))
        for s, name in enumerate(names)
        for file in [root / f"Annotations/480p/{name}.png"]
    ]


def minus_one(zero):
    return lambda i: zero if i == 0 else i - 1


# Of each layout: what builds it, its class of an id (from the papers), its number of classes, and an id it must refuse.
LAYOUTS = {
    "camvid": (camvid, lambda i: IGNORE if i == 11 else i, 11, 12),
    "voc2012": (voc2012, lambda i: i, 21, 21),
    "ade20k": (ade20k, minus_one(IGNORE), 150, 151),
    "cocostuff27": (
        cocostuff27,
        {0: 9, 71: 0, 168: 22, 156: 23, 255: IGNORE, 148: 21, 181: 24, 120: 14, 58: 2, 90: 4}.get,
        27,
        182,
    ),
    "cityscapes": (
        cityscapes,
        dict(enumerate([*[255] * 7, 0, 1, 255, 255, 2, 3, 4, *[255] * 3, 5, 255, *range(6, 16), 255, 255, 16, 17, 18])),
        19,
        34,
    ),
    "davis2016": (davis2016, {0: 0, 255: 1}.get, 2, 1),
    "davis2017": (davis2017, lambda i: i, 21, 21),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def build(layout, root):
    return LAYOUTS[layout][0](root)


@layouts
def test_layout_is_read_back_exactly(layout, tmp_path):
    samples = build(layout, tmp_path)
    _, class_of, classes, _ = LAYOUTS[layout]
    class_of = class_of.__getitem__ if isinstance(class_of, dict) else class_of
    data = open_data({"name": layout, "path": str(tmp_path)})
    assert list(data.names) == [name for name, _, _ in samples]
    assert len(data) == len(samples)
    assert len(data.classes) == len(set(data.classes)) == classes
    for sample, (name, image, labels) in zip(data, samples, strict=True):
        assert sample.name == name
        stored = pixels(image)
        assert (sample.image == torch.tensor(stored).permute(2, 0, 1) / 255).all()
        expected = np.vectorize(class_of)(pixels(labels))
        assert sample.labels.dtype == torch.int64
        assert sample.labels.tolist() == expected.tolist()
        assert sample.depth is sample.normals is sample.flow is None


@layouts
def test_reading_may_happen_in_another_process(layout, tmp_path):
    build(layout, tmp_path)
    data = open_data({"name": layout, "path": str(tmp_path)})
    twin = pickle.loads(pickle.dumps(data))
    assert torch.equal(twin[1].labels, data[1].labels)
    assert twin.classes == data.classes


def refusal(layout, root, **settings) -> str:
    """What is said on opening, or else on reading the last sample."""

    def read_last():
        data = open_data({"name": layout, "path": str(root), **settings})
        return data[len(data) - 1]

    with pytest.raises(DataError) as caught:
        read_last()
    return str(caught.value)


@layouts
def test_another_folder_is_refused_with_the_layout(layout, tmp_path):
    said = refusal(layout, tmp_path)
    assert f"data={layout}: there is no folder" in said
    assert data_sets()[layout].layout in said
    assert "is not a folder" in refusal(layout, tmp_path / "absent")


@layouts
def test_unknown_split_is_refused_with_those_there_are(layout, tmp_path):
    build(layout, tmp_path)
    assert "no split 'best'; there are: train, val" in refusal(layout, tmp_path, split="best")


@layouts
def test_split_without_files_is_refused(layout, tmp_path):
    build(layout, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.*"):
        if path.suffix in (".jpg", ".png"):
            path.unlink()
        elif path.suffix == ".txt":
            path.write_text(" \n")
    said = refusal(layout, tmp_path / "copy")
    assert "has no file" in said or "lists no image" in said


@layouts
def test_image_without_label_and_label_without_image_are_refused(layout, tmp_path):
    name, image, labels = build(layout, tmp_path)[0]
    kept = labels.read_bytes()
    labels.unlink()
    said = refusal(layout, tmp_path)
    assert name.split("/")[-1] in said
    assert "without labels" in said or "without a file in SegmentationClass" in said
    labels.write_bytes(kept)
    image.unlink()
    said = refusal(layout, tmp_path)
    assert name.split("/")[-1] in said
    assert "without image" in said or "without an image in JPEGImages" in said
    assert "complete the copy" in said


@layouts
def test_label_of_another_size_is_refused(layout, tmp_path):
    _, image, labels = build(layout, tmp_path)[-1]
    save(labels, pixels(labels)[:, :-1])
    said = refusal(layout, tmp_path)
    assert f"{labels} has {W - 1}×{H} pixels, but its image {image} has {W}×{H}" in said


@layouts
def test_unknown_class_ids_are_named(layout, tmp_path):
    *_, (_, _, labels) = build(layout, tmp_path)
    values = pixels(labels)
    values[0, 0], values[3, 3] = LAYOUTS[layout][3], 254
    save(labels, values)
    assert f"{labels}: data={layout} does not know class id {LAYOUTS[layout][3]}, 254 (it knows " in refusal(
        layout, tmp_path
    )


@layouts
def test_damaged_files_are_named(layout, tmp_path):
    *_, (_, image, labels) = build(layout, tmp_path)
    kept = labels.read_bytes()
    for content in (kept[:-20], kept[:40], b"", b"no png at all", kept[:50] + b"\xff\xff" + kept[52:]):
        labels.write_bytes(content)
        said = refusal(layout, tmp_path)
        assert said.startswith(f"{labels}: ")
        assert said.endswith("Copy the file again")
    labels.write_bytes(kept)
    image.write_bytes(image.read_bytes()[:150])
    assert refusal(layout, tmp_path).startswith(f"{image}: ")


@layouts
def test_colours_instead_of_class_ids_are_refused(layout, tmp_path):
    *_, (_, _, labels) = build(layout, tmp_path)
    picture(labels)
    assert f"{labels} is a RGB picture: expected a PNG with one number" in refusal(layout, tmp_path)


@layouts
def test_fingerprint_is_of_the_content(layout, tmp_path, monkeypatch):
    samples = build(layout, tmp_path / "here")

    def of(root):
        return open_data({"name": layout, "path": str(root)}).fingerprint

    whole = of(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "far/away")
    for path in (tmp_path / "far/away").rglob("*.*"):
        os.utime(path, (1, 1))
    assert of(tmp_path / "far/away") == whole
    monkeypatch.setattr(files, "WHOLE", 0)  # as for sets too large to read
    sampled = of(tmp_path / "here")
    assert of(tmp_path / "far/away") == sampled != whole
    _, image, labels = samples[-1]
    values = pixels(labels)
    values[4, 4] = values[4, 4] ^ 1
    save(labels, values, palette=layout in ("voc2012", "davis2017"))
    assert of(tmp_path / "here") != sampled
    monkeypatch.undo()
    changed = of(tmp_path / "here")
    assert changed != whole
    content = bytearray(image.read_bytes())
    content[-30] ^= 1
    image.write_bytes(content)
    assert of(tmp_path / "here") not in (whole, changed)


def test_sampled_fingerprint_reads_blocks_of_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE", 0)
    path = tmp_path / "a.png"

    def of(position):
        content = bytearray(3 * files.STRIDE)
        content[position] = 1
        path.write_bytes(content)
        return files.fingerprint("x", {}, [files.Record("a", path)])

    seen = of(0), of(files.STRIDE + 5), of(2 * files.STRIDE), of(3 * files.STRIDE - 1)
    assert len({*seen}) == 4
    assert of(files.BLOCK) == of(files.BLOCK + 1)  # between blocks: not seen, as documented


def test_files_that_cannot_be_opened_are_named(tmp_path):
    build("camvid", tmp_path)
    (tmp_path / "train/b.png").unlink()
    (tmp_path / "train/b.png").symlink_to(tmp_path / "moved away")
    assert refusal("camvid", tmp_path) == f"{tmp_path / 'train/b.png'}: no such file or directory"


def test_fingerprint_tells_names_order_and_settings_apart(tmp_path):
    build("ade20k", tmp_path)
    node = {"name": "ade20k", "path": str(tmp_path)}
    first = open_data(node)
    assert open_data({**node, "background": True}).fingerprint != first.fingerprint
    for kind in ("images", "annotations"):
        folder = tmp_path / kind / "training"
        suffix = ".jpg" if kind == "images" else ".png"
        (folder / f"ADE_train_2{suffix}").rename(folder / f"ADE_train_3{suffix}")
    assert open_data(node).fingerprint != first.fingerprint
    build("camvid", tmp_path / "c")
    (tmp_path / "c/val").mkdir()
    for kind in ("", "annot"):
        shutil.copytree(tmp_path / f"c/train{kind}", tmp_path / f"c/val{kind}", dirs_exist_ok=True)
    node = {"name": "camvid", "path": str(tmp_path / "c")}
    assert open_data(node).fingerprint == open_data({**node, "split": "val"}).fingerprint  # same samples


def test_two_files_of_one_name_are_refused(tmp_path):
    build("camvid", tmp_path)
    picture(tmp_path / "train/a.png")
    assert "a.jpg and" in refusal("camvid", tmp_path)
    assert "share the name a: keep one" in refusal("camvid", tmp_path)


def test_hidden_and_other_files_are_no_samples(tmp_path):
    build("camvid", tmp_path)
    (tmp_path / "train/._a.jpg").write_bytes(b"what macOS leaves behind")
    (tmp_path / "train/Thumbs.db").write_bytes(b"")
    picture(tmp_path / "train/more/c.png")
    assert open_data({"name": "camvid", "path": str(tmp_path)}).names == ["a", "b"]


def test_labelled_images_stay_as_stored(tmp_path):
    """An EXIF rotation must not turn the image away from its labels."""
    build("camvid", tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    save(tmp_path / "train/b.png", values, exif=exif)
    assert open_data({"name": "camvid", "path": str(tmp_path)})[1].image.shape == (3, H, W)
    save(tmp_path / "video/1.png", values, exif=exif)
    assert open_data({"name": "frames", "path": str(tmp_path / "video")})[0].image.shape == (3, W, H)


@pytest.mark.parametrize("above", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_each_of_its_folders(above, tmp_path):
    build("voc2012", tmp_path)
    assert open_data({"name": "voc2012", "path": str(tmp_path / above)}).names == ["2007_2", "2007_1"]


def test_lists_are_checked(tmp_path):
    build("voc2012", tmp_path)
    file = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    file.write_text("2007_1\n2007_2\n2007_1\n")
    assert f"{file} repeats 1 names (2007_1)" in refusal("voc2012", tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file} cannot be read" in refusal("voc2012", tmp_path)
    file.unlink()
    assert f"{file} cannot be read: no such file" in refusal("voc2012", tmp_path)


def test_ade_background_is_a_class_on_demand(tmp_path):
    *_, (_, _, labels) = build("ade20k", tmp_path)
    data = open_data({"name": "ade20k", "path": str(tmp_path), "background": True})
    assert data.classes[:2] == ("background", "wall")
    assert len(data.classes) == 151
    assert data[1].labels.tolist() == pixels(labels).tolist()


def test_coco_classes_cover_every_id_once():
    table = data_sets()["cocostuff27"].label_classes
    assert sorted(set(table[:182].tolist())) == list(range(27))
    assert set(table[182:255].tolist()) == {-1}
    assert np.bincount(table[:182]).tolist() == (
        [6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8, 2, 6, 4, 11, 4, 11, 7, 2, 6, 11, 9, 2, 6, 5, 5]
    )


@pytest.mark.slow  # torchvision.datasets takes seconds to import
def test_cityscapes_classes_are_the_published_ones():
    from torchvision.datasets import Cityscapes

    ours = data_sets()["cityscapes"]
    for published in (c for c in Cityscapes.classes if c.id >= 0):
        assert ours.label_classes[published.id] == published.train_id
        assert published.ignore_in_eval or ours.classes[published.train_id] == published.name
    assert set(ours.label_classes[34:].tolist()) == {-1}


def test_coco_may_be_limited_to_a_list(tmp_path):
    build("cocostuff27", tmp_path)
    (tmp_path / "curated.txt").write_text("002\n")
    node = {"name": "cocostuff27", "path": str(tmp_path), "images_listed_in": "curated.txt"}
    assert open_data(node).names == ["002"]
    (tmp_path / "curated.txt").write_text("002\n003\n")
    assert "1 names (003) in" in refusal("cocostuff27", tmp_path, images_listed_in="curated.txt")


def test_davis_2016_without_lists(tmp_path):
    expected = davis2016(tmp_path)
    assert "not_listed" in refusal("davis2016", tmp_path, split="all")  # has no masks
    shutil.rmtree(tmp_path / "JPEGImages/480p/not_listed")
    shutil.rmtree(tmp_path / "ImageSets")
    data = open_data({"name": "davis2016", "path": str(tmp_path), "split": "all"})
    assert data.names == sorted(name for name, _, _ in expected)
    assert {video: [*frames] for video, frames in data.videos.items()} == {"bear": [0], "swing": [1, 2]}
    assert "no folder ImageSets/480p" in refusal("davis2016", tmp_path)
    shutil.rmtree(tmp_path / "JPEGImages/480p")
    (tmp_path / "JPEGImages/480p").mkdir()
    assert "has no folder of frames" in refusal("davis2016", tmp_path, split="all")


def test_davis_keeps_videos_apart(tmp_path):
    build("davis2017", tmp_path)
    data = open_data({"name": "davis2017", "path": str(tmp_path)})
    assert {name: list(frames) for name, frames in data.videos.items()} == {"swing": [0, 1], "bear": [2]}
    (tmp_path / "ImageSets/2017/train.txt").write_text("swing\nlost\n")
    assert "no folder JPEGImages/480p/lost" in refusal("davis2017", tmp_path)


def test_frames_are_videos_in_natural_order(tmp_path):
    for video, numbers in (("b", (10, 9, 1)), ("a", (2,))):
        for number in numbers:
            picture(tmp_path / f"{video}/frame{number}.png", number)
    data = open_data({"name": "frames", "path": str(tmp_path)})
    assert data.names == ["a/frame2", "b/frame1", "b/frame9", "b/frame10"]
    assert {name: list(frames) for name, frames in data.videos.items()} == {"a": [0], "b": [1, 2, 3]}
    stored = pixels(tmp_path / "b/frame10.png")
    assert (data[3].image == torch.tensor(stored).permute(2, 0, 1) / 255).all()
    single = open_data({"name": "frames", "path": str(tmp_path / "b")})
    assert single.names == ["frame1", "frame9", "frame10"]
    assert {name: list(frames) for name, frames in single.videos.items()} == {"b": [0, 1, 2]}
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    assert open_data({"name": "frames", "path": str(tmp_path / "elsewhere")}).fingerprint == single.fingerprint


def test_frames_beside_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no file" in refusal("frames", tmp_path)
    picture(tmp_path / "a/1.png")
    picture(tmp_path / "2.png")
    assert "has frames (2.png) and folders (a)" in refusal("frames", tmp_path)


# Depth and normals


def depth_png(path: Path, metres: np.ndarray, scale: float = 1000) -> Path:
    return save(path, np.round(metres * scale).astype(np.uint16))


CAMERA = Intrinsics(100.0, 110.0, 30.0, 20.0)
NORMAL = np.array([0.3, -0.5, -0.8]) / np.linalg.norm([0.3, -0.5, -0.8])


def plane(normal: np.ndarray, distance: float, camera: Intrinsics, size=(40, 60)) -> np.ndarray:
    """Depth of the points P with normal·P = -distance."""
    y, x = np.mgrid[: size[0], : size[1]]
    return -distance / (normal[0] * (x - camera.cx) / camera.fx + normal[1] * (y - camera.cy) / camera.fy + normal[2])


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("normal", [NORMAL, np.array([0, 0, -1.0]), np.array([0.6, 0, -0.8])], ids=str)
def test_normals_of_a_plane_are_exact(normal, window):
    depth = plane(normal, 2.0, CAMERA)
    assert depth.min() > 0
    normals = normals_from_depth(torch.tensor(depth), CAMERA, window)
    assert normals.shape == (3, *depth.shape)
    assert normals.dtype == torch.float32
    known = normals.norm(dim=0) > 0
    assert known[window // 2 : -(window // 2), window // 2 : -(window // 2)].all()
    expected = torch.tensor(normal).float()[:, None, None].expand_as(normals)
    torch.testing.assert_close(normals[:, known], expected[:, known], atol=1e-6, rtol=0)


def test_normals_are_least_squares_planes():
    """Against the definition, pixel by pixel, on a curved surface with holes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:14, :17]
    depth = 2 + 0.01 * np.sin(x / 3) + 0.02 * np.cos(y / 4) + 1e-4 * rng.standard_normal((14, 17))
    depth[rng.random((14, 17)) < 0.3] = 0
    normals = normals_from_depth(torch.tensor(depth), CAMERA, 5).numpy()
    for row, column in np.ndindex(14, 17):
        near = (abs(y - row) <= 2) & (abs(x - column) <= 2) & (depth > 0)
        if depth[row, column] == 0 or near.sum() < 25 / 3:
            assert not normals[:, row, column].any()
            continue
        rays = np.stack([(x - CAMERA.cx) / CAMERA.fx, (y - CAMERA.cy) / CAMERA.fy, np.ones((14, 17))], -1)[near]
        fit = -np.linalg.lstsq(rays, 1 / depth[near], rcond=None)[0]
        np.testing.assert_allclose(normals[:, row, column], fit / np.linalg.norm(fit), atol=1e-5)


def test_normals_end_where_depth_jumps_or_is_unknown():
    depth = torch.full((40, 60), 1.0)
    depth[:, 30:] = 1.5
    depth[20, 10] = 0
    known = normals_from_depth(depth, CAMERA, 7).norm(dim=0) > 0.5
    assert not known[:, 27:33].any()
    assert known[:, 3:27].sum() == 40 * 24 - 1
    assert known[:, 33:57].all()
    assert not known[20, 10]
    assert not normals_from_depth(torch.zeros(9, 9), CAMERA).any()


@pytest.mark.parametrize("window", [1, 4])
def test_window_must_have_a_centre(window):
    with pytest.raises(ValueError, match="odd number"):
        normals_from_depth(torch.ones(9, 9), CAMERA, window)


def seven_scenes(root, scale=1000):
    """Two frames of a slanted plane, one in a folder of its own."""
    depth = plane(NORMAL, 2.0, CAMERA)
    for name in ("seq-01/frame-000000", "frame-000001"):
        picture(root / f"{name}.color.png", size=depth.shape)
        depth_png(root / f"{name}.depth.png", depth, scale)
        (root / f"{name}.pose.txt").write_text("not read")
    return depth


def test_rgbd_depth_is_metres(tmp_path):
    expected = seven_scenes(tmp_path)
    data = open_data({"name": "rgbd", "path": str(tmp_path)})
    assert data.names == ["frame-000001", "seq-01/frame-000000"]
    sample = data[1]
    assert sample.depth.dtype == torch.float32
    assert sample.labels is sample.normals is None
    assert abs(sample.depth - torch.tensor(expected)).max() <= 0.00051
    values = np.full(expected.shape, 2500, np.uint16)
    values[0, :3] = 0, 65535, 65534
    save(tmp_path / "frame-000001.depth.png", values)
    assert data[0].depth[0, :4].tolist() == pytest.approx([0, 0, 65.534, 2.5])
    tum = open_data({"name": "rgbd", "path": str(tmp_path), "depth_scale": 5000.0})
    assert tum[0].depth[0, 3] == 0.5
    assert tum.fingerprint != data.fingerprint


def test_rgbd_folders_of_equal_names(tmp_path):
    for name in ("1", "10", "9"):
        picture(tmp_path / f"rgb/{name}.png", int(name))
        depth_png(tmp_path / f"depth/{name}.png", np.full((H, W), float(name) / 10))
    data = open_data({"name": "rgbd", "path": str(tmp_path)})
    assert data.names == ["1", "9", "10"]
    assert [sample.depth[0, 0].item() for sample in data] == pytest.approx([0.1, 0.9, 1.0])
    (tmp_path / "depth/9.png").rename(tmp_path / "depth/9.5.png")
    assert "1 images" in refusal("rgbd", tmp_path)
    assert "without depth" in refusal("rgbd", tmp_path)


def flo(path, values, tag=202021.25):
    """Writes (H,W,2) displacements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = np.array([tag], "<f4").tobytes() + np.array(values.shape[1::-1], "<i4").tobytes()
    path.write_bytes(head + values.astype("<f4").tobytes())


@pytest.mark.parametrize("apart", [True, False])
def test_middlebury(tmp_path, apart):
    frames, flows = (tmp_path / part if apart else tmp_path for part in ("other-data", "other-gt-flow"))
    values = np.random.default_rng(0).normal(size=(H, W, 2)).astype(np.float32)
    values[2, 3] = 1666666752.0, 0.0
    for name in ("Urban", "Beanbags"):
        for frame in (10, 11):
            picture(frames / f"{name}/frame{frame}.png", frame, (H, W))
        flo(flows / f"{name}/flow10.flo", values)
    (flows / "hidden").mkdir()  # has no flow
    data = open_data({"name": "middlebury", "path": str(tmp_path)})
    assert data.names == [f"{name}/frame{i}" for name in ("Beanbags", "Urban") for i in (10, 11)]
    assert {name: [*frames] for name, frames in data.videos.items()} == {"Beanbags": [0, 1], "Urban": [2, 3]}
    flow = data[2].flow
    assert flow[:, 2, 3].isnan().all()
    values[2, 3] = np.nan
    np.testing.assert_array_equal(flow.permute(1, 2, 0).numpy(), values)
    assert data[3].flow is None
    before = data.fingerprint
    file = flows / "Urban/flow10.flo"
    flo(file, values[:, :-1])
    with pytest.raises(DataError, match=f"flow10.flo has {H}x{W - 1} pixels, its frame {H}x{W}"):
        data[2]
    flo(file, values + 1)
    assert open_data({"name": "middlebury", "path": str(tmp_path)}).fingerprint != before
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"is damaged: .* Copy it again"):
        data[2]
    flo(file, values, tag=1.0)
    with pytest.raises(DataError, match=r"is not a \.flo file"):
        data[2]
    (frames / "Urban/frame11.png").unlink()
    assert "lacks frame11: complete the copy" in refusal("middlebury", tmp_path)
    for one in flows.rglob("*.flo"):
        one.unlink()
    assert "has no flow; data.path must name" in refusal("middlebury", tmp_path)


def test_flow_of_poses_is_that_of_rendered_scenes():
    data = Scenes(size=[48, 64], num=3, frames=2, num_objects=0, supersampling=1, split="val")
    for first in (0, 2, 4):
        frame, following = data[first], data[first + 1]
        (matrix, pose), (_, other) = data.camera(first), data.camera(first + 1)
        camera = Intrinsics(
            matrix[0, 0].item(), matrix[1, 1].item(), matrix[0, 2].item() - 0.5, matrix[1, 2].item() - 0.5
        )
        flow = flow_from_depth(frame.depth, following.depth, camera, torch.linalg.inv(other) @ pose)
        both = ~(flow.isnan() | frame.flow.isnan()).any(0)
        assert both.float().mean() > 0.3
        assert frame.flow[:, both].abs().max() > 0.3
        assert (flow - frame.flow)[:, both].abs().max() < 1e-3  # depth is float32
        assert flow[:, frame.depth == 0].isnan().all()


def test_points_that_the_next_frame_does_not_see():
    depth = torch.full((4, 12), 2.0)
    motion = torch.eye(4, dtype=torch.float64)
    motion[0, 3] = 0.04  # to the right by two pixels
    flow = flow_from_depth(depth, depth, Intrinsics(100.0, 100.0, 5.5, 1.5), motion)
    assert torch.allclose(flow[0, :, :10], torch.tensor(2.0))
    assert flow[:, :, 10:].isnan().all()  # outside
    covered, unknown = depth.clone(), depth.clone()
    covered[:, 4] = 1.0
    unknown[:, 4] = 0.0
    for following in (covered, unknown):
        seen = flow_from_depth(depth, following, Intrinsics(100.0, 100.0, 5.5, 1.5), motion)[0]
        assert seen[:, 2].isnan().all()
        assert not seen[:, [1, 3]].isnan().any()
    assert flow_from_depth(unknown, depth, Intrinsics(100.0, 100.0, 5.5, 1.5), motion)[:, :, 4].isnan().all()


def test_rgbd_frames_with_poses_are_videos(tmp_path):
    depth = plane((0.0, 0.0, -1.0), 2.0, CAMERA)
    pose = np.eye(4)
    for name, shift in (("a/frame-2", 0.0), ("a/frame-10", 0.1), ("b/frame-1", 0.5), ("frame-3", 0.0)):
        picture(tmp_path / f"{name}.color.png", size=depth.shape)
        depth_png(tmp_path / f"{name}.depth.png", depth)
        pose[0, 3] = shift
        np.savetxt(tmp_path / f"{name}.pose.txt", pose)
    settings = {"intrinsics": [100.0, 110.0, 30.0, 20.0]}
    plain = open_data({"name": "rgbd", "path": str(tmp_path), **settings})
    data = open_data({"name": "rgbd", "path": str(tmp_path), "poses": True, **settings})
    assert plain.videos is None
    assert plain[0].flow is None
    assert plain.fingerprint != data.fingerprint
    assert data.videos == {"a": [0, 1], "b": [2], tmp_path.name: [3]}
    assert [sample.flow is None for sample in data] == [False, True, True, True]
    moved = data[0].flow[0]
    assert moved[~moved.isnan()].mean() == pytest.approx(-0.1 / 2 * 100, abs=0.01)  # depth in millimetres
    assert "data.poses needs the camera" in refusal("rgbd", tmp_path, poses=True)
    lost = tmp_path / "a/frame-10.pose.txt"
    for text, said in (
        ("1 2 3", "has 3 numbers"),
        ("a b", "is not a pose"),
        ("0 " * 16, "no rotation and translation"),
    ):
        lost.write_text(text)
        with pytest.raises(DataError, match=said):
            data[0]
    lost.unlink()
    assert "a/frame-10.color.png) without pose" in refusal("rgbd", tmp_path, poses=True, **settings)


def test_rgbd_normals_need_intrinsics(tmp_path):
    seven_scenes(tmp_path, scale=10000)
    node = {"name": "rgbd", "path": str(tmp_path), "depth_scale": 10000.0}
    (tmp_path / "camera.txt").write_text("100 0 30 # pixels\n0 110 20\n0 0 1\n")
    (tmp_path / "four.txt").write_text("100, 110, 30, 20")
    given = open_data({**node, "intrinsics": [100, 110, 30, 20]})
    normals = given[0].normals
    known = normals.norm(dim=0) > 0
    assert known.float().mean() > 0.95
    cosine = (normals[:, known] * torch.tensor(NORMAL).float()[:, None]).sum(0)
    assert cosine.min() > 0.999  # depth is rounded to 0.1 mm
    for file in ("camera.txt", "four.txt", str(tmp_path / "four.txt")):
        read = open_data({**node, "intrinsics_file": file})
        assert torch.equal(read[0].normals, normals)
        assert read.fingerprint == given.fingerprint
    assert open_data(node).fingerprint != given.fingerprint


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"intrinsics": [1, 2, 3]}, "data.intrinsics: [1.0, 2.0, 3.0] is not fx, fy, cx, cy"),
        ({"intrinsics": [0, 2, 3, 4]}, "fx > 0"),
        ({"intrinsics": [1, float("inf"), 3, 4]}, "finite"),
        ({"intrinsics": [1, 1, 1, 1], "intrinsics_file": "k.txt"}, "keep one"),
        ({"intrinsics_file": "absent.txt"}, "absent.txt cannot be read: no such file"),
        ({"intrinsics_file": "words.txt"}, "words.txt is not a file of intrinsics"),
        ({"intrinsics_file": "skew.txt"}, "not a camera matrix without skew"),
        ({"depth_scale": 0.0}, "data.depth_scale=0.0: give the units per metre"),
        ({"depth_scale": float("nan")}, "data.depth_scale=nan"),
        ({"normal_window": 4}, "data.normal_window=4: give an odd number"),
    ],
)
def test_rgbd_settings_that_make_no_sense(settings, said, tmp_path):
    seven_scenes(tmp_path)
    (tmp_path / "words.txt").write_text("fx fy cx cy")
    (tmp_path / "skew.txt").write_text("1 2 3\n0 1 3\n0 0 1")
    settings = {key: [float(v) for v in value] if isinstance(value, list) else value for key, value in settings.items()}
    assert said in refusal("rgbd", tmp_path, **settings)


def test_rgbd_files_that_do_not_fit(tmp_path):
    assert "has no file *.color.jpeg *.color.jpg *.color.png" in refusal("rgbd", tmp_path)
    seven_scenes(tmp_path)
    last = tmp_path / "seq-01/frame-000000.depth.png"
    save(last, np.zeros((40, 60), np.uint8))
    assert f"{last} has 8 bits per pixel" in refusal("rgbd", tmp_path)
    save(last, np.ones((40, 61), np.uint16))
    assert f"{last} has 61×40 pixels" in refusal("rgbd", tmp_path)
    last.write_bytes(last.read_bytes()[:60])
    assert refusal("rgbd", tmp_path).startswith(f"{last}: ")
    picture(tmp_path / "lonely.color.jpg")
    assert "lonely.color.jpg) without depth" in refusal("rgbd", tmp_path)


def nyuv2(root, size=(40, 60)):
    depth = plane(NORMAL, 2.0, CAMERA, size)
    for i, name in enumerate(("0001", "0002")):
        picture(root / f"images/{name}.png", i, size)
        depth_png(root / f"depth/{name}.png", depth)
    return depth


def test_nyuv2_depth_alone_and_normals_from_it(tmp_path):
    depth = nyuv2(tmp_path)
    node = {"name": "nyuv2", "path": str(tmp_path)}
    data = open_data(node)
    sample = data[0]
    assert data.classes == ()
    assert sample.labels is sample.normals is None
    assert abs(sample.depth - torch.tensor(depth)).max() <= 0.00051
    normals = open_data({**node, "intrinsics": [100, 110, 30, 20]})[0].normals
    known = normals.norm(dim=0) > 0
    assert (normals[:, known] * torch.tensor(NORMAL).float()[:, None]).sum(0).min() > 0.99


def test_nyuv2_with_labels_and_normals(tmp_path):
    nyuv2(tmp_path / "test", (H, W))
    (tmp_path / "test/images").rename(tmp_path / "test/rgb")
    stored = np.zeros((H, W, 3), np.uint8)
    stored[:] = 255, 128, 128  # about (1, 0, 0)
    stored[0, 0], stored[1, 1], stored[2, 2] = (0, 0, 0), (128, 128, 255), (128, 255, 128)
    for name in ("0001", "0002"):
        save(tmp_path / f"test/normals/{name}.png", stored)
        ids(tmp_path / f"test/labels/{name}.png", [*range(41), 255])
    node = {"name": "nyuv2", "path": str(tmp_path), "split": "test", "images": "rgb", "normal_signs": [1, -1, -1]}
    data = open_data(node)
    assert len(data.classes) == 40
    sample = data[1]
    values = pixels(tmp_path / "test/labels/0002.png").astype(int)
    assert sample.labels.tolist() == np.where((values == 0) | (values == 255), IGNORE, values - 1).tolist()
    picked = sample.normals[:, [0, 1, 2, 3], [0, 1, 2, 3]].T
    expected = torch.tensor([[0, 0, 0], [0, 0, -1], [0, -1, 0], [1, 0, 0.0]])
    torch.testing.assert_close(picked, expected, atol=0.005, rtol=0)
    lengths = sample.normals.norm(dim=0)
    torch.testing.assert_close(lengths[lengths > 0], torch.ones(H * W - 1))
    assert "keep one" in refusal(**settings_of(node), intrinsics=[1.0, 1.0, 1.0, 1.0])
    stored[:5] = 128, 128, 0
    save(tmp_path / "test/normals/0002.png", stored)
    assert "most normals point away from the camera" in refusal(**settings_of(node))
    assert "class id 14, 15, 16, 17, 18, 19, 20, 21, ..." in refusal(**settings_of(node), num_classes=13)
    save(tmp_path / "test/normals/0002.png", stored[..., 0])
    assert "has the mode L: normals are expected" in refusal(**settings_of(node | {"labels": "labels"}))


def settings_of(node):
    return {
        "layout": node["name"],
        "root": node["path"],
        **{k: v for k, v in node.items() if k not in ("name", "path")},
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "test"}, "there is no folder test"),
        ({"images": "rgb"}, "there is no folder rgb"),
        ({"labels": "labels40"}, "there is no folder labels40"),
        ({"num_classes": 37}, "data.num_classes=37 must be 13 or 40"),
        ({"normal_signs": [1, 2, 1]}, "give three of 1 and -1"),
        ({"depth_scale": -1.0}, "data.depth_scale=-1.0"),
    ],
)
def test_nyuv2_settings_that_make_no_sense(settings, said, tmp_path):
    nyuv2(tmp_path, (H, W))
    assert said in refusal("nyuv2", tmp_path, **settings)


def test_who_has_the_mat_file_is_led_to_its_layout(tmp_path):
    assert "data=nyuv2_mat" in refusal("nyuv2", tmp_path)


@pytest.fixture
def nyu_mat(tmp_path):
    """Three images in the authors' form: MATLAB's order of axes, class names behind references."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as content:
        content["images"] = rng.integers(0, 256, (3, 3, W, H), dtype=np.uint8)
        content["depths"] = rng.random((3, W, H), dtype=np.float32) + 1
        content["rawDepths"] = np.zeros((3, W, H), np.float32)
        content["labels"] = rng.integers(0, 3, (3, W, H)).astype(np.uint16)
        content["labels"][0, 0, 0] = 7
        for i, name in enumerate(("book", "floor mat")):
            content[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in name], np.uint16)
        content["names"] = np.array([[content["#refs#/0"].ref, content["#refs#/1"].ref]], dtype=h5py.ref_dtype)
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[3], [2]], "testNdxs": [[1]]})
    return tmp_path


def test_nyuv2_mat(nyu_mat):
    data = open_data({"name": "nyuv2_mat", "path": str(nyu_mat), "split": "train"})
    assert data.names == ["0002", "0003"]
    assert data.classes == ("book", "floor mat")
    sample = data[1]
    with h5py.File(nyu_mat / "nyu_depth_v2_labeled.mat") as content:
        for row, column in np.ndindex(H, W):
            assert (sample.image[:, row, column] * 255).round().tolist() == content["images"][
                2, :, column, row
            ].tolist()
            assert sample.depth[row, column] == content["depths"][2, column, row]
            label = int(content["labels"][2, column, row])
            assert sample.labels[row, column] == (label - 1 if label else IGNORE)
    assert sample.normals.shape == (3, H, W)
    raw = open_data({"name": "nyuv2_mat", "path": str(nyu_mat), "raw_depth": True})
    assert not raw[1].depth.any()
    assert len({raw.fingerprint, data.fingerprint}) == 2
    assert "does not know class id 7" in refusal("nyuv2_mat", nyu_mat, split="test")
    assert "there are: all, train, test" in refusal("nyuv2_mat", nyu_mat, split="val")
    (nyu_mat / "splits.mat").unlink()
    assert "splits.mat, which is missing" in refusal("nyuv2_mat", nyu_mat, split="train")
    (nyu_mat / "nyu_depth_v2_labeled.mat").write_bytes(b"nothing")
    assert "not an HDF5 file" in refusal("nyuv2_mat", nyu_mat)
    with h5py.File(nyu_mat / "nyu_depth_v2_labeled.mat", "w") as content:
        content["something"] = 1
    assert "is not nyu_depth_v2_labeled.mat" in refusal("nyuv2_mat", nyu_mat)


# Folders of any photographs


def test_image_folders_of_any_nesting(tmp_path):
    for i, name in enumerate(("b", "a/deep/er/c", "a/d")):
        picture(tmp_path / f"{name}.png", i, (H + i, W))
    data = open_data({"name": "images", "path": [str(tmp_path)]})
    assert sorted(data.names) == ["a/d", "a/deep/er/c", "b"]
    assert {sample.name: sample.image.shape[1] for sample in data} == {"b": H, "a/deep/er/c": H + 1, "a/d": H + 2}
    assert data.videos is None
    assert data[0].labels is None
    names = data.names
    assert open_data({"name": "images", "path": [str(tmp_path)], "first": 1, "last": 2}).names == names[1:2]
    assert open_data({"name": "images", "path": [str(tmp_path)], "first": 1}).names == names[1:]
    with pytest.raises(DataError, match=r"has no image between data.first=3 and data.last=None"):
        open_data({"name": "images", "path": [str(tmp_path)], "first": 3})
    with pytest.raises(NoImages, match="no such file or folder"):
        open_data({"name": "images", "path": [str(tmp_path / "absent")]})


def test_damaged_images_are_refused_or_left_out(tmp_path, caplog):
    good, bad = picture(tmp_path / "good.png"), picture(tmp_path / "bad.png", 1)
    bad.write_bytes(bad.read_bytes()[:80])
    node = {"name": "images", "path": [str(tmp_path)]}
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: .*bad\.png: .*data\.skip_damaged=true"):
        open_data(node)
    caplog.clear()
    assert open_data({**node, "skip_damaged": True}).names == ["good"]
    assert "bad.png" in caplog.text
    good.unlink()
    with pytest.raises(DataError, match="all are damaged"):
        open_data({**node, "skip_damaged": True})


def test_small_images_are_left_out(tmp_path, caplog):
    picture(tmp_path / "small.png")
    picture(tmp_path / "large.png", size=(20, 30))
    node = {"name": "images", "path": [str(tmp_path)]}
    assert open_data({**node, "min_size": 20}).names == ["large"]
    assert "small.png (shorter side 8)" in caplog.text
    with pytest.raises(DataError, match=r"none of 2 images .* at least 21 pixels: .*shorter side 20"):
        open_data({**node, "min_size": 21})


def test_fingerprint_of_image_folders(tmp_path):
    picture(tmp_path / "here/a/x.png", 1)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (open_data({"name": "images", "path": [str(tmp_path / p)]}).fingerprint for p in ("here", "there"))
    assert here == there
    values = pixels(tmp_path / "there/a/x.png")
    values[0, 0, 0] ^= 1
    save(tmp_path / "there/a/x.png", values)
    assert open_data({"name": "images", "path": [str(tmp_path / "there")]}).fingerprint != here


# Configuration


@pytest.fixture
def composed():
    add_root("test_data", {}, {"data": "images"})
    with initialize(version_base=None, config_path=None):
        yield lambda *overrides: compose("test_data", list(overrides)).data


def test_hydra_offers_every_data_set_with_its_settings(composed):
    published = {
        "camvid",
        "voc2012",
        "ade20k",
        "cocostuff27",
        "cityscapes",
        "davis2016",
        "davis2017",
        "frames",
        "middlebury",
        "rgbd",
    }
    assert published | {"images", "nyuv2", "nyuv2_mat"} <= set(data_sets())
    for name in data_sets():
        assert composed(f"data={name}").name == name


def test_hydra_opens_a_data_set(composed, tmp_path):
    build("ade20k", tmp_path)
    data = open_data(composed("data=ade20k", f"data.path={tmp_path}", "data.background=true"))
    assert len(data.classes) == 151
    assert data[0].labels.shape == (H, W)
    seven_scenes(tmp_path / "rgbd")
    node = composed("data=rgbd", f"data.path={tmp_path / 'rgbd'}", "data.intrinsics=[100,110,30,20]")
    assert open_data(node)[0].normals.shape == (3, 40, 60)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=camvid", "data.folder=x"], "Could not override 'data.folder'"),
        (["data=camvid", "data.background=true"], "Could not override 'data.background'"),
        (["data=ade20k", "data.background=perhaps"], "not a valid bool"),
        (["data=rgbd", "data.depth_scale=millimetres"], "could not be converted to Float"),
        (["data=rgbd", "data.intrinsics=[a]"], "could not be converted to Float"),
        (["data=camvit"], "Could not find 'data/camvit'"),
    ],
)
def test_hydra_refuses_what_does_not_exist(overrides, said, composed):
    with pytest.raises((ConfigCompositionException, MissingConfigException)) as caught:
        composed(*overrides)
    assert said in f"{caught.value} {caught.value.__cause__}"


def test_open_data_names_what_is_missing_or_unknown(composed):
    with pytest.raises(DataError, match=r"data=camvid needs a value for path: set data\.path="):
        open_data(composed("data=camvid"))
    with pytest.raises(DataError, match="data=camvid has no setting color; it has: path, split"):
        open_data({"name": "camvid", "path": ".", "color": True})
    with pytest.raises(DataError, match=r"data=camvit is not registered; there are: .*camvid"):
        open_data({"name": "camvit"})


# Real sets


def test_real_camvid(shared):
    root = str(shared("data/camvid"))
    data = {split: open_data({"name": "camvid", "path": root, "split": split}) for split in ("train", "val")}
    assert [len(d) for d in data.values()] == [367, 101]
    seen: set[int] = set()
    for sample in (data["val"][i] for i in range(0, 101, 10)):
        assert sample.image.shape == (3, 360, 480)
        seen |= set(sample.labels.unique().tolist())
    assert seen == {*range(11), IGNORE}
    assert data["train"].fingerprint != data["val"].fingerprint
    assert "there is no folder test" in refusal("camvid", root, split="test")


def test_real_depth(shared):
    root = str(shared("data/rgbd_redkitchen"))
    data = open_data({"name": "rgbd", "path": root, "intrinsics": [526.51, 526.51, 322.86, 237.91]})
    assert len(data) >= 80
    sample = data[5]
    assert sample.image.shape == (3, 480, 640)
    depth = sample.depth[sample.depth > 0]
    assert 0.3 < depth.min() < depth.median() < depth.max() < 10
    known = sample.normals.norm(dim=0) > 0
    assert 0.8 < known.float().mean() / (sample.depth > 0).float().mean() < 1
    assert (sample.depth[known] > 0).all()
    y, x = torch.meshgrid(torch.arange(480), torch.arange(640), indexing="ij")
    rays = torch.stack([(x - 322.86) / 526.51, (y - 237.91) / 526.51, torch.ones(480, 640)])
    assert ((sample.normals * rays).sum(0)[known] < 0).all()  # every surface is seen from its front


def test_real_videos(shared):
    data = open_data({"name": "frames", "path": str(shared("data/video/sintel_raft_demo"))})
    assert {name: len(frames) for name, frames in data.videos.items()} == {"sintel_raft_demo": 10}
    assert data[0].name == "frame_0016"
    data = open_data({"name": "frames", "path": str(shared("data/video/tum_desk"))})
    assert len(data) == 20
    assert data[19].image.shape == (3, 480, 640)
