"""The scores of an evaluation as tables for terminal and files, and as metrics of a run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import rich.table
from omegaconf import DictConfig, OmegaConf

from experiments.atomic import replacing
from experiments.reports.costs import cost_section, cost_table
from experiments.reports.figures import short_title
from experiments.reports.markdown import Table, signed, with_interval
from experiments.statistics.score_files import write_scores
from experiments.statistics.verdicts import FLOOR, Comparison, bases, table
from experiments.tracking.provenance import Origin

NOTES = f"""\
- After each value comes the mean paired difference to BASELINE, with its interval. The line above a table says what the
  intervals hold for; if an arm differs from the others in this, its verdict says so. One seed says nothing about other
  seeds, and one image gives no interval.
- gap closed: (arm - {FLOOR}) / (encoder - {FLOOR}); left out where the encoder at the higher resolution is not clearly
  better than {FLOOR}.
- verdict: only for checkpoints, in the first measure of the table, corrected for their number (Holm).
- NAME, blurred: the same for features blurred by the width that is best on the other images. Blur alone improves cosine
  and error, so only a gain beyond the best blurred one counts.
- upsampled: probes trained on the arm's features. transferred: probes trained on bilinearly enlarged low-resolution
  features, and applied to the arm's.
- Scores per image: the .parquet file of the same name."""


def write(
    results: Sequence[Comparison],
    scores: pd.DataFrame,
    costs: pd.DataFrame | None,
    config: DictConfig,
    origin: Origin,
) -> list[Path]:
    """Writes NAME.md, NAME.csv and NAME.parquet (the scores), each whole or not at all -> their paths."""
    paths = [Path(config.out_dir) / f"{config.name}{suffix}" for suffix in (".md", ".csv", ".parquet")]
    with replacing(paths[0]) as part:
        part.write_text(markdown(results, scores["seed"].nunique(), costs, config, origin), encoding="utf-8")
    with replacing(paths[1]) as part:
        table(list(results)).to_csv(part, index=False)
    write_scores(paths[2], scores, asdict(origin))
    return paths


def markdown(
    results: Sequence[Comparison], num_seeds: int, costs: pd.DataFrame | None, config: DictConfig, origin: Origin
) -> str:
    """The whole report."""
    sizes = ", ".join(f"{name} {config[f'{name}_size']}" for name in ("image", "encoder", "guidance", "output"))
    task = ", ".join(f"{k} {v}" for k, v in OmegaConf.to_container(config.task, resolve=True).items() if k != "name")
    facts = [
        f"images: {config.max_train_images or 'all'} to train on, {config.max_val_images or 'all'} to measure",
        f"sizes (None: as the image): {sizes}; the ceiling's encoder sees {config.ceiling_scale} times its size",
        f"{task or 'no settings'}; seeds: {num_seeds}; intervals of {config.confidence:.0%}",
    ]
    parts = [origin.header(f"{config.task.name}: {config.val_data.name}, {config.backbone.name}", facts)]
    for name, of_task in by_task(results).items():
        parts += [f"## {_heading(name, of_task)}", f"Intervals: {bases(of_task)}.", _table(of_task).markdown()]
    if costs is not None:
        parts.append(cost_section(costs))
    return "\n\n".join([*parts, NOTES.replace("BASELINE", config.baseline)]) + "\n"


def rich_tables(results: Sequence[Comparison], costs: pd.DataFrame | None = None) -> list[rich.table.Table]:
    """For the terminal: the first measure of each task in full, the values of up to three others, and costs."""
    shown, baseline = [], next(one.arm for one in results if one.difference is None)
    for name, of_task in by_task(results).items():
        first, *others = dict.fromkeys(one.measure for one in of_task)
        columns = ["arm", short_title(first), f"to {baseline}", "gap closed", *map(short_title, others[:3])]
        arms = by_arm(of_task)
        rows = []
        for arm, mine in arms.items():
            main = mine[first]
            gap = "" if main.gap_closed is None else with_interval(main.gap_closed.value, None, None, 2, "+")
            rest = (_value(mine[other].mean) if other in mine else "" for other in others[:3])
            rows.append([arm, _value(main.mean), signed(main.difference), gap, *rest])
        styles = ["dim" if mine[first].verdict == "reference" else "" for mine in arms.values()]
        title, caption = _heading(name, of_task), f"intervals: {bases(of_task)}"
        shown.append(Table(columns, rows, title, caption, styles=styles).rich())
    return shown if costs is None else [*shown, cost_table(costs).rich()]


def _heading(task: str, of_task: Sequence[Comparison]) -> str:
    count = max(one.num_images for one in of_task)
    return f"{task}, {count} image{'s' * (count != 1)}"


def _table(of_task: Sequence[Comparison]) -> Table:
    """One line per arm of a task: name, measures with differences, gap closed and verdict of the first measure."""
    measures = list(dict.fromkeys(one.measure for one in of_task))
    several = len({one.basis for one in of_task if one.difference is not None}) > 1
    rows = []
    for arm, mine in by_arm(of_task).items():
        first = next(iter(mine.values()))
        known = (mine.get(measure) for measure in measures)  # ceilings are not blurred
        values = ["" if one is None else f"{_value(one.mean)} {signed(one.difference)}".strip() for one in known]
        verdict = f"{first.verdict} ({first.basis})" if several and first.basis else first.verdict
        rows.append([arm, *values, signed(first.gap_closed, 2), verdict])
    columns = ["arm", *map(short_title, measures), "gap closed", "verdict"]
    return Table(columns, rows, left=("arm", "verdict"))


def metrics(results: Sequence[Comparison]) -> dict[str, float]:
    """The numbers of all results under TASK/ARM/MEASURE."""
    values = {}
    for one in results:
        key = f"{one.task}/{one.arm}/{one.measure}"
        values[key] = one.mean
        for name, interval in (("difference", one.difference), ("gap_closed", one.gap_closed)):
            if interval is not None:
                known = {"": interval.value, "_low": interval.low, "_high": interval.high}
                values |= {f"{key}_{name}{end}": value for end, value in known.items() if value is not None}
    return values


def by_task(results: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Task -> its results, in order."""
    found: dict[str, list[Comparison]] = {}
    for one in results:
        found.setdefault(one.task, []).append(one)
    return found


def by_arm(results: Sequence[Comparison]) -> dict[str, dict[str, Comparison]]:
    """For one task: arm -> measure -> result."""
    found: dict[str, dict[str, Comparison]] = {}
    for one in results:
        found.setdefault(one.arm, {})[one.measure] = one
    return found


def _value(value: float) -> str:
    """Four digits behind the point, fewer of large values."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
