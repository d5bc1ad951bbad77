"""Every fast path against slow float64 loops, written here from the definitions and sharing no code with the core."""

import math
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from core import AnyUp, attention, build, rotary, unifiers
from core.attention import GlobalAttention, WindowAttention
from core.encoder import Encoder
from core.fast import norm_act_conv, silu, winograd
from core.fast.windows import tiles, window_bounds
from core.reference import ReferenceAnyUp, reference_of
from core.rotary import Rotary
from core.unifiers import BasisConvolution, Ordering
from experiments.cost.measure import peak_in_child

FEW = settings(max_examples=12)


@contextmanager
def small_blocks(size: int):
    """Makes the code cut its work into blocks of about `size`, so that small inputs have several, and odd ones."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention, "MAX_LOGITS", {"cpu": size * 64}))
        stack.enter_context(patch.object(unifiers, "MAX_RESPONSES", {"cpu": size * 16}))
        stack.enter_context(patch.object(norm_act_conv, "PIXELS_PER_BLOCK", size))
        stack.enter_context(patch.object(rotary, "PIXELS_PER_BLOCK", size))
        yield


def perturb(module: nn.Module, seed: int) -> nn.Module:
    """Float64, every weight off its initial value (and exact in float32, so that it survives a conversion)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.float().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def close(actual: torch.Tensor, expected, tolerance: float = 1e-10) -> bool:
    """Largest error at most `tolerance` of the largest expected value (of 1, if that is smaller)."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    error, largest = (actual.double() - expected).abs().max().item(), max(1e-3, expected.abs().max().item())
    assert error <= tolerance * largest, f"off by {error / largest:.1e} of the largest value; allowed {tolerance:.1e}"
    return True


# --- the definitions, as loops in float64 ----------------------------------------------------------------------------


def loop_bounds(num_queries: int, num_keys: int, ratio: float) -> list[tuple[int, int]]:
    """floor(clamp(y - r, 0, 1)·n) <= key < ceil(clamp(y + r, 0, 1)·n) at y = (i + .5)/N, in float32, in this order."""
    if ratio <= 0:
        return [(0, num_keys)] * num_queries
    one, zero = np.float32(1), np.float32(0)
    bounds = []
    for i in range(num_queries):
        centre = (np.float32(i) + np.float32(0.5)) / np.float32(num_queries)
        first = min(max(centre - np.float32(ratio), zero), one) * np.float32(num_keys)
        last = min(max(centre + np.float32(ratio), zero), one) * np.float32(num_keys)
        bounds.append((math.floor(first), math.ceil(last)))
    return bounds


def loop_conv3x3(x: np.ndarray, weight: np.ndarray, reflect: bool = False) -> np.ndarray:
    """(B,in,H,W), (out,in,3,3) -> (B,out,H,W); outside the image zeros, or the image mirrored about its border."""
    batch, _, height, width = x.shape
    out = np.zeros((batch, len(weight), height, width))
    for b, row, column, dy, dx in product(range(batch), range(height), range(width), (-1, 0, 1), (-1, 0, 1)):
        y, z = row + dy, column + dx
        if reflect:
            y, z = mirrored(y, height), mirrored(z, width)
        if 0 <= y < height and 0 <= z < width:
            out[b, :, row, column] += weight[:, :, dy + 1, dx + 1] @ x[b, :, y, z]
    return out


def mirrored(index: int, size: int) -> int:
    return -index if index < 0 else 2 * size - 2 - index if index >= size else index


def loop_conv1x1(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    batch, _, height, width = x.shape
    out = np.zeros((batch, len(weight), height, width))
    for b, row, column in product(range(batch), range(height), range(width)):
        out[b, :, row, column] = weight[:, :, 0, 0] @ x[b, :, row, column]
    return out


def loop_group_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Eight groups of consecutive channels; mean and biased variance of each in each image."""
    out, width = np.zeros_like(x), x.shape[1] // 8
    for b, group in product(range(len(x)), range(8)):
        some = slice(group * width, (group + 1) * width)
        values = x[b, some]
        normed = (values - values.mean()) / math.sqrt(((values - values.mean()) ** 2).mean() + eps)
        out[b, some] = normed * gain[some, None, None] + bias[some, None, None]
    return out


def loop_res_block(x: np.ndarray, block: nn.Module) -> np.ndarray:
    """GroupNorm(8), SiLU, 1x1 convolution, twice, plus the input (through a 1x1 convolution where widths differ)."""
    weights = {name: parameter.detach().numpy() for name, parameter in block.named_parameters()}
    hidden = x
    for norm, conv in ((0, 2), (3, 5)):
        hidden = loop_group_norm(hidden, weights[f"block.{norm}.weight"], weights[f"block.{norm}.bias"])
        hidden = hidden / (1 + np.exp(-hidden))
        hidden = loop_conv1x1(hidden, weights[f"block.{conv}.weight"])
    return hidden + (loop_conv1x1(x, weights["shortcut.weight"]) if "shortcut.weight" in weights else x)


def loop_pool(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mean over the cell of rows floor(i·H/h) <= row < ceil((i + 1)·H/h), columns likewise."""
    batch, channels, height, width = x.shape
    out = np.zeros((batch, channels, *size))
    for i, j in product(range(size[0]), range(size[1])):
        rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
        columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
        out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def loop_encoder(x: np.ndarray, encoder: Encoder, size: tuple[int, int] | None = None) -> np.ndarray:
    stem, *blocks = encoder
    if isinstance(stem, nn.Conv2d):
        weight = stem.weight.detach().numpy()
        x = loop_conv1x1(x, weight) if weight.shape[-1] == 1 else loop_conv3x3(x, weight, reflect=True)
    else:
        x = loop_basis(x, stem.basis.detach().numpy(), stem.ordering.name)
    for block in blocks:
        x = loop_res_block(x, block)
    return x if size is None else loop_pool(x, size)


def loop_rotary(x: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """Channel i turns with channel i + D/2 by (row, column) @ freqs, positions from 0 to 1, ends included."""
    width = x.shape[1]
    out = np.zeros_like(x)
    height, columns = x.shape[2:]
    for row, column, d in product(range(height), range(columns), range(width)):
        y, z = row / max(1, height - 1), column / max(1, columns - 1)
        angle = y * freqs[0, d] + z * freqs[1, d]
        other = -x[:, d + width // 2, row, column] if d < width // 2 else x[:, d - width // 2, row, column]
        out[:, d, row, column] = x[:, d, row, column] * math.cos(angle) + other * math.sin(angle)
    return out


def loop_basis(features: np.ndarray, basis: np.ndarray, ordering: str) -> np.ndarray:
    """AnyUp, eq. (1), or what the released code makes of it: see UPSTREAM, "the feature-agnostic layer"."""
    batch, channels, height, width = features.shape
    num_basis, _, size, _ = basis.shape
    radius, out = size // 2, np.zeros((batch, num_basis, height, width))
    for b, row, column in product(range(batch), range(height), range(width)):
        responses = np.zeros((channels, num_basis))
        inside = 0
        for dy, dx in product(range(-radius, radius + 1), repeat=2):
            if 0 <= row + dy < height and 0 <= column + dx < width:
                inside += 1
                tap = basis[:, 0, dy + radius, dx + radius]
                for c in range(channels):
                    responses[c] += tap * features[b, c, row + dy, column + dx]
        responses /= inside
        if ordering == "released":  # position c·M + m of the memory is read as position m'·C + c'
            flat = [responses[c, m] for c in range(channels) for m in range(num_basis)]
            by_channel = [[flat[m * channels + c] for m in range(num_basis)] for c in range(channels)]
        else:
            by_channel = responses.tolist()
        for values in by_channel:
            exponentials = np.exp(values)
            out[b, :, row, column] += exponentials / exponentials.sum() / channels
    return out


def loop_attention(filler, query: np.ndarray, key: np.ndarray, value: np.ndarray, ratio: float) -> np.ndarray:
    """3x3 convolution, RMSNorm and projection of the query, RMSNorm and projection of the key; softmax per head over
    the keys in the window; mean of the heads' weights, applied once to the values."""
    weights = {name: parameter.detach().numpy() for name, parameter in filler.named_parameters()}
    heads, eps = filler.num_heads, np.finfo(np.float64).eps
    query = loop_conv3x3(query, weights["conv.weight"])
    batch, width, height, columns = query.shape
    row_bounds = loop_bounds(height, key.shape[2], ratio)
    column_bounds = loop_bounds(columns, key.shape[3], ratio)
    out = np.zeros((batch, value.shape[1], height, columns))

    def rms_norm(x, gain):
        return x / math.sqrt((x**2).mean() + eps) * gain

    for b, row, column in product(range(batch), range(height), range(columns)):
        q = rms_norm(query[b, :, row, column], weights["norm_query.weight"])
        q = weights["project_query.weight"] @ q + weights["project_query.bias"]
        seen = list(product(range(*row_bounds[row]), range(*column_bounds[column])))
        mean = np.zeros(len(seen))
        keys = [weights["project_key.weight"] @ rms_norm(key[b, :, i, j], weights["norm_key.weight"]) for i, j in seen]
        for head in range(heads):
            some = slice(head * width // heads, (head + 1) * width // heads)
            logits = np.array([q[some] @ k[some] for k in keys]) / math.sqrt(width / heads)
            exponentials = np.exp(logits - logits.max())
            mean += exponentials / exponentials.sum() / heads
        for weight, (i, j) in zip(mean, seen, strict=True):
            out[b, :, row, column] += weight * value[b, :, i, j]
    return out


def loop_anyup(model: AnyUp, image: np.ndarray, features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The whole forward: UPSTREAM, "Forward", steps 1 to 6."""
    guidance = loop_rotary(loop_encoder(image, model.image_encoder), model.rotary.freqs.detach().numpy())
    query = loop_encoder(guidance, model.query_encoder, size)
    pooled = loop_encoder(guidance, model.key_encoder, features.shape[2:])
    normed = features / np.maximum(np.sqrt((features**2).sum(1, keepdims=True)), 1e-12)
    unified = loop_encoder(normed, model.unifier.encoder)
    key = loop_encoder(np.concatenate([pooled, unified], 1), model.aggregation)
    return loop_attention(model.attention, query, key, features, model.attention.window_ratio)


# --- windows and tiles -----------------------------------------------------------------------------------------------

RATIOS = st.sampled_from([0.0, -1.0, 0.1, 0.05, 0.25, 0.5, 1.0, 3.0]) | st.floats(0.02, 1.5)


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 70), RATIOS)
def test_window_bounds(num_queries, num_keys, ratio):
    first, last = window_bounds(num_queries, num_keys, ratio)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == loop_bounds(num_queries, num_keys, ratio)


@pytest.mark.parametrize("num_queries", [224, 448, 1024, 2048])
@pytest.mark.parametrize("num_keys", [14, 16, 28, 32, 37, 64, 73])
def test_window_bounds_of_usual_sizes(num_queries, num_keys):
    """Where (i + .5)/N ± r falls on a key's border, float32 decides: these sizes have such queries."""
    first, last = window_bounds(num_queries, num_keys, 0.1)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == loop_bounds(num_queries, num_keys, 0.1)


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 70), RATIOS, st.integers(1, 9))
def test_tiles_show_each_query_its_window_once(num_queries, num_keys, ratio, at_once):
    grouped = tiles(num_queries, num_keys, ratio)
    bounds, done = loop_bounds(num_queries, num_keys, ratio), []
    for some, queries, length in grouped.blocks(at_once):
        members = range(queries.start, queries.stop)
        count = some.stop - some.start
        assert count <= at_once
        assert len(members) == count * length
        for n, i in enumerate(members):
            tile, place = some.start + n // length, n % length
            keys = grouped.keys[tile][grouped.visible[tile, place]].tolist()
            assert keys == list(range(*bounds[i])), f"query {i}"
        done += members
    assert done == list(range(num_queries))
    assert len(grouped) == len(grouped.keys)
    assert grouped.keys.min() >= 0
    assert grouped.keys.max() < num_keys


# --- attention -------------------------------------------------------------------------------------------------------

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))
SIZES = st.tuples(st.integers(1, 19), st.integers(1, 19))
WIDTHS = st.sampled_from([(8, 1), (8, 2), (16, 4), (24, 3), (24, 8)])  # embed_dim, num_heads


@FEW
@given(st.integers(1, 2), WIDTHS, st.integers(1, 4), GRIDS, SIZES, RATIOS, st.sampled_from([1, 7, 40, 10**6]))
def test_attention_is_its_definition(batch, widths, channels, grid, size, ratio, block):
    width, heads = widths
    filler = perturb(WindowAttention(width, heads, ratio), seed=heads)
    query, key, value = noise(batch, width, *size), noise(batch, width, *grid), noise(batch, channels, *grid, seed=1)
    expected = loop_attention(filler, query.numpy(), key.numpy(), value.numpy(), ratio)
    with small_blocks(block):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert close(filler(query, key, value).detach(), expected)
                rows, bands = zip(*filler.bands(query, key, value), strict=True)
            assert [i for some in rows for i in range(some.start, some.stop)] == list(range(size[0]))
            assert close(torch.cat(bands, 2).detach(), expected)


def test_global_attention_is_its_definition():
    filler = perturb(GlobalAttention(16, 4), seed=0)
    query, key, value = noise(2, 16, 9, 13), noise(2, 16, 3, 5), noise(2, 3, 3, 5)
    expected = loop_attention(filler, query.numpy(), key.numpy(), value.numpy(), ratio=0)
    with torch.no_grad():
        assert close(filler(query, key, value), expected)
        windowless = WindowAttention(16, 4, window_ratio=0).double()
        windowless.load_state_dict(filler.state_dict())
        assert torch.equal(windowless(query, key, value), filler(query, key, value))


def test_attention_convolves_by_winograd_to_rounding():
    """The float32 output that is large enough for Winograd: 64·64 queries or more."""
    filler = perturb(WindowAttention(16, 4), seed=0)
    query, key, value = noise(2, 16, 67, 71), noise(2, 16, 5, 7), noise(2, 3, 5, 7)
    with torch.no_grad():
        expected = filler(query, key, value)
        single = filler.float()
        used = []
        with patch.object(winograd.Winograd, "rows", lambda *arguments: used.append(1) or original(*arguments)):
            output = single(query.float(), key.float(), value.float())
    assert used
    assert close(output, expected, 1e-5)


original = winograd.Winograd.rows


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 5, 8]),
    st.data(),
)
def test_winograd_is_its_definition(batch, size, inputs, outputs, data):
    """In float64 the only difference to the loop is the order of sums; rows may start and stop anywhere."""
    images, weight = noise(batch, inputs, *size), noise(outputs, inputs, 3, 3)
    expected = torch.from_numpy(loop_conv3x3(images.numpy(), weight.numpy())).permute(0, 2, 3, 1)
    pixels = images.permute(0, 2, 3, 1).contiguous()
    convolution = winograd.Winograd(weight, pixels)
    for _ in range(3):  # in any order: the buffers are reused
        start = data.draw(st.integers(0, size[0] - 1))
        rows = slice(start, data.draw(st.integers(start + 1, size[0])))
        assert close(convolution.rows(rows), expected[:, rows])
        assert close(winograd.direct_rows(weight, images, rows), expected[:, rows])


@pytest.mark.parametrize("size", [(113, 257), (64, 64), (65, 63), (2, 3000)])
def test_winograd_rounds_like_a_direct_convolution(size):
    images, weight = noise(1, 32, *size), noise(32, 32, 3, 3)
    expected = F.conv2d(images, weight, padding=1).permute(0, 2, 3, 1)
    convolution = winograd.Winograd(weight.float(), images.float().permute(0, 2, 3, 1).contiguous())
    output = convolution.rows(slice(0, size[0]))
    assert output.dtype == torch.float32
    assert close(output, expected, 2e-6)


# --- the feature-agnostic layer --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.sampled_from(Ordering),
    st.integers(1, 2),
    st.integers(1, 6),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([8, 16]),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 5, 10**6]),
)
def test_feature_agnostic_layer_is_its_definition(ordering, batch, channels, grid, num_basis, kernel_size, block):
    layer = perturb(BasisConvolution(num_basis, kernel_size, ordering), seed=0)
    features = noise(batch, channels, *grid)
    expected = loop_basis(features.numpy(), layer.basis.detach().numpy(), ordering.name)
    with small_blocks(block):
        for grad, plain in product((True, False), (True, False)):
            layer.twice_differentiable = plain
            with torch.set_grad_enabled(grad):
                assert close(layer(features).detach(), expected)


# --- rotary code -----------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 2), st.sampled_from([8, 16, 24]), SIZES, st.sampled_from([1, 20, 10**6]))
def test_rotary_is_its_definition(batch, width, size, block):
    code = perturb(Rotary(width), seed=0)  # any frequencies: learned ones need not belong to one axis
    x = noise(batch, width, *size)
    expected = loop_rotary(x.numpy(), code.freqs.detach().numpy())
    with small_blocks(block):
        for grad, plain in product((True, False), (True, False)):
            code.twice_differentiable = plain
            with torch.set_grad_enabled(grad):
                for layout in (torch.contiguous_format, torch.channels_last):
                    assert close(code(x.clone(memory_format=layout)).detach(), expected)


def test_rotary_frequencies_at_the_start():
    freqs = Rotary(128).freqs.detach()
    for i, t in enumerate(np.linspace(0, 1, 32)):
        frequency = 2 * math.pi * 100**-t
        for first, row, column in ((0, frequency, 0), (32, frequency, 0), (64, 0, frequency), (96, 0, frequency)):
            assert freqs[:, first + i].tolist() == pytest.approx([row, column], rel=1e-6)


# --- encoders --------------------------------------------------------------------------------------------------------


def encoder_of(kind: str, width: int) -> Encoder:
    if kind == "aggregation":
        stem = nn.Conv2d(2 * width, width, 3, padding=1, padding_mode="reflect", bias=False)
        return perturb(Encoder(stem, width, width), seed=1)
    if kind == "unifier":
        return perturb(Encoder(BasisConvolution(8, 3, Ordering.paper), 8, width), seed=2)
    stem = nn.Conv2d({"image": 3, "guidance": width}[kind], width, 1, bias=False)
    return perturb(Encoder(stem, width, width), seed=3)


@settings(max_examples=25)
@given(
    st.sampled_from(["image", "guidance", "aggregation", "unifier"]),
    st.integers(1, 2),
    st.sampled_from([8, 16, 24]),
    st.tuples(st.integers(2, 11), st.integers(2, 11)),
    st.none() | st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.sampled_from([1, 7, 64, 10**6]),
)
def test_encoder_is_its_definition(kind, batch, width, size, output_size, block):
    """With `output_size` the mean is taken before the last convolution: the same numbers."""
    encoder = encoder_of(kind, width)
    x = noise(batch, {"image": 3, "guidance": width, "aggregation": 2 * width, "unifier": 3}[kind], *size)
    expected = loop_encoder(x.numpy(), encoder, output_size)
    given_x = x.clone()
    with small_blocks(block):
        for grad, plain in product((True, False), (True, False)):
            encoder.twice_differentiable = plain
            with torch.set_grad_enabled(grad):
                assert close(encoder(x, output_size).detach(), expected)
    assert torch.equal(x, given_x)  # reads its input, never writes it


@FEW
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_pooling_commutes_with_the_last_convolution(size, output_size):
    x, weight = noise(2, 8, *size), noise(5, 8, 1, 1)
    outside = F.conv2d(F.adaptive_avg_pool2d(x, output_size), weight)
    assert close(outside, loop_pool(F.conv2d(x, weight).numpy(), output_size))


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
@pytest.mark.parametrize("block", [13, 10**6])
@pytest.mark.parametrize("width", [8, 24, 128])
def test_moments_survive_a_large_mean(offset, block, width):
    """Within what float32 values allow: var = E[x²] - mean² would lose the variance of groups far from zero."""
    pixels = (noise(2, 9, 23, width) + offset).float()
    with small_blocks(block):
        mean, var = norm_act_conv.moments_of(pixels)
    groups = pixels.double().unflatten(-1, (8, -1))
    assert close(mean.double(), groups.mean((1, 2, 4)), 1e-6)
    assert close(var.double(), groups.var((1, 2, 4), correction=0), 1e-5)


@pytest.mark.parametrize("output_size", [None, (3, 5)])
@pytest.mark.parametrize("kind", ["image", "guidance", "aggregation", "unifier"])
def test_encoder_gradients(kind, output_size):
    """Of the input and every weight, with a shortcut and without, pooled and not: as plain operations give them."""
    encoder = encoder_of(kind, 16)
    x = noise(2, {"image": 3, "guidance": 16, "aggregation": 32, "unifier": 3}[kind], 9, 7).requires_grad_()
    found = []
    with small_blocks(11):
        for encoder.twice_differentiable in (False, True):
            y = encoder(x, output_size)
            found.append(torch.autograd.grad(y, [x, *encoder.parameters()], noise(*y.shape, seed=5)))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 1e-6
        assert close(ours, theirs)


@pytest.mark.parametrize("trains", ["weights", "input", "one weight"])
def test_encoder_gradients_of_a_part(trains):
    """What needs no gradient gets none, and changes nothing of the others."""
    encoder, x = encoder_of("guidance", 8), noise(2, 8, 9, 7).requires_grad_(trains == "input")
    for name, weight in encoder.named_parameters():
        weight.requires_grad_(trains == "weights" or (trains, name) == ("one weight", "1.block.2.weight"))
    needed = [t for t in (x, *encoder.parameters()) if t.requires_grad]
    found = []
    for encoder.twice_differentiable in (False, True):
        found.append(torch.autograd.grad(encoder(x).square().sum(), needed))
    assert all(close(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=str
)
def test_silu_and_its_slope(dtype, tolerance):
    """However large the argument: exp(-a) overflows, and nothing else does."""
    x = torch.cat([noise(20, 8), torch.linspace(-1e4, 1e4, 160).view(20, 8).double()]).to(dtype)
    scale, shift = noise(8, seed=1).to(dtype), noise(8, seed=2).to(dtype)
    argument = (x * scale + shift).double().requires_grad_()
    expected = argument * argument.sigmoid()
    (slope,) = torch.autograd.grad(expected.sum(), argument)
    out, scratch = torch.empty_like(x), torch.empty_like(x)
    assert close(silu.normed_silu(x, scale, shift, out, scratch), expected.detach(), tolerance)
    assert close(silu.normed_silu_with_slope(x, scale, shift, out, scratch), expected.detach(), tolerance)
    assert close(scratch, slope, 10 * tolerance)


# --- the whole model -------------------------------------------------------------------------------------------------


def model_of(overrides: str, seed: int = 0) -> AnyUp:
    return perturb(build(overrides.split()), seed)


def inputs_of(batch: int, channels: int, grid, image_size, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(batch, 3, *image_size).to(dtype), noise(batch, channels, *grid, seed=7).to(dtype)


@pytest.mark.parametrize(
    ("ordering", "channels", "grid", "image_size", "output_size"),
    [
        ("paper", 3, (3, 4), (9, 13), (7, 10)),
        ("released", 5, (4, 3), (12, 7), (12, 7)),
        ("released", 1, (2, 2), (3, 5), (11, 4)),
        ("paper", 2, (5, 2), (2, 3), (1, 9)),
    ],
)
def test_forward_is_its_definition(ordering, channels, grid, image_size, output_size):
    model = model_of(f"embed_dim=16 unifier.num_basis=8 unifier.kernel_size=3 unifier.ordering={ordering}")
    image, features = inputs_of(1, channels, grid, image_size)
    expected = loop_anyup(model, image.numpy(), features.numpy(), output_size)
    with torch.no_grad():
        assert close(reference_of(model)(image, features, output_size), expected)
        assert close(model(image, features, output_size), expected)


@settings(max_examples=20)
@given(
    st.sampled_from(Ordering),
    st.integers(1, 3),
    st.integers(1, 9),
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.tuples(st.integers(1, 45), st.integers(1, 45)),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.sampled_from([8, 16, 40]),
    st.sampled_from([8, 24]),
    st.sampled_from([1, 2, 4, 8]),
    RATIOS,
    st.sampled_from([3, 50, 10**6]),
)
def test_every_path_is_the_reference(
    ordering, batch, channels, grid, image_size, output_size, width, num_basis, heads, ratio, block
):
    assume(width > 8 or image_size != (1, 1))  # GroupNorm is undefined on one value
    model = model_of(
        f"embed_dim={width} unifier.num_basis={num_basis} unifier.ordering={ordering.name} "
        f"attention.num_heads={heads} attention.window_ratio={ratio}"
    )
    image, features = inputs_of(batch, channels, grid, image_size)
    with torch.no_grad():
        expected = reference_of(model)(image, features, output_size)
    with small_blocks(block):
        for grad, plain in product((True, False), (True, False)):
            model.twice_differentiable(plain)
            with torch.set_grad_enabled(grad):
                assert close(model(image, features, output_size).detach(), expected)


@pytest.fixture(scope="module")
def odd_case():
    """225x333 image, 17x23 features, 113x257 output: published sizes of the model, perturbed weights."""
    model = model_of("unifier.ordering=released")
    image, features = inputs_of(1, 5, (17, 23), (225, 333))
    with torch.no_grad():
        expected = reference_of(model)(image, features, (113, 257), queries_at_once=4000)
    return model, image, features, expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_odd_sizes(odd_case, dtype, tolerance):
    model, image, features, expected = odd_case
    with torch.no_grad():
        output = model.to(dtype)(image.to(dtype), features.to(dtype), (113, 257))
    assert output.dtype == dtype
    assert close(output, expected, tolerance)


def gradients(model: nn.Module, image, features, size, given, names=True) -> dict[str, torch.Tensor]:
    image, features = image.clone().requires_grad_(), features.clone().requires_grad_()
    weights = dict(model.named_parameters())
    found = torch.autograd.grad(
        model(image, features, size), [image, features, *weights.values()], given, allow_unused=True
    )
    return dict(zip(["image", "features", *weights], found, strict=True))


GRADIENT_CASES = {
    "odd": ("embed_dim=32 unifier.ordering=released", 2, 5, (5, 7), (45, 67), (23, 51)),
    "paper": ("embed_dim=16 unifier.num_basis=8", 1, 3, (4, 3), (21, 18), (21, 18)),
    "global": ("embed_dim=16 attention=global", 2, 4, (3, 3), (12, 17), (25, 9)),
    "no_features": ("embed_dim=16 unifier=none", 1, 4, (6, 5), (19, 33), (19, 33)),
}


@pytest.mark.parametrize("block", [30, 10**6])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_of_the_fast_path(name, block):
    """With respect to every weight, the image and the features: as plain operations give them."""
    overrides, batch, channels, grid, image_size, size = GRADIENT_CASES[name]
    model = model_of(overrides)
    image, features = inputs_of(batch, channels, grid, image_size)
    given = noise(batch, channels, *size, seed=9)
    with small_blocks(block):
        fast = gradients(model, image, features, size, given)
    plain = gradients(model.twice_differentiable(), image, features, size, given)
    assert fast.keys() == plain.keys()
    for key, expected in plain.items():
        assert expected.abs().max() > 1e-6, key
        assert close(fast[key], expected, 1e-9), key


def test_gradients_of_the_plain_path_are_the_references():
    model = model_of("embed_dim=16 unifier.num_basis=8 unifier.ordering=released").twice_differentiable()
    reference = reference_of(model)
    image, features = inputs_of(2, 3, (3, 4), (17, 22))
    given = noise(2, 3, 15, 26)
    ours = gradients(model, image, features, (15, 26), given)
    theirs = gradients(reference, image, features, (15, 26), given)
    projections = theirs["cross_decode.cross_attn.attention.in_proj_weight"].chunk(3)
    pairs = {
        "image": theirs["image"],
        "features": theirs["features"],
        "rotary.freqs": theirs["rope.freqs"],
        "unifier.encoder.0.basis": theirs["key_features_encoder.0.basis"],
        "aggregation.0.weight": theirs["aggregation.0.weight"],
        "image_encoder.0.weight": theirs["image_encoder.0.weight"],
        "attention.conv.weight": theirs["cross_decode.conv2d.weight"],
        "attention.norm_key.weight": theirs["cross_decode.cross_attn.norm_k.weight"],
        "attention.project_query.weight": projections[0],
        "attention.project_key.weight": projections[1],
    }
    for key, expected in pairs.items():
        assert close(ours[key], expected, 1e-9), key


@pytest.mark.parametrize("ordering", Ordering)
def test_gradients_by_finite_differences(ordering):
    model = model_of(f"embed_dim=8 unifier.num_basis=8 attention.num_heads=2 unifier.ordering={ordering.name}")
    image, features = (x.requires_grad_() for x in inputs_of(1, 2, (2, 3), (5, 4)))
    weights = list(model.parameters())
    direction = [noise(*weight.shape, seed=i) for i, weight in enumerate(weights)]
    (model(image, features, (6, 5)) ** 2).sum().backward()
    slope = sum((weight.grad * along).sum() for weight, along in zip(weights, direction, strict=True))
    steps = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for weight, along in zip(weights, direction, strict=True):
                weight += step * along
            steps.append((model(image, features, (6, 5)) ** 2).sum().item())
            for weight, along in zip(weights, direction, strict=True):
                weight -= step * along
    assert slope.item() == pytest.approx((steps[0] - steps[1]) / 2e-5, rel=1e-5)
    assert torch.autograd.gradcheck(lambda *x: model(*x, (6, 5)), (image, features), eps=1e-5, atol=1e-6, rtol=1e-4)


# --- second derivatives ----------------------------------------------------------------------------------------------


def second_derivative(model: nn.Module, image, features, size) -> list[torch.Tensor]:
    """Gradient of |gradient|² by a few weights, as second-order MAML takes it."""
    weights = [model.get_parameter(name) for name in ("image_encoder.0.weight", "query_encoder.1.block.2.weight")]
    loss = (model(image, features, size) ** 2).mean()
    first = torch.autograd.grad(loss, weights, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), weights)


def test_second_derivatives_are_the_references():
    model = model_of("embed_dim=16 unifier.num_basis=8 unifier.ordering=released").twice_differentiable(True)
    image, features = inputs_of(1, 3, (3, 4), (11, 14))
    expected = second_derivative(reference_of(model), image, features, (12, 13))
    for ours, theirs in zip(second_derivative(model, image, features, (12, 13)), expected, strict=True):
        assert theirs.abs().max() > 1e-8
        assert close(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-8)


REFUSED = r"twice_differentiable"  # the way out


@pytest.mark.parametrize("size", [(11, 14), (5, 6)])
@pytest.mark.parametrize("style", ["grad", "backward"])
def test_the_fast_path_refuses_second_derivatives(size, style):
    """With pooled queries and without, however they are asked for: an error that names the way out."""
    model = model_of("embed_dim=16 unifier.num_basis=8")
    image, features = inputs_of(1, 3, (3, 4), (11, 14))
    weights = [model.get_parameter(name) for name in ("attention.project_query.weight", "image_encoder.0.weight")]

    def second():
        first = torch.autograd.grad((model(image, features, size) ** 2).mean(), weights, create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        return torch.autograd.grad(total, weights) if style == "grad" else total.backward()

    with pytest.raises(RuntimeError, match=REFUSED):
        second()


@pytest.mark.parametrize("which", ["image", "features"])
def test_the_fast_path_refuses_second_derivatives_of_inputs(which):
    model = model_of("embed_dim=16 unifier.num_basis=8")
    image, features = (x.requires_grad_() for x in inputs_of(1, 3, (3, 4), (11, 14)))
    x = {"image": image, "features": features}[which]

    def second():
        (first,) = torch.autograd.grad((model(image, features, (5, 6)) ** 2).mean(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    with pytest.raises(RuntimeError, match=REFUSED):
        second()


def test_twice_differentiable_can_be_switched_off_again():
    model = model_of("embed_dim=16 unifier.num_basis=8").twice_differentiable().twice_differentiable(False)
    with pytest.raises(RuntimeError, match=REFUSED):
        second_derivative(model, *inputs_of(1, 3, (3, 4), (11, 14)), (11, 14))


# --- streaming and out= ----------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    st.integers(1, 2),
    st.tuples(st.integers(2, 8), st.integers(2, 8)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([1, 10, 10**6]),
)
def test_bands_tile_the_output(batch, grid, size, block):
    model = model_of("embed_dim=16 unifier.num_basis=8 attention.num_heads=2")
    image, features = inputs_of(batch, 3, grid, (21, 17))
    with torch.no_grad(), small_blocks(block):
        expected = model(image, features, size)
        rebuilt, next_row = torch.full_like(expected, torch.nan), 0
        for rows, band in model.stream(image, features, size):
            assert rows.start == next_row
            assert band.shape == (batch, 3, rows.stop - rows.start, size[1])
            rebuilt[:, :, rows] = band
            next_row = rows.stop
    assert next_row == size[0]
    assert close(rebuilt, expected)


def test_a_large_output_has_many_bands():
    model = model_of("embed_dim=16 unifier.num_basis=8")
    with torch.no_grad(), small_blocks(10):
        bands = list(model.stream(*inputs_of(1, 2, (8, 8), (64, 64)), (200, 100)))
    assert len(bands) >= 8
    assert max(band.shape[2] for _, band in bands) <= 50


def test_stream_can_be_abandoned_and_runs_interleaved():
    model = model_of("embed_dim=16 unifier.num_basis=8")
    first, second = inputs_of(1, 2, (8, 8), (32, 32)), inputs_of(2, 3, (5, 6), (32, 20))
    with torch.no_grad(), small_blocks(10):
        expected = model(*first), model(*second)
        model.stream(*first).__next__()  # abandoned
        both = [list(pair) for pair in zip(model.stream(*first), model.stream(*second), strict=False)]
        for i in (0, 1):
            for rows, band in (pair[i] for pair in both):
                assert close(band, expected[i][:, :, rows])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "strided", "memmap"])
def test_out(tmp_path, kind, grad):
    model = model_of("embed_dim=16 unifier.num_basis=8").float()
    image, features = inputs_of(2, 3, (5, 4), (33, 27), torch.float32)
    shape = (2, 3, 41, 35)
    with torch.no_grad():
        expected = model(image, features, shape[2:])
    if kind == "contiguous":
        out = torch.full(shape, torch.nan)
    elif kind == "channels_last":
        out = torch.full(shape, torch.nan).contiguous(memory_format=torch.channels_last)
    elif kind == "strided":
        whole = torch.full((2, 3, 82, 36), 7.0)
        out = whole[:, :, ::2, 1:]
    else:
        array = np.memmap(tmp_path / "out.dat", np.float32, "w+", shape=shape)
        out = torch.from_numpy(array)
    with torch.set_grad_enabled(grad), small_blocks(20):
        assert model(image, features, shape[2:], out=out) is out
    assert close(out.detach(), expected.double(), 1e-6)
    if kind == "strided":
        assert (whole[:, :, 1::2] == 7).all()
        assert (whole[..., 0] == 7).all()
    if kind == "memmap":
        array.flush()
        assert np.array_equal(np.fromfile(tmp_path / "out.dat", np.float32), array.ravel())


@pytest.mark.parametrize("channels", [8, 16, 24, 40])
@pytest.mark.parametrize("output_size", [(12, 14), (9, 20)])
def test_encoders_work_in_the_memory_of_the_output(channels, output_size):
    """Whatever part of their buffers fits in there, the result is the same as in memory of their own.

    To rounding: how a library sums may depend on how memory is aligned. Of the largest value, a row of 9·8 products and
    a layer after it; a number of another encoder's would be of its own size.
    """
    model = AnyUp(embed_dim=8, attention=partial(WindowAttention, num_heads=1)).eval()
    image, features = torch.randn(2, 3, 12, 14), torch.randn(2, channels, 3, 4)
    with torch.no_grad():
        shared_memory = model(image, features, output_size)
        with patch.object(WindowAttention, "takes_out", False):
            own = model(image, features, output_size)
        allowed = 2 * 9 * 8 * torch.finfo(own.dtype).eps * own.abs().max().item()
        torch.testing.assert_close(shared_memory, own, rtol=0, atol=allowed)


def test_buffers_lie_in_the_room_twice_and_the_last_one_given_back_is_taken_first():
    room, like = torch.empty(1, 2, 2, 12), torch.empty(1, 2, 2, 4)
    buffers = norm_act_conv.Buffers(room)
    first, second, third = (buffers.take(like, 4) for _ in range(3))
    buffers.give_back(second)
    buffers.give_back(third)
    assert buffers.take(like, 4) is third
    assert buffers.take(like, 4) is second
    own = room.untyped_storage().data_ptr()
    assert [b.untyped_storage().data_ptr() == own for b in (first, second, third)] == [True, True, False]
    assert second.data_ptr() == first.data_ptr() + first.nbytes


def test_buffers_of_a_forward_with_gradients_are_never_used_again():
    buffers, like = norm_act_conv.Buffers(reuse=False), torch.empty(1, 2, 2, 4)
    first = buffers.take(like, 4)
    buffers.give_back(first)
    assert first.data_ptr() not in (buffers.take(like, 4).data_ptr(), buffers.over(first).data_ptr())


def test_out_can_be_used_again():
    """A buffer is a buffer: writing into it with gradients enabled does not tie it to a graph."""
    model = model_of("embed_dim=16 unifier.num_basis=8")
    image, features = inputs_of(1, 3, (3, 4), (11, 14))
    out = torch.empty(1, 3, 11, 14, dtype=torch.float64)
    model(image, features, out=out)
    assert not out.requires_grad, "the buffer became part of a graph"
    model(image, features, out=out)


# --- dtypes, batches, inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", ["", "unifier.num_basis=8", "unifier.num_basis=32 embed_dim=64", "embed_dim=8"])
@pytest.mark.parametrize("path", ["inference", "training", "plain"])
def test_float32_is_exact_to_rounding(overrides, path):
    """Whatever the widths: with few filters a group's mean is large beside its spread."""
    overrides += " attention.num_heads=1" if "embed_dim=8" in overrides else ""
    model = build(overrides.split()).double()
    image, features = inputs_of(1, 5, (6, 6), (64, 64))
    with torch.no_grad():
        expected = reference_of(model)(image, features)
    model.float().twice_differentiable(path == "plain")
    with torch.set_grad_enabled(path != "inference"):
        output = model(image.float(), features.float())
    assert close(output.detach(), expected, 1e-5)


def test_a_nearly_uniform_image_is_no_harder():
    model = build(["embed_dim=8", "attention.num_heads=1"])
    image, features = 1 + 0.01 * noise(1, 3, 64, 64), noise(1, 5, 6, 6)
    with torch.no_grad():
        expected = reference_of(model).double()(image, features)
        limit = (reference_of(model)(image.float(), features.float()) - expected).abs().max()
        error = (model(image.float(), features.float()) - expected).abs().max().item()
    assert error < 10 * limit.item()


def test_reference_of_keeps_every_digit():
    model = build(["embed_dim=8", "attention.num_heads=1"]).double()
    with torch.no_grad():
        model.image_encoder[0].weight.fill_(1 / 3)
    weight = reference_of(model).image_encoder[0].weight
    assert weight.flatten()[0].item() == 1 / 3


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15), (torch.float16, 0.03)], ids=str
)
def test_dtypes(dtype, tolerance, grad):
    """Half precision: looser, but no NaN, and the dtype of the model."""
    model = build(["unifier.num_basis=32", "embed_dim=64"]).double()
    image, features = inputs_of(2, 5, (6, 5), (70, 75))
    with torch.no_grad():
        expected = reference_of(model)(image, features)
    model.to(dtype)
    with torch.set_grad_enabled(grad):
        output = model(image.to(dtype), features.to(dtype))
    assert output.dtype == dtype
    assert close(output.detach(), expected, tolerance)
    if grad:
        output.float().square().mean().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        assert all(parameter.grad.dtype == dtype for parameter in model.parameters())


@pytest.fixture
def every_warning():
    """Repeats warnings that PyTorch gives once per process: a test must not depend on being the first."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
def test_autocast():
    """bfloat16 inside, the weights' gradients in float32; the same dtype whichever path runs."""
    model = build(["unifier.num_basis=32", "embed_dim=64"])
    image, features = inputs_of(2, 5, (6, 5), (40, 45), torch.float32)
    with torch.no_grad():
        expected = model(image, features).double()
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        found["training"] = model(image, features)
        found["plain"] = model.twice_differentiable()(image, features)
        model.twice_differentiable(False)
        with torch.no_grad():
            found["inference"] = model(image, features)
            found["stream"] = torch.cat([band for _, band in model.stream(image, features)], 2)
    found["training"].float().square().mean().backward()
    for name, output in found.items():
        assert close(output.detach(), expected, 0.1), name
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert len({output.dtype for output in found.values()}) == 1, {name: out.dtype for name, out in found.items()}


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_is_its_images_one_by_one(grad):
    model = model_of("embed_dim=16 unifier.num_basis=8 unifier.ordering=released")
    image, features = inputs_of(3, 4, (4, 5), (29, 31))
    features[1] *= 100  # images of one batch may differ in scale
    with torch.set_grad_enabled(grad), small_blocks(50):
        together = model(image, features, (37, 21)).detach()
        alone = torch.cat([model(image[i : i + 1], features[i : i + 1], (37, 21)).detach() for i in range(3)])
    assert close(together, alone)


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_are_read_only_and_of_any_layout(grad):
    model = model_of("embed_dim=16 unifier.num_basis=8")
    image, features = inputs_of(2, 4, (4, 5), (29, 31))
    copies = image.clone(), features.clone()
    with torch.set_grad_enabled(grad):
        expected = model(image, features).detach()
        assert torch.equal(image, copies[0])
        assert torch.equal(features, copies[1])
        columns_first = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in copies)
        assert close(model(*columns_first).detach(), expected)
        channels_last = (x.contiguous(memory_format=torch.channels_last) for x in copies)
        assert close(model(*channels_last).detach(), expected)


def test_repeated_calls_agree_bit_for_bit():
    """Buffers are handed from one encoder to the next and hold old numbers: none may show."""
    model = model_of("embed_dim=16 unifier.num_basis=8").float()
    small, large = inputs_of(1, 3, (3, 4), (20, 15), torch.float32), inputs_of(2, 4, (6, 5), (51, 37), torch.float32)
    with torch.no_grad():
        first = model(*small), model(*large)
        again = model(*small), model(*large)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_inference_mode_gives_the_same():
    model = model_of("embed_dim=16 unifier.num_basis=8")
    image, features = inputs_of(1, 3, (3, 4), (20, 15))
    with torch.no_grad():
        expected = model(image, features)
    with torch.inference_mode():
        assert torch.equal(model(image, features), expected)


def test_constant_inputs_stay_finite():
    """No spread to normalise by: a black image, features of zeros."""
    model = build(["embed_dim=16", "unifier.num_basis=8"])
    for value in (0.0, 1.0, -1e4):
        image, features = torch.full((1, 3, 20, 22), value), torch.full((1, 4, 3, 4), value)
        with torch.no_grad():
            inference = model(image, features)
        training = model(image, features)
        training.sum().backward()
        assert close(inference, features.double().amax().expand_as(inference), 1e-5)
        assert close(training.detach(), inference.double(), 1e-5)
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        model.zero_grad()


def test_output_is_a_weighted_mean_of_the_visible_features():
    """Weights are positive and sum to 1: constant channels stay, no value leaves the range of the features."""
    model = model_of("embed_dim=16 unifier.num_basis=8")
    image, features = inputs_of(1, 3, (6, 7), (40, 50))
    features[:, 1] = 5
    with torch.no_grad():
        output = model(image, features, (61, 43))
    assert torch.allclose(output[:, 1], torch.tensor(5.0, dtype=torch.float64))
    for channel in (0, 2):
        assert features[:, channel].min() <= output[:, channel].min()
        assert output[:, channel].max() <= features[:, channel].max()


def test_reference_in_parts_is_the_reference():
    torch.manual_seed(0)
    reference = ReferenceAnyUp(embed_dim=16, num_basis=8).double()
    with torch.no_grad():
        inputs = inputs_of(2, 3, (3, 4), (17, 22))
        assert close(reference(*inputs, queries_at_once=7), reference(*inputs))


# --- memory ----------------------------------------------------------------------------------------------------------


def forward_at(side: int, channels: int):
    """A forward that has run before, on a small image, with inputs in place; imported by the process that measures."""
    model = build().eval()
    image, features = noise(1, 3, side, side).float(), noise(1, channels, side // 14, side // 14).float()

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return model(image, features)

    with torch.inference_mode():
        model(image[..., :56, :56], features[..., :4, :4])
    return forward


def test_peak_memory_is_the_output_and_three_images():
    """Output + 3·H·W·512 B + 10 %; the dense algorithm's logits alone would take 4 times that."""
    side, channels = 336, 64
    assert peak_in_child(partial(forward_at, side, channels)) <= 1.1 * side**2 * (channels * 4 + 3 * 512)
