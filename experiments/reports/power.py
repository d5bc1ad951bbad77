"""How many seeds and images an effect needs (`experiments.statistics.power`): tables, and a plot."""

import math
from pathlib import Path

import pandas as pd
import rich.table
from matplotlib.figure import Figure
from omegaconf import DictConfig

from experiments.atomic import replacing
from experiments.reports import style
from experiments.reports.markdown import Table, number
from experiments.statistics.power import Components
from experiments.tracking.provenance import Origin


def write(config: DictConfig, components: Components, table: pd.DataFrame) -> list[Path]:
    """Writes NAME.md and NAME.png, each whole or not at all -> their paths.

    Args:
        table: of `experiments.statistics.power.curves`.
    """
    paths = [Path(config.out_dir) / f"{config.name}{suffix}" for suffix in (".md", ".png")]
    with replacing(paths[0]) as part:
        part.write_text(markdown(config, components, table, paths[1].name), encoding="utf-8")
    with replacing(paths[1]) as part:
        plot(table, config.wanted).savefig(part, format="png")
    return paths


def markdown(config: DictConfig, components: Components, table: pd.DataFrame, picture: str) -> str:
    """The whole report; `picture` is the name of the plot's file."""
    origin = Origin.of_this_process("experiments.power", "experiments.power.main(config), from Python")
    known = ", ".join(f"{name} {value:.3g}" for name, value in vars(components).items())
    source = f"of {Path(str(config.scores)).name}" if config.scores else "as given"
    parts = [
        origin.header("Seeds and images that an effect needs"),
        f"Standard deviations of the difference between two arms: {known} ({source}). {config.num_arms} arms, "
        f"intervals of {config.confidence:.0%}. Each cell: the chance to show the effect.",
    ]
    for effect, rows in table.groupby("effect", sort=False):
        wide = rows.pivot(index="seeds", columns="images", values="power")
        columns = ["seeds", *(f"{count} images" for count in wide)]
        cells = [[str(count), *(number(value, 2) for value in row)] for count, row in wide.iterrows()]
        parts.append(f"True difference {effect:g}; {needed(table, effect, config.wanted)}")
        parts.append(Table(columns, cells, left=()).markdown())
    return "\n\n".join([*parts, f"![power]({picture})"]) + "\n"


def rich_table(table: pd.DataFrame, wanted: float) -> rich.table.Table:
    """For the terminal: all effects in one table."""
    wide = table.pivot(index=["effect", "seeds"], columns="images", values="power")
    columns = ["effect", "seeds", *(f"{count} images" for count in wide)]
    rows = [
        [f"{effect:g}", str(seeds), *(f"{value:.2f}{'*' if value >= wanted else ' '}" for value in row)]
        for (effect, seeds), row in wide.iterrows()
    ]
    return Table(columns, rows, f"chance to show an effect; *: at least {wanted:.0%}", left=()).rich()


def needed(table: pd.DataFrame, effect: float, wanted: float) -> str:
    """The sizes that reach the wanted power with the fewest seeds, and then the fewest images, in words."""
    enough = table[(table["effect"] == effect) & (table["power"] >= wanted)].sort_values(["seeds", "images"])
    if enough.empty:
        return f"none of these sizes shows it with a chance of {wanted:.0%}:"
    least = enough.drop_duplicates("seeds")
    least = least[least["images"] < least["images"].cummin().shift().fillna(math.inf)]  # more seeds: fewer images
    return (
        f"a chance of {wanted:.0%} needs "
        + ", or ".join(f"{row.seeds} seeds and {row.images} images" for row in least.itertuples())
        + ":"
    )


@style.styled
def plot(table: pd.DataFrame, wanted: float) -> Figure:
    """Power against the number of images; one line per number of seeds, one panel per effect."""
    effects = list(dict.fromkeys(table["effect"]))
    figure = style.new_figure(1 + 3.5 * len(effects), 3.2)
    for axes, effect in zip(figure.subplots(1, len(effects), squeeze=False, sharey=True)[0], effects, strict=True):
        for num_seeds, rows in table[table["effect"] == effect].sort_values("images").groupby("seeds"):
            axes.plot(rows["images"], rows["power"], "o-", label=f"{num_seeds} seeds")
        axes.axhline(wanted, color=style.GREY, linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="images", title=f"true difference {effect:g}", ylim=(-0.02, 1.02))
    figure.axes[0].set_ylabel("chance to show it")
    figure.axes[-1].legend()
    return figure
