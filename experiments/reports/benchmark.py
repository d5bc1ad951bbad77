"""The benchmark's results as tables (Markdown, CSV, terminal), a plot, and metrics of a run."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import rich.table
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig

from experiments.atomic import replacing
from experiments.cost.benchmark import Row
from experiments.reports import style
from experiments.reports.markdown import Table, number, times_faster
from experiments.tracking.provenance import Origin, machine

COLOURS = {
    "dense": style.GREY,
    "ours": style.BLUE,
    "compiled": style.ORANGE,
    "head": style.GREY,
    "readout": style.BLUE,
}
"""Of the arms of one algorithm; peers take other colours in turn."""
_OF_OTHERS = (style.GREEN, style.RED, style.PURPLE, style.SKY, style.BLACK)
_FILLS = ("full", "none", "left", "top")
LINES = {"float32": "-", "bfloat16": "--", "float16": ":"}
COLUMNS = {
    "size": "left",
    "dtype": "left",
    "arm": "left",
    "ms": "right",
    "minimum": "right",
    "runs": "right",
    "x faster": "right",
    "CPU": "right",
    "MB": "right",
    "of budget": "right",
    "differs": "right",
    "Mparam": "right",
    "GFLOP": "right",
    "remark": "left",
}
_IN_TERMINAL = ("size", "dtype", "arm", "ms", "x faster", "MB", "remark")
NOTES = """\
- ms: median of the runs. CPU: wall-clock time; GPU: time between two events of its queue, after synchronisation.
- x faster: the first arm's time divided by this arm's in the same round, median over rounds, with the 95 % interval
  of a bootstrap over rounds. CPU: the same for the process's CPU time, which other processes disturb less.
- MB: 10^6 bytes at the peak, on top of model and inputs, output included. CPU: resident memory of a fresh process per
  arm and size; GPU: allocated (reserved).
- budget: output + 3 image-sized buffers of 128 channels (3·H·W·512 B in float32) + 10 %.
- Peers (experiments/peers/) compute something else: their output is not compared. They have new weights, C is that of
  the features, and those with one factor are resampled to the output. refused: a peer does not support the size, or
  has nothing to train.
- GFLOP: of one forward; only matrix products and convolutions, a multiply-add counts as two. Our arms are counted on
  the plain path; the fast path needs fewer for its 3x3 convolution (Winograd).
- differs: largest difference from the first arm's output (training step: from its gradient of all weights), relative to
  the largest value. An arm that differs too much is called wrong and not timed."""


def header(config: DictConfig, device: torch.device) -> str:
    """The header in Markdown: the command, the machine and the versions."""
    rounds = f"rounds: {config.num_warmup} to warm up, up to {config.num_runs} timed; all arms in turn in one process"
    origin = Origin.of_this_process(
        "experiments.benchmark",
        "experiments.benchmark.benchmark(config), from Python",
        machine(device, config.num_threads, ", ".join(config.dtype), config.tf32),
        notes=[rounds],
    )
    return origin.header(f"Cost on {device.type.upper()}")


def write(rows: Sequence[Row], out_dir: Path, name: str, top: str, done: str = "") -> list[Path]:
    """Writes NAME.md, NAME.csv and NAME.png, each whole or not at all -> their paths.

    Args:
        top: the beginning of the Markdown.
        done: a remark on rows that are still missing.
    """
    paths = [out_dir / f"{name}.{suffix}" for suffix in ("md", "csv", "png")]
    with replacing(paths[0]) as part:
        part.write_text("\n\n".join(filter(None, [top, done, cost_table(rows).markdown(), NOTES])) + "\n")
    with replacing(paths[1]) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, flat(rows[0]))
        writer.writeheader()
        writer.writerows(map(flat, rows))
    with replacing(paths[2]) as part:
        plot(rows).savefig(part, format="png")
    return paths


def cells(row: Row) -> list[str]:
    """One line of the tables."""
    ratio = times_faster(row.ratio, row.ratio_low, row.ratio_high)
    if row.ratio and row.against != "dense":
        ratio += f" than {row.against}"
    memory = _number(row.memory_mb) + (f" ({_number(row.reserved_mb)})" if row.reserved_mb else "")
    remark = "" if row.status == "ok" else row.status
    if row.queries_at_once and not remark:
        remark = f"{row.queries_at_once} queries at once"
    return [
        row.case.label,
        row.case.dtype,
        row.arm,
        _number(row.time_ms),
        _number(row.time_min_ms),
        str(row.num_runs or ""),
        ratio,
        number(row.cpu_ratio, 2),
        memory,
        f"{row.of_budget:.0%}" if row.of_budget is not None else "",
        f"{row.difference:.0e}" if row.difference is not None else "",
        f"{row.parameters / 1e6:.2f}" if row.parameters else "",
        _number(row.gflops),
        remark,
    ]


def cost_table(rows: Sequence[Row]) -> Table:
    """One line for each row."""
    left = [name for name, side in COLUMNS.items() if side == "left"]
    styles = ["red" if row.defective else "" for row in rows]
    return Table(list(COLUMNS), [cells(row) for row in rows], "cost", left=left, styles=styles)


def rich_table(rows: Sequence[Row]) -> rich.table.Table:
    """The most important columns, for the terminal."""
    return cost_table(rows).rich(_IN_TERMINAL)


def flat(row: Row) -> dict[str, object]:
    """All of a row, the case's fields first."""
    own = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "case"}
    return asdict(row.case) | own | {"of_budget": row.of_budget}


def metrics(row: Row) -> dict[str, float]:
    """The numbers of a row under the names of its size and arm."""
    names = ("time_ms", "time_min_ms", "cpu_ms", "ratio", "ratio_low", "ratio_high", "cpu_ratio", "memory_mb",
             "reserved_mb", "of_budget", "difference", "parameters", "gflops", "num_runs")  # fmt: skip
    values = {f"{row.case.key}/{row.arm}/{name}": getattr(row, name) for name in names}
    return {key: value for key, value in values.items() if value is not None}


@style.styled
def plot(rows: Sequence[Row]) -> Figure:
    """Time and memory of forwards by the output's side; a cross marks an arm that ran out of memory."""
    figure = style.new_figure(9.5, 4.5)
    panels = figure.subplots(1, 2)
    forwards = [row for row in rows if not row.case.training]
    curves = list(dict.fromkeys((row.arm, row.case.dtype, row.case.channels) for row in forwards))
    widths = sorted({row.case.channels for row in forwards})
    others = dict.fromkeys(row.arm for row in forwards if row.arm not in COLOURS)
    colours = COLOURS | {arm: _OF_OTHERS[number % len(_OF_OTHERS)] for number, arm in enumerate(others)}
    fills = {arm: _FILLS[number // len(_OF_OTHERS) % len(_FILLS)] for number, arm in enumerate(others)}
    for axes, value, label in zip(panels, ("time_ms", "memory_mb"), ("time in ms", "peak memory in MB"), strict=True):
        for arm, dtype, channels in curves:
            mine = [row for row in forwards if (row.arm, row.case.dtype, row.case.channels) == (arm, dtype, channels)]
            mine.sort(key=lambda row: row.case.output)
            known = [row for row in mine if getattr(row, value)]
            looks = {
                "color": colours[arm],
                "linestyle": LINES[dtype],
                "marker": "os^v"[widths.index(channels) % 4],
                "fillstyle": fills.get(arm, "full"),
            }
            axes.plot([row.case.output for row in known], [getattr(row, value) for row in known], **looks,
                      label=f"{arm}, {dtype}, C={channels}")  # fmt: skip
            full = [row.case.output for row in mine if row.status.startswith("out of memory")]
            axes.plot(full, [0.98] * len(full), "x", color=colours[arm], transform=axes.get_xaxis_transform())
        sides = sorted({row.case.output for row in forwards})
        axes.set(xscale="log", xlabel="output side in pixels", ylabel=label)
        if any(getattr(row, value) for row in forwards):
            axes.set_yscale("log")
        axes.set_xticks(sides, list(map(str, sides)), rotation=45)
        axes.xaxis.minorticks_off()
    if forwards:
        panels[0].legend(fontsize="small", ncols=1 + len(curves) // 12)
    if any(row.status.startswith("out of memory") for row in forwards):
        figure.suptitle("A cross at the top: out of memory", fontsize="small")
    return figure


def _number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
