"""How many seeds and images an effect needs to be shown: `python -m experiments.power`. Settings: configs/power.yaml.

What decides are three deviations of the difference between two arms: from seed to seed, from image to image whatever
the seed, and the rest. They are taken from the scores of a sweep, or given. Sweeps of normal deviates with these are
then drawn, of other sizes, and compared as `experiments.statistics.verdicts` does it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from pyarrow import ArrowInvalid

from experiments.atomic import replacing
from experiments.settings import SettingError, check_writable
from experiments.statistics.intervals import Spread, pseudo_values
from experiments.statistics.scores import check
from experiments.statistics.verdicts import FAMILY, arrays, difference
from experiments.tracking.provenance import Origin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """Deviations of the difference between two arms."""

    seed: float
    """Of its mean over all images, from seed to seed."""
    image: float
    """Of its mean over all seeds, from image to image."""
    residual: float


def components_of(values: np.ndarray) -> Components:
    """(S,N) differences of S seeds on N images -> their deviations, by the analysis of variance.

    Raises:
        SettingError: fewer than two seeds or images.
    """
    num_seeds, num_images = values.shape
    if min(values.shape) < 2:
        raise SettingError(
            f"{num_seeds} seeds and {num_images} images do not show how seeds differ: give components="
            "{seed: ..., image: ..., residual: ...}, or scores of two seeds at least"
        )
    of_seeds, of_images = values.mean(1), values.mean(0)
    rest = values - of_seeds[:, None] - of_images + values.mean()
    residual = (rest**2).sum() / ((num_seeds - 1) * (num_images - 1))
    seed = of_seeds.var(ddof=1) - residual / num_images
    image = of_images.var(ddof=1) - residual / num_seeds
    return Components(*(float(np.sqrt(max(variance, 0))) for variance in (seed, image, residual)))


def power(
    components: Components,
    effect: float,
    num_seeds: int,
    num_images: int,
    num_arms: int = 1,
    confidence: float = 0.95,
    num_draws: int = 4000,
) -> float:
    """Chance that an effect is shown, in its direction, when `num_arms` are compared.

    Args:
        num_arms: the p value is corrected as if no other arm were shown (Bonferroni), the worst that Holm's method
            does to it.
    """
    random = np.random.default_rng(0)
    seed, image, residual = (deviation**2 for deviation in astuple(components))
    both = residual / (num_seeds * num_images)
    parts = seed / num_seeds + both, image / num_images + both
    freedom = num_seeds - 1, num_images - 1
    mean = random.normal(effect, np.sqrt(sum(parts) - both), num_draws)
    drawn = [
        part * random.chisquare(count, num_draws) / count if count else np.zeros(num_draws)
        for part, count in zip((*parts, both), (*freedom, freedom[0] * freedom[1]), strict=True)
    ]
    spread = Spread(mean, drawn[0], drawn[1], np.minimum(drawn[2], np.minimum(*drawn[:2])), num_seeds, num_images)
    shown = np.abs(mean) > spread.half_width((1 - confidence) / num_arms)
    return float((shown & (np.sign(mean) == np.sign(effect))).mean())


def read_components(config: DictConfig) -> Components:
    """As given, or of the scores of a sweep.

    Raises:
        SettingError: neither or both, or scores in which task, measure or arm have to be chosen.
    """
    if (config.scores is None) == (config.components is None):
        raise SettingError("give either scores=FILE.parquet or components={seed: ..., image: ..., residual: ...}")
    if config.components is not None:
        if set(config.components) != {"seed", "image", "residual"}:
            raise SettingError(f"components has the keys seed, image, residual; got {', '.join(config.components)}")
        given = {key: _deviation(key, value) for key, value in config.components.items()}
        return Components(**given)
    if not Path(config.scores).is_file():
        raise SettingError(f"scores={config.scores} does not exist")
    try:
        rows = check(pd.read_parquet(config.scores))
    except (ArrowInvalid, OSError) as error:
        raise SettingError(f"scores={config.scores} cannot be read as a table of scores (.parquet): {error}") from error
    for column in ("measure", "task"):
        rows = _chosen(rows, column, config[column])
    if len(rows.drop_duplicates(FAMILY)) > 1:
        raise SettingError("the scores are of several data sets or backbones: choose a task of one")
    found = arrays(rows)
    names = [name for name in found if name != config.baseline and len(found[name][1]) > 1]
    if config.arm is not None and config.arm == config.baseline:
        raise SettingError(f"arm={config.arm} is the baseline: its difference to itself is zero; choose another arm")
    names = names if config.arm is None else [config.arm]
    if config.baseline not in found or not names or names[0] not in found:
        raise SettingError(f"baseline={config.baseline}, arm={config.arm}: the scores have {', '.join(found)}")
    theirs, seeds = found[config.baseline]
    if odd := [name for name in names if found[name][1] != seeds]:
        raise SettingError(f"arm {odd[0]} has seeds {found[odd[0]][1]}, the baseline {seeds}")
    each = [
        components_of(pseudo_values(partial(difference, found[name][0], theirs), theirs[0].shape[1])) for name in names
    ]
    return Components(*np.sqrt(np.mean([np.square(astuple(one)) for one in each], axis=0)).tolist())


def _deviation(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise SettingError(f"components.{key} must be a deviation, a finite number from 0, got {value}")
    return float(value)


def curves(config: DictConfig, components: Components) -> pd.DataFrame:
    """One row per effect, number of seeds and number of images: its power."""
    rows = []
    for effect in config.effects:
        for num_seeds in config.seeds:
            for num_images in config.images:
                sizes = num_seeds, num_images, config.num_arms, config.confidence, config.num_draws
                chance = power(components, effect, *sizes)
                rows.append({"effect": effect, "seeds": num_seeds, "images": num_images, "power": chance})
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, wanted: float) -> Figure:
    """Power against the number of images, a line for each number of seeds, a panel for each effect."""
    effects = list(dict.fromkeys(table["effect"]))
    figure = Figure(figsize=(1 + 3.5 * len(effects), 3.2), layout="constrained")
    for axes, effect in zip(figure.subplots(1, len(effects), squeeze=False, sharey=True)[0], effects, strict=True):
        for num_seeds, rows in table[table["effect"] == effect].groupby("seeds"):
            axes.plot(rows["images"], rows["power"], "o-", label=f"{num_seeds} seeds")
        axes.axhline(wanted, color="grey", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="images", title=f"true difference {effect:g}", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("chance to show it")
    figure.axes[-1].legend()
    return figure


def write(config: DictConfig, components: Components, table: pd.DataFrame) -> list[Path]:
    """Writes NAME.md and NAME.png -> their paths."""
    paths = [Path(config.out_dir) / f"{config.name}{suffix}" for suffix in (".md", ".png")]
    made = Origin.of_this_process("experiments.power", "experiments.power.write(config, ...), from Python")
    known = ", ".join(f"{name} {value:.3g}" for name, value in vars(components).items())
    lines = [
        "# Seeds and images that an effect needs",
        "",
        f"    {made.command}",
        "",
        f"- {made}",
        f"- {made.packages}",
        "",
        f"Deviations of the difference between two arms: {known}"
        + (f" (of {Path(config.scores).name})" if config.scores else " (as given)")
        + f". {config.num_arms} arms, intervals of {config.confidence:.0%}; cells: chance to show the effect.",
        "",
    ]
    for effect in config.effects:
        shown = table[table["effect"] == effect].pivot(index="seeds", columns="images", values="power")
        lines += [f"True difference {effect:g}; {_needed(table, effect, config.wanted)}", ""]
        lines.append(f"| seeds | {' | '.join(f'{count} images' for count in shown)} |")
        lines.append("|---:" * (len(shown.columns) + 1) + "|")
        for count, row in zip(shown.index, shown.to_numpy(), strict=True):
            lines.append(f"| {count} | {' | '.join(f'{value:.2f}' for value in row)} |")
        lines.append("")
    lines.append(f"![power]({paths[1].name})")
    with replacing(paths[0]) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replacing(paths[1]) as part:
        plot(table, config.wanted).savefig(part, format="png", dpi=120)
    return paths


def _needed(table: pd.DataFrame, effect: float, wanted: float) -> str:
    """The sizes with the fewest seeds, and then the fewest images, that reach the wanted power."""
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


def _chosen(rows: pd.DataFrame, column: str, choice: str | None) -> pd.DataFrame:
    there = list(dict.fromkeys(rows[column]))
    if choice is None and len(there) > 1:
        raise SettingError(f"the scores have several: choose {column}= one of {', '.join(there)}")
    if choice is not None and choice not in there:
        raise SettingError(f"{column}={choice}: the scores have {', '.join(there)}")
    return rows if choice is None else rows[rows[column] == choice]


def check_settings(config: DictConfig) -> None:
    """Refuses counts that make no sense.

    Raises:
        SettingError: names the setting.
    """
    for key in ("effects", "seeds", "images"):
        least = 1 if key != "effects" else None
        values = _numbers(config[key])
        if not values or not all(_is_number(value, least) for value in values):
            raise SettingError(
                f"{key} must be a list of {'whole numbers from 1' if least else 'numbers'}, got {config[key]}"
            )
    if any(seeds < 2 and images < 2 for seeds in config.seeds for images in config.images):
        raise SettingError("one seed with one image shows nothing: give more of seeds or images")
    if not 0 < config.wanted < 1 or not 0.5 < config.confidence < 1 or config.num_arms < 1 or config.num_draws < 100:
        raise SettingError(
            "wanted must lie between 0 and 1, confidence between 0.5 and 1; num_arms from 1, num_draws from 100"
        )
    if config.simulate is not None and (type(config.simulate) is not int or config.simulate < 1):
        raise SettingError(f"simulate must be null or a whole number of sweeps from 1, got {config.simulate}")
    check_writable(Path(config.out_dir))


def _is_number(value: object, least: int | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if least is None else isinstance(value, int) and value >= least


def _numbers(values: object) -> Sequence[float]:
    return list(values) if hasattr(values, "__iter__") else []
