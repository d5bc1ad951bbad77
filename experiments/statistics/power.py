"""How many seeds and images are needed to show an effect (settings: configs/power.yaml).

This depends on three standard deviations of the difference between two arms: between seeds, between images (the same
for all seeds), and of the rest. They are given, or estimated from the scores of a sweep. Sweeps of other sizes are then
drawn from normal distributions with these deviations, and judged as `experiments.statistics.verdicts` does.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig, ListConfig

from experiments.settings import (
    SettingError,
    check_confidence,
    check_count,
    check_name,
    check_once,
    check_writable,
)
from experiments.statistics.intervals import Spread, pseudo_values
from experiments.statistics.score_files import read_scores
from experiments.statistics.scores import check
from experiments.statistics.verdicts import FAMILY, arrays, difference

log = logging.getLogger(__name__)

_DEVIATIONS = "{seed: ..., image: ..., residual: ...}"
_COMPONENTS = f"components={_DEVIATIONS}"


@dataclass(frozen=True)
class Components:
    """Standard deviations of the difference between two arms."""

    seed: float
    """Between seeds, of its mean over all images."""
    image: float
    """Between images, of its mean over all seeds."""
    residual: float


def components_of(values: np.ndarray) -> Components:
    """(S,N) differences of S seeds on N images -> their deviations, by the analysis of variance.

    Raises:
        SettingError: fewer than two seeds or images; the message says which.
    """
    num_seeds, num_images = values.shape
    for count, what in ((num_seeds, "seed"), (num_images, "image")):
        if count < 2:
            raise SettingError(
                f"{count} {what} does not show how {what}s differ: give scores of at least two {what}s, or "
                f"{_COMPONENTS}"
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
    """Chance that an effect is shown, with the right sign, when `num_arms` are compared.

    Args:
        num_arms: the p value is corrected as if no other arm had a verdict (Bonferroni), the worst case of Holm's
            method.
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
    """The given deviations, or those of the scores of a sweep.

    Raises:
        SettingError: neither or both are given, or the scores need a choice of task, measure or arm.
        ScoreError: the file is not a table of scores.
    """
    if (config.scores is None) == (config.components is None):
        raise SettingError(f"give either scores=FILE.parquet or {_COMPONENTS}")
    if config.components is not None:
        if not isinstance(config.components, DictConfig) or set(config.components) != {"seed", "image", "residual"}:
            raise SettingError(f"components must be {_DEVIATIONS}, got {config.components}")
        given = {key: _deviation(key, value) for key, value in config.components.items()}
        return Components(**given)
    if not Path(str(config.scores)).is_file():
        raise SettingError(f"scores={config.scores} does not exist")
    rows = check(read_scores(Path(str(config.scores)))[0])
    for column in ("measure", "task"):
        rows = _chosen(rows, column, config[column])
    if len(rows.drop_duplicates(FAMILY)) > 1:
        raise SettingError("the scores are of several data sets or backbones: choose a task that has one of each")
    found = arrays(rows)
    names = [name for name in found if name != config.baseline and len(found[name][1]) > 1]
    names = names or [name for name in found if name != config.baseline]  # all of one seed: refused below, by name
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
    """The power, one row per effect, number of seeds and number of images."""
    rows = []
    for effect in config.effects:
        for num_seeds in config.seeds:
            for num_images in config.images:
                sizes = num_seeds, num_images, config.num_arms, config.confidence, config.num_draws
                chance = power(components, effect, *sizes)
                rows.append({"effect": effect, "seeds": num_seeds, "images": num_images, "power": chance})
    return pd.DataFrame(rows)


def _chosen(rows: pd.DataFrame, column: str, choice: str | None) -> pd.DataFrame:
    there = list(dict.fromkeys(rows[column]))
    if choice is None and len(there) > 1:
        raise SettingError(f"the scores have several: choose {column}= one of {', '.join(there)}")
    if choice is not None and choice not in there:
        raise SettingError(f"{column}={choice}: the scores have {', '.join(there)}")
    return rows if choice is None else rows[rows[column] == choice]


def check_settings(config: DictConfig) -> None:
    """Checks the settings before anything is computed.

    Raises:
        SettingError: names the setting and its allowed values.
    """
    _check_list("effects", config.effects, "numbers", _is_number)
    _check_list("seeds", config.seeds, "whole numbers from 1", lambda value: type(value) is int and value >= 1)
    _check_list("images", config.images, "whole numbers from 2", lambda value: type(value) is int and value >= 2)
    if not _is_number(config.wanted) or not 0 < config.wanted < 1:
        raise SettingError(f"wanted must lie between 0 and 1, got {config.wanted}")
    check_confidence(config.confidence)
    check_count("num_arms", config.num_arms)
    check_count("num_draws", config.num_draws, 100)
    if config.simulate is not None:
        check_count("simulate", config.simulate)
    check_name(config.name)
    check_writable(Path(config.out_dir))


def _check_list(name: str, values: object, of: str, is_one: Callable[[object], bool]) -> None:
    """Checks a list. Its values become lines, columns or headings of the tables, so none may occur twice."""
    if not isinstance(values, ListConfig) or not values or not all(map(is_one, values)):
        raise SettingError(f"{name} must be a list of {of}, got {values}")
    check_once(name, values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
