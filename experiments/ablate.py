"""Ablations: arms x seeds x tasks, compared with a baseline: `python -m experiments.ablate`.

Settings: configs/ablate.yaml.
"""

import logging
import sys

import hydra
from omegaconf import DictConfig

from core.registry import discover
from experiments.reports.tables import show
from experiments.sweeps.sweep import EXPECTED_ERRORS, ablate

log = logging.getLogger(__name__)

discover()  # Hydra needs all choices before it composes


@hydra.main(version_base=None, config_path="../configs", config_name="ablate")
def main(config: DictConfig) -> None:
    """The command line of `ablate`."""
    try:
        report = ablate(config)
    except EXPECTED_ERRORS as error:
        log.error("%s", error)
        sys.exit(2)
    if report is None:
        log.info("another process leads this sweep, and reports")
        return
    show(report)
    for arm, reason in report.results.failures.items():
        log.error("arm %s failed: %s", arm, reason)
    if report.results.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
