"""The dynamic basis: closed it is the learned basis bit for bit; open it is what the loops below say."""

import math
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import core
from core import AnyUp, build, registry
from extensions import dynamic_basis
from extensions.dynamic_basis import Conditioning, DynamicBasis

WIDTH = 16
SMALL = {"num_basis": 8, "kernel_size": 3, "bank_size": 3, "hidden_dim": 6}
EVERY = [*product([choice.name for choice in Conditioning], [False, True])]
every = pytest.mark.parametrize(("conditioning", "per_location"), EVERY)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def opened(filler: DynamicBasis, seed: int = 0) -> DynamicBasis:
    """Float64, all gates open by different amounts, every weight off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filler.double().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for gate in (filler.gates, filler.contrast_gates):
            if gate is not None:
                gate.uniform_(0.2, 2.0, generator=generator)
    return filler


def make(**settings) -> DynamicBasis:
    torch.manual_seed(0)
    return opened(registry.factory("unifier", "dynamic_basis", SMALL | settings)(embed_dim=WIDTH))


def given(channels: int = 4, grid=(4, 3), image=(13, 11), batch: int = 2) -> tuple[Tensor, Tensor]:
    return noise(batch, channels, *grid), noise(batch, WIDTH, *image, seed=1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() / expected.abs().max().clamp(min=1e-3).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
    return True


# --- the definition, as loops ----------------------------------------------------------------------------------------


def neighbourhood(row: int, column: int, height: int, width: int, radius: int | None) -> list[tuple[int, int]]:
    """The cells whose moments count: those at most `radius` away, or all."""
    if radius is None:
        return [*product(range(height), range(width))]
    return [
        (i, j) for i, j in product(range(height), range(width)) if abs(i - row) <= radius and abs(j - column) <= radius
    ]


def loop_feature_moments(x: np.ndarray, cells: list[tuple[int, int]]) -> np.ndarray:
    """(C,h,w) -> (C,5), with the mean square of x being 1."""
    channels, height, width = x.shape
    found = np.zeros((channels, 5))
    for c in range(channels):
        for i, j in cells:
            value = x[c, i, j]
            down = x[c, i + 1, j] - value if i + 1 < height else 0.0
            across = x[c, i, j + 1] - value if j + 1 < width else 0.0
            found[c] += np.array([value, abs(value), value**2, down**2, across**2]) / len(cells)
    found[:, 2:] = np.sqrt(found[:, 2:] + 1e-6)
    return found


def loop_guidance_moments(guidance: np.ndarray, size: tuple[int, int], cells: list[tuple[int, int]]) -> np.ndarray:
    """(D,H,W) -> (2·D,): mean and deviation of the guidance's averages over the cells of the feature grid."""
    _, height, width = guidance.shape
    pooled = []
    for i, j in cells:
        rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
        columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
        pooled.append(guidance[:, rows, columns].mean((1, 2)))
    mean, square = np.mean(pooled, 0), np.mean(np.square(pooled), 0)
    return np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0) + 1e-6)])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer(module: nn.Linear, x: np.ndarray) -> np.ndarray:
    return module.weight.detach().numpy() @ x + module.bias.detach().numpy()


def loop_code(filler: DynamicBasis, features: np.ndarray, guidance: np.ndarray, cells) -> np.ndarray:
    meta, total = filler.meta, 0
    if meta.of_features is not None:
        scaled = features / math.sqrt((features**2).mean())
        described = [silu(layer(meta.of_channel, m)) for m in loop_feature_moments(scaled, cells)]
        total = total + layer(meta.of_features, np.mean(described, 0))
    if meta.of_guidance is not None:
        total = total + layer(meta.of_guidance, loop_guidance_moments(guidance, features.shape[1:], cells))
    normed = (total - total.mean()) / math.sqrt(((total - total.mean()) ** 2).mean() + 1e-5)
    normed = normed * meta.norm.weight.detach().numpy() + meta.norm.bias.detach().numpy()
    return silu(layer(meta.mix, silu(normed)))


def loop_filters(filler: DynamicBasis, code: np.ndarray, channels: int) -> np.ndarray:
    """(M,k²)."""
    made = layer(filler.head, code)
    num_basis, bank = len(filler.gates), filler.bank.detach().numpy()
    filters = []
    for m in range(num_basis):
        gate = math.tanh(filler.gates[m].item())
        update = sum(made[r * num_basis + m] * bank[r] for r in range(len(bank)))
        sensitivity = made[len(bank) * num_basis + m]
        basis = filler.encoder[0].basis[m].detach().numpy().ravel()
        filters.append(math.exp(gate * (math.log(channels) / 2 + sensitivity)) * (basis + gate * update))
    return np.array(filters)


def loop_responses(filler: DynamicBasis, features: np.ndarray, guidance: np.ndarray, released: bool) -> np.ndarray:
    """(B,C,h,w), (B,D,H,W) -> (B,M,h,w)."""
    batch, channels, height, width = features.shape
    num_basis, size = len(filler.gates), filler.encoder[0].basis.shape[-1]
    out = np.zeros((batch, num_basis, height, width))
    for b, row, column in product(range(batch), range(height), range(width)):
        cells = neighbourhood(row, column, height, width, filler.radius)
        filters = loop_filters(filler, loop_code(filler, features[b], guidance[b], cells), channels)
        responses, inside = np.zeros((channels, num_basis)), 0
        for tap, (dy, dx) in enumerate(product(range(-(size // 2), size // 2 + 1), repeat=2)):
            y, x = row + dy, column + dx
            if 0 <= y < height and 0 <= x < width:
                inside += 1
                vector = features[b, :, y, x] / np.linalg.norm(features[b, :, y, x])
                responses += vector[:, None] * filters[:, tap]
        responses = responses / inside
        if released:
            responses = responses.reshape(num_basis, channels).T
        exponentials = np.exp(responses)
        mean = (exponentials / exponentials.sum(1, keepdims=True)).mean(0)
        if filler.contrast_gates is not None:
            factor = num_basis ** np.tanh(filler.contrast_gates.detach().numpy())
            mean = 1 / num_basis + factor * (mean - 1 / num_basis)
        out[b, :, row, column] = mean
    return out


@every
def test_against_loops(conditioning, per_location):
    filler = make(conditioning=conditioning, per_location=per_location)
    features, guidance = given()
    responses = torch.from_numpy(loop_responses(filler, features.numpy(), guidance.numpy(), released=False))
    expected = filler.encoder.plain(features, stem=lambda _: responses)
    assert close(filler(features, guidance), expected)
    with torch.no_grad():
        assert close(filler(features, guidance), expected)


@pytest.mark.parametrize("per_location", [False, True])
def test_released_ordering_without_contrast_against_loops(per_location):
    filler = make(ordering="released", contrast=False, per_location=per_location)
    features, guidance = given(batch=1)
    responses = torch.from_numpy(loop_responses(filler, features.numpy(), guidance.numpy(), released=True))
    assert close(filler(features, guidance), filler.encoder.plain(features, stem=lambda _: responses))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("per_location", [False, True])
def test_blocks_of_any_size_give_the_same(per_location, grad):
    filler, (features, guidance) = make(per_location=per_location), given(channels=5, grid=(7, 6))
    outputs, gradients = [], []
    for size in (1, 200, 10**9):
        with torch.set_grad_enabled(grad), patch.object(dynamic_basis, "MAX_RESPONSES", {"cpu": size}):
            output = filler(features, guidance)
        if grad:
            gradients.append(torch.autograd.grad(output.square().sum(), [*filler.parameters()]))
        outputs.append(output)
    assert all(close(output, outputs[0]) for output in outputs[1:])
    for other in gradients[1:]:
        assert all(close(a, b) for a, b in zip(other, gradients[0], strict=True))


# --- closed: the learned basis ---------------------------------------------------------------------------------------


def inputs(batch: int = 1) -> tuple[Tensor, Tensor]:
    return noise(batch, 3, 28, 35).float(), noise(batch, 6, 4, 5).float()


@every
@pytest.mark.parametrize("ordering", ["paper", "released"])
def test_at_the_start_it_is_the_learned_basis_bit_for_bit(conditioning, per_location, ordering):
    """With the same initial weights; in training one batch's images have products of their own, which may round."""
    shared = [f"unifier.ordering={ordering}", "embed_dim=32"]
    chosen = ["unifier=dynamic_basis", f"unifier.conditioning={conditioning}", f"unifier.per_location={per_location}"]
    model = build([*chosen, *shared])
    baseline = build(shared)
    own, theirs = model.state_dict(), baseline.state_dict()
    assert theirs.keys() < own.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    assert all(name.startswith("unifier.") for name in own.keys() - theirs.keys())
    with torch.no_grad():
        assert torch.equal(model(*inputs(3)), baseline(*inputs(3)))
    exact = [x.double() for x in inputs(3)]
    assert close(model.double()(*exact), baseline.double()(*exact))


def test_a_trained_baseline_goes_on_as_it_is(tmp_path, perturbed):
    baseline = perturbed(build(["embed_dim=16", "unifier.num_basis=8"])).eval()
    core.save(baseline, tmp_path / "baseline.safetensors")
    model = build(["embed_dim=16", "unifier=dynamic_basis", "unifier.num_basis=8", "seed=3"]).eval()
    untouched = core.warm_start(model, tmp_path / "baseline.safetensors")
    assert {name.split(".")[1] for name in untouched} == {"meta", "head", "bank", "gates", "contrast_gates"}
    with torch.no_grad():
        assert torch.equal(model(*inputs()), baseline(*inputs()))


def test_gates_that_are_open_at_the_start():
    """As far as asked for; all other weights are those of closed gates, and another output comes from them."""
    filler, closed = (
        build(["embed_dim=32", "unifier=dynamic_basis", f"unifier.open_at_start={x}"]).unifier for x in (0.9, 0.0)
    )
    for gate in (filler.gates, filler.contrast_gates):
        torch.testing.assert_close((gate).tanh(), torch.full_like(gate, 0.9))
    own, theirs = filler.state_dict(), closed.state_dict()
    assert [name for name in own if not torch.equal(own[name], theirs[name])] == ["gates", "contrast_gates"]
    features, guidance = noise(1, 6, 4, 5).float(), noise(1, 32, 16, 20).float()
    with torch.no_grad():
        assert (filler(features, guidance) - closed(features, guidance)).abs().max() > 1e-3


@every
def test_gates_open_by_training(conditioning, per_location):
    """At the start the gates have gradients; once they moved, everything has, and it is another model."""
    torch.manual_seed(0)
    filler = registry.factory(
        "unifier", "dynamic_basis", SMALL | {"conditioning": conditioning, "per_location": per_location}
    )(embed_dim=WIDTH).double()
    features, guidance = given()
    weight = noise(2, WIDTH, 4, 3, seed=5)
    optimizer = torch.optim.Adam(filler.parameters(), lr=1e-3)
    start = filler(features, guidance).detach()
    for step in range(2):
        optimizer.zero_grad()
        (filler(features, guidance) * weight).sum().backward()
        for name, parameter in filler.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            closed = step == 0 and name.split(".")[0] in ("meta", "head", "bank")
            assert (parameter.grad.abs().max() > 0) != closed, name
        optimizer.step()
    assert not torch.allclose(filler(features, guidance), start, rtol=1e-5)


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_location", [False, True])
def test_filters_differ_between_images_and_locations(per_location):
    filler, (features, guidance) = make(per_location=per_location), given(batch=2, grid=(8, 9))
    with torch.no_grad():
        code = filler.meta(features, guidance, filler.radius)
        filters = filler.filters(code, 4)
    assert filters.shape == (2, *((8, 9) if per_location else (1, 1)), 9, 8)
    assert (filters[0] - filters[1]).abs().max() > 1e-3
    if per_location:
        assert (filters[0, 0, 0] - filters[0, -1, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(("conditioning", "sees"), [("features", (1, 0)), ("guidance", (0, 1)), ("both", (1, 1))])
@pytest.mark.parametrize("per_location", [False, True])
def test_conditioning_sees_what_it_says(conditioning, sees, per_location):
    filler = make(conditioning=conditioning, per_location=per_location)
    features, guidance = given()
    with torch.no_grad():
        code = filler.meta(features, guidance, filler.radius)
        moved = (
            filler.meta(features + noise(*features.shape, seed=9), guidance, filler.radius),
            filler.meta(features, guidance + noise(*guidance.shape, seed=9), filler.radius),
        )
    assert tuple(int((other - code).abs().max() > 1e-6) for other in moved) == sees


@pytest.mark.parametrize("per_location", [False, True])
def test_open_gates_make_wide_features_count_as_much_as_narrow_ones(per_location):
    """Every channel nine times: the learned basis then responds a third as much, fully open gates alike."""
    filler, (features, guidance) = make(per_location=per_location), given()
    with torch.no_grad():
        filler.gates.fill_(10)
        assert close(filler(features.repeat(1, 9, 1, 1), guidance), filler(features, guidance), 1e-6)
        filler.gates.zero_()
        assert not torch.allclose(filler(features.repeat(1, 9, 1, 1), guidance), filler(features, guidance), rtol=1e-3)


def test_the_scale_of_an_images_features_does_not_matter():
    filler, (features, guidance) = make(conditioning="features"), given()
    with torch.no_grad():
        assert close(filler(100 * features, guidance), filler(features, guidance))


def test_parameters_within_the_budget():
    """15 % of the core's 844,928, whatever it sees."""
    core_size = sum(p.numel() for p in AnyUp().parameters())
    for conditioning, per_location in EVERY:
        unifier = partial(DynamicBasis, conditioning=Conditioning[conditioning], per_location=per_location)
        added = sum(p.numel() for p in AnyUp(unifier=unifier).parameters()) - core_size
        assert 0 < added <= 0.15 * core_size


@pytest.mark.parametrize("per_location", [False, True])
def test_it_can_be_differentiated_twice(per_location, perturbed):
    settings = ["embed_dim=16", "unifier=dynamic_basis", "unifier.num_basis=8", f"unifier.per_location={per_location}"]
    model = perturbed(build(settings)).double().twice_differentiable()
    image, features = (x.double() for x in inputs())
    weight = model.unifier.bank
    (first,) = torch.autograd.grad(model(image, features, (5, 6)).square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert torch.isfinite(second).all()
    assert second.abs().max() > 0


def test_features_and_images_without_any_contrast():
    filler = make().float()
    for value in (0.0, 3.0):
        features = torch.full((1, 4, 4, 3), value, requires_grad=True)
        output = filler(features, torch.full((1, WIDTH, 13, 11), value))
        output.sum().backward()
        assert torch.isfinite(output).all()
        assert torch.isfinite(features.grad).all()


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_location", [False, True])
def test_pictures(per_location):
    filler, (features, guidance) = make(per_location=per_location).float(), given()
    assert filler.pictures() == {}
    filler(features.float(), guidance.float())
    assert filler.pictures() == {}, "with gradients nothing is kept"
    with torch.no_grad():
        filler(features.float(), guidance.float())
        pictures = filler.pictures()
    assert len(pictures) == 3 + per_location
    for picture in pictures.values():
        assert picture.shape[0] == 3
        assert 0 <= picture.min() <= picture.max() <= 1
    assert pictures["generated filters"].shape == (3, 5, 40)  # 8 filters of 3x3 with a border
    if per_location:
        assert pictures["change of the filters"].shape == (3, 4, 3)
        assert pictures["change of the filters"].max() == 1


def test_pictures_show_the_filters_in_red_and_blue():
    filler, (features, guidance) = make().float(), given()
    with torch.no_grad():
        filler.gates.zero_()
        filler.encoder[0].basis.zero_()
        filler.encoder[0].basis[1, 0, 0, 2] = 2.0
        filler.encoder[0].basis[1, 0, 2, 0] = -1.0
        filler(features.float(), guidance.float())
    pictures = filler.pictures()
    learned = pictures["learned filters"]
    assert learned[:, 1, 5 + 3].tolist() == [1, 0, 0]  # second filter: first row, last column
    assert learned[:, 3, 5 + 1].tolist() == [0.5, 0.5, 1]
    assert (learned == 1).sum() == learned.numel() - 4
    assert torch.equal(pictures["generated filters"], learned)
    assert (pictures["their difference"] == 1).all()


def test_pictures_are_of_the_first_image_of_the_latest_forward():
    filler, (features, guidance) = make().float(), given()
    with torch.no_grad():
        filler(features.float(), guidance.float())
        both = filler.pictures()
        filler(features[1:].float(), guidance[1:].float())
        second = filler.pictures()
        filler(features[:1].float(), guidance[:1].float())
        first = filler.pictures()
    assert torch.allclose(first["generated filters"], both["generated filters"], atol=1e-5)
    assert not torch.allclose(second["generated filters"], both["generated filters"], atol=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_basis": 0}, "num_basis must be a positive multiple of 8 .* got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"bank_size": 0}, r"bank_size must be at least 1 \(unifier=learned_basis changes no filter\), got 0"),
        ({"hidden_dim": -1}, "hidden_dim must be at least 1 .* got -1"),
        ({"open_at_start": 1.0}, "open_at_start must be from 0 to below 1, got 1.0"),
        ({"open_at_start": -0.1}, "open_at_start must be from 0 to below 1, got -0.1"),
        ({"conditioning": "image"}, "conditioning must be one of features, guidance, both, got 'image'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicBasis(WIDTH, **settings)


def test_a_wrong_conditioning_on_the_command_line_lists_the_choices():
    with pytest.raises(ValueError, match=r"Invalid value 'image', expected one of \[features, guidance, both\]"):
        build(["unifier=dynamic_basis", "unifier.conditioning=image"])
