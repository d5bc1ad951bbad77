"""What reports are made of: a sweep's plan, results, failures and origin; and what a leaderboard measured."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import pandas as pd

from experiments.tracking.provenance import Origin


@dataclass(frozen=True)
class Planned:
    """One arm with one seed, and the tasks to measure it on."""

    arm: str
    kind: str
    """trained, checkpoint, peer, ceiling."""
    seed: int
    key: str
    """Digest of the arm's configuration, code and training data."""
    tasks: list[str]


@dataclass(frozen=True)
class Plan:
    """Everything that a sweep is to measure. The run keeps it, so that the tables can be made again from there."""

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
        """Equal only for plans with equal content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        values = json.loads(text)
        return cls(**values | {"members": [Planned(**member) for member in values["members"]]})


@dataclass
class Results:
    """A sweep, ready to be compared."""

    plan: Plan
    scores: pd.DataFrame
    """The scores of all arms that are complete: every seed on every task."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Arm -> why it is not in the tables."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the measurement that a reader must know."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Task -> fingerprint of what it was measured on."""
    costs: pd.DataFrame | None = None
    """From `experiments.cost.arm_cost`."""
    origin: Origin | None = None
    """How they were made; None: not known."""
    run_id: str = ""
    """The sweep's run, if they come from the tracking store."""

    @property
    def seeds(self) -> list[int]:
        """All planned seeds."""
        return sorted({member.seed for member in self.plan.members})


@dataclass
class Board:
    """What a leaderboard measured: its sweeps, one for each encoder, joined."""

    scores: pd.DataFrame
    """Of all encoders: `experiments.statistics.scores`."""
    kinds: dict[str, str]
    """Method -> trained, checkpoint, peer or ceiling."""
    encoders: dict[str, bool]
    """Encoder -> whether it is unseen."""
    absent: dict[tuple[str, str], str]
    """Encoder and method -> why it is not measured there."""
    left_out: dict[str, str]
    """Task -> the setting without which it is not measured."""
    costs: pd.DataFrame | None
    """As `experiments.cost.arm_cost`, with the column encoder; None: not measured."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the measurement that a reader must know."""
