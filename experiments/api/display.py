"""How results show themselves: in a notebook as HTML, elsewhere as text."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments.atomic import replacing
from experiments.reports.figures import panels, title_of
from experiments.reports.markdown import signed
from experiments.statistics.verdicts import Comparison, table

COLUMNS = ["task", "measure", "arm", "mean", "difference", "difference_low", "difference_high", "p_value", "verdict"]
"""Of a table of results; `experiments.statistics.verdicts.table` has more."""
_DPI = 80


class Shown:
    """A figure that a notebook shows.

    Attributes:
        figure: of matplotlib, to be changed or saved.
    """

    def __init__(self, figure: Figure):
        self.figure = figure

    def save(self, path: str | Path, dpi: int = 120) -> None:
        """Writes it, whole or not at all; the ending says how: .png, .svg or .pdf.

        Raises:
            CannotWrite: the disk is full, say. ValueError: another ending.
        """
        with replacing(Path(path)) as part:
            self.figure.savefig(part, format=Path(path).suffix.removeprefix("."), dpi=dpi)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()

    def html(self) -> str:
        """The figure as an HTML element."""
        return f'<img src="data:image/png;base64,{base64.b64encode(self._repr_png_()).decode()}">'

    def __repr__(self) -> str:
        titles = [" ".join(axes.get_title().split()) for axes in self.figure.axes]
        return f"<figure: {'; '.join(titles)}>"


class Verdict:
    """What a comparison says in words: for each arm and task, whether the task's first measure got better."""

    def __init__(self, comparisons: Sequence[Comparison], baseline: str):
        self.baseline = baseline
        of_tasks = panels(comparisons).values()
        self._known = [one for of_task in of_tasks for one in of_task if one.verdict not in ("baseline", "reference")]

    def __getitem__(self, arm: str) -> dict[str, str]:
        """Task -> helps, hurts or not shown, of one arm.

        Raises:
            KeyError: no such arm, or one without a verdict (the baseline, a peer); names those that there are.
        """
        found = {one.task: one.verdict for one in self._known if one.arm == arm}
        if not found:
            arms = ", ".join(dict.fromkeys(one.arm for one in self._known))
            raise KeyError(f"there is no verdict on {arm!r}; there are verdicts on: {arms or 'none'}")
        return found

    @property
    def lines(self) -> list[str]:
        """One sentence for each arm and task."""
        return [self._line(one) for one in self._known] or ["nothing was compared: there is only the baseline"]

    def _line(self, one: Comparison) -> str:
        said = {"not shown": "no difference is shown:", "helps": "helps:", "hurts": "hurts:"}[one.verdict]
        seeds = f"{one.num_images} images, {one.num_seeds} seed{'s' * (one.num_seeds != 1)}"
        basis = f"; {one.basis}" if one.basis else ""
        measured = f"{title_of(one.measure)} {one.mean:.4f}, {signed(one.difference)} to {self.baseline}"
        return f"{one.arm}, {one.task}: {said} {measured} ({seeds}{basis})"

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in self.lines)}</ul>"


def table_of(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """One row for each task, measure and arm; data and backbone only where they differ."""
    found = table(list(comparisons))
    several = [name for name in ("data", "backbone") if found[name].nunique() > 1]
    return found[[COLUMNS[0], *several, *COLUMNS[1:]]]


def first_measures(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """The rows of `table_of` of the first measure of each task: what a result shows of itself."""
    return table_of([one for of_task in panels(comparisons).values() for one in of_task])


def frame_html(frame: pd.DataFrame) -> str:
    """A table for a notebook, with four digits."""
    return frame.to_html(index=False, float_format="{:.4f}".format, na_rep="", border=0)


def frame_text(frame: pd.DataFrame) -> str:
    """The same as plain text."""
    return frame.to_string(index=False, float_format="{:.4f}".format, na_rep="")


def lines_html(lines: Sequence[str]) -> str:
    """Remarks, one below the other."""
    return "".join(f"<div>{html.escape(line)}</div>" for line in lines)
