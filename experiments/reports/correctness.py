"""How exact the model is on a device, as tables: Markdown and CSV."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from experiments.atomic import replacing
from experiments.cost.correctness import Check
from experiments.reports.markdown import Table

NOTES = """\
- l2, largest: norm and largest value of the error as shares of those of the result in float64, which the dense released
  algorithm gives. released: that algorithm in the same dtype, on the same device; it is what the others are judged by.
- gradient: of the training loss by all weights, which are float32; below float32 under autocast.
- compiled: `compile_encoders()`; exported: a program of `torch.export`. Both are judged by ours."""


def write(checks: Sequence[Check], out_dir: Path, name: str, top: str, unfinished: str = "") -> None:
    """Writes NAME_correctness.md and NAME_correctness.csv, each whole or not at all.

    Args:
        top: what the Markdown begins with.
        unfinished: a remark on checks that are still missing.

    Raises:
        CannotWrite: full disk or missing rights.
    """
    names = [field.name for field in fields(Check)]
    table = Table(names, [list(map(_cell, asdict(check).values())) for check in checks], left=names)
    text = "\n\n".join(filter(None, [top, unfinished, table.markdown(), NOTES]))
    with replacing(out_dir / f"{name}_correctness.md") as part:
        part.write_text(f"{text}\n", encoding="utf-8")
    with replacing(out_dir / f"{name}_correctness.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(asdict(check).values() for check in checks)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)
