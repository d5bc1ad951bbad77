"""Uncertainty of attention and of samples: against loops in float64 over explicit weights; what is refused."""

import math

import pytest
import torch
from torch import Tensor

import core
from core import AnyUp, Attention, Context, Refiner, uncertainty

SMALL = ["embed_dim=16", "unifier.num_basis=8"]
SIZE = (11, 9)


def inputs(channels: int = 7, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator).to(dtype)  # noqa: E731
    return draw(3, 14, 19), draw(channels, 4, 5) + 3


def weights_of(model: AnyUp, image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,h·w,Qh,Qw): the weight of every cell, read off features that are 1 in one cell; `AnyUp` never sees them so."""
    _, query, key = model._guide(image, features, size, core.anyup.Buffers())
    grid = features.shape[-2:]
    alone = torch.eye(grid.numel(), dtype=features.dtype).unflatten(1, grid)
    return model.attention(query, key, alone.expand(len(features), *alone.shape), **model.attention.seen(image))


def by_loops(weights: Tensor, features: Tensor, nearest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, rarity and entropy from their definitions, each (B,1,Qh,Qw)."""
    found = torch.zeros(3, len(weights), 1, *weights.shape[-2:], dtype=torch.float64)
    for b, alpha in enumerate(weights):
        cells = features[b].flatten(1).T  # (h·w,C)
        unit = sum((cell - cells.mean(0)).square().sum() for cell in cells) / len(cells)
        rare = []
        for i, cell in enumerate(cells):
            others = sorted((cell - other).square().sum().item() for j, other in enumerate(cells) if j != i)
            rare.append(sum(others[:nearest]) / len(others[:nearest]))
        for row in range(alpha.shape[1]):
            for column in range(alpha.shape[2]):
                a = alpha[:, row, column]
                mean = (a[:, None] * cells).sum(0)
                found[0, b, 0, row, column] = (a * (cells - mean).square().sum(1)).sum() / unit
                found[1, b, 0, row, column] = (a * torch.tensor(rare, dtype=torch.float64)).sum() / unit
                found[2, b, 0, row, column] = -sum(p * math.log(p) for p in a.tolist() if p > 0)
    return tuple(found)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["attention=global"],
        ["attention.window_ratio=0.3"],
        ["attention=pyramid_window", "attention.scales=[3]"],
        ["attention=bilateral_prior", "attention.temperature=2"],
    ],
    ids=str,
)
def test_is_what_loops_over_the_weights_give(perturbed, overrides):
    model = perturbed(core.build([*SMALL, *overrides])).double().eval()
    image, features = inputs()
    with torch.no_grad():
        output, found = model.with_uncertainty(image, features, SIZE)
        expected = model(image, features, SIZE)
        variance, rarity, entropy = by_loops(weights_of(model, image, features, SIZE), features, uncertainty.NEAREST)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variance, variance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.rarity, rarity, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-9, atol=1e-12)
    alone = uncertainty.of_attention(model, image, features, SIZE)
    assert found.spread is None
    assert torch.equal(alone.variance, found.variance)
    assert torch.equal(alone.rarity, found.rarity)
    assert torch.equal(alone.entropy, found.entropy)
    assert all(measure.min() >= 0 and measure.std() > 0 for measure in (variance, rarity, entropy))


def test_the_quick_entropy_is_the_one_by_definition(perturbed):
    model = perturbed(core.build(SMALL)).double().eval()
    image, features = inputs()
    _, query, key = model._guide(image, features, (40, 30), core.anyup.Buffers())
    quick, slow = (
        [torch.cat(parts, 2) for parts in list(zip(*way(query, key, features), strict=True))[1:]]
        for way in (model.attention.bands_with_entropy, lambda *x: Attention.bands_with_entropy(model.attention, *x))
    )
    for one, other in zip(quick, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_subclass_with_other_weights_does_not_inherit_the_quick_entropy():
    class Even(core.attention.WindowAttention):
        def _tiles(self, query, keys, values, visible, mix=torch.bmm, terms=None):
            return super()._tiles(query * 0, keys, values, visible)

    model = AnyUp(attention=Even, embed_dim=16).double().eval()
    image, features = inputs()
    with torch.no_grad():
        _, found = model.with_uncertainty(image, features, SIZE)
        weights = weights_of(model, image, features, SIZE)
    torch.testing.assert_close(found.entropy, -torch.special.xlogy(weights, weights).sum(1, keepdim=True))


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_single_precision_loses_little(perturbed, shift):
    """|y - m|² is a difference from the mean: an offset of s deviations costs s roundings, relative to the variance."""
    model = perturbed(core.build(SMALL)).eval()
    image, features = inputs(dtype=torch.float32)
    features = features + shift
    with torch.no_grad():
        _, found = model.with_uncertainty(image, features, SIZE)
        weights = weights_of(model, image, features, SIZE).double()
    values = features.double().flatten(2)
    mean = values.mean(2, keepdim=True)
    unit = (values - mean).square().sum(1).mean(1)[:, None, None]
    energy, output = (values - mean).square().sum(1), torch.einsum("bnij,bcn->bcij", weights, values)
    exact = (torch.einsum("bnij,bn->bij", weights, energy) - (output - mean[..., None]).square().sum(1)) / unit
    scale = 64 * torch.finfo(torch.float32).eps * (1 + values.abs().max().item())
    torch.testing.assert_close(found.variance[:, 0].double(), exact, rtol=1e-4, atol=scale)


def test_units_do_not_matter(perturbed):
    """Neither the scale of the features, nor an offset, nor a repetition of the channels."""
    model = perturbed(core.build(["embed_dim=16", "unifier=none"])).double().eval()  # weights from the image alone
    image, features = inputs()
    _, found = model.with_uncertainty(image, features, SIZE)
    for same in (features * 1000, features - 40, features.repeat(1, 3, 1, 1)):
        _, again = model.with_uncertainty(image, same, SIZE)
        for name in ("variance", "rarity", "entropy"):
            torch.testing.assert_close(getattr(again, name), getattr(found, name), rtol=1e-8, atol=1e-10)


def test_equal_cells_are_certain():
    model = core.build(SMALL).double().eval()
    image, _ = inputs()
    _, found = model.with_uncertainty(image, torch.full((2, 7, 4, 5), 2.0, dtype=torch.float64), SIZE)
    assert found.variance.abs().max() == 0
    assert found.rarity.abs().max() == 0
    assert found.entropy.max() > 0


def test_rarity_of_small_grids_and_in_parts(monkeypatch):
    features = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    whole = uncertainty.rarity(features)
    monkeypatch.setattr(uncertainty, "_PAIRS_AT_ONCE", 100)
    torch.testing.assert_close(uncertainty.rarity(features), whole)
    pair = uncertainty.rarity(torch.tensor([[[[0.0, 1.0]]]]))
    torch.testing.assert_close(pair, torch.full((1, 1, 1, 2), 4.0))  # distance 1, variance 1/4


class Noisy(Refiner):
    """Adds noise of deviation 0.5."""

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output + 0.5 * context.noise_like(output)


def test_spread_is_the_variance_of_the_samples():
    model = AnyUp(refiner=Noisy, embed_dim=16).double().eval()
    image, features = inputs()
    output, found = model.with_uncertainty(
        image, features, SIZE, generator=torch.Generator().manual_seed(5), num_samples=6
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        samples = torch.stack([model(image, features, SIZE, generator=generator) for _ in range(6)])
    torch.testing.assert_close(output, samples[0])
    cells = features.flatten(2)
    unit = (cells - cells.mean(2, keepdim=True)).square().sum(1).mean(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found.spread, samples.var(0).sum(1, keepdim=True) / unit)


@pytest.mark.parametrize("number", [1, -2, 2.0, True])
def test_odd_numbers_of_samples_are_refused(number):
    model = core.build(SMALL).double()
    with pytest.raises(ValueError, match="num_samples must be 0 for no samples, or at least 2"):
        model.with_uncertainty(*inputs(), SIZE, num_samples=number)


def test_samples_of_a_model_that_draws_nothing_are_refused():
    with pytest.raises(ValueError, match=r"no filler of this model draws random numbers.*use num_samples=0"):
        core.build(SMALL).double().with_uncertainty(*inputs(), SIZE, num_samples=3)


class Odd(Attention):
    """Weights that do not sum to 1, or are negative."""

    first = 0.5

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = self.first * value[..., :1, :1] + 0.9 * value[..., 1:2, 1:2]
        return mixed.expand(*value.shape[:2], *query.shape[-2:])


def test_attention_that_does_not_average_is_refused():
    with pytest.raises(ValueError, match=r"attention=Odd does not average: .* sum to 1\.4, not 1"):
        AnyUp(attention=Odd, embed_dim=16).double().with_uncertainty(*inputs(), SIZE)


def test_negative_weights_are_refused(monkeypatch):
    monkeypatch.setattr(Odd, "first", 0.1)
    AnyUp(attention=Odd, embed_dim=16).double().with_uncertainty(*inputs(), SIZE)
    monkeypatch.setattr(Odd, "first", -0.1)
    with pytest.raises(ValueError, match="attention Odd has negative weights, which have no entropy"):
        AnyUp(attention=Odd, embed_dim=16).double().with_uncertainty(*inputs(), SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(perturbed, dtype):
    """A value of size x is rounded by x·eps/2 before attention and after; energy and rarity are at most about 4."""
    model = perturbed(core.build(SMALL)).eval()
    image, features = inputs(dtype=torch.float32)
    _, exact = model.with_uncertainty(image, features - 3, SIZE)
    _, found = model.to(dtype).with_uncertainty(image.to(dtype), (features - 3).to(dtype), SIZE)
    assert found.variance.dtype == torch.float32
    torch.testing.assert_close(found.variance, exact.variance, rtol=0.1, atol=32 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found.rarity, exact.rarity, rtol=0.1, atol=32 * torch.finfo(dtype).eps)


def test_full_memory_is_never_needed(largest_tensor, monkeypatch):
    """Weights of all queries on all cells are never held at once."""
    model = core.build([*SMALL, "attention=global"]).eval()
    image, features = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 24, 24)
    monkeypatch.setitem(core.attention.MAX_LOGITS, "cpu", 2**16)
    with largest_tensor() as largest:
        model.with_uncertainty(image, features, (64, 64))
    assert largest.values < 64 * 64 * 24 * 24 / 4
