"""All that is measured on a device in one go: how exact the model is there, then what it costs.

Each piece of work has its own time in a process beside this one (`supervised`), so that none takes the others' place.
Running out of memory or time is a result.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.checkpoint import BUNDLED, find
from core.registry import discover
from experiments.cost.benchmark import Row, check_arms, run_case
from experiments.cost.benchmark_cases import Case, cases_of, resolved
from experiments.cost.correctness import CHECKS, Check, Inputs
from experiments.cost.measure import arithmetic
from experiments.cost.supervised import Job, supervise
from experiments.settings import DTYPES, SettingError, check_choice, pick_device

log = logging.getLogger(__name__)

OWN = ("seconds", "checks", "check_seconds", "dtypes", "weights", "backbone", "photograph", "image", "output", "points")
"""Settings that `experiments.benchmark` does not have."""


@dataclass
class Measured:
    """What is known so far."""

    num_pieces: int
    """Of work, in all."""
    num_done: int = 0
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def unfinished(self) -> str:
        """A remark for the tables; empty once all pieces are done."""
        missing = self.num_done < self.num_pieces
        return f"UNFINISHED: {self.num_done} of {self.num_pieces} pieces." if missing else ""

    @property
    def defective(self) -> bool:
        """Anything failed, is wrong, or less accurate than it should be; a lack of memory or time is neither."""
        bad = ("failed", "less accurate", "not deterministic")
        return any(check.status.startswith(bad) for check in self.checks) or any(row.defective for row in self.rows)


def pieces(config: DictConfig) -> Iterator[Measured]:
    """Does all that `config` (configs/gpu.yaml) names -> what is known, before the first piece and after each.

    Raises:
        SettingError: found before anything is measured.
    """
    checks, points = _check_jobs(config), _point_jobs(config)
    jobs = [*checks, *points]
    known = Measured(len(jobs))
    yield known
    for outcome in supervise(jobs, config.seconds):
        known.num_done += 1
        log.info(
            "%d of %d, %s: %s, %.1f s",
            known.num_done, len(jobs), outcome.job.name, outcome.lost or "done", outcome.seconds,
        )  # fmt: skip
        if outcome.job in checks:
            known.checks += outcome.result or [replace(checks[outcome.job], status=outcome.lost)]
        else:
            known.rows += outcome.result or _lost(*points[outcome.job], outcome.lost)
        yield known


def _check_jobs(config: DictConfig) -> dict[Job, Check]:
    """The checks, with what stands for each in the table should it be lost."""
    _check_settings(config)
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


def _check_settings(config: DictConfig) -> None:
    """Raises SettingError for a setting of the checks that cannot be."""
    for key, choices in (("checks", tuple(CHECKS)), ("dtypes", tuple(DTYPES))):
        for value in config[key]:
            check_choice(key, value, choices)
    for key in ("seconds", "check_seconds"):
        if not isinstance(config[key], int | float) or not config[key] > 0:
            raise SettingError(f"{key} must be a positive number, got {config[key]}")
    for key in ("image", "output"):
        if type(config[key]) is not int or config[key] < 32:
            raise SettingError(f"{key} must be a whole number from 32, got {config[key]}")


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


def _lost(case: Case, settings: DictConfig, lost: str) -> list[Row]:
    """One row for each arm of a point of cost that says why it was not measured."""
    device = pick_device(settings.device).type
    return [
        Row(case, arm, device, settings.num_threads, None, settings.num_warmup, status=lost) for arm in settings.arms
    ]
