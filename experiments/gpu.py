"""What is to be measured on a GPU, in one go: `python -m experiments.gpu`. Settings: configs/gpu.yaml.

First how exact the model is there (experiments/cost/correctness.py), then time and memory beside the dense released
algorithm. Each piece of work has its own time in a process beside this one, so that none takes the others' place, and
the tables are rewritten, whole, after each. Running out of memory or time is a result. Exit code: 0; 1 when something
failed, is wrong or less accurate than the released algorithm; 2 when nothing was measured.
"""

import csv
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from core.checkpoint import BUNDLED, find
from core.registry import discover
from experiments.atomic import replacing
from experiments.benchmark import check_arms, run_case
from experiments.command import command
from experiments.cost.benchmark_cases import Case, cases_of, resolved
from experiments.cost.correctness import CHECKS, Check, Inputs
from experiments.cost.measure import arithmetic
from experiments.cost.supervised import Job, Outcome, supervise
from experiments.reports.benchmark import Row, rich_table, write
from experiments.reports.markdown import Table
from experiments.settings import DTYPES, SettingError, check_choice, pick_device
from experiments.tracking.provenance import Origin, machine

log = logging.getLogger(__name__)

OWN = ("seconds", "checks", "check_seconds", "dtypes", "weights", "backbone", "photograph", "image", "output", "points")
"""Settings that `experiments.benchmark` does not have."""
NOTES = """\
- l2, largest: norm and largest value of the error as shares of those of the result in float64, which the dense released
  algorithm gives. released: that algorithm in the same dtype, on the same device; it is what the others are judged by.
- gradient: of the training loss by all weights, which are float32; below float32 under autocast.
- compiled: `compile_encoders()`; exported: a program of `torch.export`. Both are judged by ours."""


def measure(config: DictConfig) -> tuple[list[Check], list[Row]]:
    """Does all that `config` (configs/gpu.yaml) names, in order -> checks and rows; writes the tables after each.

    Raises:
        SettingError: found before anything is measured. CannotWrite: the disk is full, say.
    """
    checks, points = _check_jobs(config), _point_jobs(config)
    jobs, tables = [*checks, *points], Tables(config)
    tables.write(unfinished=f"UNFINISHED: 0 of {len(jobs)} pieces.")
    for number, outcome in enumerate(supervise(list(jobs), config.seconds), 1):
        log.info(
            "%d of %d, %s: %s, %.1f s", number, len(jobs), outcome.job.name, outcome.lost or "done", outcome.seconds
        )
        if outcome.job in checks:
            tables.checks += outcome.result or [replace(checks[outcome.job], status=outcome.lost)]
        else:
            tables.rows += outcome.result or _lost(points[outcome.job], outcome)
        tables.write(f"UNFINISHED: {number} of {len(jobs)} pieces." if number < len(jobs) else "")
    return tables.checks, tables.rows


class Tables:
    """What is known so far, and the files that show it."""

    def __init__(self, config: DictConfig):
        self.checks: list[Check] = []
        self.rows: list[Row] = []
        self._folder, self._name = Path(config.out_dir), str(config.name)
        rounds = (
            f"{config.seconds} s for everything; rounds of cost: {config.num_warmup} to warm up, up to "
            f"{config.num_runs} timed, {config.max_seconds} s of them; all arms of a line in turn in one process"
        )
        self._origin = Origin.of_this_process(
            "experiments.gpu",
            "experiments.gpu.measure(config), from Python",
            machine(pick_device(config.device), config.num_threads, ", ".join(config.dtypes), config.tf32),
            notes=[rounds],
        )

    def write(self, unfinished: str = "") -> None:
        """Rewrites all files, each whole or not at all.

        Raises:
            CannotWrite: full disk or missing rights.
        """
        names = [field.name for field in fields(Check)]
        table = Table(names, [list(map(_cell, asdict(check).values())) for check in self.checks], left=names)
        top = self._origin.header("Correctness on a device")
        text = "\n\n".join(filter(None, [top, unfinished, table.markdown(), NOTES]))
        with replacing(self._folder / f"{self._name}_correctness.md") as part:
            part.write_text(f"{text}\n", encoding="utf-8")
        with replacing(self._folder / f"{self._name}_correctness.csv") as part, part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            writer.writerows(asdict(check).values() for check in self.checks)
        if self.rows:
            write(self.rows, self._folder, self._name, self._origin.header("Cost"), unfinished)


def _check_jobs(config: DictConfig) -> dict[Job, Check]:
    """The checks, with what stands for each in the table should it be lost."""
    for key, choices in (("checks", tuple(CHECKS)), ("dtypes", tuple(DTYPES))):
        for value in config[key]:
            check_choice(key, value, choices)
    for key in ("seconds", "check_seconds"):
        if not isinstance(config[key], int | float) or not config[key] > 0:
            raise SettingError(f"{key} must be a positive number, got {config[key]}")
    for key in ("image", "output"):
        if type(config[key]) is not int or config[key] < 32:
            raise SettingError(f"{key} must be a whole number from 32, got {config[key]}")
    jobs, node = {}, OmegaConf.to_container(config.backbone, resolve=True)
    for name in config.checks:
        for source in list(config.weights) or list(BUNDLED):
            try:
                weights = str(find(source))  # a file, or a name as `core.load` takes it
            except OSError as error:
                raise SettingError(f"weights: {error}") from error
            inputs = Inputs(config.device, weights, node, config.photograph, config.image, config.output)
            for dtype in config.dtypes:
                call = partial(_exactly, config.num_threads, config.tf32, partial(CHECKS[name], inputs, dtype))
                job = Job(f"{name}, {Path(weights).stem}, {dtype}", config.check_seconds, call)
                jobs[job] = Check(name, Path(weights).stem, dtype, "")
    return jobs


def _point_jobs(config: DictConfig) -> dict[Job, tuple[Case, DictConfig]]:
    """The points of cost, with the size of each and the benchmark's settings for it."""
    device, jobs = pick_device(config.device), {}
    for point in config.points:
        if set(point) != {"size", "dtype", "arms", "seconds"}:
            raise SettingError(f"points: each has size, dtype, arms and seconds, got {point}")
        own = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
        own = {key: value for key, value in own.items() if key not in OWN}
        chosen = {"forward": [point.size], "training": [], "dtype": point.dtype, "arms": list(point.arms)}
        settings = resolved(OmegaConf.create(own | chosen))
        check_arms(settings, device)
        (case,) = cases_of(settings)
        plain = OmegaConf.to_container(settings)
        call = partial(_exactly, config.num_threads, config.tf32, partial(_point, case, plain, str(device)))
        jobs[Job(f"{case.label}, {case.dtype}, {'/'.join(point.arms)}", point.seconds, call)] = case, settings
    return jobs


def _point(case: Case, settings: dict[str, Any], device: str) -> list[Row]:
    discover()
    return run_case(case, OmegaConf.create(settings), pick_device(device))


def _exactly(num_threads: int, tf32: bool, call: Callable[[], Any]) -> Any:
    with arithmetic(num_threads, tf32):
        return call()


def _lost(point: tuple[Case, DictConfig], outcome: Outcome) -> list[Row]:
    (case, settings), lost = point, outcome.lost
    device = pick_device(settings.device).type
    return [
        Row(case, arm, device, settings.num_threads, None, settings.num_warmup, status=lost) for arm in settings.arms
    ]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)


def defective(checks: Sequence[Check], rows: Sequence[Row]) -> bool:
    """Whether anything failed, is wrong, or less accurate than it should be; a lack of memory or time is neither."""
    bad = ("failed", "less accurate", "not deterministic")
    return any(check.status.startswith(bad) for check in checks) or any(row.defective for row in rows)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `measure`."""
    checks, rows = measure(config)
    if rows:
        Console().print(rich_table(rows))
    return int(defective(checks, rows))


if __name__ == "__main__":
    main()
