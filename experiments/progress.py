"""Progress of long work: a bar on a terminal; elsewhere a log line now and then, with the estimated time left."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Generic, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""Seconds between two log lines; shorter work logs nothing."""
_T = TypeVar("_T")


class Progress(Generic[_T]):
    """Iterates over items, or is told of each step by `update`.

    Args:
        items: to iterate over; None: the caller calls `update` and `close`.
        description: the name of the work. unit: the name of one step, in the singular.
        total: number of steps, where `items` has no length.
        initial: steps done before.
        shown: False: nothing is shown or logged.
        clock: gives seconds; replaced in tests.
    """

    def __init__(
        self,
        items: Iterable[_T] | None = None,
        description: str = "",
        unit: str = "step",
        total: int | None = None,
        initial: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.items, self.description, self.unit, self.clock = items, description, unit, clock
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.done = self.first = initial
        self.note, self.shown = "", shown
        self.started = self.told = clock()
        self.said = 0  # steps done at the last log line
        on_terminal = shown and sys.stderr.isatty()
        self.bar = None
        if on_terminal:
            self.bar = tqdm(total=self.total, desc=description, unit=unit, initial=initial, leave=items is None)

    def __iter__(self) -> Iterator[_T]:
        try:
            for item in self.items or ():
                yield item
                self.update()
        finally:
            self.close()

    def update(self) -> None:
        """One more step is done; `note` is shown beside it."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update()
        elif self.shown and self.clock() - self.told >= EVERY_S:
            self._tell()

    def close(self) -> None:
        """The work has ended."""
        if self.bar is not None:
            self.bar.close()
        elif self.shown and self.said and self.said < self.done == self.total:
            self._tell()
        self.shown, self.bar = False, None

    def _tell(self) -> None:
        self.told, self.said = self.clock(), self.done
        passed, steps = self.told - self.started, self.done - self.first
        line = f"{self.description}: {self.unit} {self.done}"
        if self.total is not None:
            line += f" of {self.total}"
        line += f", {_duration(passed)}"
        if self.total is not None and self.done < self.total and steps:
            line += f", about {_duration(passed / steps * (self.total - self.done))} left"
        log.info("%s%s", line, f", {self.note}" if self.note else "")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
