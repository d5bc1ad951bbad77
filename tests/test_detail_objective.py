"""objective=detail: by loops, in its neutral setting, where nothing can correlate, and as the measure has it."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import core
from core import Batch
from core.training import all_losses, cosine_mse
from experiments.measuring.detail import detail_measures
from extensions import detail
from extensions.detail import Detail, coarse_grid, correlation

GRID, SIZE, CHANNELS = (4, 5), (8, 10), 6


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def batch_of(whole: bool = True, images: int = 2, scale: int = 2, dtype: torch.dtype = torch.float64) -> Batch:
    """Targets of whole images, or two crops for each."""
    size = (scale * GRID[0], scale * GRID[1])
    corners = None if whole else torch.tensor([[i % 3, (2 * i) % 4] for i in range(2 * images)])
    target = noise(images, CHANNELS, *size, dtype=dtype) if whole else noise(2 * images, CHANNELS, 6, 7, dtype=dtype)
    return Batch(
        image=noise(images, 3, 16, 20, seed=1, dtype=dtype),
        features=noise(images, CHANNELS, *GRID, seed=2, dtype=dtype),
        target=target,
        output_size=size,
        corners=corners,
        augmented_image=noise(images, 3, 16, 20, seed=3, dtype=dtype),
    )


def only(**settings) -> Detail:
    return Detail(**{"self_consistency": 0, "input_consistency": 0} | settings)


def loop_carried(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(H,W): area means over a grid of cells, which may cut pixels, enlarged bilinearly."""
    coarse = np.zeros(grid)
    spans = [
        [(math.floor(i * n / cells), math.ceil((i + 1) * n / cells)) for i in range(cells)]
        for n, cells in zip(x.shape, grid, strict=True)
    ]
    for i, j in itertools.product(*map(range, grid)):
        coarse[i, j] = x[slice(*spans[0][i]), slice(*spans[1][j])].mean()
    out = np.empty_like(x)
    for i, j in itertools.product(*map(range, x.shape)):
        out[i, j] = 0
        y, z = (max((p + 0.5) * cells / n - 0.5, 0) for p, cells, n in zip((i, j), grid, x.shape, strict=True))
        for a, b in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(z), math.floor(z) + 1)):
            weight = (1 - abs(y - a)) * (1 - abs(z - b))
            out[i, j] += weight * coarse[min(a, grid[0] - 1), min(b, grid[1] - 1)]
    return out


def loop_loss(output: Tensor, target: Tensor, bands: list[tuple[tuple[int, int], tuple[int, int] | None]]) -> float:
    """1 - correlation, of each target and band by sums over channels and positions; a band lies between two grids."""
    found = []
    for ours, theirs in zip(output.double().numpy(), target.double().numpy(), strict=True):
        for low, high in bands:
            product = own = wanted = 0.0
            for a, b in zip(ours, theirs, strict=True):
                below = [loop_carried(x, low) for x in (a, b)]
                above = [x if high is None else loop_carried(x, high) for x in (a, b)]
                p, q = (x - y for x, y in zip(above, below, strict=True))
                product, own, wanted = product + (p * q).sum(), own + (p * p).sum(), wanted + (q * q).sum()
            found.append(product / math.sqrt(own * wanted))
    return 1 - sum(found) / len(found)


@pytest.mark.parametrize("whole", [True, False], ids=["whole images", "crops"])
def test_against_loops(whole):
    batch, output = batch_of(whole), noise(2, CHANNELS, *SIZE, seed=5)
    losses = only(weight_detail=2.0, weight_cosine=0.5, weight_squared=0.25).reconstruction(output, batch)
    found = core.batch.crops_of(output, batch)
    grid = GRID if whole else (3, 4)  # 6 and 7 cells of the fine grid
    assert losses["detail_loss"].item() == pytest.approx(2 * loop_loss(found, batch.target, [(grid, None)]), rel=1e-8)
    cosine = np.mean([
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(*(x.movedim(1, -1).flatten(0, 2).numpy() for x in (found, batch.target)), strict=True)
    ])  # fmt: skip
    assert losses["cosine_loss"].item() == pytest.approx(0.5 * (1 - cosine), rel=1e-8)
    unit = np.ptp(batch.target.numpy(), axis=1, keepdims=True)
    squared = np.mean(((found - batch.target).numpy() / unit) ** 2)
    assert losses["squared_loss"].item() == pytest.approx(0.25 * squared, rel=1e-5)  # the range has an epsilon


def test_octaves_count_alike():
    batch, output = batch_of(scale=4), noise(2, CHANNELS, 16, 20, seed=5)
    found = only(weight_cosine=0, per_octave=True).reconstruction(output, batch)["detail_loss"].item()
    assert found == pytest.approx(loop_loss(output, batch.target, [(GRID, (8, 10)), ((8, 10), None)]), rel=1e-8)
    together = only(weight_cosine=0).reconstruction(output, batch)["detail_loss"].item()
    assert together == pytest.approx(loop_loss(output, batch.target, [(GRID, None)]), rel=1e-8)
    assert abs(found - together) > 1e-3


def test_it_is_the_measure_of_evaluations():
    """On each image; averaged over the images."""
    batch, output = batch_of(), noise(2, CHANNELS, *SIZE, seed=5)
    loss = only(weight_cosine=0).reconstruction(output, batch)["detail_loss"].item()
    measured = [detail_measures(o[None], t[None], GRID)["detail"] for o, t in zip(output, batch.target, strict=True)]
    assert loss == pytest.approx(1 - sum(measured) / 2, rel=1e-8)


@pytest.mark.parametrize("whole", [True, False], ids=["whole images", "crops"])
@pytest.mark.parametrize("settings", [{}, {"self_consistency": 0}, {"input_consistency": 0.3}], ids=str)
def test_with_weights_0_1_1_it_is_the_released_objective(perturbed, whole, settings):
    """Loss and gradients, with both consistency losses."""
    model = perturbed(core.build(["embed_dim=16", "unifier.num_basis=8"])).double()
    batch, found = batch_of(whole), []
    settings = {"self_consistency_size": 9} | settings
    neutral = {"weight_detail": 0.0, "weight_cosine": 1.0, "weight_squared": 1.0}
    for node in ({"name": "cosine_mse"}, {"name": "detail", **neutral}):
        losses = all_losses(model, core.build_filler("objective", node | settings), batch)
        total = sum(losses.values())
        found.append((total, torch.autograd.grad(total, list(model.parameters())), losses))
    (released, gradients, names), (ours, our_gradients, our_names) = found
    assert ours.item() == pytest.approx(released.item(), rel=1e-12)
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert our_names.keys() - {"cosine_loss", "squared_loss"} == names.keys() - {"reconstruction_loss"}


def test_strength_and_what_the_coarse_grid_carries_play_no_part():
    batch = batch_of()
    objective, output = only(weight_cosine=0), noise(2, CHANNELS, *SIZE, seed=5)
    loss = objective.reconstruction(output, batch)["detail_loss"].item()
    for other in (7 * output, 0.01 * output, output + 3, output - 2 * noise(2, CHANNELS, 1, 1)):
        assert objective.reconstruction(other, batch)["detail_loss"].item() == pytest.approx(loss, rel=1e-6)
    perfect = objective.reconstruction(batch.target * 3 - 1, batch)["detail_loss"].item()
    assert perfect == pytest.approx(0, abs=1e-8)
    assert objective.reconstruction(-batch.target, batch)["detail_loss"].item() == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("flat", ["output", "target", "both", "zero output", "zero target"])
def test_where_there_is_no_detail_it_is_1_with_finite_gradients(flat, dtype):
    """A constant has none but rounding; the other image of the batch counts as if it were alone."""
    batch, output = batch_of(dtype=dtype), noise(2, CHANNELS, *SIZE, seed=5, dtype=dtype)
    value = 0.0 if "zero" in flat else 37.3
    constant = torch.full_like(output[:1], value) + value * noise(1, CHANNELS, 1, 1, dtype=dtype)
    target = batch.target.clone()
    if "output" in flat or flat == "both":
        output[:1] = constant
    if "target" in flat or flat == "both":
        target[:1] = constant
    output.requires_grad_()
    loss = only(weight_cosine=0).reconstruction(output, replace(batch, target=target))["detail_loss"]
    loss.backward()
    alone = only(weight_cosine=0).reconstruction(
        output[1:], replace(batch, target=target[1:], features=batch.features[1:])
    )["detail_loss"]
    assert loss.item() == pytest.approx((1 + alone.item()) / 2, abs=0.01)
    assert torch.isfinite(output.grad).all()
    assert output.grad[1].abs().max() > 0


def test_weak_detail_of_large_features_still_counts():
    """The floor is far below what features show: a thousandth of their size is measured as if it stood alone."""
    batch, fine = batch_of(dtype=torch.float32), noise(2, CHANNELS, *SIZE, seed=5, dtype=torch.float32)
    plain = only(weight_cosine=0).reconstruction(fine, batch)["detail_loss"].item()
    shifted = only(weight_cosine=0).reconstruction(1e-3 * fine + 1, batch)["detail_loss"].item()
    assert shifted == pytest.approx(plain, abs=1e-3)


def test_half_precision_targets_and_images_in_bfloat16():
    batch, output = batch_of(dtype=torch.float32), noise(2, CHANNELS, *SIZE, seed=5, dtype=torch.float32)
    expected = only().reconstruction(output, batch)
    rounded = replace(batch, target=batch.target.half(), features=batch.features.half())
    found = only().reconstruction(output, rounded)
    for name, loss in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(loss.item(), abs=2e-3)
    model = core.build(["embed_dim=16", "unifier.num_basis=8"])
    with torch.autocast("cpu", torch.bfloat16):
        losses = all_losses(model, only(), batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_second_derivatives():
    """For learners that differentiate a step: by finite differences of the gradient."""
    batch, output = batch_of(images=1), noise(1, CHANNELS, *SIZE, seed=5).requires_grad_()
    loss = lambda x: sum(only(weight_squared=0.1).reconstruction(x, batch).values())  # noqa: E731
    direction = noise(1, CHANNELS, *SIZE, seed=6)
    [gradient] = torch.autograd.grad(loss(output), output, create_graph=True)
    [found] = torch.autograd.grad((gradient * direction).sum(), output)
    ends = []
    for step in (1e-5, -1e-5):
        moved = (output + step * direction).detach().requires_grad_()
        ends.append(torch.autograd.grad(loss(moved), moved)[0])
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_steps_on_it_raise_the_detail(perturbed):
    model = perturbed(core.build(["embed_dim=16", "unifier.num_basis=8"]))
    batch = batch_of(dtype=torch.float32)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(30):
        found = all_losses(model, only(weight_cosine=0), batch)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        losses.append(found["detail_loss"].item())
    assert losses[-1] < losses[0] - 0.02


def test_pictures_show_both_side_by_side():
    objective, batch = only(), batch_of()
    assert objective.pictures() == {}
    output = batch.target.clone()
    output[0] += noise(CHANNELS, *SIZE, seed=8)
    objective.reconstruction(output, batch)
    [(title, picture)] = objective.pictures().items()
    assert "output | of the target" in title
    factor = detail.PICTURE_SIDE // SIZE[0]
    assert picture.shape == (3, SIZE[0] * factor, (2 * SIZE[1] + 1) * factor)
    assert picture.min() >= 0
    assert picture.max() <= 1
    left, right = picture[..., : SIZE[1] * factor], picture[..., -SIZE[1] * factor :]
    assert (left - right).abs().mean() > 0.05
    objective.reconstruction(batch.target, batch)
    [same] = objective.pictures().values()
    assert torch.equal(same[..., : SIZE[1] * factor], same[..., -SIZE[1] * factor :])
    assert only(weight_detail=0).pictures() == {}


@pytest.mark.parametrize("channels", [1, 2])
def test_pictures_of_few_channels(channels):
    batch = batch_of()
    objective = only()
    objective.reconstruction(batch.target[:, :channels], replace(batch, target=batch.target[:, :channels]))
    assert all(torch.isfinite(picture).all() for picture in objective.pictures().values())


def test_correlation_is_the_cosine_of_all_values():
    ours, target = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    expected = F.cosine_similarity(ours.flatten(1), target.flatten(1))
    torch.testing.assert_close(correlation(ours, target, ours, target), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("grid", "size", "target", "message"),
    [
        ((14, 14), (28, 28), (2, 14), "a target of 2x14 shows 1x7 cells of the features, and detail needs 2x2: take"),
        ((14, 14), (14, 14), (14, 14), "needs targets finer than the features, got 14x14 for 14x14: raise views.scale"),
    ],
)  # fmt: skip
def test_targets_without_a_coarse_grid_are_refused(grid, size, target, message):
    with pytest.raises(ValueError, match=message):
        coarse_grid(grid, size, target)


def test_coarse_grids_have_the_cells_of_the_features():
    assert coarse_grid((14, 14), (28, 28), (14, 14)) == (7, 7)
    assert coarse_grid((4, 6), (16, 24), (16, 24)) == (4, 6)
    assert coarse_grid((21, 29), (42, 58), (21, 29)) == (10, 14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_detail": -1.0}, "weight_detail must be 0 or more, got -1.0"),
        ({"weight_squared": math.nan}, "weight_squared must be 0 or more, got nan"),
        ({"weight_detail": 0.0, "weight_cosine": 0.0}, "all weights are 0, so there is nothing to learn: set one"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Detail(**settings)


def test_consistency_losses_are_the_baselines(perturbed):
    model = perturbed(core.build(["embed_dim=16", "unifier.num_basis=8"])).double()
    batch = batch_of()
    with torch.no_grad():
        output = model(batch.image, batch.features, batch.output_size)
        losses = Detail(self_consistency_size=9)(model, batch, output)
        pooled = F.interpolate(output, GRID, mode="area")
        clean, augmented = (model(image, batch.features, (9, 9)) for image in (batch.image, batch.augmented_image))
    assert losses["input_consistency_loss"].item() == pytest.approx(0.1 * cosine_mse(pooled, batch.features).item())
    assert losses["self_consistency_loss"].item() == pytest.approx(0.1 * cosine_mse(augmented, clean).item())
