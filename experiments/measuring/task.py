"""What a task is, and how one is registered and made."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from omegaconf import DictConfig
from torch import Tensor, nn

from core.registry import Choices
from experiments.measuring.bench import Bench, Ceiling
from experiments.settings import SettingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """An image on which an arm did badly, to look at."""

    name: str
    """Of the image."""
    badness: float
    columns: Mapping[str, Tensor | np.ndarray]
    """Title -> picture, as `experiments.reports.pictures.panel` takes them."""


class Task(ABC):
    """Something to measure. One object serves all arms of an evaluation, and keeps what they share."""

    choice: ClassVar[str]
    """The name it is registered under."""
    trains: ClassVar[bool] = False
    """Whether it trains probes: it then needs training data, and its results depend on the seed."""
    ceilings: ClassVar[tuple[str, ...]] = ("encoder",)
    """The ceilings it can measure."""
    worst: list[Picture]
    """The images that the arm measured last did worst on, worst first; empty if the task draws none."""
    notes: list[str]
    """What a reader of its scores must know of the images, found by `check` or while measuring."""

    def __init__(self) -> None:
        self.worst, self.notes = [], []

    def note(self, note: str) -> None:
        """Adds to `notes`, and to the log, what was not said before: it is the same of every arm."""
        if note not in self.notes:
            self.notes.append(note)
            log.warning("task=%s: %s", self.choice, note)

    @abstractmethod
    def check(self, bench: Bench) -> None:
        """Refuses data or sizes it cannot work with, before anything is computed.

        Raises:
            SettingError: names the setting and the way out.
        """

    @abstractmethod
    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Measures one arm: `experiments.statistics.scores.image_rows` of every validation image, each with its "task".

        Args:
            model: `(image, features, output_size) -> features`, in eval mode on the bench's device; or a ceiling.
            seed: of the probes.

        Raises:
            EvaluationError: something is not finite, or cannot be measured; names the image.
        """


_choices = Choices("task", Task, f"{__package__}.tasks", SettingError)
register_task = _choices.register
"""`@register_task("name")` offers a task class as `task=name`: `core.registry.Choices.register`."""
tasks = _choices.all
"""All registered tasks by name."""


def make_task(config: DictConfig | Mapping[str, Any]) -> Task:
    """The task of a configuration node `{name, ...settings}`, as the Hydra group `task` gives it.

    Raises:
        SettingError: unknown name, an unknown, missing or wrong setting; or as the task's `__init__`.
    """
    return _choices.make(config)
