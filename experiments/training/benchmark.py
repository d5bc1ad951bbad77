"""Whole training steps, timed beside the released loop's algorithm.

A step is what `experiments.training.loop` does in one: views cut from photographs, the encoder on whole images and
crops, the forwards and all losses, backward, update. The arms have the same weights and see the same images: `dense`
trains the dense reference in the model's place, `ours` the model, and `shared` is what both contain, views and encoder.
Steps are timed in turn, peaks measured apart (on CPU in a fresh process).
"""

import itertools
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from omegaconf import DictConfig, OmegaConf

import core
from experiments.cost.benchmark_arms import dense_reference
from experiments.cost.measure import (
    MIN_RUNS,
    OutOfMemory,
    Times,
    arithmetic,
    interleave,
    out_of_memory_named,
    paired_ratio,
    peak_in_child,
    peak_on_gpu,
)
from experiments.reports.training_steps import Row, metrics, write
from experiments.settings import SettingError, check_name, check_writable
from experiments.tracking.provenance import Origin, machine
from experiments.tracking.store import track
from experiments.training.loop import Training

log = logging.getLogger(__name__)

ARMS = ("dense", "ours", "shared")
TOLERANCE = {"no": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Of first losses, relative to them, by `mixed_precision`."""


def benchmark_training(config: DictConfig) -> list[Row]:
    """Measures all arms, and writes NAME.md and NAME.csv -> one row per arm.

    Args:
        config: configs/benchmark_training.yaml.

    Raises:
        SettingError, and what `experiments.training.loop.train` refuses: before anything is measured.
        CannotWrite: the disk is full, say.
    """
    check_settings(config)
    with tempfile.TemporaryDirectory() as folder, arithmetic(config.num_threads, tf32=False):
        num_steps = max(config.steps, config.num_warmup + config.num_runs + 2)  # the first of all, and one for the peak
        plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # typed nodes cannot be pickled
        config_of_arms = OmegaConf.create(plain | {"out_dir": folder, "steps": num_steps})
        arms = {name: PreparedTraining(name, config_of_arms) for name in config.arms}
        device = next(iter(arms.values())).training.device
        with track(config, device) as run:
            rows = {name: Row(name) for name in arms}
            for name, arm in arms.items():
                _first_step_and_peak(arm, rows[name], config_of_arms)
            _compare(rows, config.tolerance or TOLERANCE[config.mixed_precision])
            calls = {name: arm.step for name, arm in arms.items() if rows[name].status == "ok"}
            _enter(rows, interleave(calls, config.num_warmup, config.num_runs, config.max_seconds, device))
            for path in write(list(rows.values()), Path(config.out_dir), config.name, _header(config, device)):
                run.file(path, f"tables/{path.name}")
            for row in rows.values():
                run.metrics(metrics(row))
    return list(rows.values())


def check_settings(config: DictConfig) -> None:
    """Refuses what could only fail later.

    Raises:
        SettingError: names the setting and what it may be.
    """
    names = list(config.arms)
    if not names or len(set(names)) < len(names) or set(names) - set(ARMS):
        raise SettingError(f"arms must name one or several different ones of {', '.join(ARMS)}, got {names}")
    for key, least in (("num_warmup", 0), ("num_runs", MIN_RUNS), ("num_threads", 1)):
        if type(config[key]) is not int or config[key] < least:
            raise SettingError(f"{key} must be a whole number from {least} up, got {config[key]}")
    for key in ("max_seconds", "tolerance"):
        if config[key] is not None and not config[key] > 0:
            raise SettingError(f"{key} must be a positive number or null, got {config[key]}")
    check_name(config.name)
    check_writable(Path(config.out_dir))


class PreparedTraining:
    """An arm's training, ready for its next step.

    Raises:
        SettingError: the model has no dense reference; and what `Training` refuses.
    """

    def __init__(self, name: str, config: DictConfig):
        self.name, self._steps = name, itertools.count()
        self.training = Training(config, _reference if name == "dense" else lambda model: model)

    def step(self) -> float | None:
        """The next step -> its loss; `shared` has none."""
        views = self.training.views[next(self._steps)]
        if self.name != "shared":
            return sum(self.training.step(views).values())
        for one in self.training.of_each_backbone(views):
            self.training.batch(one)
        return None


def warmed_up(name: str, config: DictConfig) -> Callable[[], object]:
    """Builds an arm on CPU and takes its first step -> the function that takes the next."""
    torch.set_num_threads(config.num_threads)
    arm = PreparedTraining(name, config)
    arm.step()
    return arm.step


def _reference(model: core.AnyUp) -> torch.nn.Module:
    try:
        return dense_reference(model)
    except ValueError as error:
        raise SettingError(f"arms=[dense]: {error}") from error


def _first_step_and_peak(arm: PreparedTraining, row: Row, config: DictConfig) -> None:
    device = arm.training.device
    try:
        with out_of_memory_named():
            if device.type == "cpu":
                row.memory_mb = peak_in_child(partial(warmed_up, arm.name, config)) / 1e6
            row.loss = arm.step()
            if device.type == "cuda":
                row.memory_mb = peak_on_gpu(arm.step, device)[0] / 1e6
    except OutOfMemory as error:
        row.status = f"out of memory: {error}"


def _compare(rows: dict[str, Row], tolerance: float) -> None:
    """Marks an arm as wrong whose first loss is not that of the first arm."""
    known = [row for row in rows.values() if row.loss is not None]
    for row in known[1:]:
        difference = abs(row.loss - known[0].loss) / abs(known[0].loss)
        if not difference <= tolerance:
            row.status = f"wrong: its loss is {difference:.1e} off {known[0].arm}'s, {tolerance:.0e} are allowed"
            log.error("%s is %s", row.arm, row.status)


def _enter(rows: dict[str, Row], measured: dict[str, Times | OutOfMemory]) -> None:
    """Enters times, and ratios against the first arm that has any."""
    base: Times | None = None
    for name, times in measured.items():
        row = rows[name]
        if isinstance(times, OutOfMemory):
            row.status = f"out of memory: {times}"
            continue
        row.num_runs, row.time_s = len(times.time), median(times.time) / 1e3
        row.steps_per_s = 1 / row.time_s
        if base is None:
            base = times
            continue
        ratio = paired_ratio(base.time, times.time)
        row.ratio, row.ratio_low, row.ratio_high = ratio.median, ratio.low, ratio.high
        row.cpu_ratio = paired_ratio(base.cpu, times.cpu).median


def _header(config: DictConfig, device: torch.device) -> str:
    """Markdown: the command, and where and with what it ran."""
    views, backbones = config.views, ", ".join(node["name"] for node in config.backbones)
    precision = "float32" if config.mixed_precision == "no" else f"{config.mixed_precision} autocast"
    what = (
        f"batch {config.batch_size}, {views.crops} crops each, view {views.view}, "
        f"guidance {views.guidance or views.view}, scale {views.scale}; encoder {backbones}; "
        f"objective {dict(config.objective)}"
    )
    origin = Origin.of_this_process(
        "experiments.benchmark_training",
        "experiments.training.benchmark.benchmark_training(config), from Python",
        machine(device, config.num_threads, precision),
        notes=[what],
    )
    return origin.header(f"Training steps on {device.type.upper()}")
