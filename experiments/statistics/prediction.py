"""Which measure predicts which: rank correlation over methods, with intervals that hold for other methods.

A measure that needs no labels is cheap. Whether it may be trusted is asked of methods that have both: do those that are
better in it do better in a probe? Spearman's rank correlation over the methods says so, for one encoder; several
encoders are averaged. Methods are few and often relatives (an upsampler, and the same one blurred), so they are the
sample: each interval is a jackknife that leaves out one family of methods at a time, on Fisher's z scale.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from scipy.stats import rankdata

from experiments.settings import SettingError
from experiments.statistics.intervals import Interval
from experiments.statistics.scores import MEASURES, is_control, sums, value

LEAST = 4
"""Methods that a rank correlation needs; fewer have too few orders."""
_CLOSEST = 1 - 1e-9


@dataclass(frozen=True)
class Prediction:
    """How well predictors order the methods as targets do; arrays are (predictors, targets)."""

    predictors: list[str]
    targets: list[str]
    methods: list[str]
    num_families: int
    correlation: np.ndarray
    """Spearman's, averaged over encoders; NaN: too few methods have both, or one of the two is the same for all."""
    interval: list[list[Interval | None]]
    mean: list[Interval | None]
    """Of each predictor, over the targets; None: it lacks one of them."""
    difference: list[Interval | None]
    """Of each predictor's mean to that of the best one; None for the best one, and where there is no mean."""
    num_methods: np.ndarray
    """Methods that have both, in the encoder with the fewest."""
    num_encoders: np.ndarray

    @property
    def order(self) -> list[int]:
        """Predictors, best mean first; those without a mean last, in the order given."""
        means = [-np.inf if one is None else one.value for one in self.mean]
        return sorted(range(len(means)), key=lambda i: -means[i])


def method_values(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores -> what each method reaches: one row per encoder and arm, one column per task/measure; more is better.

    Values are means over seeds; a measure where less is better has its sign changed. Where a task was measured on
    several data sets, its columns are called task@data/measure.
    """
    data_of = scores.groupby("task")["data"].nunique()
    columns: dict[str, dict[tuple[str, str], float]] = {}
    for (task, data, backbone, measure, arm), rows in scores.groupby(
        ["task", "data", "backbone", "measure", "arm"], sort=False
    ):
        if is_control(measure):
            continue
        name = f"{task}@{data}/{measure}" if data_of[task] > 1 else f"{task}/{measure}"
        found = float(np.mean(value(*sums(rows)[:2])))
        columns.setdefault(name, {})[backbone, arm] = MEASURES[measure].better * found
    table = pd.DataFrame(columns)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["backbone", "arm"])
    return table


def chosen(columns: Iterable[str], patterns: Sequence[str], setting: str) -> list[str]:
    """The columns that match at least one pattern (`*` stands for anything), in the order of the patterns.

    Raises:
        SettingError: a pattern matches none; says which there are.
    """
    columns, found = list(columns), []
    for pattern in patterns:
        some = [name for name in columns if fnmatchcase(name, pattern)]
        if not some:
            raise SettingError(f"{setting}: {pattern} is none of the measures: {', '.join(columns)}")
        found += [name for name in some if name not in found]
    return found


def predict(
    values: pd.DataFrame,
    predictors: Sequence[str],
    targets: Sequence[str],
    families: Mapping[str, Sequence[str]] | None = None,
    confidence: float = 0.95,
) -> Prediction:
    """Rank correlations of predictors with targets over methods.

    Args:
        values: of `method_values`.
        families: name -> arms that are relatives, left out together; an arm in none is a family by itself.

    Raises:
        SettingError: fewer than `LEAST` families, or an arm that is unknown or in two families.
    """
    arms = list(dict.fromkeys(values.index.get_level_values("arm")))
    of_families = _families(arms, families or {})
    if len(of_families) < LEAST:
        raise SettingError(
            f"{len(of_families)} families of methods ({', '.join(of_families)}) are too few for a rank correlation: "
            f"give scores of at least {LEAST}"
        )
    pairs = _Pairs(values, arms, predictors, targets)
    whole = pairs.correlations()  # (P,T)
    without = np.stack([pairs.correlations(members) for members in of_families.values()])  # (G,P,T)
    means, means_without = whole.mean(1), without.mean(2)  # NaN where one target is missing
    best = int(np.nanargmax(means)) if np.isfinite(means).any() else None
    counts = pairs.counts()
    return Prediction(
        list(predictors),
        list(targets),
        arms,
        len(of_families),
        whole,
        [
            [_jackknife(whole[i, j], without[:, i, j], confidence, fisher=True) for j in range(len(targets))]
            for i in range(len(predictors))
        ],
        [_jackknife(means[i], means_without[:, i], confidence, fisher=True) for i in range(len(predictors))],
        [
            None
            if best is None or i == best
            else _jackknife(means[i] - means[best], means_without[:, i] - means_without[:, best], confidence)
            for i in range(len(predictors))
        ],
        np.where(counts > 0, counts, counts.max(initial=0)).min(0),
        (counts > 0).sum(0),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of two vectors, ties at their mean rank; NaN where one of them is constant or shorter than 3."""
    if len(x) < 3:
        return np.nan
    ranks = np.stack([rankdata(x), rankdata(y)])
    ranks -= ranks.mean(1, keepdims=True)
    product, own, other = ranks[0] @ ranks[1], ranks[0] @ ranks[0], ranks[1] @ ranks[1]
    return float(product / np.sqrt(own * other)) if own > 0 and other > 0 else np.nan


class _Pairs:
    """Values of predictors and targets for all encoders and methods, as arrays."""

    def __init__(
        self, values: pd.DataFrame, arms: Sequence[str], predictors: Sequence[str], targets: Sequence[str]
    ) -> None:
        encoders = list(dict.fromkeys(values.index.get_level_values("backbone")))
        full = values.reindex(pd.MultiIndex.from_product([encoders, arms], names=values.index.names))
        self.arms = np.array(arms)
        self.predictors, self.targets = (
            full[list(names)].to_numpy(float).reshape(len(encoders), len(arms), -1) for names in (predictors, targets)
        )  # (E,M,P), (E,M,T)

    def correlations(self, without: Sequence[str] = ()) -> np.ndarray:
        """(P,T): the mean over encoders in which enough methods have both; `without` some methods."""
        kept = ~np.isin(self.arms, without)
        found = np.full((self.predictors.shape[2], self.targets.shape[2]), np.nan)
        for i, j in np.ndindex(found.shape):
            each = []
            for x, y in zip(self.predictors[:, kept, i], self.targets[:, kept, j], strict=True):
                both = np.isfinite(x) & np.isfinite(y)
                if both.sum() >= LEAST - 1:
                    each.append(spearman(x[both], y[both]))
            if each:
                found[i, j] = np.mean(each)
        return found

    def counts(self) -> np.ndarray:
        """(E,P,T): methods that have both; 0 where they are too few."""
        has = [np.isfinite(x).astype(int) for x in (self.predictors, self.targets)]
        both = np.einsum("emp,emt->ept", *has)
        return np.where(both >= LEAST - 1, both, 0)


def _families(arms: Sequence[str], given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    of_arm = {}
    for name, members in given.items():
        for arm in members:
            if arm not in arms:
                raise SettingError(f"families.{name}: there is no arm {arm}; there are: {', '.join(arms)}")
            if arm in of_arm:
                raise SettingError(f"families: {arm} is in {of_arm[arm]} and in {name}; it can be in one only")
            of_arm[arm] = name
    for arm in arms:
        found.setdefault(of_arm.get(arm, arm), []).append(arm)
    return found


def _jackknife(whole: float, without: np.ndarray, confidence: float, fisher: bool = False) -> Interval | None:
    """The interval of a statistic from its values with one family left out (Tukey 1958), t with G - 1 degrees.

    Without ends where leaving out a family changes nothing, or leaves nothing: then the spread is not known.
    """
    if not np.isfinite(whole):
        return None
    if not np.isfinite(without).all() or np.ptp(without) == 0:
        return Interval(float(whole), None, None)
    there, back = (np.arctanh, np.tanh) if fisher else (lambda x: x, lambda x: x)
    z, each = (there(np.clip(x, -_CLOSEST, _CLOSEST)) if fisher else x for x in (whole, without))
    groups = len(each)
    error = np.sqrt((groups - 1) / groups * ((each - each.mean()) ** 2).sum())
    half = stdtrit(groups - 1, (1 + confidence) / 2) * error
    return Interval(float(whole), float(back(z - half)), float(back(z + half)))
