"""Intervals for differences between methods that were measured on the same images, with one seed or several.

The intervals of `Spread` hold for other seeds and other images, even with three seeds. docs/statistics.md has the
assumptions, and how often the intervals are wrong in simulated sweeps, compared with the two-way bootstrap.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

_RESAMPLES_AT_ONCE = 1000
_LEAST_P = 1e-12


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval; `low` and `high` None: unknown."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Spread:
    """A mean over seeds x images, and the parts of its squared standard error; arrays of one shape, or numbers.

    The model is value = mean + seed + image + residual, with random seed, image and residual. The squared standard
    error is then at most `seeds` + `images`: the variance of the seeds' means divided by their number, and the same for
    images. Both contain the residual's part, which `both` estimates. `seeds` is known from few seeds and `images` from
    many images, so each gets the quantile of its own degrees of freedom (Banerjee, Sankhya 1961). The half width is

        sqrt(t(num_seeds - 1)^2 seeds + t(num_images - 1)^2 images - z^2 both)

    It covers whatever the shares of the two are. Satterthwaite's single quantile does not.
    """

    mean: np.ndarray
    seeds: np.ndarray
    images: np.ndarray
    both: np.ndarray
    """The residual's part, limited to the smaller of the two, so that no more is subtracted than was added."""
    num_seeds: int
    num_images: int

    @property
    def known(self) -> bool:
        """Whether there is an interval: one image says nothing about other images, however many seeds there are."""
        return self.num_images > 1

    def half_width(self, error: ArrayLike) -> np.ndarray:
        """Half width of the interval that misses with probability `error` at most; infinite where nothing is known."""
        if not self.known:
            return np.full(np.shape(self.mean), np.inf)
        upper = 1 - np.asarray(error, np.float64) / 2
        squared = -(ndtri(upper) ** 2) * self.both
        for part, count in ((self.seeds, self.num_seeds), (self.images, self.num_images)):
            if count > 1:
                squared = squared + stdtrit(count - 1, upper) ** 2 * part
        return np.sqrt(np.maximum(squared, 0))

    def p_value(self) -> np.ndarray:
        """Smallest error level at which the interval excludes 0 (at least 1e-12); 1 if nothing is known or all is 0."""
        low, high = np.full(np.shape(self.mean), np.log(_LEAST_P)), np.zeros(np.shape(self.mean))
        for _ in range(50):
            middle = (low + high) / 2
            inside = np.abs(self.mean) <= self.half_width(np.exp(middle))  # 0 is in the interval: p is larger
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        certain = np.abs(self.mean) <= self.half_width(1.0)  # a mean of 0
        return np.where(certain, 1.0, np.exp(high))

    def interval(self, confidence: float = 0.95) -> Interval:
        """The interval of a single mean."""
        value, half = float(self.mean), float(self.half_width(1 - confidence))
        return Interval(value, value - half, value + half) if self.known else Interval(value, None, None)


def spread(values: np.ndarray) -> Spread:
    """(...,S,N) values of S seeds on the same N images -> the spread of their means.

    Seeds that all gave the same values count as one seed, which says nothing about others.
    """
    if values.shape[-2] > 1 and (values == values[..., :1, :]).all():
        values = values[..., :1, :]
    num_seeds, num_images = values.shape[-2:]
    mean, of_seeds, of_images = values.mean((-2, -1)), values.mean(-1), values.mean(-2)
    none = np.zeros_like(mean)
    seeds = of_seeds.var(-1, ddof=1) / num_seeds if num_seeds > 1 else none
    images = of_images.var(-1, ddof=1) / num_images if num_images > 1 else none
    both = none
    if num_seeds > 1 and num_images > 1:
        left = values - of_seeds[..., :, None] - of_images[..., None, :] + mean[..., None, None]
        residual = (left**2).sum((-2, -1)) / ((num_seeds - 1) * (num_images - 1))
        both = np.minimum(residual / (num_seeds * num_images), np.minimum(seeds, images))
    return Spread(mean, seeds, images, both, num_seeds, num_images)


def pseudo_values(statistic: Callable[[np.ndarray], np.ndarray], num_images: int) -> np.ndarray:
    """The jackknife's pseudo-values; their spread over images estimates that of the statistic (Tukey 1958).

    Args:
        statistic: (R,N) weights of the images -> (R,S) values of S seeds; an image of weight 0 is left out.

    Returns:
        (S,N). For a mean over images, these are the values of the images; with one image, its value.
    """
    whole = np.atleast_2d(statistic(np.ones((1, num_images))))[0]  # (S,)
    if num_images == 1:
        return whole[:, None]
    without = np.atleast_2d(statistic(1 - np.eye(num_images)))  # (N,S)
    pseudo = num_images * whole[:, None] - (num_images - 1) * without.T  # (S,N)
    return pseudo + (whole - pseudo.mean(1))[:, None]  # centred at the value, without bias correction


def two_way_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_images: int,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over seeds, with seeds and images resampled (Owen, AoAS 2007), for comparison.

    With few seeds it is too narrow. Three seeds, resampled, have a third less variance than three new ones would, and a
    ninth of the resamples contains only one seed.

    Args:
        statistic: as for `pseudo_values`.
    """
    random = np.random.default_rng(seed)
    drawn = random.multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples)  # (R,N)
    values = np.atleast_2d(statistic(drawn.astype(float)))  # (R,S)
    num_seeds = values.shape[1]
    seeds = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)  # (R,S)
    low, high = np.quantile((values * seeds).mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: ArrayLike, axis: int = -1) -> np.ndarray:
    """p values corrected for their number, so that the chance of any false one stays below the level (Holm 1979)."""
    p = np.moveaxis(np.asarray(p_values, np.float64), axis, -1)
    order = p.argsort(-1)
    count = p.shape[-1]
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * np.arange(count, 0, -1), -1).clip(max=1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, stepped, -1)
    return np.moveaxis(adjusted, -1, axis)
