"""Figures of a sweep: differences to the baseline with their intervals, and quality against cost."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reports import style
from experiments.statistics.scores import MEASURES
from experiments.statistics.verdicts import Comparison, bases

COLOURS = {
    "helps": style.GREEN,
    "hurts": style.RED,
    "not shown": style.BLUE,
    "reference": style.GREY,
    "baseline": style.BLACK,
}
_MARKERS = {"helps": "^", "hurts": "v", "not shown": "o", "reference": "D", "baseline": "s"}
_MAX_COLUMNS = 2


def panels(comparisons: Sequence[Comparison]) -> dict[tuple[str, str, str], list[Comparison]]:
    """Task, data and backbone -> the comparisons of its first measure, which the figures show."""
    found: dict[tuple[str, str, str], list[Comparison]] = {}
    for one in comparisons:
        of_family = found.setdefault(one.family, [])
        if not of_family or of_family[0].measure == one.measure:
            of_family.append(one)
    return found


def short_title(measure: str) -> str:
    """A measure's name at the top of a column."""
    return MEASURES[measure].title or measure


def title_of(measure: str) -> str:
    """For headings: the measure's title, its unit, and whether less is better."""
    known = MEASURES[measure]
    unit = f", {known.unit}" if known.unit else ""
    return f"{short_title(measure)}{unit}{' (less is better)' if known.better < 0 else ''}"


@style.styled
def forest(comparisons: Sequence[Comparison], confidence: float) -> Figure:
    """Differences to the baseline: one line per arm, one panel per task, for the first measure of each task.

    The axis covers the intervals of arms with verdicts. References outside it are arrows at the edge, with numbers.
    """
    found = panels(comparisons)
    arms = list(dict.fromkeys(one.arm for one in comparisons if one.difference))
    figure, places = _grid(len(found), 1 + 0.3 * max(1, len(arms)))
    for axes, (family, of_family) in zip(places, found.items(), strict=False):
        rows = {one.arm: one for one in of_family if one.difference}
        low, high = _limits(of_family)
        for place, arm in enumerate(arms):
            if arm in rows:
                _line(axes, rows[arm], place, low, high)
        axes.axvline(0, color=style.GREY, linewidth=1)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set(title=_title(family), xlabel="difference in " + title_of(of_family[0].measure).replace(" (", "\n("))
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_yticks(range(len(arms)), arms)
    shown = [one for of_family in found.values() for one in of_family]
    figure.suptitle(f"differences to the baseline, intervals of {confidence:.0%}: {bases(shown)}", wrap=True)
    return figure


@style.styled
def cost_quality(comparisons: Sequence[Comparison], costs: pd.DataFrame) -> Figure:
    """Quality against the time of one forward relative to the baseline's, with the Pareto front."""
    times = costs.set_index("arm")["time_ratio"].dropna()
    found = panels(comparisons)
    figure, places = _grid(len(found), 3.5)
    for axes, (family, of_family) in zip(places, found.items(), strict=False):
        shown = [one for one in of_family if one.arm in times.index]
        for one in shown:
            axes.plot(times[one.arm], one.mean, _MARKERS[one.verdict], color=COLOURS[one.verdict])
            axes.annotate(one.arm, (times[one.arm], one.mean), xytext=(4, 3), textcoords="offset points", fontsize=9)
        best = front([(times[one.arm], one.mean) for one in shown], MEASURES[of_family[0].measure].better)
        axes.plot(*zip(*best, strict=True), color=style.GREY, linewidth=1, drawstyle="steps-post", zorder=0)
        axes.set(title=_title(family), ylabel=title_of(of_family[0].measure), xlabel="time, times the baseline's")
        axes.set_xscale("log")
        axes.margins(x=0.25)
    return figure


def front(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """The Pareto front: (cost, quality) of the points that no cheaper one equals, cheapest first."""
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not kept or better * quality > better * kept[-1][1]:
            kept.append((cost, quality))
    return kept


def _title(family: tuple[str, str, str]) -> str:
    task, data, backbone = family
    return f"{task}\n{data}, {backbone}"


def _limits(of_family: Sequence[Comparison]) -> tuple[float, float]:
    """Limits of the axis of differences: zero and the intervals of arms with verdicts, or of all if there are none."""
    known = [one for one in of_family if one.difference]
    known = [one for one in known if one.verdict != "reference"] or known
    ends = [0.0, *(end for one in known for end in vars(one.difference).values() if end is not None)]
    margin = 0.15 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _line(axes: Axes, one: Comparison, place: int, low: float, high: float) -> None:
    colour = COLOURS[one.verdict]
    if not low <= one.difference.value <= high:
        edge, marker, side = (low, "<", "left") if one.difference.value < low else (high, ">", "right")
        axes.plot(edge, place, marker, color=colour, clip_on=False)
        text = f"  {one.difference.value:+.3g}  "
        axes.annotate(text, (edge, place), ha=side, va="center", fontsize=9, color=colour)
        return
    axes.plot(one.difference.value, place, _MARKERS[one.verdict], color=colour)
    if one.difference.low is not None:
        axes.plot([one.difference.low, one.difference.high], [place, place], color=colour)


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(_MAX_COLUMNS, count)
    rows = -(-count // columns)
    figure = style.new_figure(1 + 4.5 * columns, 0.6 + rows * height)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[count:]:
        axes.remove()
    return figure, places
