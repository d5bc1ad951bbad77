"""Distils the encoder of `backbone=embedded` from a deeper one: `python -m experiments.distill data.path=[PHOTOS]`.

Settings: configs/distill.yaml. What is done: experiments/training/distillation.py.
"""

import logging

from omegaconf import DictConfig

from experiments.command import command
from experiments.training.distillation import distill

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `distill`."""
    path = distill(config)
    log.info("weights: %s; use them with backbone=embedded backbone.weights=%s", path, path)


if __name__ == "__main__":
    main()
