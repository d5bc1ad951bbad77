"""What a probe predicts, and how it is trained: the settings and the abstract class of all probe tasks."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from experiments.measuring.bench import Bench, EncodedImage, EncodedImages, EvaluationError
from experiments.measuring.heads import HEADS, enlarged
from experiments.measuring.task import Task
from experiments.schedule import rate
from experiments.settings import SettingError, check_choice

SCHEDULES = ("cosine", "legacy_jafar")


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is trained: AdamW, with the schedule over all steps.

    Args:
        lr, weight_decay: of AdamW. batch_size: images. epochs: passes over the training images.
        schedule: `cosine` to zero at the last step; `legacy_jafar`: the rate of JAFAR's released loop, which steps a
            cosine of `epochs` steps at every iteration, so that it oscillates and never anneals.
        warmup_epochs: over which the rate first rises linearly (of `cosine`).
        flip: share of training images that are mirrored (of `pixels_per_image=null`).
        pixels_per_image: drawn from each image; None: all of them, the published protocol.
        head: linear or dpt. hidden: width of the dpt head.

    Raises:
        SettingError: a value out of its range, or two that do not go together.
    """

    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    flip: float = 0.0
    pixels_per_image: int | None = None
    head: str = "linear"
    hidden: int = 512

    def __post_init__(self):
        check_choice("task.schedule", self.schedule, SCHEDULES)
        check_choice("task.head", self.head, tuple(HEADS))
        for name in ("batch_size", "epochs", "hidden"):
            if getattr(self, name) < 1:
                raise SettingError(f"task.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"task.{name} must not be negative, got {getattr(self, name)}")
        if self.pixels_per_image is not None and self.pixels_per_image < 1:
            raise SettingError(f"task.pixels_per_image must be null or at least 1, got {self.pixels_per_image}")
        if self.pixels_per_image is not None and not HEADS[self.head].pointwise:
            raise SettingError(f"task.head={self.head} looks at neighbours: it needs task.pixels_per_image=null")
        if not 0 <= self.flip <= 1:
            raise SettingError(f"task.flip must lie between 0 and 1, got {self.flip}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise SettingError(
                f"task.warmup_epochs must be at least 0 and below task.epochs={self.epochs}, got {self.warmup_epochs}"
            )

    @property
    def commutes(self) -> bool:
        """Whether the head's outputs may be enlarged in place of its inputs."""
        return HEADS[self.head].linear

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a step."""
        if self.schedule == "legacy_jafar":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.epochs))
        warmup = int(self.warmup_epochs * num_steps / self.epochs)
        return rate(self.lr, step, num_steps, warmup)


class Probe(Task):
    """A task that trains probes; what they predict is the subclass's: outputs, target, loss and measures."""

    trains = True
    cell_targets = False
    """Whether the transferred probe is trained on the features' own grid, one target for each cell."""
    worst_by: ClassVar[str]
    """The measure by which the worst images are found."""

    def __init__(self, settings: ProbeSettings):
        super().__init__()
        self.settings = settings
        self._low: dict[int, nn.Module] = {}
        self._usable: list[int] | None = None

    @abstractmethod
    def outputs(self, bench: Bench) -> int:
        """Channels that the head gives."""

    @abstractmethod
    def target(self, case: EncodedImage) -> Tensor:
        """(1,K,H,W): what is to be predicted."""

    @abstractmethod
    def known(self, target: Tensor) -> Tensor:
        """(B,K,H,W) -> (B,H,W) bool: pixels that count."""

    def decode(self, raw: Tensor) -> Tensor:
        """(B,outputs,h,w) of the head -> prediction (B,·,h,w), on the grid of the features."""
        return raw

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,·,H,W), (B,K,H,W) -> scalar; of drawn pixels (B,·,P,1), (B,K,P,1)."""

    @abstractmethod
    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, object]:
        """(1,·,H,W), (1,K,H,W) -> what `scores.image_rows` takes; empty where nothing is known."""

    @abstractmethod
    def columns(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """(1,·,H,W), (1,K,H,W) -> pictures (3,H,W) of both, by title."""

    def of_cells(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        """(1,K,H,W) -> (1,K,*size), what is to be predicted of cells as a whole; if the task has `cell_targets`."""
        raise NotImplementedError

    def usable(self, cases: EncodedImages) -> list[int]:
        """Training images in which something is known.

        Raises:
            EvaluationError: there are none.
        """
        if self._usable is None:
            self._usable = [i for i in range(len(cases)) if self.known(self.target(cases.cut(i))).any()]
        if not self._usable:
            raise EvaluationError(f"task={self.choice}: none of {len(cases)} training images has a known pixel")
        return self._usable

    def predict(self, raw: Tensor, bench: Bench) -> Tensor:
        """(B,outputs,·,·) of a head, on the output's grid or a coarser one -> (B,·,H,W), at the size of the labels."""
        raw = enlarged(raw, bench.sizes.output)  # (B,outputs,Qh,Qw)
        return enlarged(self.decode(raw), bench.sizes.image)  # (B,·,H,W)
