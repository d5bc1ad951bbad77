"""Intervals for differences between methods that were measured on the same images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

_RESAMPLES_AT_ONCE = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate and how far chance in the choice of images may have moved it; `low` and `high` None: unknown."""

    value: float
    low: float | None
    high: float | None

    @property
    def above_zero(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.low is not None and self.low > 0


def paired_difference(
    ours: ArrayLike, theirs: ArrayLike, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> Interval:
    """Mean of ours - theirs over images, with its BCa bootstrap interval (Efron, JASA 1987; scipy).

    Args:
        ours, theirs: (n,) values of the same n images in the same order. One image gives no interval.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: unequal lengths, no images, or values that are not finite.
    """
    ours, theirs = _checked(ours, theirs)

    def mean(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(a - b, axis)

    return _interval(mean, (ours, theirs), _constant(ours - theirs, ours), confidence, num_resamples, seed)


def share_of_gap(
    ours: ArrayLike,
    baseline: ArrayLike,
    ceiling: ArrayLike,
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """(mean of ours - mean of baseline) / (mean of ceiling - mean of baseline), with its BCa bootstrap interval.

    Means something only where ceiling and baseline clearly differ.

    Args, Raises:
        as `paired_difference`; also ValueError where the means of ceiling and baseline are equal.
    """
    ours, baseline, ceiling = _checked(ours, baseline, ceiling)
    if np.mean(ceiling - baseline) == 0:
        raise ValueError("there is no gap between baseline and ceiling to close a share of")
    constant = _constant(ours - baseline, ours) and _constant(ceiling - baseline, ceiling)

    def share(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(a - b, axis) / np.mean(c - b, axis)

    return _interval(share, (ours, baseline, ceiling), constant, confidence, num_resamples, seed)


def _checked(*columns: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if any(array.shape != arrays[0].shape or array.ndim != 1 or not len(array) for array in arrays):
        raise ValueError(f"paired values must be columns of one length, got {[array.shape for array in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("paired values must be finite: a value that is not must be found, not averaged")
    return arrays


def _constant(differences: np.ndarray, values: np.ndarray) -> bool:
    """Whether differences of such values are equal up to rounding: every resample then has the same mean."""
    return bool(np.ptp(differences) <= 1e-12 * np.abs(values).max())


def _interval(
    statistic: Callable[..., np.ndarray],
    columns: Sequence[np.ndarray],
    constant: bool,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> Interval:
    value = float(statistic(*columns, axis=0))
    if len(columns[0]) == 1:
        return Interval(value, None, None)
    if constant:
        return Interval(value, value, value)
    result = bootstrap(
        columns,
        statistic,
        n_resamples=num_resamples,
        batch=_RESAMPLES_AT_ONCE,
        vectorized=True,
        paired=True,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(result.low), float(result.high))
