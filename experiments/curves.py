"""Draws training and validation curves: `python -m experiments.curves`. Settings: configs/curves.yaml."""

import logging
import os
import sys

import hydra
from omegaconf import DictConfig

from experiments.training.curves import EXPECTED_ERRORS, draw

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../configs", config_name="curves")
def main(config: DictConfig) -> None:
    """The command line of `draw`."""
    try:
        log.info("%s", os.path.relpath(draw(config)))
    except EXPECTED_ERRORS as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
