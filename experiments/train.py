"""Trains an upsampler: `python -m experiments.train`. Settings: configs/train.yaml."""

import logging

from omegaconf import DictConfig

from experiments.command import command
from experiments.training.loop import train

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `train`."""
    trained = train(config)
    log.info("%d steps; weights: %s; best: %s", trained.state.step, trained.checkpoint, trained.best or "none")


if __name__ == "__main__":
    main()
