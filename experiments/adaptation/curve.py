"""What an adaptation did to held-out images, step by step: a table, a picture, and whether it helped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.atomic import replacing
from experiments.reports import style
from experiments.statistics.intervals import Interval, spread

SIGNS = {"detail": +1, "loss": -1}
"""Measure -> +1 where more is better."""
_COLUMNS = ["step", "image", "measure", "value"]


@dataclass
class Curve:
    """Values of held-out images after some of the steps.

    Args:
        names: of the images. confidence: of the intervals.
    """

    names: list[str]
    confidence: float

    def __post_init__(self):
        self.rows: list[tuple[int, str, str, float]] = []

    def add(self, step: int, measured: Sequence[dict[str, float]]) -> None:
        """Keeps what was measured after `step` steps, for each image."""
        for name, values in zip(self.names, measured, strict=True):
            self.rows += [(step, name, measure, value) for measure, value in values.items()]

    @property
    def table(self) -> pd.DataFrame:
        """Columns step, image, measure, value."""
        return pd.DataFrame(self.rows, columns=_COLUMNS)

    @property
    def primary(self) -> str:
        """Detail, where it is measured."""
        return "detail" if "detail" in set(self.table["measure"]) else "loss"

    def values(self, measure: str) -> pd.DataFrame:
        """Rows: steps; columns: images."""
        table = self.table
        return table[table["measure"] == measure].pivot(index="step", columns="image", values="value")[self.names]

    def gain(self, measure: str, step: int) -> Interval:
        """Mean over the images of what a step has gained over step 0, positive where better; paired."""
        values = self.values(measure)
        gains = SIGNS[measure] * (values.loc[step] - values.loc[0]).to_numpy(np.float64)
        return spread(gains[None]).interval(self.confidence)

    def verdict(self) -> str:
        """Whether the last step is better than none on held-out images, in words."""
        values, measure = self.values(self.primary), self.primary
        last = int(values.index[-1])
        gain = self.gain(measure, last)
        before, after = values.loc[0].mean(), values.loc[last].mean()
        told = f"{measure} on {len(self.names)} held-out images: {before:.4f} before, {after:.4f} after {last} steps"
        if gain.low is None:
            return f"{told}: one image gives no interval"
        ends = f"gain {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}, {self.confidence:.0%} over images)"
        shown = "it helped" if gain.low > 0 else "it hurt" if gain.high < 0 else "no help shown"
        return f"{told}: {shown}, {ends}"

    def save(self, path: Path) -> list[Path]:
        """Writes PATH.csv and PATH.png, each whole or not at all."""
        paths = [path.with_name(f"{path.name}{ending}") for ending in (".csv", ".png")]
        with replacing(paths[0]) as part:
            self.table.to_csv(part, index=False)
        with replacing(paths[1]) as part:
            self.draw().savefig(part, format="png")
        return paths

    @style.styled
    def draw(self) -> Figure:
        """One panel for each measure: its change since step 0, of each image and on average with its interval."""
        measures = sorted(set(self.table["measure"]))
        figure = style.new_figure(6 * len(measures), 4)
        for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
            values = self.values(measure)
            change = values - values.loc[0]
            axes.plot(change.index, change, color=style.GREY, alpha=0.4, linewidth=0.8)
            gains = [self.gain(measure, int(step)) for step in change.index]
            axes.plot(change.index, change.mean(axis=1), color=style.BLUE, label="mean")
            if gains[0].low is not None:
                low, high = ([getattr(gain, end) for gain in gains] for end in ("low", "high"))
                ends = np.sort(SIGNS[measure] * np.array([low, high]), axis=0)
                axes.fill_between(
                    change.index, *ends, color=style.BLUE, alpha=0.2, label=f"{self.confidence:.0%} interval"
                )
            axes.axhline(0, color=style.BLACK, linewidth=0.8)
            better = "more is better" if SIGNS[measure] > 0 else "less is better"
            axes.set(title=f"{measure} of held-out images ({better})", xlabel="steps", ylabel="change since step 0")
            axes.legend(fontsize="small")
        return figure
