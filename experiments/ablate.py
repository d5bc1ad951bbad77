"""Ablations: arms x seeds x tasks, compared with a baseline: `python -m experiments.ablate`.

Settings: configs/ablate.yaml.
"""

import logging

from omegaconf import DictConfig

from experiments.command import command
from experiments.reports.tables import show
from experiments.sweeps.sweep import ablate

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command `ablate`; returns 1 when an arm failed."""
    report = ablate(config)
    if report is None:
        log.info("another process leads this sweep and writes its report")
        return 0
    show(report)
    for arm, reason in report.results.failures.items():
        log.error("arm %s failed: %s", arm, reason)
    return int(bool(report.results.failures))


if __name__ == "__main__":
    main()
