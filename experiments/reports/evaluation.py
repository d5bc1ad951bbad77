"""Scores of an evaluation -> tables for terminal and files, and the metrics of a run."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.atomic import replacing
from experiments.cost.arm_cost import cost_markdown, cost_table
from experiments.statistics.intervals import Interval
from experiments.statistics.scores import MEASURES
from experiments.statistics.verdicts import FLOOR, Comparison, table
from experiments.tracking.provenance import Origin

NOTES = f"""\
- Behind each value the mean paired difference to {FLOOR} with its interval over seeds and images (over images, where
  there is one seed or the task has none).
- gap closed: (arm - {FLOOR}) / (encoder - {FLOOR}); left out where the encoder at the higher resolution is not clearly
  better than {FLOOR}.
- verdict: of checkpoints, corrected for their number (Holm).
- upsampled: probes trained on the arm's features. transferred: trained on low-resolution features, enlarged
  bilinearly, and applied to the arm's.
- Scores per image: the .parquet file of the same name."""


def header(config: DictConfig, fingerprints: Mapping[str, str], num_seeds: int, notes: Sequence[str] = ()) -> str:
    """Markdown: the command, with what it ran, and what else a reader must know."""
    made = Origin.of_this_process("experiments.evaluate", "experiments.evaluate.evaluate(config), from Python")
    sizes = ", ".join(f"{name} {config[f'{name}_size']}" for name in ("image", "encoder", "guidance", "output"))
    task = ", ".join(f"{k} {v}" for k, v in OmegaConf.to_container(config.task, resolve=True).items() if k != "name")
    data = "; ".join(f"{role}={config[role].name}, fingerprint {d[:12]}" for role, d in fingerprints.items())
    return "\n".join(
        [
            f"# {config.task.name}: {config.val_data.name}, {config.backbone.name}",
            "",
            f"    {made.command}",
            "",
            f"- {made}",
            f"- {data}; at most {config.max_train_images or 'all'} and {config.max_val_images or 'all'} images",
            f"- sizes (None: as the image): {sizes}; the ceiling's encoder sees {config.ceiling_scale} times its size",
            f"- {task or 'no settings'}; seeds: {num_seeds}; intervals of {config.confidence:.0%}",
            f"- {platform.machine()}, {made.packages}",
            *(f"- {note}" for note in notes),
        ]
    )


def write(
    results: Sequence[Comparison], scores: pd.DataFrame, costs: pd.DataFrame | None, out_dir: Path, name: str, top: str
) -> list[Path]:
    """Writes NAME.md, NAME.csv and NAME.parquet (the scores), each whole or not at all -> their paths."""
    paths = [out_dir / f"{name}{suffix}" for suffix in (".md", ".csv", ".parquet")]
    parts = [top]
    for task, of_task in by_task(results).items():
        measures = list(dict.fromkeys(result.measure for result in of_task))
        lines = [["arm", *map(title, measures), "gap closed", "verdict"]]
        lines += [["---", *["---:"] * len(measures), "---:", "---"], *cells(of_task)]
        count = max(result.num_images for result in of_task)
        parts += [f"## {task}, {count} images", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if costs is not None:
        parts.append(cost_markdown(costs))
    with replacing(paths[0]) as part:
        part.write_text("\n\n".join([*parts, NOTES]) + "\n", encoding="utf-8")
    with replacing(paths[1]) as part:
        table(list(results)).to_csv(part, index=False)
    with replacing(paths[2]) as part:
        scores.to_parquet(part, index=False)
    return paths


def rich_tables(results: Sequence[Comparison], costs: pd.DataFrame | None = None) -> list[Table]:
    """For the terminal: the first measure of each task with all that is known of it, the other values, and costs."""
    tables = []
    for task, of_task in by_task(results).items():
        first, *others = dict.fromkeys(result.measure for result in of_task)
        count = max(result.num_images for result in of_task)
        shown = Table(title=f"{task}, {count} images", box=SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(("arm", title(first), f"to {FLOOR}", "gap closed", *map(title, others[:3]))):
            shown.add_column(column, justify="right" if i else "left", overflow="fold")
        for arm, mine in by_arm(of_task).items():
            main = mine[first]
            gap = "" if main.gap_closed is None else f"{main.gap_closed.value:+.2f}"
            rest = (number(mine[name].mean) for name in others[:3])
            style = "dim" if main.verdict == "reference" else ""
            shown.add_row(arm, number(main.mean), signed(main.difference), gap, *rest, style=style)
        tables.append(shown)
    return tables if costs is None else [*tables, cost_table(costs)]


def cells(results: Sequence[Comparison]) -> list[list[str]]:
    """One line per arm of a task: its name, each measure with its difference, gap closed and verdict of the first."""
    lines = []
    for arm, mine in by_arm(results).items():
        first = next(iter(mine.values()))
        values = [f"{number(one.mean)} {signed(one.difference)}".strip() for one in mine.values()]
        lines.append([arm, *values, signed(first.gap_closed, 2), first.verdict])
    return lines


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
    """Of one task: arm -> measure -> result."""
    found: dict[str, dict[str, Comparison]] = {}
    for one in results:
        found.setdefault(one.arm, {})[one.measure] = one
    return found


def title(measure: str) -> str:
    """A measure's name in tables."""
    return MEASURES[measure].title or measure


def number(value: float) -> str:
    """Four digits behind the point, fewer of large values."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def signed(interval: Interval | None, digits: int = 4) -> str:
    """+0.0123 [+0.0100, +0.0150]"""
    if interval is None:
        return ""
    ends = "" if interval.low is None else f" [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    return f"{interval.value:+.{digits}f}{ends}"
