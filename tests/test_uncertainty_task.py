"""Measures of uncertainty and its calibration, and `task=uncertainty`."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hydra import compose, initialize_config_dir
from PIL import Image
from scipy.stats import binom, spearmanr

import core
from core.registry import discover
from experiments.measuring.bench import EvaluationError
from experiments.measuring.evaluation import evaluate
from experiments.measuring.metrics import fidelity_case
from experiments.measuring.task import make_task
from experiments.measuring.uncertainty import KINDS, error_of, of_interpolation, uncertain_output
from experiments.reports.style import heat
from experiments.settings import SettingError
from experiments.statistics.calibration import (
    LEAST,
    CannotCalibrate,
    ause,
    conformal_factor,
    coverage,
    fitted_exponent,
    rank_correlation,
    sparsification,
)

NOISE = np.random.default_rng(0)


def test_sparsification_by_hand():
    """The uncertainty 3, 2, 1 of the errors 6, 1, 2: all, then without the first, then the last alone."""
    np.testing.assert_allclose(sparsification([3, 2, 1], [6, 1, 2]), [1, 1.5 / 3, 2 / 3])
    np.testing.assert_allclose(sparsification([6, 1, 2], [6, 1, 2]), [1, 1.5 / 3, 1 / 3])
    assert ause([3, 2, 1], [6, 1, 2]) == pytest.approx((2 / 3 - 1 / 3) / (0.5 + 2 / 3))


def test_ause_of_perfect_constant_random_and_wrong():
    error = NOISE.gamma(1, size=2000)
    assert ause(error**3, error) == pytest.approx(0, abs=1e-12)
    assert ause(np.full(2000, 7.0), error) == pytest.approx(1, abs=1e-12)
    assert ause(1 / (1 + error), error) > 1.5
    assert ause(NOISE.random(2000), error) == pytest.approx(1, abs=0.15)
    assert 0 < ause(error * NOISE.gamma(3, size=2000), error) < 0.6


def test_equals_are_removed_in_any_order():
    error = NOISE.gamma(1, size=60)
    coarse = NOISE.integers(0, 4, 60)
    orders = [ause(coarse + 1e-6 * NOISE.random(60), error) for _ in range(4000)]
    assert ause(coarse, error) == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / 4000**0.5)


def test_rank_correlation_is_spearmans():
    first, second = NOISE.integers(0, 9, 200).astype(float), NOISE.random(200)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second)[0], abs=1e-12)
    assert rank_correlation(np.ones(200), second) == 0.0


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_bounds_cover_what_they_say_within_the_binomial_error(level):
    """Exchangeable pixels: coverage is binomial around the level, and the factor itself has the error of its rank."""

    def image(count):
        uncertainty = NOISE.gamma(2, size=count)
        return uncertainty, (uncertainty + LEAST) * NOISE.exponential(size=count)

    factor = conformal_factor([image(5000) for _ in range(4)], level)
    assert factor == pytest.approx(-np.log(1 - level), rel=0.05)
    covered = 20000 * coverage(*image(20000), factor)
    low, high = binom.interval(0.9999, 20000, level)
    assert low - 200 < covered < high + 200  # 200: one more binomial error, of the 20000 that calibrated


def test_the_factor_by_hand():
    uncertainty = np.full(9, 1 - LEAST)
    error = np.arange(1.0, 10)
    assert conformal_factor([(uncertainty, error)], 0.8) == 8  # ceil(10 · 0.8)
    assert conformal_factor([(uncertainty, error)], 0.9) == 9
    assert coverage(uncertainty, error, 8.0) == pytest.approx(8 / 9)
    with pytest.raises(CannotCalibrate, match="9 pixels are too few to calibrate a bound for 95% of them"):
        conformal_factor([(uncertainty, error)], 0.95)


@pytest.mark.parametrize("power", [0.0, 0.4, 1.0])
def test_the_exponent_is_the_power_of_the_error(power):
    """Noise of the logarithm with deviation 0.3 gives the slope a deviation of 0.3/sqrt(N)."""
    pairs = []
    for _ in range(3):
        uncertainty = np.exp(NOISE.normal(size=3000)) + 1
        error = 50 * (uncertainty + LEAST) ** power * np.exp(0.3 * NOISE.normal(size=3000))
        pairs.append((uncertainty, error))
    assert fitted_exponent(pairs) == pytest.approx(power, abs=0.05)
    assert fitted_exponent([(error, uncertainty + 1 / error) for uncertainty, error in pairs]) >= 0
    factor = conformal_factor(pairs, 0.8, power)
    assert np.mean([coverage(*pair, factor, power) for pair in pairs]) == pytest.approx(0.8, abs=1e-3)


def test_an_uncertainty_that_says_the_contrary_gives_a_constant_bound():
    assert fitted_exponent([(np.arange(1.0, 9), 1 / np.arange(1.0, 9))]) == 0
    assert fitted_exponent([(np.ones(8), np.arange(1.0, 9))]) == 0


@pytest.mark.parametrize(
    ("uncertainty", "error", "message"),
    [
        ([1, 2], [1.0], "2 uncertainties do not fit 1 errors"),
        ([], [], "0 uncertainties do not fit 0 errors"),
        ([1, np.nan], [1, 2], "some uncertainties are not finite, or below 0"),
        ([1, 2], [1, -2], "some errors are not finite, or below 0"),
        ([1, 2], [0, 0], "no error in any pixel"),
        ([1, 2], [3, 3], "the error is the same everywhere"),
    ],
)
def test_what_cannot_be_measured_is_told(uncertainty, error, message):
    with pytest.raises(CannotCalibrate, match=message):
        ause(uncertainty, error)


def test_odd_calibrations_are_refused():
    with pytest.raises(CannotCalibrate, match="no image to calibrate on"):
        conformal_factor([], 0.9)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 90"):
        conformal_factor([([1.0], [1.0])], 90)


def test_uncertainty_of_interpolation_is_that_of_its_weights():
    features, size = torch.randn(1, 5, 4, 6), (9, 13)
    found = of_interpolation(features, size)
    weights = F.interpolate(torch.eye(24).view(1, 24, 4, 6), size, mode="bilinear").flatten(2)[0].T  # (N,24)
    cells = features[0].flatten(1).T  # (24,C)
    unit = (cells - cells.mean(0)).square().sum(1).mean()
    spread = (weights[:, :, None] * (cells - (weights @ cells)[:, None]).square()).sum((1, 2)) / unit
    torch.testing.assert_close(found["variance"].flatten(), spread, rtol=1e-4, atol=1e-5)
    some = weights[40][weights[40] > 0]
    torch.testing.assert_close(found["entropy"].flatten()[40], -(some * some.log()).sum())
    assert set(found) == set(KINDS)


def test_the_local_control_is_the_variance_of_three_by_three():
    features = torch.randn(1, 5, 4, 6)
    local = of_interpolation(features, (4, 6))["local"]
    block = features[0, :, 1:4, 2:5].flatten(1)
    cells = features[0].flatten(1)
    unit = (cells - cells.mean(1, keepdim=True)).square().sum(0).mean()
    torch.testing.assert_close(local[0, 0, 2, 3], block.var(1, correction=0).sum() / unit)


def test_anyup_has_an_uncertainty_of_its_own():
    model = core.build(["embed_dim=16"]).eval()
    image, features = torch.randn(1, 3, 32, 32), torch.randn(1, 5, 4, 4)
    output, found = uncertain_output(model, image, features, (8, 8))
    _, expected = model.with_uncertainty(image, features, (8, 8))
    torch.testing.assert_close(found["rarity"], expected.rarity)
    assert not torch.allclose(found["rarity"], found["rarity_enlarged"])
    assert output.shape == (1, 5, 8, 8)


def test_colours_rise_in_brightness_and_equals_are_dark():
    ramp = heat(np.arange(200.0).reshape(10, 20), percentile=0).mean(2).ravel()
    assert (np.diff(ramp) >= -0.01).all()
    assert ramp[-1] > 0.6 > 0.1 > ramp[0]
    assert heat(np.full((3, 4), 5.0)).max() < 0.1
    with pytest.raises(ValueError, match=re.escape("finite values of shape (h,w), got (2, 3, 4)")):
        heat(np.zeros((2, 3, 4)))


QUICK = ("tracking.enabled=false", "task=uncertainty", "backbone=hog8", "task.view=32", "device=cpu", "cost=null")


def config(*overrides):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("evaluate", ["data@val_data=images", "val_data.path=[photos]", "peers=[bilinear]", *QUICK,
                                    *overrides])  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, size in (("a", (72, 90)), ("b", (64, 64)), ("c", (70, 80))):
        coarse = NOISE.integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(f"photos/{name}.png")


@pytest.fixture
def weights(tmp_path):
    core.save(core.build(["seed=1", "embed_dim=16"]), tmp_path / "seed1.safetensors")
    return tmp_path / "seed1.safetensors"


def test_every_kind_is_measured_on_every_image(photos, weights):
    report = evaluate(config(f"checkpoints=[{weights}]"))
    scores = report.scores.set_index(["task", "arm", "measure", "image"])["numerator"]
    assert set(report.scores["task"]) == {f"uncertainty/2x/{kind}" for kind in KINDS}
    assert set(report.scores["arm"]) == {"bilinear", "seed1", "encoder"}
    model, backbone = core.load(weights).eval(), core.load_backbone("hog8")
    pairs = {}
    for name in ("a", "b", "c"):
        rgb = torch.from_numpy(np.array(Image.open(f"photos/{name}.png"))).permute(2, 0, 1)[None] / 255
        case = fidelity_case(rgb, backbone, 2, 32)
        output, found = model.with_uncertainty(case.guidance, case.features, case.output_size)
        error = error_of(output, case.target, case.features)
        pairs[name] = found.rarity.flatten().double().numpy(), error.detach().flatten().double().numpy()
        rank = scores["uncertainty/2x/rarity", "seed1", "error_rank", name]
        assert rank == pytest.approx(spearmanr(*pairs[name])[0], abs=0.02)  # the cache rounds to half precision
    exponent = fitted_exponent([pairs["a"], pairs["c"]])
    factor = conformal_factor([pairs["a"], pairs["c"]], 0.9, exponent)
    assert scores["uncertainty/2x/rarity", "seed1", "exponent", "b"] == pytest.approx(exponent, abs=0.02)
    assert scores["uncertainty/2x/rarity", "seed1", "factor_90", "b"] == pytest.approx(factor, rel=0.02)
    assert scores["uncertainty/2x/rarity", "seed1", "coverage_90", "b"] == pytest.approx(
        coverage(*pairs["b"], factor, exponent), abs=0.05
    )
    assert any("coverage is best where it is nominal" in note for note in report.notes)
    assert len(report.pictures) == 3


def test_a_calibration_from_elsewhere(photos):
    scores = evaluate(config("task.calibration=[1,0.001,1e6]", "task.kinds=[local]", "ceilings=[]")).scores
    found = scores.groupby("measure")["numerator"].mean()
    assert found["factor_80"] == pytest.approx(0.001)
    assert found["coverage_80"] < 0.1
    assert found["coverage_90"] == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"calibration": [1.0]}, "task.calibration must be null or [exponent, factor for 80 %, factor for 90 %]"),
        ({"calibration": [1.0, 2.0, -3.0]}, "none below 0, got [1.0, 2.0, -3.0]"),
        ({"kinds": ["doubt"]}, "task.kinds must be different ones of rarity, variance, entropy, local"),
        ({"kinds": []}, "task.kinds must be different ones of"),
        ({"scales": [1]}, "task.scales must be different whole numbers from 2"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(SettingError, match=re.escape(message)):
        make_task({"name": "uncertainty", **setting})


def test_one_image_cannot_calibrate_itself(photos):
    with pytest.raises(SettingError, match=r"calibrates on the other images: it needs two.*task\.calibration"):
        evaluate(config("max_val_images=1"))


def test_features_that_are_not_finite_are_told(photos, monkeypatch):
    from experiments.peers.interpolation import Bilinear

    monkeypatch.setattr(Bilinear, "forward", lambda self, image, features, size: torch.full((1, 1, 1, 1), torch.nan))
    with pytest.raises(EvaluationError, match="image a at 2x: upsampled features are not finite"):
        evaluate(config("ceilings=[]"))
