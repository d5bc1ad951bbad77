"""Training and validation curves: a table beside the checkpoints, and pictures of it: `python -m experiments.curves`.

A training keeps every logged value in `curves.csv` (columns step, name, value), which is as far as its state file and
goes on with it; without that file the curves are read from the tracking store. Settings: configs/curves.yaml.
"""

import csv
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig, ListConfig

from experiments.atomic import replacing
from experiments.reports import style
from experiments.settings import SettingError, check_writable
from experiments.tracking.store import read_metrics, store_uri
from experiments.training.state import STATE_NAME, read_state

log = logging.getLogger(__name__)

CURVES_NAME = "curves.csv"
_COLUMNS = ["step", "name", "value"]
_SMOOTHED_OVER = 25
"""Losses are drawn as running medians over one in so many of their points: each step may be of another encoder, and a
target without contrast, which the loss divides by, makes one a million times larger than its neighbours."""


class Point(NamedTuple):
    """One logged value."""

    step: int
    name: str
    value: float


class Curves:
    """The curves of a training under way.

    Args:
        path: the table. until: a resumed training's step; what was logged later is dropped, for it is computed again.

    Raises:
        SettingError: the table is damaged.
    """

    def __init__(self, path: Path, until: int = 0):
        self.path = path
        self.points = [point for point in read_table(path) if point.step <= until] if until and path.exists() else []

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps what was logged at a step, in memory."""
        self.points += [Point(step, name, value) for name, value in values.items()]

    def save(self) -> None:
        """Writes the table, atomically.

        Raises:
            CannotWrite: full disk or missing rights; the earlier table is untouched.
        """
        with replacing(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows(self.points)


def read_table(path: Path) -> list[Point]:
    """Reads `curves.csv`.

    Raises:
        SettingError: it is not such a table; names the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if next(lines, None) != _COLUMNS:
            raise SettingError(f"{path} is no table of curves (step, name, value): move it away to do without it")
        points = []
        for line in lines:
            try:
                step, name, value = line
                points.append(Point(int(step), name, float(value)))
            except ValueError as error:
                raise SettingError(
                    f"{path}, line {lines.line_num} is damaged ({error}): move the file away to do without it"
                ) from error
    return points


def read_training(folder: Path) -> list[Point]:
    """The curves of a training's folder (or of its table): its own, or those in the store of a training without any.

    Raises:
        SettingError: neither is there. WeightsError: the state is damaged. TrackingUnavailable: no store.
    """
    table = folder / CURVES_NAME if folder.is_dir() else folder
    if table.exists():
        return read_table(table)
    state = folder / STATE_NAME
    if not state.exists():
        raise SettingError(f"{folder} is no training's folder: it has neither {CURVES_NAME} nor {STATE_NAME}")
    run_id = read_state(state)[0].run_id
    if not run_id:
        raise SettingError(f"{folder} has no {CURVES_NAME}, and the training was not tracked")
    return read_run(run_id)


def read_run(run_id: str) -> list[Point]:
    """The curves of a run in the tracking store, each step as it was logged last.

    Raises:
        SettingError: the store has no such run. TrackingUnavailable: no store.
    """
    found = read_metrics(run_id)
    if found is None:
        raise SettingError(f"{store_uri()} has no run {run_id}; MLFLOW_TRACKING_URI names another store")
    latest: dict[tuple[int, str], tuple[int, float]] = {}
    for name, value, time, step in found:
        latest[step, name] = max(latest.get((step, name), (time, value)), (time, value), key=lambda known: known[0])
    return [Point(step, name, value) for (step, name), (_, value) in sorted(latest.items())]


@style.styled
def plot(trainings: Mapping[str, Iterable[Point]], crops_per_step: int | None = None) -> Figure:
    """Losses (of several encoders, the total of each), and validation: detail above bilinear upsampling, for each.

    Args:
        trainings: name -> curves. crops_per_step: counts the horizontal axis in image crops instead of steps.
    """
    curves = {name: _by_name(points, crops_per_step or 1) for name, points in trainings.items()}
    figure = style.new_figure(9.5, 4.2)
    losses, gains = figure.subplots(1, 2)
    curves_of = {}
    for (training, known), dashes in zip(curves.items(), _cycled(style.LINES, len(curves)), strict=True):
        prefix = f"{training}: " if len(curves) > 1 else ""
        measured, validated = [], []
        several = any(name.startswith("loss/") for name in known)  # encoders: then one curve for each
        for name, (x, y) in known.items():
            if name.startswith("val/") and name.endswith("/gain"):
                validated.append((f"{prefix}{name[4:-5]}", x, y))
            elif name.startswith("loss/") if several else name == "loss" or name.endswith("_loss"):
                measured.append((f"{prefix}{name.removeprefix('loss/')}", x, y))
        for i, (label, x, y) in enumerate(measured):
            (line,) = losses.plot(x, _smooth(y), dashes, color=style.colour(i), label=label)
            curves_of[line] = x, y
        for i, (label, x, y) in enumerate(validated):
            gains.plot(x, y, dashes, marker=".", color=style.colour(i), label=label)
    gains.axhline(0, color=style.GREY, linewidth=1)
    unit = "image crops" if crops_per_step else "steps"
    losses.set(title="training losses, running medians", xlabel=unit, ylabel="loss", yscale="log")
    limits = losses.get_ylim()
    for line in [*losses.get_lines()]:  # single values behind, which do not decide what is shown
        x, y = curves_of[line]
        losses.plot(x, y, color=line.get_color(), alpha=0.15, linewidth=0.8)
    losses.set_ylim(limits)
    gains.set(title="validation: detail above bilinear's", xlabel=unit, ylabel="difference")
    for axes in (losses, gains):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def draw(config: DictConfig) -> Path:
    """Draws what `config` (configs/curves.yaml) names -> the picture's path.

    Raises:
        SettingError: nothing to draw, a training or run without curves; WeightsError, TrackingUnavailable, CannotWrite.
    """
    if config.crops_per_step is not None and (type(config.crops_per_step) is not int or config.crops_per_step < 1):
        raise SettingError(f"crops_per_step must be null or a whole number from 1, got {config.crops_per_step}")
    out = Path(config.out).expanduser()
    if out.suffix != ".png":
        raise SettingError(f"out must name a .png file, got {config.out}")
    folders, runs = _named("trainings", config.trainings), _named("runs", config.runs)
    if not folders | runs:
        raise SettingError("nothing to draw: give trainings=[FOLDER, ...] or runs=[RUN_ID, ...]")
    check_writable(out.parent)
    curves = {name: read_training(Path(folder).expanduser()) for name, folder in folders.items()}
    curves |= {name: read_run(run_id) for name, run_id in runs.items()}
    with replacing(out) as part:
        plot(curves, config.crops_per_step).savefig(part, format="png")
    return out


def _named(key: str, values: DictConfig | ListConfig | None) -> dict[str, str]:
    """What a setting names, by name: {NAME: VALUE}, or [VALUE, ...] under the values' last parts."""
    if values is None:
        return {}
    if isinstance(values, DictConfig):
        return {str(name): str(value) for name, value in values.items()}
    if not isinstance(values, ListConfig):
        raise SettingError(f"{key} must be null, [...] or {{NAME: ...}}, got {values}")
    named = {Path(str(value)).name: str(value) for value in values}
    if len(named) < len(values):
        raise SettingError(f"{key}: two have the same name: give them names, {key}={{NAME: ..., NAME: ...}}")
    return named


def _by_name(points: Iterable[Point], scale: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        found.setdefault(point.name, []).append((point.step * scale, point.value))
    return {name: (np.array([x for x, _ in line]), np.array([y for _, y in line])) for name, line in found.items()}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running median; shorter at the ends."""
    half = max(1, len(values) // _SMOOTHED_OVER) // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _cycled(values: tuple[str, ...], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]
