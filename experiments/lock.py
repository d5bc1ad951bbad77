"""Locks a folder for one process. The system releases the lock when the process ends, even if it is killed."""

import errno
import fcntl
import os
from pathlib import Path

_held: dict[Path, object] = {}  # the system's locks are per process and do not exclude other threads of this one


class Locked(OSError):
    """The lock is held by another process, or by this one already."""


def lock_folder(folder: Path) -> int:
    """Locks a folder, which is made if it is missing -> what `unlock_folder` needs.

    Child processes do not inherit the lock, because they may outlive a killed parent.

    Raises:
        Locked: another process holds it, or this one holds it already.
        OSError: the folder cannot be written.
    """
    folder, mine = folder.resolve(), object()
    if _held.setdefault(folder, mine) is not mine:  # test and set in one call, because other threads may do the same
        raise Locked(f"{folder} is in use by this process")
    lock = -1
    try:
        lock = _lock(folder)
    finally:
        if lock < 0:
            del _held[folder]
    return lock


def unlock_folder(folder: Path, lock: int) -> None:
    """Releases the lock of a folder."""
    try:
        os.close(lock)
    finally:  # not before: closing any descriptor of the file releases a lock that another thread got meanwhile
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
        except FileNotFoundError:  # the folder was removed meanwhile: try again
            pass
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise Locked(f"{folder} is in use by another process") from error
            raise
        os.close(lock)
