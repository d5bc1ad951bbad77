"""Adapts an upsampler to an encoder, from a few photographs: `python -m experiments.adapt`.

Settings: configs/adapt.yaml. Exit code: 0 if held-out photographs got better, 1 if not, or not as far as
their interval shows.
"""

import os

from omegaconf import DictConfig
from rich.console import Console

from experiments.adaptation.adapt import Adapted, adapt
from experiments.command import command


def _report(adapted: Adapted, console: Console) -> None:
    console.print(adapted.curve.verdict(), highlight=False, soft_wrap=True)
    for file in adapted.files:
        console.print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)
    for delta in adapted.deltas:
        told = f"{os.path.relpath(delta)}: {delta.stat().st_size / 1e6:.1f} MB, usable as checkpoint=FILE"
        console.print(told, markup=False, highlight=False, soft_wrap=True)


@command
def main(config: DictConfig) -> int | None:
    """The command `adapt`."""
    adapted = adapt(config)
    _report(adapted, Console())
    return 0 if adapted.helped else 1


if __name__ == "__main__":
    main()
