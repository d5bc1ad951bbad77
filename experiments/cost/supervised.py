"""Pieces of work one after the other in a process beside this one, each within its own time.

What overruns its time, or takes its process down, is lost alone: the next piece gets a new process. Pieces that end
well share one, so that a GPU is set up once. Nothing here knows what the work is.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from experiments.cost.measure import OutOfMemory, out_of_memory_named

_LEAST_S = 1.0
"""With less time left than this, nothing is begun."""


@dataclass(frozen=True)
class Job:
    """A piece of work."""

    name: str
    seconds: float
    """That it may take, the start of a process apart."""
    call: Callable[[], Any]
    """Importable (it is pickled), as is what it returns."""


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work."""

    job: Job
    seconds: float
    result: Any = None
    """None unless it ended well."""
    lost: str = ""
    """Why there is no result; empty when there is one."""


def supervise(jobs: Sequence[Job], seconds: float) -> Iterator[Outcome]:
    """Does the jobs in order -> what became of each, as soon as it is known; after `seconds` none is begun or goes on.

    A job that overruns its time is ended; the traceback of one that raises goes to stderr.
    """
    started, worker = time.monotonic(), None
    try:
        for job in jobs:
            left = seconds - (time.monotonic() - started)
            if left < _LEAST_S:
                yield Outcome(job, 0.0, lost="not done: no time was left")
                continue
            worker = worker or _Worker()
            outcome = worker.do(job, left)
            if outcome.lost:  # what it held, and a GPU that it may have left unusable, go with the process
                worker.end()
                worker = None
            yield outcome
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that does what it is sent."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could not use the GPU
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        self._ready = False

    def do(self, job: Job, left: float) -> Outcome:
        """Sends a job and waits for its answer, `job.seconds` at most and never longer than `left`."""
        begun = time.monotonic()
        try:
            if not self._ready:
                if not self._connection.poll(left):
                    return Outcome(job, time.monotonic() - begun, lost="not done: its process did not start in time")
                self._ready = self._connection.recv()
            allowed = min(job.seconds, left - (time.monotonic() - begun))
            begun = time.monotonic()
            self._connection.send(job.call)
            if not self._connection.poll(max(0.0, allowed)):
                return Outcome(job, time.monotonic() - begun, lost=f"ended: it took longer than {allowed:.1f} s")
            result, lost = self._connection.recv()
            return Outcome(job, time.monotonic() - begun, result, lost)
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            lost = f"failed: its process ended with exit code {code}; a traceback, if any, is on stderr"
            return Outcome(job, time.monotonic() - begun, lost=lost)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve(connection: Connection) -> None:
    connection.send(True)
    while True:
        try:
            call = connection.recv()
        except EOFError:  # nobody waits any more
            return
        with ExitStack() as stack:
            stack.push(partial(_last_words, connection))
            try:
                with out_of_memory_named():
                    answer = call(), ""
            except OutOfMemory as error:
                answer = None, f"out of memory: {error}"
            except RuntimeError as error:
                traceback.print_exc()
                answer = None, f"failed: {_first_line(error)}"
        connection.send(answer)


def _last_words(connection: Connection, kind: type | None, error: BaseException | None, trace: object) -> None:
    """Tells what ends this process; the traceback goes to stderr, which may be kept by nobody."""
    if error is not None:
        connection.send((None, f"failed: {kind.__name__}: {_first_line(error)}"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
