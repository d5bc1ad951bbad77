"""Reads PNG files with one number per pixel, and turns class ids into classes."""

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.data.base import DataError

# What Pillow's PNG decoder raises on damaged files; there is no common base class.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_png(path: Path) -> tuple[np.ndarray, str]:
    """The stored values of a PNG, (H,W) or (H,W,channels), and Pillow's name of their mode.

    Checksums are compared, because a damaged file may decode to wrong numbers.

    Raises:
        DataError: missing or damaged; names the file.
    """
    try:
        content = BytesIO(path.read_bytes())
        with Image.open(content, formats=("PNG",)) as opened:
            opened.verify()  # which leaves the image unusable
        with Image.open(content, formats=("PNG",)) as opened:
            return np.array(opened), opened.mode
    except _DECODER_ERRORS as error:
        raise DataError(f"{path}: {why(error)}. Copy the file again") from error


def read_ids(path: Path) -> np.ndarray:
    """The (H,W) integers that a one-channel or palette PNG stores.

    Raises:
        DataError: damaged, or a colour picture instead of numbers; names the file.
    """
    values, mode = read_png(path)
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(f"{path} is a {mode} picture: expected a PNG with one number (or palette index) per pixel")
    return values


def classes_of(ids: np.ndarray, label_classes: np.ndarray, where: str) -> Tensor:
    """(H,W) ids -> (H,W) int64 classes by the table `label_classes`.

    Raises:
        DataError: ids that the table does not know; the message begins with `where`.
    """
    known = (ids >= 0) & (ids < len(label_classes))
    classes = np.where(known, label_classes[np.where(known, ids, 0)], -1)  # (H,W)
    if (classes < 0).any():
        unknown = np.unique(ids[classes < 0])
        expected = ", ".join(map(str, np.flatnonzero(label_classes >= 0)))
        raise DataError(
            f"{where} does not know class id {', '.join(map(str, unknown[:8]))}{', ...' if len(unknown) > 8 else ''} "
            f"(it knows {expected}): these labels belong to another data set or use another numbering"
        )
    return torch.from_numpy(classes)


def table(classes: Mapping[int, int], size: int = 256) -> np.ndarray:
    """(size,) int64 lookup table, id -> class; -1 for ids that must not occur."""
    lookup = np.full(size, -1, dtype=np.int64)
    lookup[list(classes)] = list(classes.values())
    return lookup


def why(error: BaseException) -> str:
    """What an error says went wrong, without the path."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a PNG file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
