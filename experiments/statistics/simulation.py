"""Simulated sweeps with known differences: how often are verdicts wrong, and do intervals miss (docs/statistics.md)?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy.special import expit

from experiments.progress import Progress
from experiments.statistics.intervals import Spread, holm, pseudo_values, spread, two_way_bootstrap
from experiments.statistics.scores import value

NUM_CLASSES = 11
SPREADS = {
    "no seed effect": {"seed": 0.0, "image": 0.0, "residual": 0.3},
    "all three": {"seed": 0.1, "image": 0.3, "residual": 0.3},
    "large seed effect": {"seed": 0.3, "image": 0.3, "residual": 0.1},
}
EFFECT = 0.3
"""True difference of arms that differ."""
BOOTSTRAP_SWEEPS = 200
"""Largest number of sweeps with the bootstrap, which takes most of the time."""
_BOOTSTRAP_RESAMPLES = 500


@dataclass(frozen=True)
class Scenario:
    """The size of a sweep, and the random parts of its results.

    An arm's value for a seed on an image is a sum of random draws with the given deviations, independent between arms:
    one for the seed, one for the image, one for both together. For `miou` the sum shifts the logits of pixels being
    right, for all classes together. Images then differ in which classes they show (many are absent), and in their
    sizes.
    """

    num_seeds: int = 3
    num_images: int = 30
    num_arms: int = 4
    """Besides the baseline."""
    seed: float = 0.1
    """Standard deviations: of a seed's values on all images, ..."""
    image: float = 1.0
    """... of an arm's values on an image, with any seed, ..."""
    residual: float = 1.0
    """... and of one seed on one image."""
    heavy_tails: bool = False
    """Student's t with 3 degrees of freedom instead of normal deviates."""
    measure: str = "mean"
    """mean: over images; miou: ratios of sums over images, averaged over classes."""


@dataclass(frozen=True)
class Rates:
    """How often statements about simulated sweeps are wrong."""

    false_positives: float
    """Share of sweeps of identical arms in which some arm is said to help or hurt."""
    coverage: float
    """Share of intervals that contain the true difference."""
    bootstrap_false_positives: float | None
    """As `false_positives`, with the two-way percentile bootstrap, Bonferroni-corrected."""
    bootstrap_coverage: float | None
    num_sweeps: int


def simulate(
    scenario: Scenario,
    num_sweeps: int = 500,
    effect: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
    num_resamples: int | None = None,
) -> Rates:
    """Draws sweeps, compares their arms with the baseline as a report does, and counts.

    Args:
        effect: true difference of all arms to the baseline, in values, or for `miou` in logits. If it is not 0,
            `false_positives` counts the sweeps with any verdict, right or wrong.
        num_resamples: of the bootstrap, which takes most of the time; None: no bootstrap.
    """
    random = np.random.default_rng(seed)
    truth = true_difference(scenario, effect)
    wrong, missed, booted = [], [], []
    for _ in range(num_sweeps):
        differences = _differences(scenario, effect, random)
        spreads = [spread(pseudo_values(one, scenario.num_images)) for one in differences]
        found = stacked(spreads)
        wrong.append((holm(found.p_value()) <= 1 - confidence).any())
        missed.append(np.abs(found.mean - truth) > found.half_width(1 - confidence))
        if num_resamples:
            corrected = 1 - (1 - confidence) / scenario.num_arms
            ends = [
                [two_way_bootstrap(one, scenario.num_images, level, num_resamples) for level in (confidence, corrected)]
                for one in differences
            ]
            booted.append(np.array(ends))  # (arms, level, end)
    rates = None, None
    if booted:
        low, high = np.moveaxis(np.array(booted), -1, 0)  # (sweeps, arms, level)
        rates = (
            _outside(low[..., 1], high[..., 1], 0).any(1).mean(),
            1 - _outside(low[..., 0], high[..., 0], truth).mean(),
        )
    return Rates(float(np.mean(wrong)), 1 - float(np.mean(missed)), *rates, num_sweeps)


def simulate_all(num_sweeps: int, confidence: float) -> pd.DataFrame:
    """Every scenario of docs/statistics.md -> one row each: what was drawn, and how often it was judged wrongly."""
    rows = []
    grid = itertools.product(("mean", "miou"), (3, 5), (30, 100), SPREADS, (False, True))
    for which, num_seeds, num_images, chance, heavy in Progress(list(grid), "scenarios", "scenario"):
        scenario = Scenario(num_seeds, num_images, 4, **SPREADS[chance], heavy_tails=heavy, measure=which)
        same = simulate(scenario, num_sweeps, 0.0, confidence)
        other = simulate(scenario, num_sweeps, EFFECT, confidence, seed=1)
        boot = simulate(scenario, min(num_sweeps, BOOTSTRAP_SWEEPS), 0.0, confidence, 0, _BOOTSTRAP_RESAMPLES)
        names = {"measure": which, "seeds": num_seeds, "images": num_images, "spread": chance}
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


def true_difference(scenario: Scenario, effect: float) -> float:
    """Of an arm with `effect` to the baseline, over all seeds and images there could be."""
    if scenario.measure == "mean" or effect == 0:
        return effect
    many = Scenario(200, 2000, 0, scenario.seed, scenario.image, scenario.residual, scenario.heavy_tails, "miou")
    values = []
    for shift in (0.0, effect):  # the same draws
        random = np.random.default_rng(1)
        pixels = _pixels(many.num_images, random)
        values.append(value(*_sums(pixels, _draws(many, random) + shift)).mean())
    return float(values[1] - values[0])


def stacked(spreads: Sequence[Spread]) -> Spread:
    """Joins spreads with equal numbers of seeds and images into one of arrays."""
    arrays = [np.stack([getattr(one, name) for one in spreads]) for name in ("mean", "seeds", "images", "both")]
    return Spread(*arrays, spreads[0].num_seeds, spreads[0].num_images)


def draw_scores(scenario: Scenario, effect: float, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """One sweep -> (numerators, denominators), each (S,N,K), of the baseline and then of each arm."""
    arms = range(scenario.num_arms + 1)
    if scenario.measure == "mean":
        shared = random.standard_normal((1, scenario.num_images))  # a difficult image is so for all arms
        values = [(shared + _draws(scenario, random) + effect * (arm > 0))[..., None] for arm in arms]
        return [(numerator, np.ones_like(numerator)) for numerator in values]
    pixels = _pixels(scenario.num_images, random)
    return [_sums(pixels, _draws(scenario, random) + effect * (arm > 0)) for arm in arms]


def _differences(scenario: Scenario, effect: float, random: np.random.Generator) -> list:
    """For each arm: weights of images -> difference to the baseline, per seed."""
    baseline, *arms = draw_scores(scenario, effect, random)
    return [partial(_difference, arm, baseline) for arm in arms]


def _difference(arm: tuple, baseline: tuple, weights: np.ndarray) -> np.ndarray:
    return np.atleast_2d(value(*arm, weights)) - np.atleast_2d(value(*baseline, weights))


def _draws(scenario: Scenario, random: np.random.Generator) -> np.ndarray:
    """(S,N): the random part of an arm's values."""
    total = np.zeros((scenario.num_seeds, scenario.num_images))
    for deviation, shape in (
        (scenario.seed, (scenario.num_seeds, 1)),
        (scenario.image, (1, scenario.num_images)),
        (scenario.residual, total.shape),
    ):
        draws = random.standard_t(3, shape) / 3**0.5 if scenario.heavy_tails else random.standard_normal(shape)
        total = total + deviation * draws
    return total


def _pixels(num_images: int, random: np.random.Generator) -> np.ndarray:
    """(N,K) pixels of each class; every image shows the first class, about a third shows the last."""
    present = random.random((num_images, NUM_CLASSES)) < np.linspace(1, 0.35, NUM_CLASSES)
    return present * random.lognormal(np.linspace(3, 0, NUM_CLASSES), 1.0, (num_images, NUM_CLASSES))


def _sums(pixels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,K) pixels, (S,N) logits -> intersections and unions (S,N,K): as much is wrongly added as is missed."""
    right = expit(logits[..., None] + np.linspace(2, 0, NUM_CLASSES))  # (S,N,K)
    return pixels * right, pixels * (2 - right)


def _outside(low: np.ndarray, high: np.ndarray, truth: float) -> np.ndarray:
    return (low > truth) | (high < truth)
