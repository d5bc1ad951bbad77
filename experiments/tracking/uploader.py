"""Sends a run's journal to the tracking store: `Drain` sends what is new, `Uploader` does so while a run is at work.

A record may be sent twice, after a crash or a lost answer. That is harmless: a store identifies a metric point by key,
time, step and value, and a tag, parameter or file by its name.
"""

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Protocol

from experiments.tracking.run import Run, SystemMetrics
from experiments.tracking.spool import Journal, Record, SpoolError

log = logging.getLogger(__name__)

Point = tuple[str, float, int, int]
"""Key, value, milliseconds since 1970, step."""
_LINES = 500  # lines of the journal per request; the store splits a record of many values
_PERIOD_S = 1.0  # between requests when all is well
_LONGEST_WAIT_S = 30.0  # between tries when the store is away


class StoreAway(OSError):
    """The store does not answer, or cannot do it now, but may later."""


class StoreRefuses(ValueError):
    """The store will never take this."""


class Store(Protocol):
    """A store of runs. Every method may raise StoreAway; methods that send may raise StoreRefuses."""

    def find(self, run_id: str) -> str | None:
        """The store's identifier of a run."""

    def begin(self, run_id: str, start: Record) -> str:
        """Makes the run if it is missing, and sets it RUNNING -> the store's identifier."""

    def log(self, store_id: str, points: list[Point], tags: dict[str, str]) -> None:
        """Adds points and sets tags."""

    def upload(self, store_id: str, file: Path, name: str) -> None:
        """Keeps a file as the artifact `name`, which must end with the file's name."""

    def end(self, store_id: str, end: Record) -> None:
        """Closes the run."""

    def points(self, store_id: str, key: str) -> list[Point]:
        """All points of a metric."""

    def sizes(self, store_id: str, folder: str) -> dict[str, int | None]:
        """The artifacts in a folder -> their bytes, None for a folder."""


class Drain:
    """Sends a journal to a store, from the position reached so far."""

    def __init__(self, journal: Journal, store: Store, keep_copies: bool = False) -> None:
        self.journal, self.store, self.keep_copies = journal, store, keep_copies
        self.ended = False
        """Whether the store has the end of the run."""
        self.store_id: str | None = None
        """The store's identifier, once it knows the run."""

    def __call__(self) -> None:
        """Sends everything recorded so far.

        Raises:
            StoreAway: the next call sends the rest.
            SpoolError: the store refused a record, and it cannot be written to disk either.
        """
        if self.store_id is None and self.journal.store_id:
            self.store_id = self.store.find(self.journal.store_id)
        offset = self.journal.offset if self.store_id else 0  # a store that does not know the run gets all of it
        batch: list[Record] = []
        while lines := list(self.journal.read(offset, _LINES)):
            for record, end in lines:
                if record["kind"] in ("metrics", "tag"):
                    batch.append(record)
                else:
                    batch = self._log(batch)
                    taken = self._apply(record)
                    self._advance(end)
                    if taken and record["kind"] == "file" and not self.keep_copies:
                        shutil.rmtree((self.journal.folder / record["copy"]).parent, ignore_errors=True)
                offset = end
            batch = self._log(batch)
            self._advance(offset)
        self._send_unwritten()

    def _send_unwritten(self) -> None:
        """Sends records that could not be written to disk from memory."""
        records = self.journal.unwritten()
        while records:
            try:
                self._apply(records[0])
            except (StoreAway, SpoolError):
                self.journal.put_back(records)
                raise
            records.pop(0)

    def _advance(self, offset: int) -> None:
        if self.store_id is not None and offset != self.journal.offset:
            self.journal.advance(offset, self.store_id)

    def _apply(self, record: Record) -> bool:
        """Sends one record -> whether the store took it."""
        kind = record["kind"]
        if kind == "start":
            self._begin(record)
        elif self.store_id is None or kind == "broken":
            return self._refuse(record, "the line is broken" if kind == "broken" else "the start is missing")
        elif kind in ("metrics", "tag"):
            self._log([record])
        else:
            self.ended = kind == "end"
            try:
                if kind == "end":
                    self.store.end(self.store_id, record)
                else:
                    self.store.upload(self.store_id, self.journal.folder / record["copy"], record["name"])
            except StoreRefuses as error:
                return self._refuse(record, str(error))
        return True

    def _begin(self, start: Record) -> None:
        self.ended = False
        try:
            self.store_id = self.store.begin(self.journal.folder.name, start)
        except StoreRefuses as error:  # for example a deleted run, which can be restored
            raise StoreAway(f"the run cannot be started: {error}") from error

    def _log(self, records: list[Record]) -> list[Record]:
        """Sends metrics and tags in one request, or one by one if it is refused -> what is left to send: nothing."""
        if not records:
            return []
        if self.store_id is None:
            for record in records:
                self._refuse(record, "the start is missing")
            return []
        points = [
            (key, value, record["time"], record["step"])
            for record in records
            if record["kind"] == "metrics"
            for key, value in record["values"].items()
        ]
        tags = {record["key"]: record["value"] for record in records if record["kind"] == "tag"}
        try:
            self.store.log(self.store_id, points, tags)
        except StoreRefuses as error:
            if len(records) == 1:
                self._refuse(records[0], str(error))
            else:
                for record in records:
                    self._log([record])
        return []

    def _refuse(self, record: Record, reason: str) -> bool:
        log.error("run %s: %s cannot be uploaded: %s", self.journal.folder.name, str(record)[:200], reason)
        self.journal.refuse(record, reason)
        return False


class Uploader(threading.Thread):
    """A thread that sends what a run records about once a second, and samples the machine; the run never waits."""

    def __init__(self, run: Run, store: Store | None, sample_s: float | None) -> None:
        super().__init__(name=f"tracking {run.run_id}", daemon=True)
        self.complete = False
        """Whether the store has everything."""
        self._record, self._journal, self._sample_s = run, run.journal, sample_s
        self._drain = None if store is None else Drain(run.journal, store)
        self._system = SystemMetrics()
        self._next_sample = self._next_try = self._wait = 0.0
        self._away = False
        self._ending, self._abandoned = threading.Event(), threading.Event()

    def run(self) -> None:
        """The work of the thread. It ends when the run has ended and all is sent, or when nobody waits any longer."""
        try:
            while not self._abandoned.is_set():
                ending = self._ending.is_set()  # read before draining, so that the drain includes the end
                if not ending and self._sample_s is not None and time.monotonic() >= self._next_sample:
                    self._next_sample = time.monotonic() + self._sample_s
                    self._record.metrics(*self._system.sample())
                if self._drain is not None and (ending or time.monotonic() >= self._next_try):
                    self._try(self._drain)
                if ending and (self._drain is None or (self._drain.ended and not self._away)):
                    break
                (self._abandoned if ending else self._ending).wait(_PERIOD_S)
        finally:
            self.complete = self._drain is not None and self._drain.ended and not self._away
            if self.complete and not self._journal.refused():
                self._journal.remove()
            elif self._ending.is_set():  # otherwise the run still writes
                self._journal.close()

    def finish(self, patience_s: float) -> None:
        """Waits until all is sent, but at most `patience_s` without progress."""
        self._ending.set()
        progress, since = self._journal.offset, time.monotonic()
        while self.is_alive() and time.monotonic() - since < patience_s:
            self.join(0.05)
            if self._journal.offset != progress:
                progress, since = self._journal.offset, time.monotonic()
        self._abandoned.set()
        if not self.is_alive():
            self._journal.close()

    def _try(self, drain: Drain) -> None:
        try:
            drain()
        except (StoreAway, SpoolError) as error:
            if not self._away:
                log.warning(
                    "run %s goes on without the tracking store, and records to disk: %s", self._record.run_id, error
                )
            self._away, self._wait = True, min(_LONGEST_WAIT_S, 2 * self._wait or _PERIOD_S)
            self._next_try = time.monotonic() + self._wait
            return
        if self._away:
            log.warning("the tracking store takes run %s again", self._record.run_id)
        self._away, self._wait, self._next_try = False, 0.0, 0.0
