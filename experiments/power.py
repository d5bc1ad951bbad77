"""How many seeds and images an effect needs to be shown: `python -m experiments.power`.

Settings: configs/power.yaml.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from experiments.reports.power import rich_table, write
from experiments.reports.simulation import write_simulation
from experiments.statistics.power import EXPECTED_ERRORS, check_settings, curves, read_components
from experiments.statistics.simulation import simulate_all

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../configs", config_name="power")
def main(config: DictConfig) -> None:
    """The command line of `power`."""
    try:
        check_settings(config)
        if config.simulate is not None:
            simulated = simulate_all(config.simulate, config.confidence)
            files = write_simulation(simulated, config.simulate, config.confidence, Path(config.out_dir), config.name)
        else:
            components = read_components(config)
            table = curves(config, components)
            files = write(config, components, table)
            Console().print(rich_table(table, config.wanted))
    except EXPECTED_ERRORS as error:
        log.error("%s", error)
        sys.exit(2)
    for file in files:
        Console().print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
