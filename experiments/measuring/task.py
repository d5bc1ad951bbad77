"""What a task is, and how one is registered and made."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from core.registry import add_choice, signature_fields
from experiments.settings import SettingError

if TYPE_CHECKING:
    from experiments.measuring.bench import Bench

_tasks: dict[str, type["Task"]] = {}
_T = TypeVar("_T", bound=type["Task"])


class EvaluationError(ValueError):
    """What cannot be measured: features or a measure that are not finite, nothing to learn from; names the image."""


@dataclass(frozen=True)
class Ceiling:
    """In the place of a model: what no upsampler can be expected to pass, as the encoder at a higher resolution."""

    name: str


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
    """What a reader of its scores must know of the images, found by `check`."""

    def __init__(self) -> None:
        self.worst, self.notes = [], []

    @abstractmethod
    def check(self, bench: "Bench") -> None:
        """Refuses data or sizes it cannot work with, before anything is computed.

        Raises:
            SettingError: names the setting and the way out.
        """

    @abstractmethod
    def rows(self, model: nn.Module | Ceiling, seed: int, bench: "Bench") -> Iterator[dict[str, object]]:
        """Measures one arm: `experiments.statistics.scores.image_rows` of every validation image, each with its "task".

        Args:
            model: `(image, features, output_size) -> features`, in eval mode on the bench's device; or a ceiling.
            seed: of the probes.

        Raises:
            EvaluationError: something is not finite, or cannot be measured; names the image.
        """


def register_task(name: str) -> Callable[[_T], _T]:
    """Offers a task class as `task=name`; running the same definition again replaces the earlier one.

    Raises:
        ValueError: another task has that name.
    """

    def add(cls: _T) -> _T:
        known = _tasks.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"task={name} is already registered by {known.__module__}.{known.__qualname__}")
        _tasks[name] = cls
        cls.choice = name
        add_choice("task", name, signature_fields(cls))
        return cls

    return add


def tasks() -> dict[str, type[Task]]:
    """All registered tasks by name."""
    return dict(_tasks)


def make_task(config: DictConfig | Mapping[str, Any]) -> Task:
    """The task of a configuration node `{name, ...settings}`, as the Hydra group `task` gives it.

    Raises:
        SettingError: unknown name or setting, lists what there is; or as the task's `__init__`.
    """
    values = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    name = values.pop("name", None)
    if name not in _tasks:
        raise SettingError(f"no task is called {name!r}; there are: {', '.join(sorted(_tasks))}")
    known = signature_fields(_tasks[name])
    if unknown := sorted(set(values) - set(known)):
        raise SettingError(
            f"task={name} has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'no settings'}"
        )
    return _tasks[name](**values)
