"""Probes: heads trained on frozen features, and what they then predict on validation images.

Every task of this kind measures two probes of each arm. `upsampled`: trained on the arm's upsampled features.
`transferred`: trained on low-resolution features enlarged bilinearly (for a linear head that is: with bilinear
logits), and applied to the arm's features, which shows whether they have stayed what they were. It depends on encoder,
data and seed only, so all arms share it. Of the arm `bilinear` both are the same probe, unless the former is trained
on whole cells.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from experiments.measuring.bench import Bench, Case, Cases
from experiments.measuring.heads import enlarged
from experiments.measuring.probe_training import ProbeSettings, features_for, train_probe
from experiments.measuring.task import Ceiling, EvaluationError, Picture, Task
from experiments.peers.interpolation import Bilinear
from experiments.statistics.scores import MEASURES, image_rows

NUM_WORST = 3
"""Images of which pictures are kept."""


class ProbeTask(Task):
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
    def target(self, case: Case) -> Tensor:
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

    def usable(self, cases: Cases) -> list[int]:
        """Training images in which something is known.

        Raises:
            EvaluationError: there are none.
        """
        if self._usable is None:
            self._usable = [i for i in range(len(cases)) if self.known(self.target(cases.cut(i))).any()]
        if not self._usable:
            raise EvaluationError(f"task={self.choice}: none of {len(cases)} training images has a known pixel")
        return self._usable

    def predict(self, head: nn.Module, features: list[Tensor], bench: Bench) -> Tensor:
        """Features as `features_for` gives them -> (B,·,H,W), at the size of the labels."""
        raw = enlarged(head(features), bench.sizes.output)  # (B,outputs,Qh,Qw)
        return enlarged(self.decode(raw), bench.sizes.image)  # (B,·,H,W)

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`."""
        if seed not in self._low:
            self._low[seed] = train_probe(self, None if self.cell_targets else Bilinear(), 1, seed, bench)
        heads = {"upsampled": self._low[seed], "transferred": self._low[seed]}
        upsampler, scale = bench.arm(model)
        if scale > 1 or self.cell_targets or not isinstance(upsampler, Bilinear):
            heads["upsampled"] = train_probe(self, upsampler, scale, seed, bench)
        self.worst = []
        for i in range(len(bench.val)):
            case = bench.val.get(i, scale=scale)
            target, features = self.target(case), features_for(self.settings.head, upsampler, [case], bench)
            for kind, head in heads.items():
                with torch.no_grad():
                    prediction = self.predict(head, features, bench)
                measured = self.measures(prediction, target)
                for row in image_rows(case.name, measured):
                    yield {"task": f"{self.choice}/{kind}"} | row
                if kind == "upsampled" and self.worst_by in measured:
                    self._offer(case, measured[self.worst_by], prediction, target)

    def _offer(self, case: Case, value: float | tuple[float, float], prediction: Tensor, target: Tensor) -> None:
        """Keeps a picture of the image if it is among the worst so far."""
        value = value[0] / value[1] if isinstance(value, tuple) else value
        badness = -MEASURES[self.worst_by].better * value
        if len(self.worst) < NUM_WORST or badness > self.worst[-1].badness:
            columns = {"image": case.rgb[0].float(), **self.columns(prediction, target)}
            self.worst = sorted([*self.worst, Picture(case.name, badness, columns)], key=lambda p: -p.badness)
            del self.worst[NUM_WORST:]
