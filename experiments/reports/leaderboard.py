"""The leaderboard: ranks with intervals, wins, values, and quality against time and memory, as tables and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.atomic import replacing
from experiments.reports import style
from experiments.reports.costs import conditions
from experiments.reports.figures import front
from experiments.reports.markdown import Table, number, with_interval
from experiments.reports.results import Board
from experiments.statistics.ranks import Column, Ranks
from experiments.statistics.score_files import write_scores
from experiments.statistics.scores import MEASURES, value
from experiments.tracking.provenance import Origin

NOTES = """\
- Rank: 1 is the best. Mean over the measures of an aspect, then over aspects; only methods that have all measures of
  the group are ranked. Intervals: a Bayesian bootstrap over images and seeds, which says how stable ranks are, and is
  too narrow over few seeds.
- first: share of the resamples in which the method has the best mean rank.
- wins, losses: over all methods of the table and all measures, how often it is shown to be better or worse than
  another: intervals over seeds and images, corrected for the number of pairs of a measure (Holm).
- In the figure: circles are trained here, squares are checkpoints, diamonds are other methods; numbers are places.
- ms, MB: one forward, and its memory on top of model and inputs.
- Every method saw the same features. Those that are trained here had the same data, steps, seeds and optimiser; they
  are the architectures at this budget, not the published models.
- Values, intervals and p of every pair: the .csv files of the same name; scores per image: the .parquet file."""
_KINDS = {"trained": (style.BLUE, "o"), "checkpoint": (style.RED, "s"), "peer": (style.BLACK, "D")}
"""Colour and marker of each kind of method."""


def write(
    folder: Path,
    name: str,
    origin: Origin,
    board: Board,
    ranked: Sequence[tuple[Ranks, pd.DataFrame]],
    columns: Sequence[Column],
    judged: pd.DataFrame,
) -> list[Path]:
    """Writes NAME.md, .csv, .png, _values.csv, _pairs.csv, _scores.parquet, each whole or not at all -> their paths.

    Args:
        ranked: of each group of encoders, with the wins of its methods. judged: `statistics.ranks.pairs`.
    """
    files = [folder / f"{name}{end}" for end in (".md", ".csv", "_values.csv", "_pairs.csv", ".png", "_scores.parquet")]
    text = markdown(name, origin, board, ranked, columns, files[4].name)
    with replacing(files[0]) as part:
        part.write_text(text, encoding="utf-8")
    for file, table in zip(files[1:4], (rows_of(ranked), values_of(columns, board.kinds), judged), strict=True):
        with replacing(file) as part:
            table.to_csv(part, index=False)
    with replacing(files[4]) as part:
        plot(ranked, board.kinds, board.costs).savefig(part, format="png")
    write_scores(files[5], board.scores, asdict(origin))
    return files


def markdown(
    name: str,
    origin: Origin,
    board: Board,
    ranked: Sequence[tuple[Ranks, pd.DataFrame]],
    columns: Sequence[Column],
    picture: str,
) -> str:
    """The whole report; `picture` is the name of the figure's file."""
    parts = [origin.header(name), f"![ranks, and ranks against cost]({picture})"]
    for ranks, beaten in ranked:
        parts += [f"## {ranks.group}", _what(ranks), rank_table(ranks, beaten, board).markdown()]
    for encoder in dict.fromkeys(column.backbone for column in columns):
        parts += [
            f"## Values, {encoder}",
            value_table([one for one in columns if one.backbone == encoder], board.kinds).markdown(),
        ]
    if board.costs is not None:
        parts.append(f"Cost: {conditions(board.costs)}")
    lines = [f"- {task}: needs {setting}=PATH" for task, setting in board.left_out.items()]
    lines += [f"- {method} on {encoder}: {reason}" for (encoder, method), reason in board.absent.items()]
    parts += ["## Not measured", "\n".join(lines)] if lines else []
    return "\n\n".join([*parts, NOTES]) + "\n"


def rank_table(ranks: Ranks, beaten: pd.DataFrame, board: Board) -> Table:
    """One line per method, the best first; then those that lack something, with the reason."""
    times = (
        {} if board.costs is None else board.costs.groupby("arm")[["time_ms", "memory_mb"]].median().to_dict("index")
    )
    rows = []
    for method in ranks.methods:
        cells = [with_interval(*asdict(ranks.overall[method]).values(), 1), number(ranks.first[method], 2)]
        cells += [with_interval(*asdict(of_method[method]).values(), 1) for of_method in ranks.aspects.values()]
        cells += [str(beaten.loc[method].sum()), str(beaten[method].sum())]
        cost = times.get(method, {})
        cells += [number(cost.get("time_ms"), 1), number(cost.get("memory_mb"), 0)]
        rows.append([method, board.kinds.get(method, ""), *cells])
    columns = ["method", "kind", "rank", "first", *ranks.aspects, "wins", "losses", "ms", "MB"]
    encoders = {column.backbone for column in ranks.columns}
    for method, lacking in ranks.incomplete.items():
        reasons = [reason for (encoder, name), reason in board.absent.items() if name == method and encoder in encoders]
        why = "; ".join(dict.fromkeys(reasons)) or f"lacks {len(lacking)} of {len(ranks.columns)} measures"
        rows.append([method, board.kinds.get(method, ""), why, *[""] * (len(columns) - 3)])
    return Table(columns, rows, ranks.group, left=("method", "kind"))


def value_table(columns: Sequence[Column], kinds: Mapping[str, str]) -> Table:
    """What each method reaches in each column of one encoder, mean over seeds."""
    methods = [name for name in kinds if any(name in column.sums for column in columns)]
    rows = [
        [name, *("" if name not in column.sums else f"{_mean(column, name):.4f}" for column in columns)]
        for name in methods
    ]
    return Table(["method", *(_title(column) for column in columns)], rows)


def rows_of(ranked: Sequence[tuple[Ranks, pd.DataFrame]]) -> pd.DataFrame:
    """One row per group, aspect (and overall) and method: mean rank with its interval."""
    rows = []
    for ranks, beaten in ranked:
        for aspect, of_methods in {"overall": ranks.overall, **ranks.aspects}.items():
            for method, interval in of_methods.items():
                row = {"group": ranks.group, "aspect": aspect, "method": method, "rank": interval.value}
                row |= {"low": interval.low, "high": interval.high}
                if aspect == "overall":
                    won, lost = int(beaten.loc[method].sum()), int(beaten[method].sum())
                    row |= {"first": ranks.first[method], "wins": won, "losses": lost}
                rows.append(row)
    return pd.DataFrame(rows)


def values_of(columns: Sequence[Column], kinds: Mapping[str, str]) -> pd.DataFrame:
    """One row per column and method: the value, mean over seeds."""
    rows = []
    for column in columns:
        keys = {key: getattr(column, key) for key in ("aspect", "task", "data", "backbone", "measure", "better")}
        for method, (_, seeds) in column.sums.items():
            known = {"method": method, "kind": kinds.get(method, ""), "value": _mean(column, method)}
            rows.append(keys | known | {"seeds": len(seeds), "images": len(column.images)})
    return pd.DataFrame(rows)


@style.styled
def plot(ranked: Sequence[tuple[Ranks, pd.DataFrame]], kinds: Mapping[str, str], costs: pd.DataFrame | None) -> Figure:
    """For each group: mean ranks with intervals, and against time and memory with the Pareto front, by number."""
    most = max((len(ranks.methods) for ranks, _ in ranked), default=1)
    figure = style.new_figure(style.WIDTH, max(1, len(ranked)) * (1.2 + 0.24 * max(most, 10)))
    shown = [] if costs is None else [("time_ms", "ms"), ("memory_mb", "MB")]
    widths = (1.2, *[1] * len(shown))
    places = figure.subplots(max(1, len(ranked)), len(widths), squeeze=False, width_ratios=widths)
    for row, (ranks, _) in zip(places, ranked, strict=False):
        _draw_ranks(row[0], ranks, kinds)
        for axes, (key, label) in zip(row[1:], shown, strict=True):
            known = costs.groupby("arm")[key].median().dropna().to_dict()
            _draw_cost(axes, ranks, kinds, {name: cost for name, cost in known.items() if cost > 0}, label)
    return figure


def _draw_ranks(axes: Axes, ranks: Ranks, kinds: Mapping[str, str]) -> None:
    for place, method in enumerate(ranks.methods):
        one, (colour, marker) = ranks.overall[method], _look(kinds, method)
        axes.plot([one.low, one.high], [place, place], color=colour)
        axes.plot(one.value, place, marker, color=colour)
    names = [f"{name}  {place}" for place, name in enumerate(ranks.methods, 1)]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(ranks.group, loc="left")
    axes.set_xlabel("mean rank")


def _draw_cost(axes: Axes, ranks: Ranks, kinds: Mapping[str, str], costs: Mapping[str, float], label: str) -> None:
    at = {name: (costs[name], ranks.overall[name].value) for name in ranks.methods if name in costs}
    axes.set(xlabel=f"{label} of one forward", ylabel="mean rank")
    axes.invert_yaxis()
    if not at:
        return
    for place, name in enumerate(ranks.methods, 1):
        if name in at:
            colour, marker = _look(kinds, name)
            axes.plot(*at[name], marker, color=colour)
            axes.annotate(str(place), at[name], xytext=(4, 3), textcoords="offset points", fontsize=9)
    best = front(list(at.values()), -1)
    axes.plot(*zip(*best, strict=True), color=style.GREY, drawstyle="steps-post", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)


def _look(kinds: Mapping[str, str], method: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    return _KINDS.get(kinds.get(method, ""), (style.GREY, "^"))


def _what(ranks: Ranks) -> str:
    counts = pd.Series([column.aspect for column in ranks.columns]).value_counts(sort=False)
    images = sorted({len(column.images) for column in ranks.columns})
    of_images = str(images[0]) if len(images) == 1 else f"{images[0]} to {images[-1]}"
    measures = ", ".join(f"{aspect} {count}" for aspect, count in counts.items())
    return f"{len(ranks.methods)} methods; measures: {measures}; {of_images} images each."


def _title(column: Column) -> str:
    known = MEASURES[column.measure]
    less = " (less is better)" if known.better < 0 else ""
    return f"{column.task} {known.title or column.measure}, {column.data}{less}"


def _mean(column: Column, method: str) -> float:
    return float(np.mean(value(*column.sums[method][0])))
