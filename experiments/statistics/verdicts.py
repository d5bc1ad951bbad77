"""Compares arms by their scores: difference to the baseline with an interval, verdict, share of the gap closed.

Differences are paired: they compare the same images and the same seeds. An interval holds for other seeds and other
images (`intervals.Spread`), unless `Comparison.basis` says otherwise. A verdict is corrected for the number of
competing arms (Holm, within one measure of one task). Measures and tasks are judged one by one, so a claim over several
of them needs a further correction. For a measure that blur improves (`Measure.blurred`), an arm helps only if it also
beats the best blurred baseline: the blurred baseline or blurred bilinear upsampling, whichever is better.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pandas as pd

from experiments.statistics.intervals import Interval, Spread, holm, pseudo_values, spread, two_way_bootstrap
from experiments.statistics.scores import MEASURES, Measure, ScoreError, check, sums, value

FAMILY = ["task", "data", "backbone"]
FLOOR, CEILING = "bilinear", "encoder"
"""The gap closed by an arm is its share of the way from the first to the second."""


@dataclass(frozen=True)
class Comparison:
    """One measure of one arm on one task."""

    task: str
    data: str
    backbone: str
    measure: str
    arm: str
    mean: float
    """Mean over seeds."""
    difference: Interval | None
    """To the baseline; None for the baseline itself."""
    p_value: float | None
    """Corrected for the number of arms; None for an arm that does not compete."""
    verdict: str
    """helps, hurts, not shown; baseline; reference (peers and ceilings)."""
    basis: str
    """What the interval holds for, if not for other seeds and other images; else empty. One seed (or equal results with
    all seeds) says nothing about other seeds. One image says nothing about other images, and there is no interval."""
    gap_closed: Interval | None
    """None if encoder or bilinear is missing, or the encoder is not clearly better."""
    num_seeds: int
    num_images: int
    blurred: float | None
    """For a measure that blur improves: the mean of blurred features, each image at the width best on the others."""
    beyond_blur: Interval | None
    """The difference to the best blurred baseline; None if there is none, or if blur does not improve the measure."""
    bootstrap: Interval | None
    """The difference with a two-way percentile bootstrap, for comparison; too narrow with few seeds."""

    @property
    def family(self) -> tuple[str, str, str]:
        """Task, data and backbone."""
        return self.task, self.data, self.backbone


def compare(
    scores: pd.DataFrame,
    baseline: str,
    competing: Collection[str],
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> list[Comparison]:
    """Compares every arm of `scores` with the baseline, for each measure, arms in the order of the rows.

    Args:
        scores: see `experiments.statistics.scores`. If an arm has one seed and the baseline several, the arm (a peer)
            counts as the same for all seeds.
        competing: the arms that get a verdict.
        num_resamples: of the bootstrap that is given beside the interval; 0: no bootstrap.

    Raises:
        ScoreError: as `check`; the baseline is missing on a task, or an arm has other seeds than the baseline.
    """
    check(scores)
    compared = []
    for keys, rows in scores.groupby(FAMILY, sort=False):
        for measure, of_measure in rows.groupby("measure", sort=False):
            arms = arrays(of_measure)
            where = f"{'/'.join(keys)}, {measure}"
            if baseline not in arms:
                raise ScoreError(f"{where}: the baseline {baseline} has no scores; there are: {', '.join(arms)}")
            meaning = MEASURES[measure]
            controls = arrays(rows[rows["measure"] == meaning.blurred])
            one = _OneMeasure(arms, baseline, meaning, controls, where)
            compared += one.comparisons(
                dict(zip(FAMILY, keys, strict=True)), measure, competing, confidence, num_resamples
            )
    return compared


def table(comparisons: list[Comparison]) -> pd.DataFrame:
    """One row per comparison; an interval takes the columns NAME, NAME_low, NAME_high."""
    rows = []
    for one in comparisons:
        row = asdict(one)
        for name in ("difference", "gap_closed", "beyond_blur", "bootstrap"):
            interval = row.pop(name) or {"value": None, "low": None, "high": None}
            ends = {f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
            row |= ends if name == "bootstrap" else {name: interval["value"]} | ends
        rows.append(row)
    return pd.DataFrame(rows)


def bases(comparisons: Iterable[Comparison]) -> str:
    """What the intervals of some comparisons hold for, in words; if arms differ in that, all of it."""
    found = dict.fromkeys(one.basis or "over seeds and images" for one in comparisons if one.difference is not None)
    return "; ".join(found) or "none"


def difference(arm: "Sums", baseline: "Sums", weights: np.ndarray) -> np.ndarray:
    """(R,N) weights of the images -> (R,S) differences of the arm to the baseline, per seed."""
    return np.atleast_2d(value(*arm, weights)) - np.atleast_2d(value(*baseline, weights))


Sums = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators, (S,N,K); images in the same order for all arms."""


class _OneMeasure:
    """All arms, for one measure on one task."""

    def __init__(
        self,
        arms: Mapping[str, tuple[Sums, list[int]]],
        baseline: str,
        meaning: Measure,
        controls: Mapping[str, tuple[Sums, list[int]]],
        where: str,
    ):
        self.sums = {name: of_arm for name, (of_arm, _) in arms.items()}
        self.seeds = {name: seeds for name, (_, seeds) in arms.items()}
        self.baseline, self.better, self.blur_helps = baseline, meaning.better, bool(meaning.blurred)
        self.blurred = {name: float(np.mean(value(*of_arm))) for name, (of_arm, _) in controls.items()}
        known = [name for name in (baseline, FLOOR) if name in controls]
        best = max(known, key=lambda name: self.better * self.blurred[name], default=None)
        self.control = None if best is None else controls[best][0]
        self.num_images = self.sums[baseline][0].shape[1]
        for name, seeds in self.seeds.items():
            if seeds != self.seeds[baseline] and len(seeds) > 1 and len(self.seeds[baseline]) > 1:
                raise ScoreError(f"{where}: arm {name} has seeds {seeds}, the baseline {self.seeds[baseline]}")

    def comparisons(
        self, family: Mapping[str, str], measure: str, competing: Collection[str], confidence: float, num_resamples: int
    ) -> list[Comparison]:
        others = [name for name in self.sums if name != self.baseline]
        spreads = {name: self.spread_of(name) for name in others}
        rivals = [name for name in others if name in competing]
        beyond = {name: self._beyond_blur(name) for name in others}
        raw = [self._p_value(spreads[name], beyond[name]) for name in rivals]
        adjusted = dict(zip(rivals, holm(raw), strict=True))
        clear = self._gap_is_clear(confidence)
        found = []
        for name in self.sums:
            of_arm, p = spreads.get(name), adjusted.get(name)
            interval = of_arm and of_arm.interval(confidence)
            verdict = "baseline" if of_arm is None else "reference" if p is None else "not shown"
            if p is not None and p <= 1 - confidence:
                verdict = "helps" if interval.value * self.better > 0 else "hurts"
            share = clear and name not in (FLOOR, CEILING)
            found.append(
                Comparison(
                    **family,
                    measure=measure,
                    arm=name,
                    mean=float(np.mean(value(*self.sums[name]))),
                    difference=interval,
                    p_value=None if p is None else float(p),
                    verdict=verdict,
                    basis=_basis(of_arm),
                    gap_closed=self._share(name, confidence) if share else None,
                    num_seeds=len(self.seeds[name]),
                    num_images=self.num_images,
                    blurred=self.blurred.get(name),
                    beyond_blur=beyond[name].interval(confidence) if beyond.get(name) else None,
                    bootstrap=self._bootstrap(name, confidence, num_resamples) if of_arm and num_resamples else None,
                )
            )
        return found

    def spread_of(self, name: str, other: str | None = None) -> Spread:
        return self._spread(self.sums[name], self.sums[other or self.baseline])

    def _spread(self, one: Sums, other: Sums) -> Spread:
        return spread(pseudo_values(partial(difference, one, other), self.num_images))

    def _beyond_blur(self, name: str) -> Spread | None:
        return self._spread(self.sums[name], self.control) if self.control is not None else None

    def _p_value(self, to_baseline: Spread, beyond: Spread | None) -> float:
        """Of the difference to the baseline; if blur gains too, the larger of this and of beating blur."""
        p = float(to_baseline.p_value())
        if not self.blur_helps or to_baseline.mean * self.better <= 0:
            return p
        return max(p, float(beyond.p_value())) if beyond and beyond.mean * self.better > 0 else 1.0

    def _gap_is_clear(self, confidence: float) -> bool:
        if not {FLOOR, CEILING} <= self.sums.keys():
            return False
        gap = self.spread_of(CEILING, FLOOR).interval(confidence)
        return gap.low is not None and min(self.better * gap.low, self.better * gap.high) > 0

    def _share(self, name: str, confidence: float) -> Interval:
        arm, floor, ceiling = (self.sums[key] for key in (name, FLOOR, CEILING))

        def share(weights: np.ndarray) -> np.ndarray:
            return difference(arm, floor, weights) / difference(ceiling, floor, weights)  # (R,S)

        found = spread(pseudo_values(share, self.num_images))
        return found.interval(confidence)

    def _bootstrap(self, name: str, confidence: float, num_resamples: int) -> Interval | None:
        statistic = partial(difference, self.sums[name], self.sums[self.baseline])
        try:
            low, high = two_way_bootstrap(statistic, self.num_images, confidence, num_resamples)
        except ScoreError:  # a resample in which no image has the measure, because few images have it
            return None
        return Interval(float(statistic(np.ones((1, self.num_images))).mean()), low, high)


def _basis(of_arm: Spread | None) -> str:
    if of_arm is None:
        return ""
    if not of_arm.known:
        return "one image: no interval"
    return "" if of_arm.num_seeds > 1 else "one seed: over images only"


def arrays(rows: pd.DataFrame) -> dict[str, tuple[Sums, list[int]]]:
    """Arm -> (its sums over all images for which any arm has the measure, its seeds)."""
    images = sorted(set(rows.loc[rows["denominator"] > 0, "image"]))
    arrays = {}
    for arm, of_arm in rows.groupby("arm", sort=False):
        numerator, denominator, seeds, own = sums(of_arm)
        at = pd.Index(images).get_indexer(own)
        kept = at >= 0
        wide = []
        for array in (numerator, denominator):
            full = np.zeros((len(seeds), len(images), array.shape[2]))
            full[:, at[kept]] = array[:, kept]
            wide.append(full)
        arrays[arm] = ((wide[0], wide[1]), seeds)
    return arrays
