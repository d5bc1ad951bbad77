"""Feature fidelity of upsamplers, without labels: `experiments.evaluate task=fidelity` with other defaults.

`python -m experiments.fidelity`; settings: configs/fidelity.yaml. What is measured: experiments/measuring/metrics.py.
"""

from omegaconf import DictConfig

from experiments.command import command
from experiments.evaluate import measure_and_show


@command
def main(config: DictConfig) -> int | None:
    """The command `fidelity`."""
    measure_and_show(config)


if __name__ == "__main__":
    main()
