"""Gathers the results of a sweep from its members, from disk or from MLflow. Incomplete ones are refused by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.errors import Told
from experiments.reports.results import Plan, Results
from experiments.statistics.score_files import read_scores, write_scores
from experiments.statistics.scores import KEYS, VALUES, ScoreError, check, sums, value


class SweepError(Told, ValueError):
    """Results that cannot be compared: the baseline failed, or two different results have one name."""


@dataclass(frozen=True)
class Unit:
    """The scores of one arm with one seed on one task, and their origin."""

    arm: str
    seed: int
    task: str
    member: str
    """Digest of the arm's configuration, code and training data."""
    fingerprint: str
    """Fingerprint of the evaluation."""
    scores: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    """Remarks on the scores that the tables must show."""

    def write(self, path: Path) -> None:
        """Writes them to a Parquet file, which also says what they were made with.

        Raises:
            CannotWrite: for example, the disk is full.
        """
        write_scores(path, self.scores, {"member": self.member, "fingerprint": self.fingerprint, "notes": self.notes})

    @classmethod
    def read(cls, path: Path, arm: str, seed: int, task: str) -> "Unit":
        """Reads a file that `write` made.

        Raises:
            ScoreError: it cannot be read, or does not say what its scores were made with.
        """
        scores, made = read_scores(path)
        if missing := [key for key in ("member", "fingerprint") if key not in made]:
            raise ScoreError(
                f"{path} does not say what its scores were made with ({', '.join(missing)}): remove it, and they are "
                "measured again"
            )
        return cls(arm, seed, task, made["member"], made["fingerprint"], scores, list(made.get("notes", [])))


def gather(plan: Plan, units: Iterable[Unit], reasons: Mapping[str, str]) -> Results:
    """Joins the units of a sweep. An arm is used only if all its planned units are there; otherwise it is a failure.

    Args:
        reasons: arm -> why it failed, where that is known.

    Raises:
        SweepError: the baseline is incomplete, two units of one arm, seed and task differ, or units of one task were
            measured on different data.
        ScoreError: as `scores.check`.
    """
    found: dict[tuple[str, int, str], Unit] = {}
    for unit in units:
        _add(found, unit)
    _check_data(found.values())
    planned = [(member.arm, member.seed, task) for member in plan.members for task in member.tasks]
    failures = dict(reasons)
    for arm in plan.kinds:
        missing = [
            f"{task} with seed {seed}"
            for name, seed, task in planned
            if name == arm and (name, seed, task) not in found
        ]
        if missing and arm not in failures:
            failures[arm] = f"not measured: {', '.join(missing)}"
    if plan.baseline in failures:
        raise SweepError(
            f"sweep {plan.name}: the baseline {plan.baseline} failed, so nothing can be compared: "
            f"{failures[plan.baseline]}"
        )
    tasks = list(dict.fromkeys(task for _, _, task in planned))
    kept = [found[key] for task in tasks for key in planned if key[2] == task and key[0] not in failures]
    scores = pd.concat([unit.scores for unit in kept], ignore_index=True)
    notes = list(dict.fromkeys(note for unit in kept for note in unit.notes))
    data = {unit.task: unit.fingerprint for unit in kept}
    return Results(plan, check(scores), failures, notes, data)


def means(scores: pd.DataFrame) -> dict[str, float]:
    """TASK/DATA/BACKBONE/MEASURE -> value, mean over seeds; of one arm."""
    groups = scores.groupby(["task", "data", "backbone", "measure"], sort=False)
    return {"/".join(keys): float(np.mean(value(*sums(rows)[:2]))) for keys, rows in groups}


def _add(found: dict[tuple[str, int, str], Unit], unit: Unit) -> None:
    key = (unit.arm, unit.seed, unit.task)
    rows = unit.scores
    if set(rows["arm"]) != {unit.arm} or set(rows["seed"]) != {unit.seed}:
        raise SweepError(
            f"the scores of arm {unit.arm}, seed {unit.seed}, task {unit.task} belong to another arm or seed"
        )
    before = found.setdefault(key, unit)
    if before is not unit and not _same(before, unit):
        raise SweepError(
            f"there are two different results of arm {unit.arm}, seed {unit.seed}, task {unit.task}: of "
            f"{before.member[:12]} on {before.fingerprint[:12]}, and of {unit.member[:12]} on {unit.fingerprint[:12]}. "
            "They belong to two sweeps: give each sweep its own name"
        )


def _same(one: Unit, other: Unit) -> bool:
    if (one.member, one.fingerprint) != (other.member, other.fingerprint):
        return False
    frames = [unit.scores[[*KEYS, *VALUES]].sort_values(KEYS, ignore_index=True) for unit in (one, other)]
    return frames[0].equals(frames[1])


def _check_data(units: Iterable[Unit]) -> None:
    seen: dict[str, Unit] = {}
    for unit in units:
        first = seen.setdefault(unit.task, unit)
        if first.fingerprint != unit.fingerprint:
            raise SweepError(
                f"task {unit.task} was measured on different data: arm {first.arm}, seed {first.seed} on "
                f"{first.fingerprint[:12]}, arm {unit.arm}, seed {unit.seed} on {unit.fingerprint[:12]}. Measure one "
                "of them again"
            )
