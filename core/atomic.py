"""Atomic writing: a file gets a temporary name until it is complete, so it is either whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class CannotWrite(OSError):
    """A result cannot be written: full disk, missing rights. No half-written file is left behind."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written there replaces `path` when the block succeeds.

    Raises:
        CannotWrite: the system refused; names the file and the reason. An earlier file at `path` is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        with part.open("rb") as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotWrite(f"{path} cannot be written: {reason}") from error
    finally:
        part.unlink(missing_ok=True)
