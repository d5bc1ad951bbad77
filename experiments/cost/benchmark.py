"""Measures the benchmark's arms at one size: peak memory (CPU: in a fresh process), agreement, then times, interleaved.

What goes wrong with one arm goes into its row. What does not fit into memory is a result.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import psutil
import torch
from omegaconf import DictConfig

import core
from core.checks import check_linear
from experiments.cost.benchmark_arms import (
    PreparedArm,
    bench_peer,
    dense_reference,
    forward_flops,
    make_arm,
    make_batch,
    warmed_up,
)
from experiments.cost.benchmark_cases import ARM_NAMES, READOUT_ARMS, Case, cases_of, dense_bytes, queries_at_once
from experiments.cost.measure import (
    MIN_RUNS,
    OutOfMemory,
    Times,
    difference,
    interleave,
    out_of_memory_named,
    paired_ratio,
    peak_in_child,
    peak_on_gpu,
)
from experiments.peers import CannotUpsample, peers
from experiments.settings import DTYPES, SettingError

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}
"""Of outputs; gradients may differ ten times as much. An untrained model magnifies rounding; tests/ are stricter."""


@dataclass
class Row:
    """What was measured of one arm at one size; None: not measured."""

    case: Case
    arm: str
    device: str
    threads: int
    queries_at_once: int | None
    """Of the dense arm; None: all."""
    num_warmup: int
    parameters: int | None = None
    gflops: float | None = None
    budget_mb: float | None = None
    status: str = "ok"
    """ok, or why something was not measured: `out of memory...`, `refused...`, `wrong...`, `failed...`."""
    num_runs: int = 0
    time_ms: float | None = None
    time_min_ms: float | None = None
    cpu_ms: float | None = None
    cpu_min_ms: float | None = None
    against: str = ""
    """The arm that the ratios compare with."""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    cpu_ratio: float | None = None
    memory_mb: float | None = None
    reserved_mb: float | None = None
    difference: float | None = None

    @property
    def of_budget(self) -> float | None:
        """Peak memory as a fraction of the budget."""
        return None if None in (self.memory_mb, self.budget_mb) else self.memory_mb / self.budget_mb

    @property
    def defective(self) -> bool:
        """Failed or wrong; running out of memory, or a peer's refusal of the size, is neither."""
        return self.status.startswith(("failed", "wrong"))


def run_case(case: Case, config: DictConfig, device: torch.device) -> list[Row]:
    """Measures every arm at one size; an arm that cannot be measured has a row that says why."""
    rows = {name: _new_row(name, case, config, device) for name in config.arms}
    batch, arms = make_batch(case, device), {}
    for name, row in rows.items():
        if row.status != "ok":
            continue
        with recorded(row):
            _check_dense(row, config)
            if device.type == "cpu":
                row.memory_mb = peak_in_child(partial(warmed_up, name, case, config), _room(config)) / 1e6
                if row.memory_mb * 1e6 > psutil.virtual_memory().available:
                    raise OutOfMemory(f"{row.memory_mb / 1e3:.1f} GB are needed to time it, less is free")
            arms[name] = make_arm(name, case, config, batch)
    _compare({name: arm for name, arm in arms.items() if name not in peers()}, rows, config.tolerance)
    arms = {name: arm for name, arm in arms.items() if rows[name].status == "ok"}
    if device.type == "cuda":
        for name, arm in arms.items():
            with recorded(rows[name]):
                arm.call()  # what only a first call takes is not counted
                rows[name].memory_mb, rows[name].reserved_mb = (peak / 1e6 for peak in peak_on_gpu(arm.call, device))
    calls = {name: arm.call for name, arm in arms.items() if rows[name].status == "ok"}
    _enter_times(rows, interleave(calls, config.num_warmup, config.num_runs, config.max_seconds, device))
    return list(rows.values())


@contextmanager
def recorded(row: Row) -> Iterator[None]:
    """What goes wrong with one arm goes into its row, and the others go on."""
    try:
        with out_of_memory_named():
            yield
    except OutOfMemory as error:
        row.status = f"out of memory: {error}"
    except RuntimeError as error:
        log.exception("%s %s %s failed", row.case.label, row.case.dtype, row.arm)
        row.status = f"failed: {str(error).splitlines()[0]}"
    if row.status != "ok":  # gives back what the arm held
        gc.collect()
        torch.cuda.empty_cache()


def check_arms(config: DictConfig, device: torch.device) -> None:
    """Raises SettingError for a model that cannot be built, or an arm that it cannot have."""
    try:
        model = core.from_config(config)
        if "dense" in config.arms:
            dense_reference(model)
        if "readout" in config.arms:
            check_linear(model)
        if "compiled" in config.arms:
            model.to(device).compile_encoders()
        for name in config.arms:
            if name in peers():
                bench_peer(name, cases_of(config)[0])
    except (ValueError, RuntimeError) as error:
        arms = ", ".join(config.arms)
        raise SettingError(f"{error} (arms are {arms}; arms=[ours] measures the model alone)") from error


def _new_row(name: str, case: Case, config: DictConfig, device: torch.device) -> Row:
    chunk = queries_at_once(case, config, device) if name == "dense" else None
    row = Row(case, name, device.type, config.num_threads, chunk, config.num_warmup)
    if name in peers():
        network = bench_peer(name, case)
    else:
        model = core.from_config(config)
        network = dense_reference(model) if name == "dense" else model
    row.parameters = sum(weight.numel() for weight in network.parameters())
    if name in READOUT_ARMS:
        return row
    if case.training and not any(weight.requires_grad for weight in network.parameters()):
        row.status = "refused: it has no weights to train"
        return row
    try:
        row.gflops = forward_flops(network, case) / 1e9
    except CannotUpsample as refusal:
        row.status = f"refused: {refusal}"
    except RuntimeError as error:  # a filler that looks at its values
        log.info("no operations counted: %s", error)
    if name in ARM_NAMES and name != "dense" and not case.training:
        size = DTYPES[case.dtype].itemsize
        buffers = 3 * config.embed_dim * case.image**2
        row.budget_mb = 1.1 * case.batch * (case.channels * case.output**2 + buffers) * size / 1e6
    return row


def _check_dense(row: Row, config: DictConfig) -> None:
    """Raises OutOfMemory where the dense algorithm would drive the machine into the ground."""
    if row.arm != "dense":
        return
    mask, rest = dense_bytes(row.case, config.attention.num_heads, row.queries_at_once or row.case.output**2)
    needed = max(mask, rest) if row.device == "cpu" else mask  # the mask is made in RAM
    if needed > _room(config):
        raise OutOfMemory(f"estimated {needed / 1e9:.1f} GB, {_room(config) / 1e9:.1f} GB are free")


def _room(config: DictConfig) -> int:
    """Bytes of RAM that an arm may take."""
    free = psutil.virtual_memory().available
    return free if config.memory_limit_gb is None else min(free, int(config.memory_limit_gb * 1e9))


def _compare(arms: dict[str, PreparedArm], rows: dict[str, Row], tolerance: float | None) -> None:
    """Marks a row as wrong whose arm computes something else than the first that runs."""
    expected = None
    for name, arm in arms.items() if len(arms) > 1 else ():
        row = rows[name]
        allowed = tolerance or TOLERANCE[row.case.dtype] * (10 if row.case.training else 1)
        with recorded(row):
            outcome = arm.outcome()
            if expected is None:
                expected = outcome
                continue
            row.difference = difference(outcome, expected)
            if not row.difference <= allowed:
                row.status = f"wrong: differs by {row.difference:.1e} of the largest value, {allowed:.0e} are allowed"
                log.error("%s %s %s is %s", row.case.label, row.case.dtype, name, row.status)


def _enter_times(rows: dict[str, Row], measured: dict[str, Times | OutOfMemory]) -> None:
    """Enters times, and ratios against the first arm that has any."""
    base: tuple[str, Times] | None = None
    for name, times in measured.items():
        row = rows[name]
        if isinstance(times, OutOfMemory):
            row.status = f"out of memory: {times}"
            continue
        row.num_runs = len(times.time)
        row.time_ms, row.time_min_ms = median(times.time), min(times.time)
        row.cpu_ms, row.cpu_min_ms = median(times.cpu), min(times.cpu)
        if base is None:
            base = name, times
            continue
        row.against = base[0]
        ratio = paired_ratio(base[1].time, times.time)
        row.ratio = ratio.median
        if row.num_runs >= MIN_RUNS:
            row.ratio_low, row.ratio_high = ratio.low, ratio.high
        row.cpu_ratio = paired_ratio(base[1].cpu, times.cpu).median
