"""What upsampled features are good for: `python -m experiments.evaluate`. Settings: configs/evaluate.yaml.

Exit code: 0, or 2 when nothing was measured; a value that is not finite stops the run and names it.
"""

import logging
import os
import sys

import hydra
from omegaconf import DictConfig
from rich.console import Console

from core.registry import discover
from experiments.measuring.evaluation import EXPECTED_ERRORS, evaluate
from experiments.reports.evaluation import rich_tables

log = logging.getLogger(__name__)

discover()  # Hydra needs all choices before it composes


@hydra.main(version_base=None, config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    """The command line of `evaluate`."""
    try:
        report = evaluate(config)
    except EXPECTED_ERRORS as error:
        log.error("%s", error)
        sys.exit(2)
    console = Console()
    for table in rich_tables(report.results, report.costs):
        console.print(table)
    for line in (*report.notes, *map(os.path.relpath, report.files)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
