"""Trains an upsampler: `python -m experiments.train`. Settings: configs/train.yaml."""

import logging

from omegaconf import DictConfig

from experiments.command import command
from experiments.training.loop import train
from experiments.training.setup import warn_of_bundled_images

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command `train`."""
    warn_of_bundled_images(config.data)
    trained = train(config)
    log.info("%d steps; weights: %s; best: %s", trained.state.step, trained.checkpoint, trained.best or "none")


if __name__ == "__main__":
    main()
