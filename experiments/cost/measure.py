"""How cost is measured: interleaved times and their ratio, peak memory in a fresh process, agreement, operations.

Nothing here knows what is measured: a thing to measure is a function without arguments.
"""

import ctypes
import errno
import gc
import multiprocessing
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

MIN_RUNS = 3
"""Rounds that are timed in any case; fewer give no median worth the name."""
_REFUSED = re.compile(
    "can't allocate memory|Cannot allocate memory|not enough memory|bad_alloc|ALLOC_FAILED|out of memory", re.I
)
_TIME_TO_EXIT_S = 30
_KILLED = (signal.SIGKILL, signal.SIGABRT)  # the kernel ran out; a C++ allocation failed where nobody catches it


class OutOfMemory(Exception):
    """A computation does not fit: a result, not a defect."""


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Turns the many errors that full memory causes into `OutOfMemory`; others pass."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _REFUSED.search(str(error))
        if full or getattr(error, "errno", None) == errno.ENOMEM:
            raise OutOfMemory((str(error).splitlines() or ["memory was refused"])[0]) from None
        raise


@contextmanager
def arithmetic(num_threads: int, tf32: bool) -> Iterator[None]:
    """Sets CPU threads and, on a GPU, whether float32 products may round to TF32 (PyTorch: convolutions only)."""
    products = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul

    def choose(*precisions: str) -> None:
        # PyTorch's older switch too: torch.export asks it, and gets an error where the two do not say the same.
        torch.backends.cudnn.allow_tf32 = precisions[0] == "tf32"
        for kind, precision in zip(products, precisions, strict=True):
            kind.fp32_precision = precision

    before = torch.get_num_threads(), [kind.fp32_precision for kind in products]
    torch.set_num_threads(num_threads)
    choose(*["tf32" if tf32 else "ieee"] * len(products))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        choose(*before[1])


@dataclass
class Times:
    """Milliseconds of each round."""

    time: list[float] = field(default_factory=list)
    """By the clock; on a GPU between two events of its queue."""
    cpu: list[float] = field(default_factory=list)
    """Of all threads of this process: what other processes on the machine take is not in it."""


def interleave(
    calls: Mapping[str, Callable[[], object]],
    num_warmup: int,
    num_runs: int,
    max_seconds: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Times | OutOfMemory]:
    """Times functions in turn, A B C A B C ..., so that what slows the machine down slows all of them.

    Args:
        calls: by name, in order.
        num_warmup: rounds before those that count.
        num_runs: rounds that count; fewer, but `MIN_RUNS` at least, once `max_seconds` have passed.

    Returns:
        The times of each, of equal length; or that it ran out of memory, after which the others go on without it.
    """
    measured: dict[str, Times | OutOfMemory] = {name: Times() for name in calls}
    started = time.perf_counter()
    for run in range(-num_warmup, num_runs):
        late = max_seconds is not None and time.perf_counter() - started > max_seconds
        if late and run >= MIN_RUNS:
            break
        for name, call in calls.items():
            times = measured[name]
            if isinstance(times, OutOfMemory):
                continue
            try:
                with out_of_memory_named():
                    clock, cpu = _time(call, torch.device(device))
            except OutOfMemory as error:
                measured[name] = OutOfMemory(str(error))  # the error itself keeps what was computed
                continue
            if run >= 0:
                times.time.append(clock)
                times.cpu.append(cpu)
    return measured


def _time(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = time.process_time()
        start.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return start.elapsed_time(end), 1000 * (time.process_time() - cpu)
    clock, cpu = time.perf_counter(), time.process_time()
    call()
    return 1000 * (time.perf_counter() - clock), 1000 * (time.process_time() - cpu)


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of one time divided by the other of the same round, with its 95 % interval."""

    median: float
    low: float
    high: float


def paired_ratio(slow: Sequence[float], fast: Sequence[float], num_resamples: int = 2000) -> Ratio:
    """How many times faster `fast` is; the interval is the percentile bootstrap's, over rounds."""
    ratios = np.divide(slow, fast)
    samples = np.random.default_rng(0).choice(ratios, (num_resamples, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def peak_in_child(prepare: Callable[[], Callable[[], object]], limit: int | None = None) -> int:
    """Peak bytes of what `prepare()` returns, in a fresh process, above what preparing left there.

    Args:
        prepare: importable (it is pickled): builds models and inputs, warms up, returns the function to measure.
        limit: bytes that the process may allocate from then on (Linux).

    Raises:
        OutOfMemory: it needs more, or the system killed it.
        RuntimeError: it failed otherwise; its traceback went to stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_for_parent, args=(sender, prepare, limit))
    child.start()
    sender.close()
    answer: int | str | None = None
    try:
        with suppress(EOFError):  # it ended without an answer
            answer = receiver.recv()
        child.join(_TIME_TO_EXIT_S)
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(answer, int):
        return answer
    if answer is None and -child.exitcode not in _KILLED:
        raise RuntimeError(f"measuring memory failed (exit code {child.exitcode}); the traceback is above")
    raise OutOfMemory(answer or f"the process was ended by {signal.Signals(-child.exitcode).name}")


def _measure_for_parent(sender, prepare: Callable[[], Callable[[], object]], limit: int | None) -> None:
    try:
        with out_of_memory_named():
            sender.send(peak_memory(prepare(), limit))
    except OutOfMemory as error:
        sender.send(str(error))


def peak_memory(call: Callable[[], object], limit: int | None = None) -> int:
    """Peak resident bytes of this process during `call()`, its result included, above the level before.

    Where the peak cannot be reset (not Linux), only growth beyond the process's earlier peak is seen.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # memory that is free already would hide what `call` takes
    if limit is not None and Path("/proc/self/statm").exists():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak to what is resident now
    before = _peak_resident()
    result = call()
    peak = _peak_resident() - before
    del result
    return peak


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_on_gpu(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Peak bytes (allocated, reserved) during `call()`, its result included, above the level before."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    result = call()
    torch.cuda.synchronize(device)
    peaks = torch.cuda.max_memory_allocated(device) - allocated, torch.cuda.max_memory_reserved(device) - reserved
    del result
    return peaks


def difference(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference relative to the largest expected value; both (..., n, m). Not finite: not equal."""
    rows = max(1, 2**24 * expected.shape[-2] // max(1, expected.numel()))  # a few at a time, to need little memory
    worst, largest = [], []
    for some, known in zip(result.split(rows, -2), expected.split(rows, -2), strict=True):
        worst.append((some.float() - known.float()).abs().max())
        largest.append(known.float().abs().max())
    return float(torch.stack(worst).max() / torch.stack(largest).max())


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions (2 per multiply-add); nothing else is counted."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
