"""The pyramid of windows: closed it is the window; open it is what the loops below say."""

import copy
import math
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import core
from core import build, registry
from core.attention import WindowAttention
from experiments.measuring.metrics import FidelityCase
from experiments.training.validation import Validation
from extensions import pyramid_window
from extensions.pyramid_window import PyramidWindowAttention

WIDTH = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(scales=(2.0, 5.0), num_heads: int = 2, seed: int = 0, **settings) -> PyramidWindowAttention:
    """Float64, open gates of both signs, every weight off its initial value."""
    torch.manual_seed(seed)
    filler = registry.factory(
        "attention", "pyramid_window", {"scales": tuple(scales), "num_heads": num_heads} | settings
    )(embed_dim=WIDTH).double()
    with torch.no_grad():
        for parameter in filler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        filler.gates.copy_(torch.linspace(-1, 3, len(filler.gates)))
        filler.fusion.weight.mul_(5)
    return filler


def given(channels: int = 3, grid=(5, 6), size=(9, 13), batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return noise(batch, WIDTH, *size), noise(batch, WIDTH, *grid, seed=1), noise(batch, channels, *grid, seed=2)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() / expected.abs().max().clamp(min=1e-3).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
    return True


@contextmanager
def blocks_of(logits: int):
    with patch.object(pyramid_window, "MAX_LOGITS", {"cpu": logits}):
        yield


# --- the definition, as loops ----------------------------------------------------------------------------------------


def loop_pool(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N,h,w): mean over rows floor(i·h/n) <= row < ceil((i + 1)·h/n), columns likewise."""
    out = np.zeros((len(x), *size))
    for i, j in product(range(size[0]), range(size[1])):
        rows = slice(i * x.shape[1] // size[0], -(-(i + 1) * x.shape[1] // size[0]))
        columns = slice(j * x.shape[2] // size[1], -(-(j + 1) * x.shape[2] // size[1]))
        out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out


def seen(index: int, num_queries: int, num_keys: int, half: float) -> range:
    """The keys of one query along one axis, in float32 as AnyUp's window is; all of them if half <= 0."""
    if half <= 0:
        return range(num_keys)
    centre = (np.float32(index) + np.float32(0.5)) / np.float32(num_queries)
    first = min(max(centre - np.float32(half), np.float32(0)), np.float32(1)) * np.float32(num_keys)
    last = min(max(centre + np.float32(half), np.float32(0)), np.float32(1)) * np.float32(num_keys)
    return range(math.floor(first), math.ceil(last))


def loop_convolution(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), *x.shape[1:]))
    for i, j in product(range(x.shape[1]), range(x.shape[2])):
        out[:, i, j] = np.einsum("oikl,ikl->o", weight, padded[:, i : i + 3, j : j + 3])
    return out


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / math.sqrt((x**2).mean() + np.finfo(np.float64).eps) * gain


def loop_level(filler, weights, q, keys, values, place, halves, window, temperature, position) -> np.ndarray:
    """One query looking at one level -> (C,). place: (index, number of queries) of both axes."""
    (row, height), (column, width) = place
    grid = keys.shape[1:]
    pairs = [*product(seen(row, height, grid[0], window[0]), seen(column, width, grid[1], window[1]))]
    total = np.zeros(len(pairs))
    for head in range(filler.num_heads):
        some = slice(head * WIDTH // filler.num_heads, (head + 1) * WIDTH // filler.num_heads)
        logits = []
        for i, j in pairs:
            k = weights["project_key.weight"] @ rms_norm(keys[:, i, j], weights["norm_key.weight"])
            down = ((row + 0.5) / height - (i + 0.5) / grid[0]) / halves[0]
            across = ((column + 0.5) / width - (j + 0.5) / grid[1]) / halves[1]
            bias = position[0, 0] * down + position[0, 1] * down**2
            bias += position[1, 0] * across + position[1, 1] * across**2
            logits.append(math.exp(temperature) * (q[some] @ k[some]) / math.sqrt(WIDTH / filler.num_heads) + bias)
        exponentials = np.exp(np.array(logits) - max(logits))
        total += exponentials / exponentials.sum() / filler.num_heads
    return sum(weight * values[:, i, j] for weight, (i, j) in zip(total, pairs, strict=True))


def loop_pyramid(filler: PyramidWindowAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = {name: parameter.detach().numpy() for name, parameter in filler.named_parameters()}
    size, grid = query.shape[-2:], key.shape[-2:]
    out = np.zeros((len(query), value.shape[1], *size))
    for b, (image, keys, values) in enumerate(zip(query.numpy(), key.numpy(), value.numpy(), strict=True)):
        convolved = loop_convolution(image, weights["conv.weight"])
        for row, column in product(range(size[0]), range(size[1])):
            context = rms_norm(convolved[:, row, column], weights["norm_query.weight"])
            q = weights["project_query.weight"] @ context + weights["project_query.bias"]
            place = (row, size[0]), (column, size[1])
            base = filler.window_ratio
            result = loop_level(filler, weights, q, keys, values, place, (1, 1), (base, base), 0, np.zeros((2, 2)))
            shares = 1.0
            for s, scale in enumerate(filler.scales):
                halves = [scale / (2 * n) if filler.unit.name == "cells" else scale for n in grid]
                pooled, window = [], []
                for n, half in zip(grid, halves, strict=True):
                    block = max(1, round(2 * half * n / filler.keys_per_side)) if filler.keys_per_side else 1
                    pooled.append(math.ceil(n / block))
                    window.append(half if 2 * half < 1 else 0)
                looked = loop_level(
                    filler,
                    weights,
                    q,
                    loop_pool(keys, pooled),
                    loop_pool(values, pooled),
                    place,
                    halves,
                    window,
                    weights["log_temperature"][s],
                    weights["position"][s],
                )
                logit = weights["fusion.weight"][s] @ context + weights["fusion.bias"][s]
                share = abs(weights["gates"][s]) / (1 + math.exp(-logit))
                result, shares = result + share * looked, shares + share
            out[b, :, row, column] = result / shares
    return torch.from_numpy(out)


CASES = {
    "cells": ({}, (5, 6), (9, 13)),
    "one scale beyond the grid": ({"scales": (32.0,), "keys_per_side": 2}, (5, 6), (9, 13)),
    "nothing pooled": ({"scales": (1.0, 3.0), "keys_per_side": 0, "window_ratio": 0.3}, (5, 4), (11, 7)),
    "ratios": ({"scales": (0.4, 0.15, 2.0), "unit": "ratio", "keys_per_side": 2}, (7, 4), (16, 10)),
    "large tiles": ({"scales": (4.0, 2.0)}, (2, 3), (20, 27)),
    "fewer queries than keys": ({"scales": (3.0,)}, (7, 8), (4, 5)),
    "no window": ({"window_ratio": 0.0, "scales": (2.0,)}, (4, 4), (8, 9)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_loops(case):
    settings, grid, size = case
    filler, inputs = make(**settings), given(grid=grid, size=size)
    expected = loop_pyramid(filler, *inputs)
    assert close(filler(*inputs).detach(), expected)
    with torch.no_grad():
        assert close(filler(*inputs), expected)
        with blocks_of(100):
            assert close(filler(*inputs), expected)


@pytest.mark.parametrize("logits", [1, 3000, 10**9])
def test_blocks_of_any_size_give_the_same(logits):
    """Outputs, bands, gradients; and what is written to `out`, whatever its memory layout."""
    filler, inputs = make(), given(size=(63, 18))
    with blocks_of(10**12):
        expected = filler(*inputs)
        gradients = torch.autograd.grad(expected.square().sum(), [*filler.parameters()])
    with blocks_of(logits):
        output = filler(*inputs)
        assert close(output, expected)
        found = torch.autograd.grad(output.square().sum(), [*filler.parameters()])
        assert all(close(a, b) for a, b in zip(found, gradients, strict=True))
        with torch.no_grad():
            assert close(filler(*inputs), expected)
            out = torch.full(expected.shape, torch.nan, dtype=torch.float64)
            assert filler(*inputs, out) is out
            assert close(out, expected)
            rows, bands = zip(*filler.bands(*inputs), strict=True)
    assert [i for some in rows for i in range(some.start, some.stop)] == list(range(63))
    assert close(torch.cat(bands, 2), expected)
    assert (len(bands) > 3) == (logits < 10**9)  # a short tile, whole ones and a rest are separate bands


def test_memory_is_bounded(largest_tensor):
    """However many queries there are, no tensor of an inference is larger than all queries or the output."""
    filler = make(scales=(4.0, 8.0, 16.0, 32.0)).float()
    query, key, value = (x.float() for x in given(channels=8, grid=(16, 16), size=(256, 256), batch=1))
    with torch.no_grad(), blocks_of(2**16), largest_tensor() as largest:
        output = filler(query, key, value)
    assert 2**16 <= largest.values <= max(query.numel(), output.numel())  # all logits: 4 heads x 256² x hundreds


# --- closed: the window ----------------------------------------------------------------------------------------------


def inputs() -> tuple[Tensor, Tensor]:
    return noise(1, 3, 28, 35).float(), noise(1, 6, 4, 5).float()


@pytest.mark.parametrize("more", [[], ["attention.scales=[0.1]", "attention.unit=ratio"]], ids=["default", "one scale"])
def test_at_the_start_it_is_the_window(more):
    """Bit for bit without gradients; to rounding with them, since a closed scale must get a gradient."""
    model, baseline = build(["embed_dim=32", "attention=pyramid_window", *more]), build(["embed_dim=32"])
    own, theirs = model.state_dict(), baseline.state_dict()
    assert theirs.keys() < own.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    assert {name.split(".")[1] for name in own.keys() - theirs.keys()} == {
        "fusion",
        "gates",
        "log_temperature",
        "position",
    }
    with torch.no_grad():
        assert torch.equal(model(*inputs()), baseline(*inputs()))
        points = torch.rand(7, 2)
        assert torch.equal(model.query(*inputs(), points), baseline.query(*inputs(), points))
    assert close(model(*inputs()), baseline(*inputs()), 1e-6)


def test_a_trained_baseline_goes_on_as_it_is(tmp_path, perturbed):
    baseline = perturbed(build(["embed_dim=16", "unifier.num_basis=8"])).eval()
    core.save(baseline, tmp_path / "baseline.safetensors")
    model = build(["embed_dim=16", "attention=pyramid_window", "unifier.num_basis=8", "seed=3"]).eval()
    untouched = core.warm_start(model, tmp_path / "baseline.safetensors")
    assert {name.split(".")[1] for name in untouched} == {"fusion", "gates", "log_temperature", "position"}
    with torch.no_grad():
        assert torch.equal(model(*inputs()), baseline(*inputs()))


def test_gates_open_by_training():
    """At the start the gates have gradients; once they moved, everything has, and it is another model."""
    torch.manual_seed(0)
    filler = PyramidWindowAttention(WIDTH, scales=(2.0, 4.0)).double()
    arguments = given()
    weight = noise(2, 3, 9, 13, seed=5)
    optimizer = torch.optim.Adam(filler.parameters(), lr=1e-3)
    start = filler(*arguments).detach()
    for step in range(2):
        optimizer.zero_grad()
        (filler(*arguments) * weight).sum().backward()
        for name, parameter in filler.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            closed = step == 0 and name.split(".")[0] in ("fusion", "log_temperature", "position")
            if name == "gates":
                assert (parameter.grad != 0).all()
            assert (parameter.grad.abs().max() > 0) != closed, name
        optimizer.step()
    assert not torch.allclose(filler(*arguments), start, rtol=1e-5)


def test_a_gate_may_change_its_sign():
    """It counts by its magnitude: no gate is ever stuck, and no weight negative."""
    filler, arguments = make(), given()
    with torch.no_grad():
        expected = filler(*arguments)
        filler.gates.neg_()
        assert close(filler(*arguments), expected)
        shares = filler.fusion_weights(noise(50, WIDTH))
    assert (shares > 0).all()
    assert torch.allclose(shares.sum(-1), torch.ones(50, dtype=torch.float64))


def test_closed_scales_are_not_computed_without_gradients():
    filler, arguments = make(scales=(2.0, 3.0, 5.0)), given()
    with torch.no_grad():
        filler.gates.copy_(torch.tensor([0.0, 2.0, 0.0]))
        with patch.object(pyramid_window, "_attend", wraps=pyramid_window._attend) as attend:
            found = filler(*arguments)
        assert {len(call.args[2]) for call in attend.call_args_list} == {2}  # the window and one scale
        assert close(found, loop_pyramid(filler, *arguments))
    assert close(filler(*arguments).detach(), found)


# --- properties ------------------------------------------------------------------------------------------------------


def test_outputs_lie_among_the_values_that_are_seen():
    """Weights are positive and sum to 1 at every query: a channel that is constant stays, none leaves its range."""
    filler, (query, key, value) = make(), given()
    value[:, 1] = 5
    with torch.no_grad():
        output = filler(query, key, value)
    assert torch.allclose(output[:, 1], torch.tensor(5.0, dtype=torch.float64))
    for channel in (0, 2):
        assert value[:, channel].min() <= output[:, channel].min()
        assert output[:, channel].max() <= value[:, channel].max()


def test_each_scale_reaches_as_far_as_its_window():
    """A change of one value is felt where a window shows it: two cells away, four cells away, everywhere."""
    for scale, reach in ((2.0, 2), (4.0, 3), (12.0, 11)):
        filler = make(scales=(scale,), window_ratio=0.05, keys_per_side=0)
        query, key, value = given(grid=(12, 12), size=(12, 12), batch=1)
        moved = value.clone()
        moved[0, 0, 0, 0] += 1
        with torch.no_grad():
            felt = (filler(query, key, moved) - filler(query, key, value))[0, 0].abs() > 1e-12
        assert felt[:, 0].sum() == min(12, reach if reach < 11 else 12)


def test_queries_at_points_agree_with_the_grid():
    filler, arguments = make(), given(batch=1)
    centres = torch.stack(torch.meshgrid((torch.arange(9) + 0.5) / 9, (torch.arange(13) + 0.5) / 13, indexing="ij"), -1)
    with torch.no_grad():
        assert close(filler.at(*arguments, centres.flatten(0, 1).double()), filler(*arguments).flatten(2), 1e-6)


def test_it_composes_with_the_dynamic_basis(perturbed):
    model = perturbed(
        build(
            [
                "embed_dim=16",
                "unifier=dynamic_basis",
                "unifier.num_basis=8",
                "attention=pyramid_window",
                "attention.scales=[2,4]",
            ]
        )
    )
    output = model(*inputs(), (17, 13))
    output.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    with torch.no_grad():
        bands = torch.cat([band for _, band in model.stream(*inputs(), (17, 13))], 2)
        assert close(bands, output.detach(), 1e-5)


def test_half_precision_positions_are_those_of_double():
    """Offsets are computed in full precision: bfloat16 could not tell two of 448 neighbours apart."""
    filler = make(scales=(8.0,)).bfloat16()
    exact = copy.deepcopy(filler).double()
    query, key, value = given(grid=(14, 14), size=(448, 8), batch=1)
    with torch.no_grad():
        (found, expected) = (
            own._levels(query.to(dtype), key.to(dtype), value.to(dtype), [0])[2][1].down.bias
            for own, dtype in ((filler, torch.bfloat16), (exact, torch.float64))
        )
    assert torch.equal(found.isinf(), expected.isinf())
    seen = expected.isfinite()
    assert close(found[seen], expected[seen], 0.01)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures():
    filler, arguments = make(), given(size=(40, 30))
    assert filler.pictures() == {}
    filler(*arguments)
    assert filler.pictures() == {}, "with gradients nothing is kept"
    with torch.no_grad(), blocks_of(3000):
        filler(*arguments)
        pictures = filler.pictures()
        convolved = filler.convolved_rows(arguments[0])(slice(0, 40))
        shares = filler.fusion_weights(nn.functional.rms_norm(convolved, (WIDTH,), filler.norm_query.weight))
    assert list(pictures) == ["window", "2 cells", "5 cells"]
    for picture, share in zip(pictures.values(), shares[0].unbind(-1), strict=True):
        assert picture.shape == (3, 40, 30)
        assert torch.allclose(picture, share.float().expand(3, -1, -1), atol=1e-6)
    with torch.no_grad():
        filler.gates.zero_()
        filler(*arguments)
    assert filler.pictures() == {}, "closed gates show nothing"


def test_pictures_of_large_outputs_are_small():
    filler = make(scales=(2.0,))
    with torch.no_grad(), blocks_of(3000):
        filler(*given(size=(280, 10), batch=1))
        large = filler.pictures()["2 cells"]
        convolved = filler.convolved_rows(given(size=(280, 10), batch=1)[0])(slice(0, 280))
        shares = filler.fusion_weights(nn.functional.rms_norm(convolved, (WIDTH,), filler.norm_query.weight))
    assert large.shape == (3, 94, 4)
    assert torch.allclose(large[0], shares[0, ::3, ::3, 1].float(), atol=1e-6)


class Pictures:
    """A run that only remembers."""

    run_id = "remembered"

    def __init__(self):
        self.kept: dict[str, Image.Image] = {}

    def picture(self, image: Image.Image, name: str) -> None:
        self.kept[name] = image


@pytest.mark.parametrize("overrides", [[], ["unifier=dynamic_basis", "attention=pyramid_window"]], ids=["off", "on"])
def test_validation_logs_what_fillers_show(perturbed, overrides):
    """For the image that is shown beside it; and nothing for fillers that have nothing to show."""
    image, features = inputs()
    edges, target = torch.ones(8, 10, dtype=torch.bool), noise(1, 6, 8, 10).float()
    cases = [FidelityCase(torch.rand(1, 3, 56, 70), image + i, features, target, edges) for i in range(2)]
    validation = object.__new__(Validation)  # without data and backbones
    validation.cases, validation.names = {"a/b": cases}, ["first", "second"]
    validation.bilinear = {"a/b": {"detail": 0.0}}
    run, model = Pictures(), perturbed(build(["embed_dim=16", "unifier.num_basis=8", *overrides]))
    validation.measure(model, run, 7)
    expected = {"validation/a_b/000007.png"}
    if overrides:
        expected |= {f"validation/a_b/000007_{hook}.png" for hook in ("attention", "unifier")}
    assert run.kept.keys() == expected


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "scales is empty: give at least one window size, or use attention=window"),
        ({"scales": (4.0, -8.0, 0.0)}, "scales must be positive and finite, got -8, 0"),
        ({"scales": (math.nan, math.inf)}, "scales must be positive and finite, got nan, inf"),
        ({"scales": (4, 8, 4.0)}, "scales must differ, got 4 more than once"),
        ({"keys_per_side": -1}, "keys_per_side must be positive, or 0 for keys that are not pooled, got -1"),
        ({"unit": "pixels"}, "unit must be one of cells, ratio, got 'pixels'"),
        ({"num_heads": 3}, "num_heads must divide embed_dim = 16, got 3"),
        ({"window_ratio": math.nan}, "window_ratio must be a number, got nan"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        PyramidWindowAttention(WIDTH, **settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention.scales=[]", "scales is empty"),
        ("attention.scales=[4,-8]", "scales must be positive and finite, got -8"),
        ("attention.scales=[4,wide]", "Value 'wide' .* could not be converted to Float"),
        ("attention.unit=pixels", r"Invalid value 'pixels', expected one of \[cells, ratio\]"),
    ],
)
def test_refusals_on_the_command_line(override, message):
    with pytest.raises(ValueError, match=message):
        build(["embed_dim=16", "attention=pyramid_window", override])


def test_overrides_reach_the_filler():
    model = build(["embed_dim=16", "attention=pyramid_window", "attention.scales=[3,7.5]", "attention.unit=cells"])
    assert model.attention.scales == (3.0, 7.5)
    assert isinstance(model.attention, WindowAttention)
    assert build(["embed_dim=16", "attention=pyramid_window"]).attention.scales == (4, 8, 16, 32)
