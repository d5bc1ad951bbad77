"""Writing results: files that are whole or absent (`replacing`), and arrays larger than memory."""

import os
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from core.atomic import CannotWrite, replacing

__all__ = ["CannotWrite", "allocate_array", "replacing"]


def allocate_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A new `.npy` file mapped into memory, with all its space reserved.

    Without the reservation, a full disk would kill the process (SIGBUS) at some later write instead of raising here.

    Raises:
        OSError: not enough space.
    """
    array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
