"""One process at a time in a folder; the system lets go of the lock when the process ends, however it ends."""

import errno
import fcntl
import os
from pathlib import Path

_held: set[Path] = set()  # the system's locks are per process: within one they keep nobody out


class Locked(OSError):
    """Somebody else holds the lock."""


def lock_folder(folder: Path) -> int:
    """Locks a folder, made when there is none -> what `unlock_folder` needs.

    The lock is not inherited by child processes, which may outlive a killed parent.

    Raises:
        Locked: another process has it, or this one has it already.
        OSError: the folder cannot be written.
    """
    folder = folder.resolve()
    if folder in _held:
        raise Locked(f"{folder} is in use by this process")
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                _held.add(folder)
                return lock
        except FileNotFoundError:  # the folder has been removed: try the next one
            pass
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise Locked(f"{folder} is in use by another process") from error
            raise
        os.close(lock)


def unlock_folder(folder: Path, lock: int) -> None:
    """Lets go of a folder."""
    _held.discard(folder.resolve())
    os.close(lock)
