"""Images of every odd kind, read from real files; and what is found where."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.image_files import BUNDLED, NoImages, UnreadableImage, collect, read, shrink

RED, BLUE = (220, 20, 20), (20, 20, 220)


def rgb16_png(path, value):
    """Pillow cannot write 16-bit RGB."""
    row = b"\0" + struct.pack(">3H", *value) * 4
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row * 3)), (b"IEND", b"")
    packed = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def flat(mode, value, size=(4, 3)):
    return Image.new(mode, size, value)


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (flat("RGB", RED), ".png", (220 / 255, 20 / 255, 20 / 255)),
        (flat("L", 51), ".png", (0.2, 0.2, 0.2)),
        (flat("1", 1), ".png", (1, 1, 1)),
        (flat("LA", (0, 0)), ".png", (1, 1, 1)),
        (flat("RGBA", (255, 0, 0, 51)), ".png", (1, 0.8, 0.8)),
        (flat("RGB", BLUE).quantize(4), ".gif", (20 / 255, 20 / 255, 220 / 255)),
        (flat("CMYK", (0, 255, 255, 0)), ".tif", (1, 0, 0)),
        (flat("YCbCr", (128, 128, 128)), ".jpg", (0.5, 0.5, 0.5)),
        (Image.fromarray(np.full((3, 4), 32768, np.uint16)), ".png", (0.5, 0.5, 0.5)),
        (Image.fromarray(np.full((3, 4), 65535, np.uint16)), ".png", (1, 1, 1)),
        (Image.fromarray(np.full((3, 4), 32768, np.uint16)), ".tif", (0.5, 0.5, 0.5)),
        (Image.fromarray(np.full((3, 4), 0.25, np.float32)), ".tif", (0.25, 0.25, 0.25)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_kind_becomes_rgb(tmp_path, image, suffix, expected):
    image.save(tmp_path / f"a{suffix}")
    pixels = read(tmp_path / f"a{suffix}")
    assert pixels.shape == (1, 3, 3, 4)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0].mean((1, 2)), torch.tensor(expected).float(), atol=0.011, rtol=0)


def test_16_bit_colours_keep_their_meaning(tmp_path):
    rgb16_png(tmp_path / "a.png", (65535, 32768, 0))
    torch.testing.assert_close(read(tmp_path / "a.png")[0, :, 0, 0], torch.tensor([1, 0.5, 0]), atol=0.005, rtol=0)


def test_transparent_palette_is_laid_over_white(tmp_path):
    image = Image.new("P", (4, 3), 0)
    image.putpalette([*RED, *BLUE])
    image.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    assert read(tmp_path / "a.png").min() == 1


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_photographs_are_turned_upright(tmp_path, orientation, corner):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read(tmp_path / "a.png")
    assert pixels.shape[-2:] == ((4, 8) if orientation in (1, 3) else (8, 4))
    assert pixels[0, 0][corner] == 0
    assert pixels.sum() == 3 * 31


def test_the_first_frame_of_an_animation(tmp_path):
    first, second = flat("RGB", RED), flat("RGB", BLUE)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read(tmp_path / "a.gif")[0, 0].mean() > 0.8


def damaged_png(path):
    flat("RGB", RED, (64, 64)).save(path)
    content = bytearray(path.read_bytes())
    content[45] ^= 0xFF
    path.write_bytes(content)


def truncated_jpeg(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b""), "not an image"),
        (lambda path: path.write_text("hello"), "not an image"),
        (lambda path: None, "no such file"),
        (damaged_png, "broken|corrupt|checksum|decod|crc"),
        (truncated_jpeg, "truncated"),
        (lambda path: Image.fromarray(np.full((3, 4), 7.5, np.float32)).save(path, "tiff"), "scale is unknown"),
        (lambda path: Image.fromarray(np.full((3, 4), -7, np.int32)).save(path, "tiff"), "scale is unknown"),
        (lambda path: flat("RGB", RED).save(path, "pdf"), "not an image"),
    ],
    ids=["empty", "text", "missing", "damaged", "truncated", "float", "negative", "document"],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, write, reason):
    path = tmp_path / "odd.png"
    write(path)
    with pytest.raises(UnreadableImage, match=rf"odd\.png: .*(?i:{reason})"):
        read(path)


def test_huge_images_are_refused_by_name(tmp_path, monkeypatch):
    flat("RGB", RED, (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 + 1)
    assert read(tmp_path / "a.png").shape == (1, 3, 64, 64)  # up to twice the limit: welcome, without a warning
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"a\.png: .*exceeds limit"):
        read(tmp_path / "a.png")


def test_bundled_photographs_are_all_there():
    found = collect("bundled")
    assert [file.name for file in found] == list(BUNDLED)
    for file in found:
        pixels = read(file.path)
        assert min(pixels.shape[-2:]) >= 300
        assert pixels.std() > 0.1
    assert collect(["coffee"])[0].path == found[2].path


@pytest.fixture
def album(tmp_path):
    for name in ("b.png", "a.jpg", "deep/er/c.PNG", "deep/a.jpg", ".hidden.png", ".trash/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(images):
    return [file.name for file in collect(images)]


def test_a_folder_is_searched_to_its_leaves(album):
    assert names(str(album)) == ["a", "b", "deep/a", "deep/er/c"]


def test_patterns_and_lists(album):
    assert names(f"{album}/*.jpg") == ["a"]
    assert names(f"{album}/**/*.jpg") == ["a_jpg", "a_jpg-2"]
    assert names([f"{album}/b.png", f"{album}/notes.txt"]) == ["b", "notes"], "what is named is tried"
    assert names([f"{album}/b.png", str(album)]).count("b") == 1, "no image twice"


def test_names_differ_where_only_the_suffix_does(tmp_path):
    for name in ("x.png", "x.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert names(str(tmp_path)) == ["x_jpg", "x_png"]


def test_a_file_with_brackets_in_its_name_is_no_pattern(tmp_path):
    (tmp_path / "a[1].png").write_bytes(b"")
    assert names(str(tmp_path / "a[1].png")) == ["a[1]"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty"),
        ("{}/nothing", "no such file or folder.*write `bundled` instead"),
        ("{}/*.jpg", "pattern matches no file"),
        ("{}", "folder .* holds no image"),
    ],
)
def test_finding_nothing_says_where(tmp_path, images, message):
    with pytest.raises(NoImages, match=message):
        collect(images.format(tmp_path) if isinstance(images, str) else images)


def test_shrinking_keeps_the_shape_and_never_enlarges():
    image = torch.rand(1, 3, 30, 60)
    assert shrink(image, 20).shape == (1, 3, 10, 20)
    assert shrink(torch.rand(1, 3, 2, 400), 20).shape == (1, 3, 1, 20)
    assert shrink(image, 60) is image
    assert shrink(image, 100) is image
    assert shrink(image, None) is image
    assert shrink((image > 0.5).float(), 20).min() >= 0
    assert shrink((image > 0.5).float(), 20).max() <= 1
