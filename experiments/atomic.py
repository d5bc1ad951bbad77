"""Files that are whole or absent: written beside their place first, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from safetensors import SafetensorError


class CannotWrite(OSError):
    """A result cannot be written: full disk, missing rights. No half-written file is left behind."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; it takes the place of `path` when the block succeeds.

    Raises:
        CannotWrite: the system refused; names the file and the reason. What was at `path` before is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        with part.open("rb") as file:
            os.fsync(file.fileno())  # some file systems tell only now that the disk is full
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotWrite(f"{path} cannot be written: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def allocate_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A new `.npy` file mapped into memory, with all its space reserved.

    Without the reservation a full disk would end the process (SIGBUS) at some later store instead of raising here.

    Raises:
        OSError: not enough space.
    """
    array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
