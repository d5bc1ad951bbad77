"""Trains an upsampler: `python -m experiments.train`. Settings: configs/train.yaml."""

import logging
import sys

import hydra
from omegaconf import DictConfig

from core.registry import discover
from experiments.training.loop import EXPECTED_ERRORS, train

log = logging.getLogger(__name__)

discover()  # Hydra needs all choices before it composes


@hydra.main(version_base=None, config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """The command line of `train`."""
    try:
        trained = train(config)
    except EXPECTED_ERRORS as error:
        log.error("%s", error)
        sys.exit(2)
    log.info("%d steps; weights: %s; best: %s", trained.state.step, trained.checkpoint, trained.best or "none")


if __name__ == "__main__":
    main()
