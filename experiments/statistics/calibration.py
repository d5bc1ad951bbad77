"""How good an uncertainty is: how it ranks errors, and bounds of the error calibrated on other images.

All functions take one value per pixel, as flat arrays, and know nothing of images or models.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from experiments.errors import Told

LEAST = 0.01
"""Added to uncertainties, so that a pixel said to be certain still has a bound, and to errors before a logarithm."""


class CannotCalibrate(Told, ValueError):
    """Errors or uncertainties that nothing can be said of; the message says why."""


def rank_correlation(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Spearman's correlation. 0 where either is the same everywhere: it then tells no pixel from another.

    Raises:
        CannotCalibrate: as `sparsification`.
    """
    uncertainty, error = _checked(uncertainty, error)
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (uncertainty, error))
    energy = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / energy) if energy else 0.0


def sparsification(uncertainty: np.ndarray, error: np.ndarray) -> np.ndarray:
    """(N,) mean error of the N, N - 1, ..., 1 pixels that are least uncertain, divided by that of all.

    Pixels with the same uncertainty are removed in any order: each counts with the mean error of them all.
    (Kybic & Nieuwenhuis, CVIU 2011; Ilg et al., ECCV 2018.)

    Raises:
        CannotCalibrate: shapes that differ, no pixel, values that are not finite, or below 0; no error anywhere.
    """
    uncertainty, error = _checked(uncertainty, error)
    order = np.argsort(uncertainty, kind="stable")
    _, group = np.unique(uncertainty[order], return_inverse=True)
    alike = np.bincount(group, error[order]) / np.bincount(group)  # mean error of each group of equals
    means = np.cumsum(alike[group]) / np.arange(1, len(error) + 1)
    return means[::-1] / error.mean()


def ause(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Area between the sparsification curves by uncertainty and by error, divided by that of a random order.

    0: pixels are ranked as the error ranks them. 1: as good as chance, which any constant is. Above 1: worse.

    Raises:
        CannotCalibrate: as `sparsification`; the error is the same everywhere.
    """
    ours, best = sparsification(uncertainty, error), sparsification(error, error)
    chance = (1 - best).sum()
    if chance <= len(best) * np.finfo(float).eps * 16:
        raise CannotCalibrate("the error is the same everywhere, so no order of the pixels is better than another")
    return float((ours - best).sum() / chance)


def fitted_exponent(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The power of the uncertainty that the error grows with: the slope of their logarithms over all pixels, or 0.

    A negative slope gives 0, and so a constant bound. The power changes no order of pixels. Below 1, errors differ less
    than uncertainties do, from image to image as well.

    Args:
        pairs: (uncertainty, error) of each calibration image.

    Raises:
        CannotCalibrate: as `sparsification`; no images.
    """
    known, errors = _pooled(pairs)
    known, errors = np.log(known), np.log(errors + LEAST)
    known = known - known.mean()
    energy = known @ known
    return max(0.0, float(known @ errors / energy)) if energy else 0.0


def conformal_factor(pairs: Sequence[tuple[np.ndarray, np.ndarray]], level: float, exponent: float = 1.0) -> float:
    """The factor f for which error <= f·(uncertainty + `LEAST`)^exponent in a share `level` of pixels like these.

    Split conformal prediction with normalised scores (Lei et al., JASA 2018; Angelopoulos & Bates, arXiv 2107.07511,
    section 2.3): the ceil((N + 1)·level)-th smallest of the N scores error/(uncertainty + `LEAST`)^exponent. The
    guarantee is for pixels that are exchangeable. Those of one image are alike, so the coverage of single images
    varies more than that; and it is for an exponent from elsewhere, but one number moves the coverage little.

    Args:
        pairs: (uncertainty, error) of each calibration image. level: between 0 and 1.
        exponent: see `fitted_exponent`.

    Raises:
        CannotCalibrate: as `sparsification`; no images, or too few pixels for the level.
        ValueError: a level out of its range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    known, errors = _pooled(pairs)
    scores = errors / known**exponent
    rank = int(np.ceil((len(scores) + 1) * level - 1e-9))
    if rank > len(scores):
        raise CannotCalibrate(f"{len(scores)} pixels are too few to calibrate a bound for {level:.0%} of them")
    return float(np.partition(scores, rank - 1)[rank - 1])


def coverage(uncertainty: np.ndarray, error: np.ndarray, factor: float, exponent: float = 1.0) -> float:
    """Share of the pixels whose error is within the bound factor·(uncertainty + `LEAST`)^exponent.

    Raises:
        CannotCalibrate: as `sparsification`.
    """
    uncertainty, error = _checked(uncertainty, error)
    return float((error <= factor * (uncertainty + LEAST) ** exponent).mean())


def _pooled(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All pixels of all images: uncertainty + `LEAST`, and error."""
    if not pairs:
        raise CannotCalibrate("there is no image to calibrate on")
    known, errors = zip(*(_checked(*pair) for pair in pairs), strict=True)
    return np.concatenate(known) + LEAST, np.concatenate(errors)


def _checked(uncertainty: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    uncertainty, error = (np.asarray(values, dtype=float).ravel() for values in (uncertainty, error))
    if uncertainty.shape != error.shape or not len(error):
        raise CannotCalibrate(f"{len(uncertainty)} uncertainties do not fit {len(error)} errors")
    for name, values in (("uncertainties", uncertainty), ("errors", error)):
        if not np.isfinite(values).all() or values.min() < 0:
            raise CannotCalibrate(f"some {name} are not finite, or below 0")
    if not error.any():
        raise CannotCalibrate("there is no error in any pixel, so nothing can tell of it")
    return uncertainty, error
