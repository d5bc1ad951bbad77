"""Draws training and validation curves: `python -m experiments.curves`. Settings: configs/curves.yaml."""

import logging
import os

from omegaconf import DictConfig

from experiments.command import command
from experiments.training.curves import draw

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command `curves`: runs `draw`."""
    log.info("%s", os.path.relpath(draw(config)))


if __name__ == "__main__":
    main()
