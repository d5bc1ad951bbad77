"""What whole training steps cost, as tables (Markdown, CSV, terminal) and metrics of a run."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from experiments.atomic import replacing
from experiments.reports.markdown import Table, number, times_faster

NOTES = """\
- A step: views cut from photographs, encoder on whole images and crops, forwards, losses, backward, update; of one
  backbone and batch, all its crops. s/step: median of the runs.
- x faster: the first arm's time divided by this arm's of the same round, median over rounds, with the 95 % interval of
  a bootstrap over rounds. CPU: the same of the CPU time of the process, which its neighbours disturb less.
- MB: 10^6 bytes, peak of one step above the level with models, optimiser and images in place. On CPU resident memory of
  a fresh process per arm; on a GPU allocated.
- loss: of the first step, from the same weights on the same images."""


@dataclass
class Row:
    """What was measured of one arm; None: not measured."""

    arm: str
    status: str = "ok"
    """ok, or why something was not measured: `out of memory...`, `wrong...`."""
    num_runs: int = 0
    time_s: float | None = None
    steps_per_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    cpu_ratio: float | None = None
    memory_mb: float | None = None
    loss: float | None = None


def write(rows: Sequence[Row], out_dir: Path, name: str, top: str) -> list[Path]:
    """Writes NAME.md and NAME.csv, each whole or not at all -> their paths.

    Args:
        top: what the Markdown begins with.
    """
    paths = [out_dir / f"{name}.{suffix}" for suffix in ("md", "csv")]
    with replacing(paths[0]) as part:
        part.write_text("\n\n".join([top, step_table(rows).markdown(), NOTES]) + "\n")
    with replacing(paths[1]) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    return paths


def metrics(row: Row) -> dict[str, float]:
    """The numbers of a row under the name of its arm."""
    return {f"{row.arm}/{key}": value for key, value in asdict(row).items() if isinstance(value, float)}


def _cells(row: Row) -> list[str]:
    ratio = times_faster(row.ratio, row.ratio_low, row.ratio_high)
    numbers = [number(row.time_s, 2), number(row.steps_per_s, 3), str(row.num_runs), ratio, number(row.cpu_ratio, 2)]
    remark = "" if row.status == "ok" else row.status
    return [row.arm, *numbers, number(row.memory_mb, 0), number(row.loss, 5), remark]


_COLUMNS = ("arm", "s/step", "steps/s", "runs", "x faster", "CPU", "MB", "loss", "remark")


def step_table(rows: Sequence[Row]) -> Table:
    """One line for each row."""
    return Table(_COLUMNS, [_cells(row) for row in rows], "training steps", left=("arm", "remark"))
