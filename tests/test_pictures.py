"""The joint-PCA picture: equal features have equal colours, at any size and in bounded memory."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.reports import pictures
from experiments.reports.pictures import fit_colours, panel


@pytest.fixture
def features():
    return torch.randn(1, 24, 6, 9, generator=torch.Generator().manual_seed(0))


def test_equal_features_have_equal_colours_in_every_column(features):
    output = F.interpolate(features, (60, 90), mode="nearest")
    colours = fit_colours([features, output])
    low, high = colours.paint(features), colours.paint(output)
    assert low.shape == (6, 9, 3)
    assert high.shape == (60, 90, 3)
    assert low.dtype == np.float32
    np.testing.assert_allclose(high[5::10, 5::10], low, atol=1e-6)


def test_colours_follow_the_strongest_directions():
    axes = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))[0]
    amounts = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)) * torch.tensor([9, 3, 1])[:, None, None]
    colours = fit_colours([torch.einsum("kc,khw->chw", axes[:3], amounts) + 5], percentile=0)
    picture = colours.paint(torch.einsum("kc,khw->chw", axes[:3], amounts) + 5)
    for k in range(3):
        correlation = np.corrcoef(picture[..., k].ravel(), amounts[k].flatten())[0, 1]
        assert abs(correlation) > 0.98
    assert picture.min() == pytest.approx(0, abs=1e-5)
    assert picture.max() == pytest.approx(1, abs=1e-5)


def test_enlarging_the_colours_is_enlarging_the_features(features):
    colours = fit_colours([features], percentile=0)
    middle = features / 3  # away from the ends of the range, where colours saturate
    enlarged = F.interpolate(middle, (25, 40), mode="bilinear")
    np.testing.assert_allclose(colours.paint(middle, (25, 40)), colours.paint(enlarged), atol=1e-5)


def test_outliers_do_not_grey_the_rest(features):
    spoiled = F.interpolate(features, (60, 90), mode="nearest")
    spoiled[:, :, ::15, ::10] *= 1000
    assert fit_colours([features, spoiled]).paint(features).std() > 0.1


def test_every_column_counts_alike():
    """A thousand times more pixels of one column must not take over the range of the other."""
    small, large = torch.rand(4, 4, 4) * 10, torch.rand(4, 200, 200) * 1e-3
    assert fit_colours([small, large]).paint(small).std() > 0.2


@pytest.mark.parametrize("channels", [1, 2, 3, 700])
def test_any_number_of_channels(channels):
    picture = fit_colours([torch.rand(channels, 8, 8)]).paint(torch.rand(channels, 8, 8))
    assert picture.shape == (8, 8, 3)
    assert np.isfinite(picture).all()
    assert channels > 1 or np.array_equal(picture[..., 0], picture[..., 2])


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_features_are_grey(value):
    np.testing.assert_allclose(fit_colours([torch.full((5, 4, 4), value)]).paint(torch.full((5, 4, 4), value)), 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_real_dtype(features, dtype):
    colours = fit_colours([features.to(dtype)])
    np.testing.assert_allclose(colours.paint(features.to(dtype)), colours.paint(features), atol=0.03)


def test_colours_repeat_and_leave_the_random_state_alone(features):
    before = torch.random.get_rng_state()
    first, second = fit_colours([features]), fit_colours([features])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.components, second.components)


@pytest.mark.parametrize("seed", range(4))
def test_an_axis_points_the_same_way_whatever_the_solver_says(seed):
    components = fit_colours([torch.randn(9, 8, 8, generator=torch.Generator().manual_seed(seed))]).components
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_fitting_reads_only_a_sample():
    """64 x 100000 x 100000 values, 2.5 TB if anything touched them all."""
    fit_colours([torch.ones(1).expand(64, 100_000, 100_000)])


def test_painting_in_bands_changes_nothing(features, monkeypatch):
    colours, enlarged = fit_colours([features]), F.interpolate(features, (31, 17))
    whole = colours.paint(enlarged)
    monkeypatch.setattr(pictures, "_BAND_VALUES", 24 * 17 * 4)
    np.testing.assert_allclose(colours.paint(enlarged), whole, atol=1e-6)


def test_refusals(features):
    with pytest.raises(ValueError, match=r"equal numbers of channels, got \[7, 24\]"):
        fit_colours([features, torch.rand(7, 4, 4)])
    with pytest.raises(ValueError, match="got none"):
        fit_colours([])
    with pytest.raises(ValueError, match="not finite"):
        fit_colours([features * float("nan")])
    with pytest.raises(ValueError, match=r"of one image.*\(2, 24, 6, 9\)"):
        fit_colours([features.expand(2, -1, -1, -1)])
    with pytest.raises(ValueError, match=r"shape \(h,w,3\)"):
        panel({"odd": np.zeros((4, 4))})


def test_a_panel_shows_the_pixels_it_is_given():
    image = torch.rand(1, 3, 240, 320)
    sheet = panel({"image": image, "low-res": np.eye(4)[:, :, None].repeat(3, 2)})
    pixels = np.asarray(sheet)
    assert sheet.size == (2 * 320 + 30, 240 + 46)
    shown = (image[0].permute(1, 2, 0).numpy() * 255).round()
    np.testing.assert_array_equal(pixels[36:276, 10:330], shown)
    blocks = pixels[36:276, 340:660].reshape(4, 60, 4, 80, 3)
    assert (blocks == blocks[:, :1, :, :1]).all(), "a low resolution is shown in square blocks, not blurred"
    assert max(pixels[10:36, left : left + 320].min() for left in (10, 340)) < 100, "both have titles"


def test_panels_stay_within_reasonable_sizes():
    assert panel({"tiny": np.zeros((8, 16, 3))}).size == (224 + 20, 112 + 46)
    assert panel({"large": np.zeros((1500, 3000, 3))}).size == (1024 + 20, 512 + 46)
    wide = panel({"a": np.zeros((100, 400, 3)), "b": np.zeros((100, 400, 3))})
    assert wide.size == (420, 2 * 136 + 10), "wide pictures are stacked"
