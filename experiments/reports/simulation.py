"""Writes docs/statistics.md: the assumptions of the intervals, and how often intervals and verdicts are wrong."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments.atomic import replacing
from experiments.reports import style
from experiments.reports.markdown import Table, number
from experiments.statistics.simulation import BOOTSTRAP_SWEEPS
from experiments.tracking.provenance import Origin

TEXT = """\
# How differences are judged

An arm is compared with the baseline on the same images and with the same seeds. A measure is a ratio of sums over
images (`experiments/statistics/scores.py`). It is turned into jackknife pseudo-values, one per seed and image. For a
mean over images, these are the values of the images, so mIoU and means are treated alike. With S seeds and N images,
their difference d is modelled as

    d[s, i] = true difference + seed[s] + image[i] + rest[s, i]

Seeds and images are both taken as random samples, so that the interval holds for other seeds and other images. The
squared standard error of the mean of d is at most the variance of the seeds' means divided by S (`seeds`), plus the
variance of the images' means divided by N (`images`). Both contain the part of the rest (`rest`), so it is subtracted
once. With three seeds, the first is estimated with two degrees of freedom and is poorly known; the second is well
known. The half width is therefore (Banerjee, Sankhya 1961)

    sqrt(t(S - 1)^2 · seeds + t(N - 1)^2 · images - z^2 · rest)

It covers the true difference at least as often as it claims, whatever the shares of seeds and images are. The price:
where neither seeds nor images have an effect of their own, it is wider than needed, with three seeds twice as wide. The
usual single quantile (Satterthwaite) is narrower and was tried. With four arms and three seeds whose effect is large,
it called identical arms different in 14 of 100 sweeps. The .csv of a sweep also gives the percentile bootstrap over
seeds and images (Owen 2007), and the table below shows how often that is wrong.

One seed says nothing about other seeds, and the verdict then says "over images only". With one image there is no
interval at all, however many seeds it was measured with.

p is the smallest error level at which the interval excludes 0, after Holm's correction for the number of arms within
one measure of one task. Measures and tasks are judged one by one.

{header}

Each line: {num_sweeps} sweeps of 4 arms and a baseline (bootstrap: {num_bootstrap}, Bonferroni-corrected).

- False: share of sweeps of identical arms in which some arm is said to help or hurt. It should be at most {error:.0%}.
- Coverage: share of intervals that contain the true difference. It should be at least {confidence:.0%}. "Arms
  differ": all arms truly differ from the baseline.
- Spread: the standard deviations of seeds, images and rest. "No seed effect": 0, 0 and .3. "All three": .1, .3 and .3.
  "Large seed effect": .3, .3 and .1.
- Tails: normal deviates, or Student's t with 3 degrees of freedom ("heavy"). miou: 11 classes; each image shows some of
  them, in sizes that differ a hundredfold.
"""


def write_simulation(table: pd.DataFrame, num_sweeps: int, confidence: float, out_dir: Path, name: str) -> list[Path]:
    """Writes NAME.md, NAME.csv and NAME.png, each whole or not at all -> their paths.

    Args:
        table: of `experiments.statistics.simulation.simulate_all`, with the same number and confidence.
    """
    paths = [out_dir / f"{name}{suffix}" for suffix in (".md", ".csv", ".png")]
    with replacing(paths[1]) as part:
        table.to_csv(part, index=False)
    with replacing(paths[0]) as part:
        part.write_text(markdown(table, num_sweeps, confidence, paths[2].name), encoding="utf-8")
    with replacing(paths[2]) as part:
        plot(table, confidence).savefig(part, format="png")
    return paths


def markdown(table: pd.DataFrame, num_sweeps: int, confidence: float, picture: str) -> str:
    """The text with the table; `picture` is the name of the plot's file."""
    origin = Origin.of_this_process("experiments.power", "experiments.power.main(config), from Python")
    text = TEXT.format(
        header=origin.header("Simulated sweeps", level=2),
        num_sweeps=num_sweeps,
        num_bootstrap=min(num_sweeps, BOOTSTRAP_SWEEPS),
        error=1 - confidence,
        confidence=confidence,
    )
    cells = table.map(lambda value: number(value, 3) if isinstance(value, float) else str(value)).to_numpy().tolist()
    shown = Table(list(table.columns), cells, left=list(table.columns)).markdown()
    return f"{text}\n{shown}\n\n![false positives and coverage]({picture})\n"


@style.styled
def plot(table: pd.DataFrame, confidence: float) -> Figure:
    """Rates of all scenarios, beside those of the bootstrap."""
    figure = style.new_figure(9, 3.6)
    pairs = {"false": 1 - confidence, "coverage": confidence}
    for axes, (column, nominal) in zip(figure.subplots(1, 2), pairs.items(), strict=True):
        for place, (key, label) in enumerate(
            ((column, "here"), (f"bootstrap: {column}", "two-way percentile bootstrap"))
        ):
            for num_seeds, marker in ((3, "o"), (5, "s")):
                values = table.loc[table["seeds"] == num_seeds, key]
                x = [place + (num_seeds - 4) / 8] * len(values)
                axes.plot(x, values, marker, alpha=0.4, color=style.colour(place), label=f"{label}, {num_seeds} seeds")
        axes.axhline(nominal, color=style.GREY, linestyle="--", linewidth=1)
        axes.set(
            title={"false": "sweeps with a false verdict", "coverage": "intervals that hold the truth"}[column],
            xticks=[],
        )
    figure.axes[0].legend(fontsize=9)
    return figure
