"""Finds image files and reads them as RGB tensors, or says what is wrong with them.

The bundled photographs are those that scikit-image (public domain, CC0) and scikit-learn (CC-BY-2.0, by
danielbuechele and vultilion) install with their code; nothing is downloaded.
"""

import glob
import logging
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from experiments.errors import Told

log = logging.getLogger(__name__)

BUNDLED = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Photographs that need no download: name -> (package, path inside it)."""

SUFFIXES = frozenset(
    (
        ".apng",
        ".avif",
        ".bmp",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
# Pillow also opens formats that run other programs (EPS) or are not photographs (PDF, HDF5): those are refused.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What Pillow's decoders raise on damaged files; there is no common base class.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_METADATA_WARNINGS = "(Possibly c|C)orrupt EXIF|Metadata Warning, tag|Truncated File Read|Invalid APNG|.*malformed MPO"


class NoImages(Told, ValueError):
    """A path, folder or pattern holds no image."""


class UnreadableImage(ValueError):
    """A file that is not an image, is damaged, or has no clear meaning as RGB."""


@dataclass(frozen=True)
class ImageFile:
    """One image to work on."""

    name: str
    """Unique among the images of one call and usable as a relative path; results are named after it."""
    path: Path


def collect(images: str | Iterable[str]) -> list[ImageFile]:
    """Finds images: `bundled`, one bundled name, a file, a folder (with all folders inside), a pattern, or several.

    From a folder come all files with an image suffix that are not hidden; a file or pattern gives all that it names.

    Raises:
        NoImages: an entry leads to no image; the message names it.
    """
    entries = [images] if isinstance(images, str) else [str(entry) for entry in images]
    if not entries:
        raise NoImages("images is empty: give a file, a folder, a pattern such as 'photos/*.jpg', or 'bundled'")
    found: dict[Path, str] = {}
    for entry in entries:
        for path, name in _find(entry):
            found.setdefault(path, name)
    return [ImageFile(name, path) for path, name in zip(found, _unique_names(found), strict=True)]


def bundled(name: str) -> Path:
    """The file of a bundled photograph.

    Raises:
        NoImages: unknown name (the message lists the names), or the installed package does not include the file.
    """
    if name not in BUNDLED:
        raise NoImages(f"no bundled photograph is called {name!r}; there are: {', '.join(BUNDLED)}")
    package, inside = BUNDLED[name]
    found = find_spec(package)  # does not import it, which would take seconds
    if found is None or not (path := Path(found.origin).parent / inside).is_file():
        raise NoImages(f"the installed {package} does not include {inside}: choose other images")
    return path


def read(path: str | Path, upright: bool = True, max_pixels: int | None = None) -> Tensor:
    """Reads an image as (1,3,H,W) float32 RGB in [0,1], upright (EXIF), the first frame of several.

    Grey becomes three equal channels. Transparent pixels are laid over white. Palettes and CMYK are converted. 16-bit
    values are divided by 65535. `upright=False` keeps pixels where they are stored, so that they match label files.
    `max_pixels` refuses larger images before they are decoded.

    Raises:
        UnreadableImage: missing, damaged, empty, too large, or values of unknown scale; names the file and the reason.
    """
    path = Path(path)
    Image.init()  # without it Pillow knows only some of its formats by name
    try:
        with warnings.catch_warnings():
            # Large photographs are accepted (Pillow still refuses twice its limit). Damaged metadata changes no pixel.
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", message=_METADATA_WARNINGS)
            with Image.open(path, formats=_FORMATS) as opened:
                if max_pixels is not None and opened.width * opened.height > max_pixels:
                    raise UnreadableImage(
                        f"{path}: {opened.width} x {opened.height} pixels are too many, at most {max_pixels / 1e6:g} "
                        "million are taken: make it smaller"
                    )
                return _to_tensor(_to_rgb(ImageOps.exif_transpose(opened) if upright else opened))
    except UnreadableImage:
        raise
    except _DECODER_ERRORS as error:
        raise UnreadableImage(f"{path}: {_reason(error)}") from error


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,3,H,W) RGB in [0,1] -> (B,3,*size), bicubic and antialiased; unchanged if it has that size already."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)


def shrink(image: Tensor, max_size: int | None) -> Tensor:
    """(1,3,H,W) -> the same picture with its longer side at most `max_size` pixels; never enlarged."""
    height, width = image.shape[-2:]
    if max_size is None or max(height, width) <= max_size:
        return image
    scale = max_size / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return resized(image, size)  # (1,3,H',W')


def centre_square(image: Tensor, side: int) -> Tensor:
    """(B,3,H,W) -> (B,3,side,side): resized so that the shorter side is `side` pixels, then cropped at its centre."""
    height, width = image.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    image = resized(image, size)  # (B,3,H',W')
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return image[..., top : top + side, left : left + side]  # (B,3,side,side)


def square_flow(flow: Tensor, side: int) -> Tensor:
    """(B,2,H,W) flow in pixels -> (B,2,side,side), for frames that went through `centre_square`, in their pixels.

    Each value is that of the nearest pixel, so that NaN does not spread.
    """
    height, width = flow.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    factor = flow.new_tensor([size[1] / width, size[0] / height]).view(2, 1, 1)  # x, y
    resized = F.interpolate(flow, size, mode="nearest-exact") * factor  # (B,2,H',W')
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[..., top : top + side, left : left + side]


def _find(entry: str) -> list[tuple[Path, str]]:
    """The images of one entry, sorted: (path, name without suffix)."""
    if entry == "bundled":
        return [(bundled(name), name) for name in BUNDLED]
    if entry in BUNDLED and not Path(entry).exists():
        return [(bundled(entry), entry)]
    start = Path(entry).expanduser()
    if start.is_dir():
        found = _in_folder(start)
        if not found:
            raise NoImages(f"the folder {entry!r} holds no image ({' '.join(sorted(SUFFIXES))})")
        return found
    if start.exists():
        return [(start, start.stem)]
    # Path.glob takes no absolute pattern
    matches = sorted(Path(match) for match in glob.glob(str(start), recursive=True))  # noqa: PTH207
    found = [item for path in matches for item in (_in_folder(path) if path.is_dir() else [(path, path.stem)])]
    if not found:
        what = "the pattern matches no file" if glob.has_magic(entry) else "no such file or folder"
        raise NoImages(
            f"{entry!r}: {what}; write `bundled` instead for the bundled photographs, or name one of: "
            f"{', '.join(BUNDLED)}"
        )
    return found


def _in_folder(folder: Path) -> list[tuple[Path, str]]:
    found, ignored = [], 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES:
                found.append((path, path.relative_to(folder).with_suffix("").as_posix()))
            else:
                ignored += 1
    if ignored:
        log.info("%s: %d files without an image suffix are skipped", folder, ignored)
    return found


def _unique_names(found: dict[Path, str]) -> list[str]:
    """Makes names unique: equal ones get their suffix, then a number."""
    count = Counter(found.values())
    names = [name if count[name] == 1 else name + path.suffix.replace(".", "_") for path, name in found.items()]
    taken: set[str] = set()
    for i, name in enumerate(names):
        number = 2
        while names[i] in taken:
            names[i] = f"{name}-{number}"
            number += 1
        taken.add(names[i])
    return names


def _to_rgb(image: Image.Image) -> Image.Image | np.ndarray:
    """RGB, or for grey modes of more than 8 bits an (H,W) array in [0,1]."""
    if image.mode.startswith("I"):
        return _scaled(image, 65535)
    if image.mode == "F":
        return _scaled(image, 1)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, top: int) -> np.ndarray:
    values = np.asarray(image, dtype=np.float64)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise ValueError(f"mode {image.mode} with values outside 0..{top}: their scale is unknown, convert it first")
    return values / top


def _to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(image)).float() / 255  # (H,W,3)
    else:
        pixels = torch.from_numpy(image).float().unsqueeze(-1).expand(-1, -1, 3)  # (H,W,3)
    return pixels.permute(2, 0, 1).unsqueeze(0).contiguous()  # (1,3,H,W)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or not in a supported format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
