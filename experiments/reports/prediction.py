"""Which measure predicts which (`experiments.statistics.prediction`): a table, and a picture of the correlations."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from experiments.atomic import replacing
from experiments.reports import style
from experiments.reports.markdown import Table, signed, with_interval
from experiments.statistics.prediction import Prediction
from experiments.tracking.provenance import Origin


def write(config: DictConfig, found: Prediction) -> list[Path]:
    """Writes NAME.md, NAME.csv and NAME.png, each whole or not at all -> their paths."""
    paths = [Path(config.out_dir) / f"{config.name}{suffix}" for suffix in (".md", ".csv", ".png")]
    with replacing(paths[0]) as part:
        part.write_text(markdown(found, config.confidence, paths[2].name), encoding="utf-8")
    with replacing(paths[1]) as part:
        rows_of(found).to_csv(part, index=False)
    with replacing(paths[2]) as part:
        plot(found).savefig(part, format="png")
    return paths


def markdown(found: Prediction, confidence: float, picture: str) -> str:
    """The whole report; `picture` is the name of the plot's file."""
    origin = Origin.of_this_process("experiments.predict", "experiments.predict.main(config), from Python")
    sizes = sorted(set(found.num_methods[found.num_methods > 0].tolist())) or [0]
    methods = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    parts = [
        origin.header("Which measure predicts which"),
        f"Spearman's rank correlation over {methods} upsamplers that have both measures, averaged over up to "
        f"{found.num_encoders.max(initial=0)} encoders. Intervals of {confidence:.0%} hold for other upsamplers: a "
        f"jackknife over {found.num_families} families. Measures where less is better have their sign changed, so 1 is "
        "perfect for all.",
        table_of(found).markdown(),
        "- mean: over the targets. against the best: difference to the measure with the largest mean, which was\n"
        "  chosen on the same upsamplers.\n"
        "- Without an interval: leaving out a family changes nothing, or leaves too few methods.\n"
        f"- Methods: {', '.join(found.methods)}.",
        f"![correlations]({picture})",
    ]
    return "\n\n".join(parts) + "\n"


def table_of(found: Prediction) -> Table:
    """One row per predictor, the best first; one column per target."""
    rows = []
    for i in found.order:
        cells = ["" if one is None else with_interval(one.value, one.low, one.high, 2) for one in found.interval[i]]
        mean = found.mean[i]
        rows.append(
            [
                found.predictors[i],
                *cells,
                "" if mean is None else with_interval(mean.value, mean.low, mean.high, 2),
                signed(found.difference[i], 2),
            ]
        )
    return Table(["measure", *found.targets, "mean", "against the best"], rows)


def rows_of(found: Prediction) -> pd.DataFrame:
    """One row per predictor and target."""
    rows = []
    for i in found.order:
        for j, target in enumerate(found.targets):
            one = found.interval[i][j]
            rows.append(
                {
                    "measure": found.predictors[i],
                    "target": target,
                    "correlation": found.correlation[i, j],
                    "low": None if one is None else one.low,
                    "high": None if one is None else one.high,
                    "methods": found.num_methods[i, j],
                    "encoders": found.num_encoders[i, j],
                }
            )
    return pd.DataFrame(rows)


@style.styled
def plot(found: Prediction) -> Figure:
    """Correlations as colours with their numbers; the best predictor on top."""
    values = found.correlation[found.order]
    names = [found.predictors[i] for i in found.order]
    size = (3.2 + 0.9 * len(found.targets), 1.6 + 0.3 * len(names))
    figure = style.new_figure(*size)
    axes = figure.subplots()
    shown = axes.imshow(values, vmin=-1, vmax=1, cmap=style.DIVERGING, aspect="auto")
    axes.grid(False)
    for (row, column), one in np.ndenumerate(values):
        if np.isfinite(one):
            axes.text(column, row, f"{one:.2f}", ha="center", va="center", color="white" if abs(one) > 0.7 else "black")
    axes.set_xticks(range(len(found.targets)), found.targets, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(shown, label="rank correlation over upsamplers")
    return figure
