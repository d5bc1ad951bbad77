"""Tables and pictures of a sweep, made again from MLflow alone: `python -m experiments.report run=ID`.

The run of a sweep holds its plan: arms, seeds, tasks, and what they depend on. The runs below it hold the scores per
image. Settings: configs/report.yaml. Exit code: 0, or 2 when there is nothing to report.
"""

import logging

from omegaconf import DictConfig

from experiments.command import command
from experiments.reports.tables import show
from experiments.sweeps.stored import report

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `report`."""
    made = report(config)
    show(made)
    for arm, reason in made.results.failures.items():
        log.error("arm %s failed: %s", arm, reason)


if __name__ == "__main__":
    main()
