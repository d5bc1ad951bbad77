"""How many seeds and images an effect needs to be shown: `python -m experiments.power`.

Settings: configs/power.yaml.
"""

import logging
import os
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.command import command
from experiments.reports.simulation import write_simulation
from experiments.statistics.power import check_settings, curves, read_components, write

log = logging.getLogger(__name__)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `curves`."""
    check_settings(config)
    if config.simulate is not None:
        files = write_simulation(config.simulate, config.confidence, Path(config.out_dir), config.name)
    else:
        components = read_components(config)
        table = curves(config, components)
        files = write(config, components, table)
        Console().print(_rich(table, config.wanted))
    for file in files:
        Console().print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)


def _rich(table: pd.DataFrame, wanted: float) -> Table:
    shown = Table(title=f"chance to show an effect; bold: at least {wanted:.0%}", box=SIMPLE_HEAD, pad_edge=False)
    images = list(dict.fromkeys(table["images"]))
    for column in ("effect", "seeds", *(f"{count} images" for count in images)):
        shown.add_column(column, justify="right")
    for (effect, seeds), rows in table.groupby(["effect", "seeds"], sort=False):
        cells = [f"[bold]{value:.2f}[/]" if value >= wanted else f"{value:.2f}" for value in rows["power"]]
        shown.add_row(f"{effect:g}", str(seeds), *cells)
    return shown


if __name__ == "__main__":
    main()
