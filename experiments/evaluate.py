"""Measures upsampled features with probes and without: `python -m experiments.evaluate`.

Settings: configs/evaluate.yaml. Exit code: 0, or 2 when nothing was measured. A value that is not finite stops the run,
and the message names it.
"""

import os

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.measuring.evaluation import evaluate
from experiments.reports.evaluation import rich_tables


@command
def main(config: DictConfig) -> int | None:
    """The command `evaluate`."""
    measure_and_show(config)


def measure_and_show(config: DictConfig) -> None:
    """Runs `evaluate` and prints its tables."""
    report = evaluate(config)
    console = Console()
    for table in rich_tables(report.results, report.costs):
        console.print(table)
    for line in (*report.notes, *map(os.path.relpath, report.files)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report.pictures:
        folder = os.path.relpath(report.pictures[0].parent)
        console.print(f"worst images of each arm: {folder}/", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
