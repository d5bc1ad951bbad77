"""What a sweep has measured, gathered from its members, wherever they were kept: complete, or refused by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.errors import Told
from experiments.statistics.scores import KEYS, VALUES, check, sums, value
from experiments.tracking.provenance import Origin


class SweepError(Told, ValueError):
    """Results that cannot be compared: the baseline failed, nothing is there, or one name stands for several things."""


@dataclass(frozen=True)
class Planned:
    """One arm with one seed, and the tasks it is to be measured on."""

    arm: str
    kind: str
    """trained, checkpoint, peer, ceiling."""
    seed: int
    key: str
    """Digest of the arm's configuration, code and training data."""
    tasks: list[str]


@dataclass(frozen=True)
class Plan:
    """All that a sweep is to measure; kept with its run, so that its tables can be made again from there."""

    name: str
    baseline: str
    confidence: float
    members: list[Planned]

    @property
    def kinds(self) -> dict[str, str]:
        """Arm -> kind, in the order of the tables."""
        return {member.arm: member.kind for member in self.members}

    @property
    def competing(self) -> list[str]:
        """Arms that get a verdict: peers and ceilings are references."""
        return [arm for arm, kind in self.kinds.items() if kind in ("trained", "checkpoint")]

    @property
    def digest(self) -> str:
        """Equal for equal plans of equal things."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        values = json.loads(text)
        return cls(**values | {"members": [Planned(**member) for member in values["members"]]})


@dataclass(frozen=True)
class Unit:
    """The scores of one arm with one seed on one task, and what they were made with."""

    arm: str
    seed: int
    task: str
    member: str
    """Digest of the arm's configuration, code and training data."""
    fingerprint: str
    """Of the evaluation."""
    scores: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    """What the tables must say of them."""

    @classmethod
    def read(cls, path: Path, arm: str, seed: int, task: str) -> "Unit":
        """From the Parquet file that the sweep wrote, which says what it was made with."""
        scores = pd.read_parquet(path)
        known = scores.attrs
        member, fingerprint = str(known.get("member")), str(known.get("fingerprint"))
        return cls(arm, seed, task, member, fingerprint, scores, known.get("notes", []))


@dataclass
class Results:
    """A sweep, ready to be compared."""

    plan: Plan
    scores: pd.DataFrame
    """Of all arms that have every seed on every task."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Arm -> why it is not in the tables."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know of how they were measured."""
    costs: pd.DataFrame | None = None
    """Of `experiments.cost.arm_cost`."""
    origin: Origin | None = None
    """What made them; None: not known."""
    run_id: str = ""
    """Of the sweep, where they come from the tracking store."""


def gather(plan: Plan, units: Iterable[Unit], reasons: Mapping[str, str]) -> Results:
    """Puts the units of a sweep together; an arm counts only when all that was planned of it is there.

    Args:
        reasons: arm -> why it failed, where that is known.

    Raises:
        SweepError: no results of the baseline; two units of one arm, seed and task that differ, or of one task that
            were measured on different data.
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
    return Results(plan, check(scores), failures, notes)


def means(scores: pd.DataFrame) -> dict[str, float]:
    """TASK/DATA/BACKBONE/MEASURE -> value, mean over seeds; of one arm."""
    groups = scores.groupby(["task", "data", "backbone", "measure"], sort=False)
    return {"/".join(keys): float(np.mean(value(*sums(rows)[:2]))) for keys, rows in groups}


def _add(found: dict[tuple[str, int, str], Unit], unit: Unit) -> None:
    key = (unit.arm, unit.seed, unit.task)
    rows = unit.scores
    if set(rows["arm"]) != {unit.arm} or set(rows["seed"]) != {unit.seed}:
        raise SweepError(
            f"the scores of arm {unit.arm}, seed {unit.seed}, task {unit.task} say they are of another arm"
        )
    before = found.setdefault(key, unit)
    if before is not unit and not _same(before, unit):
        raise SweepError(
            f"there are two different results of arm {unit.arm}, seed {unit.seed}, task {unit.task}: of "
            f"{before.member[:12]} on {before.fingerprint[:12]}, and of {unit.member[:12]} on {unit.fingerprint[:12]}. "
            "They are of two sweeps: give each its own name"
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
