"""The format of all reports: tables for Markdown and terminal from the same cells, numbers with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from experiments.statistics.intervals import Interval


@dataclass
class Table:
    """A table; each row has one cell per column.

    Raises:
        ValueError: a row has more or fewer.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    """For the terminal; in Markdown there are headings."""
    caption: str = ""
    """Below the table on the terminal."""
    left: Sequence[str] | None = None
    """Columns that are aligned left (words); the others are aligned right (numbers). None: the first."""
    styles: Sequence[str] = field(default_factory=list)
    """Styles of the rows on the terminal, by Rich's names."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a table of {len(self.columns)} columns has a row of {len(row)} cells: {list(row)}")

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
        """For each column, whether it is aligned left."""
        left = self.columns[:1] if self.left is None else self.left
        return [name in left for name in self.columns]


def number(value: float | None, digits: int) -> str:
    """With that many digits after the point; empty if it is not known (None, NaN)."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def with_interval(value: float, low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    """`2.00 [1.80, 2.20]`, without the ends if they are not known; with `sign="+"` all numbers have a sign."""
    shape = f"{sign}.{digits}f"
    ends = "" if low is None or high is None else f" [{low:{shape}}, {high:{shape}}]"
    return f"{value:{shape}}{ends}"


def signed(interval: Interval | None, digits: int = 4) -> str:
    """A difference: `+0.0123 [+0.0100, +0.0150]`; empty if there is none."""
    return "" if interval is None else with_interval(interval.value, interval.low, interval.high, digits, "+")


def times_faster(ratio: float | None, low: float | None, high: float | None) -> str:
    """A ratio of times as the benchmarks give it: `2.45 (2.39-2.64)`."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if low is None else f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def _in_markdown(cell: str) -> str:
    """Escapes what would end a cell. A remark may be the text of an error, for example."""
    return " ".join(cell.split("\n")).replace("|", "\\|")
