"""Detail correlation: blind to amplitude, not to blur, position or scale."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.detail import detail, octaves
from experiments.measuring.detail import agreement, detail_measures

GRID = (6, 8)


def fields(scale: int = 4, channels: int = 5, seed: int = 0) -> torch.Tensor:
    """(1,C,s·6,s·8) smooth on the scale of two fine cells, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, scale * GRID[0], scale * GRID[1], generator=generator, dtype=torch.float64)
    return blurred(x, 1.0)


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-4, 5, dtype=x.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (4, 4, 0, 0), mode="replicate"), taps, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, 4, 4), mode="replicate"), taps.mT, groups=x.shape[1])


def loop_detail(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(H,W) by its definition: means over the blocks of each coarse cell, enlarged bilinearly."""
    (height, width), (rows, columns) = x.shape, grid
    coarse = x.reshape(rows, height // rows, columns, width // columns).mean((1, 3))
    out = np.empty_like(x)
    for i, j in itertools.product(range(height), range(width)):
        y, z = (i + 0.5) * rows / height - 0.5, (j + 0.5) * columns / width - 0.5
        value = 0.0
        for a, b in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(z), math.floor(z) + 1)):
            weight = (1 - abs(y - a)) * (1 - abs(z - b))
            value += weight * coarse[min(max(a, 0), rows - 1), min(max(b, 0), columns - 1)]
        out[i, j] = x[i, j] - value
    return out


def test_detail_against_loops():
    x = fields()
    found = detail(x, GRID)
    for channel in range(x.shape[1]):
        expected = loop_detail(x[0, channel].numpy(), GRID)
        np.testing.assert_allclose(found[0, channel].numpy(), expected, atol=1e-12)


def test_octaves_add_up_to_detail():
    x = fields(scale=8)
    bands = octaves(x, GRID)
    assert list(bands) == ["1x-2x", "2x-4x", "4x-8x"]
    torch.testing.assert_close(sum(bands.values()), detail(x, GRID))
    assert list(octaves(fields(scale=2), GRID)) == ["1x-2x"]
    assert list(octaves(fields(scale=3), GRID)) == ["1x-2x", "2x-4x"]  # the last one is cut short


def test_a_perfect_output_has_1_and_amplitude_plays_no_part():
    target = fields()
    perfect = detail_measures(target, target, GRID)
    assert perfect["detail"] == pytest.approx(1)
    assert perfect["detail_error"] == pytest.approx(0, abs=1e-9)
    assert perfect["detail_1x-2x"] == perfect["detail_2x-4x"] == pytest.approx(1)
    coarse = target - detail(target, GRID)
    weak = detail_measures(coarse + 0.2 * detail(target, GRID), target, GRID)
    other = detail_measures(fields(seed=9), target, GRID)
    louder = detail_measures(7 * fields(seed=9), target, GRID)
    assert (
        weak["detail"] > 0.8
    )  # not 1: bilinear after area means is no projection, so some of the detail is taken away twice
    for name in ("detail", "detail_error", "detail_1x-2x"):
        assert louder[name] == pytest.approx(other[name])
    assert louder["detail_amplitude"] == pytest.approx(7 * other["detail_amplitude"])


def test_a_shifted_output_is_punished():
    target = fields()
    found = [detail_measures(target.roll(shift, -1), target, GRID)["detail"] for shift in range(4)]
    assert all(before > after + 0.1 for before, after in itertools.pairwise(found[:3]))


def test_blurring_does_not_raise_it_where_it_raises_cosine():
    """The output is right in its coarse and fine parts, and noisy in all: blur takes away more of the right detail."""
    target = fields(channels=32)
    output = target + 1.5 * blurred(torch.randn(target.shape, generator=torch.Generator().manual_seed(5)).double(), 1.0)
    cosine = lambda x: F.cosine_similarity(x, target, dim=1).mean()  # noqa: E731
    noise = 1.2 * torch.randn(target.shape, generator=torch.Generator().manual_seed(6)).double()
    smooth = F.interpolate(F.interpolate(output, GRID, mode="area"), target.shape[-2:], mode="bilinear")
    assert cosine(blurred(output + noise, 0.8)) > cosine(output + noise), "this blur is one that cosine likes"
    before = detail_measures(output, target, GRID)["detail"]
    assert before > 0.4
    for sigma in (1.5, 2.0, 3.0):
        assert detail_measures(blurred(output, sigma), target, GRID)["detail"] < before
    assert abs(detail_measures(smooth, target, GRID)["detail"]) < before / 2


def test_an_output_without_detail_and_a_target_without_any():
    target = fields()
    constant = torch.ones_like(target)
    assert detail_measures(constant, target, GRID)["detail"] == pytest.approx(0, abs=1e-6)
    assert detail_measures(constant, target, GRID)["detail_error"] == pytest.approx(1, abs=1e-6)
    assert "detail" not in detail_measures(target, torch.zeros_like(target), GRID)
    assert agreement(-target, target)["unexplained"] == 1  # no positive amplitude helps


def test_near_edges_only_what_is_there_counts():
    target, edges = fields(), torch.zeros(24, 32, dtype=torch.bool)
    edges[:, 10:14] = True
    output = target.clone()
    output[..., ~edges] += blurred(fields(seed=3), 1.0)[..., ~edges]
    measured = detail_measures(output, target, GRID, edges)
    assert measured["edge_detail"] > measured["detail"]
    assert "edge_detail" not in detail_measures(output, target, GRID, torch.zeros_like(edges))


def test_a_grid_that_is_not_coarser_is_refused():
    with pytest.raises(ValueError, match=r"the coarse grid \(24, 8\) must have fewer cells than the features"):
        detail(fields(), (24, 8))


def test_blurring_raises_it_where_most_detail_is_wrong():
    """Why the task has a blurred control for it: white noise above right detail of a lower frequency."""
    target = fields(channels=32)
    output = target + 3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(5)).double()
    before, after = (detail_measures(x, target, GRID)["detail"] for x in (output, blurred(output, 0.7)))
    assert after > before + 0.05
