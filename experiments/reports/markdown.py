"""How all reports look: tables, for Markdown and the terminal from the same cells, and numbers with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from experiments.statistics.intervals import Interval


@dataclass
class Table:
    """Cells under columns; each row has as many as there are columns.

    Raises:
        ValueError: a row has more or fewer.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    """For the terminal; in Markdown headings say it."""
    caption: str = ""
    """Below the table on the terminal."""
    left: Sequence[str] | None = None
    """Columns of words, which begin at the left; numbers end at the right. None: the first."""
    styles: Sequence[str] = field(default_factory=list)
    """Of the rows on the terminal, as Rich names them."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, and a row of {len(row)} cells: {list(row)}")

    def markdown(self) -> str:
        """Lines of Markdown, without a line break at the end."""
        rule = ["---" if left else "---:" for left in self._sides()]
        lines = (self.columns, rule, *self.rows)
        return "\n".join(f"| {' | '.join(map(_in_markdown, line))} |" for line in lines)

    def rich(self, columns: Sequence[str] | None = None) -> rich.table.Table:
        """For the terminal: all columns, or some of them."""
        shown = [i for i, name in enumerate(self.columns) if columns is None or name in columns]
        made = rich.table.Table(
            title=self.title or None, title_justify="left", caption=self.caption or None, box=SIMPLE_HEAD,
            pad_edge=False, caption_justify="left",
        )  # fmt: skip
        sides = self._sides()
        for i in shown:
            made.add_column(escape(self.columns[i]), justify="left" if sides[i] else "right", overflow="fold")
        for i, row in enumerate(self.rows):
            made.add_row(*(escape(row[at]) for at in shown), style=self.styles[i] if self.styles else "")
        return made

    def _sides(self) -> list[bool]:
        """Of each column: whether it begins at the left."""
        left = self.columns[:1] if self.left is None else self.left
        return [name in left for name in self.columns]


def number(value: float | None, digits: int) -> str:
    """With that many digits behind the point; nothing where it is not known (None, NaN)."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def with_interval(value: float, low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    """`2.00 [1.80, 2.20]`, or without ends that are not known; with `sign="+"` all numbers have theirs."""
    shape = f"{sign}.{digits}f"
    ends = "" if low is None or high is None else f" [{low:{shape}}, {high:{shape}}]"
    return f"{value:{shape}}{ends}"


def signed(interval: Interval | None, digits: int = 4) -> str:
    """A difference: `+0.0123 [+0.0100, +0.0150]`; nothing where there is none."""
    return "" if interval is None else with_interval(interval.value, interval.low, interval.high, digits, "+")


def times_faster(ratio: float | None, low: float | None, high: float | None) -> str:
    """A ratio of times as the benchmarks give it: `2.45 (2.39-2.64)`."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if low is None else f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def _in_markdown(cell: str) -> str:
    """A cell may hold what would end it: a remark is an error's text, say."""
    return " ".join(cell.split("\n")).replace("|", "\\|")
