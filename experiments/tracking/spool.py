"""Journals. What a run records is written to its journal first, and sent to the tracking store from there.

One folder per run, `<spool_dir>/<run id>/`:

    journal.jsonl   one JSON object per line, only ever appended to (NaN and Infinity as Python's json writes them)
        {"kind": "start", "time": MS, "experiment": "train", "run_name": null, "parent": null, "resumed": false,
         "tags": {"device": "cpu"}, "params": {"seed": 0}}
        {"kind": "metrics", "time": MS, "step": 3, "values": {"loss": 0.5}}
        {"kind": "tag", "key": "claim", "value": "none"}
        {"kind": "file", "name": "pictures/a.png", "copy": "files/17/a.png", "bytes": 120}
        {"kind": "end", "time": MS, "status": "FINISHED"}       with "process", if it was added for a dead run
    files/          copies of the artifacts, one numbered folder each (NUMBER.part until it is complete)
    position.json   how many bytes of the journal the store has, and the run's identifier there
    refused.jsonl   records that the store will never take, with the reasons
    lock            held by the process that writes or uploads

Times are milliseconds since 1970. A resumed run has several start records. Every line is passed to the operating system
before the call that makes it returns, so a killed process loses nothing. An incomplete last line is removed when the
journal is opened again.
"""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from experiments.lock import Locked, lock_folder, unlock_folder

log = logging.getLogger(__name__)

Record = dict[str, Any]

FIELDS = {
    "start": {"time", "experiment", "run_name", "parent", "resumed", "tags", "params"},
    "metrics": {"time", "step", "values"},
    "tag": {"key", "value"},
    "file": {"name", "copy", "bytes"},
    "end": {"time", "status"},
}
"""The fields that a record of each kind must have."""
_IN_MEMORY = 10_000  # records kept in memory while the disk cannot be written


class SpoolError(OSError):
    """The spool cannot be used: full disk, missing rights."""


class Journal:
    """The journal of one run, locked and open for appending."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self.path = folder, folder / "journal.jsonl"
        self._lock, self._writing = lock, threading.Lock()
        self._unwritten: deque[bytes] = deque(maxlen=_IN_MEMORY)
        self._half = False  # whether the file ends in an incomplete line
        self.cut = _cut_broken_end(self.path)
        """The incomplete last line that was removed when the journal was opened; else empty."""
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.offset, self.store_id = self._read_position()

    @classmethod
    def open(cls, spool_dir: Path, run_id: str) -> "Journal":
        """Opens the journal of a run, new or left by an earlier process.

        Raises:
            Locked: it is open already, here or in another process.
            SpoolError: it cannot be read or written.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w\-]{0,255}", run_id, re.ASCII):
            raise SpoolError(f"{run_id!r} is not a run's identifier")
        folder = spool_dir.resolve() / run_id
        lock = -1
        try:
            lock = lock_folder(folder)
            return cls(folder, lock)
        except Locked:
            raise
        except OSError as error:
            if lock >= 0:
                unlock_folder(folder, lock)
            raise SpoolError(f"the spool {folder} cannot be used: {error.strerror or error}") from error

    def append(self, record: Record) -> None:
        """Writes one record.

        Raises:
            SpoolError: it cannot be written. It stays in memory and is tried again with the next record.
        """
        line = json.dumps(record).encode() + b"\n"
        with self._writing:
            self._unwritten.append(line)
            self._flush()

    def keep(self, name: str, write: Callable[[Path], object]) -> None:
        """Keeps the artifact `name`; `write` is called with the path to write it to.

        Raises:
            SpoolError: it cannot be written. No part of it is left.
        """
        number = str(time.time_ns())
        part = self.folder / "files" / f"{number}.part"
        copy = Path("files", number, name.rpartition("/")[2])
        try:
            part.mkdir(parents=True)
            write(part / copy.name)
            size = (part / copy.name).stat().st_size
            part.rename(self.folder / copy.parent)
        except OSError as error:
            raise SpoolError(f"{name} cannot be kept in {self.folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.append({"kind": "file", "name": name, "copy": copy.as_posix(), "bytes": size})

    def read(self, offset: int, limit: int | None = None) -> Iterator[tuple[Record, int]]:
        """(record, offset of the next) from `offset` on; a line that is not a record comes with the kind `broken`.

        Raises:
            SpoolError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                lines = list(islice(file, limit))
        except FileNotFoundError:  # it was deleted during the run
            return
        except OSError as error:
            raise SpoolError(f"{self.path} cannot be read: {error.strerror or error}") from error
        for line in lines:
            if not line.endswith(b"\n"):  # still being written
                return
            offset += len(line)
            yield _parse(line), offset

    def unwritten(self) -> list[Record]:
        """Returns and forgets the records that could not be written to disk."""
        with self._writing:
            lines = list(self._unwritten)
            self._unwritten.clear()
        return [json.loads(line) for line in lines]

    def put_back(self, records: list[Record]) -> None:
        """Takes back records that could not be sent either."""
        with self._writing:
            self._unwritten.extendleft(json.dumps(record).encode() + b"\n" for record in reversed(records))

    def advance(self, offset: int, store_id: str) -> None:
        """Stores how much the store has. If this cannot be written, records are sent twice, which is harmless."""
        self.offset, self.store_id = offset, store_id
        part = self.folder / "position.part"
        try:
            part.write_text(json.dumps({"offset": offset, "store_id": store_id}))
            part.replace(self.folder / "position.json")
        except OSError as error:
            log.debug("position of %s: %s", self.folder, error)

    def refuse(self, record: Record, reason: str) -> None:
        """Puts aside a record that the store will never take.

        Raises:
            SpoolError: it cannot be written.
        """
        try:
            with (self.folder / "refused.jsonl").open("a") as file:
                file.write(json.dumps({"reason": reason, "record": record}) + "\n")
        except OSError as error:
            raise SpoolError(f"{self.folder}/refused.jsonl cannot be written: {error.strerror or error}") from error

    def refused(self) -> int:
        """How many records were put aside."""
        path = self.folder / "refused.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def close(self) -> None:
        """Closes the journal and keeps it."""
        if self._file >= 0:
            os.close(self._file)
            unlock_folder(self.folder, self._lock)
            self._file = -1

    def remove(self) -> None:
        """Deletes the journal with its files, and closes it."""
        gone = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.done")
        if self.folder.exists():
            self.folder.rename(gone)  # atomic: a half-deleted journal would look complete
        self.close()
        shutil.rmtree(gone, ignore_errors=True)

    def _flush(self) -> None:
        if self._file < 0:
            raise SpoolError(f"{self.path} is closed")
        try:
            if not os.fstat(self._file).st_nlink:
                raise SpoolError(f"{self.path} has been deleted")
            while self._unwritten:
                self._write(self._unwritten[0])
                self._unwritten.popleft()
        except SpoolError:
            raise
        except OSError as error:
            raise SpoolError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _write(self, line: bytes) -> None:
        """Writes a whole line, or removes the part of it that was written."""
        size = os.fstat(self._file).st_size
        rest = line = b"\n" * self._half + line  # ends a part that could not be removed; it is read as a broken line
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            self._half = False
        except OSError:
            try:
                os.ftruncate(self._file, size)
            except OSError:
                self._half |= len(rest) < len(line)
            raise

    def _read_position(self) -> tuple[int, str]:
        try:
            position = json.loads((self.folder / "position.json").read_text())
            offset, store_id = int(position["offset"]), str(position["store_id"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # then everything is sent again
            return 0, ""
        return (offset, store_id) if 0 < offset <= self.path.stat().st_size else (0, "")


def folders(spool_dir: Path) -> list[Path]:
    """The runs of a spool, oldest first, so that a parent comes before its children."""
    found = [path.parent for path in spool_dir.glob("[!.]*/journal.jsonl")]
    return sorted(found, key=lambda folder: (first_record(folder).get("time", 0), folder.name))


def first_record(folder: Path) -> Record:
    """The first record of a journal; empty if it has no complete line, or may not be read."""
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            line = file.readline()
    except (PermissionError, FileNotFoundError):
        return {}
    return _parse(line) if line.endswith(b"\n") else {}


def is_open(folder: Path) -> bool:
    """Whether a process records or uploads this run, or only another user may open it."""
    try:
        unlock_folder(folder, lock_folder(folder))
    except (Locked, PermissionError):
        return True
    return False


def _parse(line: bytes) -> Record:
    try:
        record = json.loads(line)
        if FIELDS[record["kind"]] <= record.keys():
            return record
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"kind": "broken", "line": line.decode(errors="replace").rstrip("\n")}


def _cut_broken_end(path: Path) -> bytes:
    """Removes what a killed process left after the last complete line -> the removed bytes."""
    if not path.exists():
        return b""
    with path.open("r+b") as file:
        end = start = file.seek(0, os.SEEK_END)
        tail = b""
        while start and b"\n" not in tail:
            start = max(0, start - 2**16)
            file.seek(start)
            tail = file.read(end - start)
        tail = tail.rpartition(b"\n")[2]
        file.truncate(end - len(tail))
    if tail:
        log.warning("%s ended in an incomplete line, which is removed: %r", path, tail[:200])
    return tail
