"""Progress of long work: a bar on a terminal or in a notebook; elsewhere a log line now and then, and the time left."""

import html
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, Generic, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""Seconds between two log lines; shorter work logs nothing."""
_REDRAWN_S = 0.2
"""Seconds between two changes of a notebook's bars."""
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
        self.bar = None
        self.notebook = _Notebook.here() if shown else None
        if self.notebook is not None:
            self.notebook.add(self)
        elif shown and sys.stderr.isatty():
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
        elif self.notebook is not None:
            self.notebook.draw()
        elif self.shown and self.clock() - self.told >= EVERY_S:
            self._tell()

    def close(self) -> None:
        """The work has ended."""
        if self.bar is not None:
            self.bar.close()
        elif self.notebook is not None:
            self.notebook.remove(self)
        elif self.shown and self.said and self.said < self.done == self.total:
            self._tell()
        self.shown, self.bar, self.notebook = False, None, None

    @property
    def line(self) -> str:
        """How far it is, in words."""
        passed, steps = self.clock() - self.started, self.done - self.first
        line = f"{self.description}: {self.unit} {self.done}"
        if self.total is not None:
            line += f" of {self.total}"
        line += f", {_duration(passed)}"
        if self.total is not None and self.done < self.total and steps:
            line += f", about {_duration(passed / steps * (self.total - self.done))} left"
        return f"{line}, {self.note}" if self.note else line

    def _tell(self) -> None:
        self.told, self.said = self.clock(), self.done
        log.info("%s", self.line)


class _Notebook:
    """The bars of one cell of a notebook: those of the work under way, one below the other, in one output."""

    now: "_Notebook | None" = None
    """Of the cell that runs, or ran last."""

    def __init__(self, cell: int):
        from IPython.display import display

        self.cell, self.active, self.drawn = cell, [], 0.0
        self.handle = display({"text/plain": "", "text/html": ""}, raw=True, display_id=True)

    @classmethod
    def here(cls) -> "_Notebook | None":
        """None: this is no notebook."""
        ipython: Any = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            return None
        if cls.now is None or cls.now.cell != shell.execution_count:
            cls.now = cls(shell.execution_count)
        return cls.now

    def add(self, work: Progress) -> None:
        self.active.append(work)
        self.draw(at_once=True)

    def remove(self, work: Progress) -> None:
        self.active.remove(work)
        self.draw(at_once=not self.active)

    def draw(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self.drawn < _REDRAWN_S:
            return
        self.drawn = time.monotonic()
        bars = [
            f"<progress max='{work.total or 1}' value='{work.done if work.total else 0}'></progress>"
            for work in self.active
        ]
        lines = [work.line for work in self.active]
        shown = "<br>".join(f"{bar} {html.escape(line)}" for bar, line in zip(bars, lines, strict=True))
        self.handle.update({"text/plain": "\n".join(lines), "text/html": shown}, raw=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
