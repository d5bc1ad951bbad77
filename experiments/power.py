"""How many seeds and images an effect needs to be shown: `python -m experiments.power`.

Settings: configs/power.yaml.
"""

import logging
import os
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.reports.power import rich_table, write
from experiments.reports.simulation import write_simulation
from experiments.statistics.power import check_settings, curves, read_components
from experiments.statistics.simulation import simulate_all

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command `power`: runs `curves`, or `simulate_all`."""
    from experiments.measuring.tasks import tasks  # imported above, Hydra would take task=... for a group of choices

    tasks()  # registers the measures
    check_settings(config)
    if config.simulate is not None:
        simulated = simulate_all(config.simulate, config.confidence)
        files = write_simulation(simulated, config.simulate, config.confidence, Path(config.out_dir), config.name)
    else:
        components = read_components(config)
        table = curves(config, components)
        files = write(config, components, table)
        Console().print(rich_table(table, config.wanted))
    for file in files:
        Console().print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
