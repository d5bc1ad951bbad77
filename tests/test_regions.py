"""Regions of an image that fidelity measures by themselves."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from core.backbones import load_backbone
from core.uncertainty import rarity
from experiments.measuring.detail import detail
from experiments.measuring.metrics import closeness, fidelity, fidelity_case
from experiments.measuring.regions import DECILES, regions_of
from experiments.measuring.tasks.fidelity import SMOOTH
from experiments.statistics.scores import MEASURES

SIZE = (24, 20)


@pytest.fixture(scope="module")
def case():
    image = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image, (96, 96), mode="bicubic").clamp(0, 1)
    found = fidelity_case(image, load_backbone("hog8"), scale=2, view=48)
    return replace(found, regions=regions_of(found.image, found.features, found.output_size))


def features(rows=6, columns=5):
    return torch.randn(1, 7, rows, columns, generator=torch.Generator().manual_seed(1))


def test_a_line_is_thin_a_step_is_neither_thin_nor_flat_and_the_rest_is_flat():
    image = torch.zeros(1, 3, 96, 80)
    image[..., 40:] = 0.5  # a step between columns 9 and 10 of the grid
    image[..., 20:24] = 1  # a line in column 5
    image[..., :48, 64:68] = 0.0  # a dark line in column 16, in the upper half
    found = regions_of(image, features(), SIZE)
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[:, 5] = True
    expected[:12, 16] = True
    # the 10 % with the largest top-hat: the bright line is the strongest, and alone is half of them
    assert found["thin"][:, 5].all()
    assert not (found["thin"] & ~expected).any()
    assert not found["flat"][:, 4:7].any()
    assert not found["flat"][:, 9:11].any()
    assert 0.3 < found["flat"].double().mean() <= 0.5


@pytest.mark.parametrize("grey", [0.0, 0.3, 0.7])
def test_a_blank_image_has_neither_thin_nor_flat_parts(grey):
    assert set(regions_of(torch.full((1, 3, 48, 40), grey), features(), SIZE)) == set(DECILES)


def test_deciles_divide_the_grid_in_the_order_of_uncertainty():
    values = features()
    found = regions_of(torch.rand(1, 3, 48, 40), values, SIZE)
    parts = torch.stack([found[name] for name in DECILES])
    assert (parts.sum(0) == 1).all()
    assert parts.flatten(1).sum(1).max() - parts.flatten(1).sum(1).min() <= 1
    rare = F.interpolate(rarity(values), SIZE, mode="bilinear")[0, 0].double()
    for below, above in pairwise(parts):
        assert rare[below].max() <= rare[above].min()


def test_errors_of_the_deciles_add_up_to_the_error_of_the_image(case):
    output = F.interpolate(case.features, case.output_size, mode="bilinear")
    measured = fidelity(output, case)
    counts = {name: case.regions[name].sum().item() for name in DECILES}
    whole = sum(measured[f"{name}_error"] * count for name, count in counts.items()) / sum(counts.values())
    assert whole == pytest.approx(measured["error"], rel=1e-12)


def test_detail_of_a_region_is_the_correlation_over_its_positions_alone(case):
    output = case.target.clone()
    where = case.regions["decile_10"]
    output[0, :, ~where] = torch.randn_like(output[0, :, ~where])
    grid = tuple(case.features.shape[-2:])
    ours, target = (detail(x.double(), grid)[0][:, where].flatten() for x in (output, case.target))
    expected = (ours @ target / (ours.norm() * target.norm())).item()
    assert fidelity(output, case)["decile_10_detail"] == pytest.approx(expected, rel=1e-9)
    assert fidelity(case.target, case)["decile_10_detail"] == pytest.approx(1, rel=1e-9)


def test_every_region_has_a_measure_with_its_blurred_control(case):
    for name in closeness(case.target, case):
        assert MEASURES[name].blurred == f"{name}_blurred"
        assert name in SMOOTH
    assert set(fidelity(case.target, case)) <= set(MEASURES)


def test_no_regions_unless_asked_for():
    found = fidelity_case(torch.rand(3, 96, 96), load_backbone("hog8"), scale=2, view=48)
    assert not any(name.startswith(("thin", "flat", "decile")) for name in fidelity(found.target, found))
