"""Ranks of methods over many measures, with intervals, and which method beats which.

A column is one measure of one task on one data set with one encoder. Methods are ranked in each column, and ranks are
averaged: over the columns of an aspect (detail, segmentation, ...), then over aspects. The intervals come from a
Bayesian bootstrap (Rubin, Annals of Statistics 1981): images, and seeds, get random weights that sum to one, the same
for all methods and for all columns with the same images, and everything is ranked again. Images never drop out, so that
no class is lost, as it may be when images are resampled. With few seeds these intervals are too narrow over seeds
(docs/statistics.md). They say how stable ranks are on such images, not whether one method beats another: pairs do that.

A pair is judged in each column by the interval of its difference, over seeds and images
(`experiments.statistics.intervals.Spread`), corrected for the number of pairs of the column (Holm).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from experiments.settings import SettingError
from experiments.statistics.intervals import Interval, holm, pseudo_values, spread
from experiments.statistics.prediction import chosen
from experiments.statistics.scores import MEASURES, is_control, value
from experiments.statistics.verdicts import Sums, arrays

COLUMN = ["task", "data", "backbone", "measure"]
_FEWEST = 2
"""Methods that can be ranked."""


@dataclass(frozen=True)
class Column:
    """One measure of one task on one data set with one encoder."""

    aspect: str
    task: str
    data: str
    backbone: str
    measure: str
    sums: Mapping[str, tuple[Sums, list[int]]] = field(repr=False)
    """Method -> numerators and denominators, (S,N,K), and seeds; images in one order."""
    images: tuple[str, ...] = field(repr=False)

    @property
    def better(self) -> int:
        """+1: more is better; -1: less is."""
        return MEASURES[self.measure].better


@dataclass(frozen=True)
class Ranks:
    """Ranks in a group of columns, 1 the best, of the methods that have all of them."""

    group: str
    columns: list[Column]
    methods: list[str]
    """The best mean rank first."""
    overall: dict[str, Interval]
    """Method -> mean rank over aspects."""
    aspects: dict[str, dict[str, Interval]]
    """Aspect -> method -> mean rank over its columns."""
    first: dict[str, float]
    """Method -> in how many of the resamples it has the best mean rank, as a share."""
    incomplete: dict[str, list[str]]
    """Method that lacks columns -> these, as task/measure on data."""


def columns_of(scores: pd.DataFrame, aspects: Mapping[str, Sequence[str]], methods: Sequence[str]) -> list[Column]:
    """The columns that count, by aspect.

    Args:
        aspects: name -> patterns of task/measure, in which `*` stands for anything.
        methods: those to rank; other arms of the scores are left out.

    Raises:
        SettingError: two aspects have one measure. A pattern that no measure fits is left out.
    """
    known = [f"{task}/{measure}" for task, measure in dict.fromkeys(zip(scores["task"], scores["measure"], strict=True))]
    known = [name for name in known if not is_control(name.rpartition("/")[2])]
    aspect_of: dict[str, str] = {}
    for aspect, patterns in aspects.items():
        for pattern in patterns:
            for name in _fitting(known, pattern):
                if aspect_of.setdefault(name, aspect) != aspect:
                    raise SettingError(f"aspects: {name} is in {aspect_of[name]} and in {aspect}; it can be in one only")
    found = []
    for keys, rows in scores[scores["arm"].isin(methods)].groupby(COLUMN, sort=False):
        if aspect := aspect_of.get(f"{keys[0]}/{keys[3]}"):
            images = tuple(sorted(set(rows.loc[rows["denominator"] > 0, "image"])))
            found.append(Column(aspect, *keys, arrays(rows), images))
    order = list(aspects)
    return sorted(found, key=lambda column: order.index(column.aspect))


def rank(
    group: str,
    columns: Sequence[Column],
    methods: Sequence[str],
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Ranks | None:
    """Ranks methods in a group of columns; None: fewer than two methods have all of its columns."""
    lacking = {name: [_title(column) for column in columns if name not in column.sums] for name in methods}
    complete = [name for name in methods if not lacking[name]]
    incomplete = {name: titles for name, titles in lacking.items() if titles}
    if len(complete) < _FEWEST or not columns:
        return None
    values = _resampled(columns, complete, num_resamples, seed)  # (R+1,columns,methods), the first as measured
    better = np.array([column.better for column in columns])[:, None]
    ranks = rankdata(-better * values, axis=2)
    of_aspect = np.array([column.aspect for column in columns])
    aspects = {name: ranks[:, of_aspect == name].mean(1) for name in dict.fromkeys(of_aspect)}  # (R+1,methods)
    overall = np.mean(list(aspects.values()), axis=0)
    best = overall[1:] == overall[1:].min(1, keepdims=True)
    order = overall[0].argsort(kind="stable")

    def intervals(of_methods: np.ndarray) -> dict[str, Interval]:
        ends = np.quantile(of_methods[1:], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return {complete[i]: Interval(*map(float, (of_methods[0, i], *ends[:, i]))) for i in order}

    return Ranks(
        group,
        list(columns),
        [complete[i] for i in order],
        intervals(overall),
        {name: intervals(of_methods) for name, of_methods in aspects.items()},
        {complete[i]: float((best[:, i] / best.sum(1)).mean()) for i in order},
        incomplete,
    )


def pairs(columns: Sequence[Column], methods: Sequence[str]) -> pd.DataFrame:
    """Every pair of methods in every column that has both: one row each.

    Returns:
        aspect, task, data, backbone, measure, one, other, difference (positive: `one` is better), p (corrected for the
        pairs of the column).
    """
    tables = [_pairs(column, [name for name in methods if name in column.sums]) for column in columns]
    names = ["aspect", *COLUMN, "one", "other", "difference", "p"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def wins(judged: pd.DataFrame, methods: Sequence[str], confidence: float = 0.95) -> pd.DataFrame:
    """Rows of `pairs` -> (methods,methods): in how many columns the row's method is shown to beat the column's."""
    table = pd.DataFrame(0, index=list(methods), columns=list(methods))
    shown = judged[(judged["p"] <= 1 - confidence) & judged["one"].isin(methods) & judged["other"].isin(methods)]
    for row in shown.itertuples():
        winner, loser = (row.one, row.other) if row.difference > 0 else (row.other, row.one)
        table.loc[winner, loser] += 1
    return table


def _fitting(names: Sequence[str], pattern: str) -> list[str]:
    try:
        return chosen(names, [pattern], "aspects")
    except SettingError:  # a task that was left out
        return []


def _title(column: Column) -> str:
    return f"{column.task}/{column.measure} on {column.data}, {column.backbone}"


def _resampled(columns: Sequence[Column], methods: Sequence[str], num_resamples: int, seed: int) -> np.ndarray:
    """(R+1,columns,methods): the values as measured, then with random weights of images and seeds."""
    found = np.empty((num_resamples + 1, len(columns), len(methods)))
    for at, column in enumerate(columns):
        images = _weights(num_resamples, len(column.images), [seed, *_bytes_of(column.images)])
        for place, name in enumerate(methods):
            of_method, seeds = column.sums[name]
            shares = _weights(num_resamples, len(seeds), [seed, 1])
            each = np.asarray(value(*of_method, images)).reshape(num_resamples + 1, len(seeds))
            found[:, at, place] = (each * shares).sum(1) / shares.sum(1)
    return found


def _weights(num_resamples: int, count: int, entropy: list[int]) -> np.ndarray:
    """(R+1,count): ones, then exponential weights, which are the same for the same entropy."""
    random = np.random.default_rng(entropy)
    return np.concatenate([np.ones((1, count)), random.exponential(size=(num_resamples, count))])


def _bytes_of(images: Sequence[str]) -> list[int]:
    return list("\n".join(images).encode())


def _pairs(column: Column, methods: Sequence[str]) -> pd.DataFrame:
    pseudo = {name: _pseudo_values(*column.sums[name][0]) for name in methods}  # (S,N) each
    rows = []
    for one, other in combinations(methods, 2):
        of_pair = spread(column.better * (pseudo[one] - pseudo[other]))  # one seed counts as the same for all
        names = {"one": one, "other": other, "difference": float(of_pair.mean), "p": float(of_pair.p_value())}
        rows.append({key: getattr(column, key) for key in ("aspect", *COLUMN)} | names)
    table = pd.DataFrame(rows)
    return table.assign(p=holm(table["p"])) if rows else table


def _pseudo_values(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """(S,N): their difference between two methods is that of the difference, because both are linear in it."""
    return pseudo_values(partial(_value, numerator, denominator), numerator.shape[1])


def _value(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.atleast_2d(value(numerator, denominator, weights))
