"""One process at a time in a folder; the system lets go of the lock when the process ends, however it ends."""

import errno
import fcntl
import os
from pathlib import Path

_held: dict[Path, object] = {}  # the system's locks are per process: within one they keep nobody out


class Locked(OSError):
    """Somebody else holds the lock."""


def lock_folder(folder: Path) -> int:
    """Locks a folder, made when there is none -> what `unlock_folder` needs.

    The lock is not inherited by child processes, which may outlive a killed parent.

    Raises:
        Locked: another process has it, or this one has it already.
        OSError: the folder cannot be written.
    """
    folder, mine = folder.resolve(), object()
    if _held.setdefault(folder, mine) is not mine:  # asks and enters at once: another thread may do the same
        raise Locked(f"{folder} is in use by this process")
    lock = -1
    try:
        lock = _lock(folder)
    finally:
        if lock < 0:
            del _held[folder]
    return lock


def unlock_folder(folder: Path, lock: int) -> None:
    """Lets go of a folder."""
    try:
        os.close(lock)
    finally:  # only now: closing any descriptor of the file gives up whatever lock this process has by then
        _held.pop(folder.resolve(), None)


def _lock(folder: Path) -> int:
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:  # the folder has been removed: try the next one
            pass
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise Locked(f"{folder} is in use by another process") from error
            raise
        os.close(lock)
