"""Probes: heads trained on frozen features, and what they then predict on validation images.

Every task of this kind measures two probes of each arm. `upsampled`: trained on the arm's upsampled features.
`transferred`: trained on low-resolution features enlarged bilinearly (for a linear head that is: with bilinear
logits), and applied to the arm's features, which shows whether they have stayed what they were. It depends on encoder,
data and seed only, so all arms share it. Of the arm `bilinear` both are the same probe, unless the former is trained
on whole cells.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from experiments.measuring.bench import Bench, Ceiling, EncodedImage
from experiments.measuring.probe import Probe
from experiments.measuring.probe_training import train_probe
from experiments.measuring.readout import raw_outputs
from experiments.measuring.task import Picture
from experiments.peers.interpolation import Bilinear
from experiments.statistics.scores import MEASURES, image_rows

NUM_WORST = 3
"""Images of which pictures are kept."""


class ProbeTask(Probe):
    """A task that trains probes; what they predict is the subclass's: outputs, target, loss and measures."""

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        """Contract: `Task.rows`."""
        if seed not in self._low:
            self._low[seed] = train_probe(self, None if self.cell_targets else Bilinear(), 1, seed, bench)
        heads = {"upsampled": self._low[seed], "transferred": self._low[seed]}
        upsampler, scale = bench.arm(model)
        if scale > 1 or self.cell_targets or not isinstance(upsampler, Bilinear):
            heads["upsampled"] = train_probe(self, upsampler, scale, seed, bench)
        self.worst, unknown = [], []
        for i in range(len(bench.val)):
            case = bench.val.get(i, scale=scale)
            target = self.target(case)
            raw = raw_outputs(upsampler, case, list(heads.values()), bench)
            for kind, of_head in zip(heads, raw, strict=True):
                with torch.no_grad():
                    prediction = self.predict(of_head, bench)
                measured = self.measures(prediction, target)
                rows = list(image_rows(case.name, measured))
                if not rows and case.name not in unknown:
                    unknown.append(case.name)
                for row in rows:
                    yield {"task": f"{self.choice}/{kind}"} | row
                if kind == "upsampled" and self.worst_by in measured:
                    self._offer(case, measured[self.worst_by], prediction, target)
        if unknown:
            self.note(
                f"{len(unknown)} of {len(bench.val)} images have no pixel whose target is known, and do not count "
                f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})"
            )

    def _offer(
        self, case: EncodedImage, value: float | tuple[float, float], prediction: Tensor, target: Tensor
    ) -> None:
        """Keeps a picture of the image if it is among the worst so far."""
        value = value[0] / value[1] if isinstance(value, tuple) else value
        badness = -MEASURES[self.worst_by].better * value
        if len(self.worst) < NUM_WORST or badness > self.worst[-1].badness:
            columns = {"image": case.rgb[0].float(), **self.columns(prediction, target)}
            self.worst = sorted([*self.worst, Picture(case.name, badness, columns)], key=lambda p: -p.badness)
            del self.worst[NUM_WORST:]
