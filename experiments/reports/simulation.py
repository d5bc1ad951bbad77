"""docs/statistics.md: what the intervals assume, and how often they and the verdicts are wrong in simulated sweeps."""

import itertools
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments.atomic import replacing
from experiments.progress import Progress
from experiments.statistics.simulation import Scenario, simulate

SPREADS = {
    "no seed effect": {"seed": 0.0, "image": 0.0, "residual": 0.3},
    "all three": {"seed": 0.1, "image": 0.3, "residual": 0.3},
    "large seed effect": {"seed": 0.3, "image": 0.3, "residual": 0.1},
}
EFFECT = 0.3
_BOOTSTRAP_SWEEPS = 200
_BOOTSTRAP_RESAMPLES = 500

TEXT = """\
# How differences are judged

An arm is compared with the baseline on the same images and with the same seeds. A measure is a ratio of sums over
images (`experiments/statistics/scores.py`); its jackknife pseudo-values, one per seed and image, are what a mean over
images would average, so that mIoU and means go the same way. With S seeds and N images their difference d is taken as

    d[s, i] = true difference + seed[s] + image[i] + rest[s, i]

and both seeds and images as drawn from more of them: an interval is to hold for other seeds and other images. The
squared standard error of the mean of d is at most the variance of the seeds' means over S plus that of the images'
means over N; both contain the rest's part, which is subtracted once. With three seeds the first is a guess from two
degrees of freedom, the second is well known. The half width is therefore (Banerjee, Sankhya 1961)

    sqrt(t(S - 1)^2 · seeds + t(N - 1)^2 · images - z^2 · rest)

which covers at least as often as it says, whatever the shares of the two are. Its price: where neither seeds nor
images have an effect of their own it is wider than needed, with three seeds twice as wide. The usual single quantile
(Satterthwaite) is narrower and was tried: with three seeds whose effect is large, and four arms, it called identical
arms different in 14 of 100 sweeps. The percentile bootstrap over seeds and images (Owen 2007), given beside it in the
.csv, is in the table. With one seed nothing is known of others, and the verdict says "over images only".

p is the least error for which the interval leaves out 0, after Holm's correction for the number of arms within one
measure of one task. Measures and tasks are judged one by one.

## Simulated sweeps

    {command}

{num_sweeps} sweeps of 4 arms and a baseline for each line (of the bootstrap: {num_bootstrap}, Bonferroni-corrected).

- False: sweeps of identical arms in which any arm is said to help or hurt; nominal: at most {error:.0%}.
- Coverage: intervals that hold the true difference; nominal: at least {confidence:.0%}. "Arms differ": where all arms
  truly differ from the baseline.
- Spread: deviations of seeds, images and rest are 0, 0 and .3 ("no seed effect"), .1, .3 and .3 ("all three"), .3, .3
  and .1 ("large seed effect").
- Tails: normal deviates, or Student's t with 3 degrees of freedom. mIoU: 11 classes, of which images show some, in
  sizes that differ hundredfold.
"""


def measure(num_sweeps: int, confidence: float) -> pd.DataFrame:
    """One row per scenario."""
    rows = []
    grid = itertools.product(("mean", "miou"), (3, 5), (30, 100), SPREADS, (False, True))
    for which, num_seeds, num_images, spread, heavy in Progress(list(grid), "scenarios", "scenario"):
        scenario = Scenario(num_seeds, num_images, 4, **SPREADS[spread], heavy_tails=heavy, measure=which)
        same = simulate(scenario, num_sweeps, 0.0, confidence)
        other = simulate(scenario, num_sweeps, EFFECT, confidence, seed=1)
        boot = simulate(scenario, min(num_sweeps, _BOOTSTRAP_SWEEPS), 0.0, confidence, 0, _BOOTSTRAP_RESAMPLES)
        names = {"measure": which, "seeds": num_seeds, "images": num_images, "spread": spread}
        rows.append(
            names
            | {
                "tails": "heavy" if heavy else "normal",
                "false": same.false_positives,
                "coverage": same.coverage,
                "coverage, arms differ": other.coverage,
                "bootstrap: false": boot.bootstrap_false_positives,
                "bootstrap: coverage": boot.bootstrap_coverage,
            }
        )
    return pd.DataFrame(rows)


def write_simulation(num_sweeps: int, confidence: float, out_dir: Path, name: str) -> list[Path]:
    """Simulates, and writes NAME.md, NAME.csv and NAME.png -> their paths."""
    table = measure(num_sweeps, confidence)
    paths = [out_dir / f"{name}{suffix}" for suffix in (".md", ".csv", ".png")]
    with replacing(paths[1]) as part:
        table.to_csv(part, index=False)
    return [*write_text(table, num_sweeps, confidence, paths[0]), paths[1], *write_plot(table, confidence, paths[2])]


def write_text(table: pd.DataFrame, num_sweeps: int, confidence: float, path: Path) -> list[Path]:
    """The text with the table."""
    text = TEXT.format(
        command=f"python -m experiments.power simulate={num_sweeps} out_dir=docs name={path.stem}",
        num_sweeps=num_sweeps,
        num_bootstrap=min(num_sweeps, _BOOTSTRAP_SWEEPS),
        error=1 - confidence,
        confidence=confidence,
    )
    shown = table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    text += "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text += f"\n\n![false positives and coverage]({path.stem}.png)\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return [path]


def write_plot(table: pd.DataFrame, confidence: float, path: Path) -> list[Path]:
    """Rates of all scenarios, beside those of the bootstrap."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    pairs = {"false": 1 - confidence, "coverage": confidence}
    for axes, (column, nominal) in zip(figure.subplots(1, 2), pairs.items(), strict=True):
        for place, (key, label) in enumerate(
            ((column, "here"), (f"bootstrap: {column}", "two-way percentile bootstrap"))
        ):
            for num_seeds, marker in ((3, "o"), (5, "s")):
                values = table.loc[table["seeds"] == num_seeds, key]
                x = [place + (num_seeds - 4) / 8] * len(values)
                axes.plot(x, values, marker, alpha=0.4, color=f"C{place}", label=f"{label}, {num_seeds} seeds")
        axes.axhline(nominal, color="grey", linestyle="--", linewidth=1)
        axes.set(
            title={"false": "sweeps with a false verdict", "coverage": "intervals that hold the truth"}[column],
            xticks=[],
        )
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    return [path]
