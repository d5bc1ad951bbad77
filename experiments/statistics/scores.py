"""Scores: the results of an evaluation per image, in one form for tables, intervals and sweeps.

A measure is a ratio of sums over images, averaged over its parts::

    value = mean over parts of (sum over images of numerator) / (sum over images of denominator)

So a mean over images (one part, denominator 1), a mean over pixels (denominator: number of pixels) and the mean IoU of
a whole data set (one part per class; intersection, union) have the same form. Resampling images for a bootstrap needs
only these sums. A part whose denominators are all 0 (a class that never occurs) does not count.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.errors import Told

KEYS = ["task", "data", "backbone", "arm", "seed", "image", "measure", "part"]
"""These columns identify a row. `part` is a class id, or 0 for measures without classes."""
VALUES = ["numerator", "denominator"]


@dataclass(frozen=True)
class Measure:
    """The meaning of a measure's numbers."""

    better: int
    """+1: more is better; -1: less is."""
    unit: str = ""
    title: str = ""
    """The name in tables; empty: the measure's own name."""
    blurred: str = ""
    """If blur alone improves this measure: the name of the same measure of blurred features. An arm then helps only if
    it
    is better than the best blurred baseline. Empty: blur does not improve it."""


MEASURES: dict[str, Measure] = {}
"""All measures by name; each task's file registers its own."""


def is_control(measure: str) -> bool:
    """Whether a measure is one of blurred features, which is only shown beside the measure it belongs to."""
    return any(known.blurred == measure for known in MEASURES.values())


def register_measures(measures: Mapping[str, Measure]) -> None:
    """Registers measures by name. Registering the same again changes nothing.

    Raises:
        ValueError: the name is registered with another meaning.
    """
    for name, measure in measures.items():
        if MEASURES.setdefault(name, measure) != measure:
            raise ValueError(f"a measure {name} is already registered as {MEASURES[name]}")


class ScoreError(Told, ValueError):
    """Scores that must not be averaged: a value is missing, repeated or not finite. The message names arm and image."""


def image_rows(
    image: str, values: Mapping[str, float | tuple[float, float] | tuple[np.ndarray, np.ndarray]]
) -> Iterator[dict[str, object]]:
    """The rows of one image. `values`: measure -> value, or (numerator, denominator), or arrays of both by part.

    Parts with numerator and denominator 0 give no row.
    """
    for measure, value in values.items():
        numerator, denominator = value if isinstance(value, tuple) else (value, 1.0)
        pairs = np.broadcast_arrays(np.atleast_1d(numerator).astype(float), np.atleast_1d(denominator).astype(float))
        for part, (above, below) in enumerate(zip(*pairs, strict=True)):
            if above or below or np.isnan(above):
                yield {"image": image, "measure": measure, "part": part, "numerator": above, "denominator": below}


def frame(rows: list[dict[str, object]], names: Mapping[str, object]) -> pd.DataFrame:
    """Rows of `image_rows`, with the other keys as `names` (data, backbone, arm, seed, ...) -> checked scores.

    Raises:
        ScoreError: as `check`.
    """
    table = pd.DataFrame(rows).assign(**names)
    return check(table[[*KEYS, *VALUES]])


def check(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns the scores, if they may be averaged.

    Raises:
        ScoreError: a column is missing, a measure is unknown, two rows have the same keys, a value is not finite, or
            not all arms have a measure for the same images.
    """
    if missing := [column for column in [*KEYS, *VALUES] if column not in scores]:
        raise ScoreError(f"scores lack the columns {', '.join(missing)}")
    if unknown := sorted(set(scores["measure"]) - set(MEASURES)):
        raise ScoreError(f"unknown measures {', '.join(unknown)}; the tasks register: {', '.join(MEASURES)}")
    if twice := scores[scores.duplicated(KEYS)].to_dict("records"):
        raise ScoreError(f"{len(twice)} scores occur twice, the first: {_where(twice[0])}")
    if bad := scores[~np.isfinite(scores[VALUES]).all(axis=1)].to_dict("records"):
        raise ScoreError(f"{len(bad)} scores are not finite, the first: {_where(bad[0])}")
    for keys, rows in scores.groupby(["task", "data", "backbone", "measure"], sort=False):
        images = {arm: frozenset(of_arm["image"]) for arm, of_arm in rows.groupby(["arm", "seed"], sort=False)}
        everything = frozenset().union(*images.values())
        for (arm, seed), seen in images.items():
            if lacking := sorted(everything - seen):
                raise ScoreError(
                    f"{'/'.join(keys)}: arm {arm}, seed {seed} lacks {len(lacking)} images that other arms have, "
                    f"the first: {lacking[0]}"
                )
    return scores


def sums(scores: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, list[int], list[str]]:
    """One measure of one arm -> (numerators, denominators, seeds, images), the first two (seeds,images,parts)."""
    seeds, images = sorted(set(scores["seed"])), sorted(set(scores["image"]))
    parts = sorted(set(scores["part"]))
    shape = len(seeds), len(images), len(parts)
    at = tuple(
        pd.Index(values).get_indexer(scores[key])
        for key, values in (("seed", seeds), ("image", images), ("part", parts))
    )
    arrays = [np.zeros(shape), np.zeros(shape)]
    for array, column in zip(arrays, VALUES, strict=True):
        array[at] = scores[column]
    return *arrays, seeds, images


def value(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The value of a measure per seed: (S,N,K) sums -> (S,), or (R,S) for (R,N) weights of the images.

    Raises:
        ScoreError: no image has the measure.
    """
    weights = np.ones((1, numerator.shape[1])) if weights is None else np.atleast_2d(weights)
    above, below = (np.tensordot(weights, array, (1, 1)) for array in (numerator, denominator))  # (R,S,K)
    counts = (below > 0).sum(2)  # (R,S)
    if not counts.all():
        raise ScoreError("no image that was drawn has the measure")
    ratios = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    values = ratios.sum(2) / counts  # (R,S)
    return values[0] if len(values) == 1 else values


def _where(row: dict[str, object]) -> str:
    return ", ".join(f"{key} {row[key]}" for key in KEYS)
