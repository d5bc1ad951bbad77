"""LiFT, UPLiFT, LoftUp and RaysUp: what each computes, by its definition in float64."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from experiments.peers import CannotUpsample, make_peer
from experiments.peers.lift import LiFT
from experiments.peers.loftup import LoftUp
from experiments.peers.raysup import RaysUp, ray_angles
from experiments.peers.tiles import weighted_sums
from experiments.peers.uplift import OFFSETS, UPLiFT


def doubled(peer, perturbed):
    """In float64, with every weight and statistic away from its initial value."""
    for name, buffer in perturbed(peer.double()).named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand_like(buffer) if name.endswith("var") else torch.randn_like(buffer))
    return peer.eval().requires_grad_(False)


def conv(state, name, x, padding=0, stride=1):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride, padding=padding)


def normed(state, name, x):
    """Batch norm with its statistics."""
    mean, var, gain, shift = (
        state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * gain + shift


def spread(state, name, x):
    """The transposed convolution 2x2 with stride 2, cell by cell."""
    weight, out = state[f"{name}.weight"], x.new_empty(1, state[f"{name}.bias"].numel(), *(2 * n for n in x.shape[2:]))
    for i in range(2):
        for j in range(2):
            out[:, :, i::2, j::2] = torch.einsum("bchw,cd->bdhw", x, weight[:, :, i, j])
    return out + state[f"{name}.bias"].view(-1, 1, 1)


@pytest.mark.parametrize("patch", [8, 16])
def test_lift_is_its_definition(patch, perturbed):
    peer = doubled(LiFT(channels=6, patch=patch), perturbed)
    state = peer.state_dict()
    image, features = torch.randn(1, 3, 2 * patch, 3 * patch).double(), torch.randn(1, 6, 2, 3).double()
    fine = image
    for i in (0, 3):
        fine = normed(state, f"image_convs_1.{i + 1}", conv(state, f"image_convs_1.{i}", fine, 1, 2)).relu()
    if patch == 16:
        fine = fine.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    coarse = normed(state, "image_convs_2.1", conv(state, "image_convs_2.0", fine, 1, 2)).relu()
    x = torch.cat([spread(state, "up1.up", torch.cat([features, coarse], 1)), fine], 1)
    for i in (0, 3):
        x = normed(state, f"up1.conv_1.double_conv.{i + 1}", conv(state, f"up1.conv_1.double_conv.{i}", x, 1)).relu()
    torch.testing.assert_close(peer(image, features, (4, 6)), conv(state, "outc", x))


def test_lift_repeats_with_larger_images_and_resizes_only_if_asked():
    image, features = torch.randn(1, 3, 32, 48), torch.randn(1, 6, 2, 3)
    twice = LiFT(channels=6, num_steps=2).eval()
    once = LiFT(channels=6)
    once.load_state_dict(twice.state_dict())
    once.eval()
    first = once(image, features, (4, 6))
    larger = F.interpolate(image, (64, 96), mode="bilinear", antialias=True)
    torch.testing.assert_close(twice(image, features, (8, 12)), once(larger, first, (8, 12)))
    once.choice = "lift"
    with pytest.raises(
        CannotUpsample, match=r"lift enlarges 2 times, 2x3 features to 4x6, not to 5x6: .*any_size=true"
    ):
        once(image, features, (5, 6))
    once.any_size = True
    torch.testing.assert_close(once(image, features, (2, 3)), F.avg_pool2d(first, 2))


def attended(guide, values, weight, bias):
    """(17,h2,w2) softmax of 1x1 plus the first channels; then means of 17 neighbours, clamped at the border."""
    logits = torch.einsum("chw,oc->ohw", guide, weight) + bias[:, None, None] + guide[:17]
    shares, (h, w) = logits.softmax(0), values.shape[1:]
    out = values.new_zeros(len(values), 2 * h, 2 * w)
    for y in range(2 * h):
        for x in range(2 * w):
            for o, (i, j) in enumerate(OFFSETS):
                row, column = min(max(y // 2 + i, 0), h - 1), min(max(x // 2 + j, 0), w - 1)
                out[:, y, x] += shares[o, y, x] * values[:, row, column]
    return out


def test_the_local_attender_is_its_definition(perturbed):
    peer = doubled(UPLiFT(channels=5), perturbed)
    guide, values = torch.randn(2, 64, 6, 8).double(), torch.randn(2, 5, 3, 4).double()
    layer = peer.attender.conv1
    expected = [attended(g, v, layer.weight[..., 0, 0], layer.bias) for g, v in zip(guide, values, strict=True)]
    torch.testing.assert_close(peer.attender(guide, values), torch.stack(expected))
    nine = {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert set(OFFSETS) == nine | {(2 * i, 2 * j) for i, j in nine}
    assert list(OFFSETS) == sorted(OFFSETS)


def residual(state, name, x, nums):
    """`nums`: numbers of the 3x3 convolutions; the last, 1x1, follows."""
    y = x
    for i in nums:
        y = normed(state, f"{name}.conv.{i + 1}", conv(state, f"{name}.conv.{i}", y, 1)).relu()
    y = conv(state, f"{name}.conv.{nums[-1] + 3}", y)
    shared = min(x.shape[1], y.shape[1])
    return torch.cat([y[:, :shared] + x[:, :shared], y[:, shared:]], 1)


def test_uplift_is_its_definition(perturbed):
    """Two steps, and the final size smaller than what they give."""
    peer = doubled(UPLiFT(channels=5), perturbed)
    state = peer.state_dict()
    image, features = torch.randn(1, 3, 24, 32).double(), torch.randn(1, 5, 3, 4).double()
    encoded = [image]
    for i in range(5):
        encoded.append(residual(state, f"encoder.block_{i}.blocks.0", encoded[-1], [0]))
    x = features
    for _ in range(2):
        h, w = x.shape[2:]
        rows, columns = ([i * side // n for i in range(n)] for side, n in ((24, h), (32, w)))
        guide = torch.cat([x, encoded[5][:, :, rows][..., columns]], 1)
        guide = residual(state, "decoder.block_0.blocks.0", guide, [0, 3])
        corners = F.interpolate(guide, (2 * h, 2 * w), mode="bilinear", align_corners=True)
        guide = spread(state, "decoder.up_1.up", guide) + corners
        rows, columns = ([i * side // n for i in range(n)] for side, n in ((24, 2 * h), (32, 2 * w)))
        guide = torch.cat([guide, encoded[4][:, :, rows][..., columns]], 1)
        guide = residual(state, "decoder.block_1.blocks.0", guide, [0, 3])
        layer = "attender.conv1"
        x = attended(guide[0], x[0], state[f"{layer}.weight"][..., 0, 0], state[f"{layer}.bias"])[None]
    expected = F.interpolate(x, (11, 13), mode="bilinear", antialias=True)
    torch.testing.assert_close(peer(image, features, (11, 13)), expected)


@pytest.mark.parametrize(("size", "steps"), [((3, 4), 1), ((6, 8), 1), ((7, 8), 2), ((12, 16), 2), ((48, 64), 4)])
def test_uplift_makes_as_many_steps_as_the_output_needs(size, steps):
    peer, calls = UPLiFT(channels=5).eval(), []
    peer.decoder.register_forward_hook(lambda *_: calls.append(1))
    assert peer(torch.randn(1, 3, 48, 64), torch.randn(1, 5, 3, 4), size).shape[2:] == size
    assert len(calls) == steps


def test_uplift_enlarges_images_of_patches_of_14():
    seen = []
    for patch in (14, 16):
        peer = UPLiFT(channels=5, patch=patch).eval()
        peer.encoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
        peer(torch.randn(1, 3, 42, 56), torch.randn(1, 5, 3, 4), (6, 8))
    assert seen == [(48, 64), (42, 56)]


def layer_norm(x, state, name, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def waves(values, biases, num):
    """Of (k,P) values: sines and cosines with frequencies exp(linspace(-2,10)), frequency after frequency."""
    freqs = [math.exp(-2 + 12 * i / (num - 1)) for i in range(num)]
    phases = biases.reshape(2, num, len(values))
    made = [[value * f + phases[part, i, k] for i, f in enumerate(freqs) for k, value in enumerate(values)]
            for part in (0, 1)]  # fmt: skip
    return torch.stack([x.sin() for x in made[0]] + [x.cos() for x in made[1]])


def corners(h, w):
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (h, w))
    return torch.stack([rows[:, None].expand(h, w), columns[None].expand(h, w)])


def test_loftup_is_its_definition(perturbed):
    """Angles are up to exp(10) = 2.2e4, so sines agree to 2.2e4 eps = 5e-12, and what follows to 1e-9."""
    peer = doubled(LoftUp(channels=8), perturbed)
    state = {name.removeprefix("upsampler."): tensor for name, tensor in peer.state_dict().items()}
    image, features = torch.randn(1, 3, 5, 6).double(), torch.randn(1, 8, 2, 3).double()
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    colours = ((image - low) / (high - low) - 0.5)[0].flatten(1)  # (3,30)
    query = waves(torch.cat([corners(5, 6).flatten(1), colours]), state["fourier_feat.1.biases"], 20)
    query = layer_norm(torch.cat([query, colours]).T, state, "first_conv.0.norm").T.reshape(1, 203, 5, 6)
    for i in (1, 4):
        query = normed(state, f"first_conv.{i + 1}", conv(state, f"first_conv.{i}", query, 1)).relu()
    query = query[0].flatten(1).T  # (30,28)
    tokens = layer_norm(features[0].flatten(1).T, state, "channelnorm.norm")
    tokens = torch.cat([tokens, waves(corners(2, 3).flatten(1), state["lr_pe.biases"], 5).T], 1)  # (6,28)
    for i in range(2):
        name = f"ca_transformer.layers.{i}"
        kv = layer_norm(tokens, state, f"{name}.0.norm_kv")
        weight, bias = (state[f"{name}.0.attention.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
        sources = (layer_norm(query, state, f"{name}.0.norm_q"), kv, kv)
        q, k, v = (x @ a.T + b for x, a, b in zip(sources, weight, bias, strict=True))
        heads = []
        for head in range(4):
            own = slice(7 * head, 7 * head + 7)
            heads.append((q[:, own] @ k[:, own].T / math.sqrt(7)).softmax(1) @ v[:, own])
        out = f"{name}.0.attention.out_proj"
        query = query + torch.cat(heads, 1) @ state[f"{out}.weight"].T + state[f"{out}.bias"]
        x = layer_norm(query, state, f"{name}.1.net.0")
        x = F.gelu(x @ state[f"{name}.1.net.1.weight"].T + state[f"{name}.1.net.1.bias"])
        query = query + x @ state[f"{name}.1.net.4.weight"].T + state[f"{name}.1.net.4.bias"]
    x = layer_norm(query, state, "ca_transformer.norm")
    x = x @ state["final_conv.0.weight"][..., 0, 0].T + state["final_conv.0.bias"]
    expected = layer_norm(x, state, "final_conv.1", 1e-6).T.reshape(1, 8, 5, 6)
    torch.testing.assert_close(peer(image, features), expected, atol=1e-9, rtol=0)


def test_ray_angles():
    """The middle is seen straight ahead, the right border at 45 degrees of half an image; the origin turns nothing."""
    angles = ray_angles((3, 1001), 32, torch.empty(()))
    assert angles.shape == (32, 3, 1001)
    x, z = 0.5 * 1000 / 1001, 1.0
    for f in range(5):
        assert not angles[6 * f : 6 * f + 3].any()
        freq = 2 * math.pi / 8 * 3**f
        torch.testing.assert_close(angles[6 * f + 5, 1, 500], torch.tensor(freq))
        torch.testing.assert_close(angles[6 * f + 3, 1, 1000], torch.tensor(freq * x / math.hypot(x, z)))
    assert not angles[30:].any()


def rotated(vectors, y, x):
    """(4,64), a row for each head: i and i + 32 turned back by the angle i of a pixel at (y, x) in the unit square."""
    length = math.hypot(x - 0.5, y - 0.5, 1.0)
    out = vectors.clone()
    for f in range(5):
        for k, part in enumerate((x - 0.5, y - 0.5, 1.0)):
            i, angle = 6 * f + 3 + k, 2 * math.pi / 8 * 3**f * part / length
            out[:, i] = vectors[:, i] * math.cos(angle) + vectors[:, i + 32] * math.sin(angle)
            out[:, i + 32] = vectors[:, i + 32] * math.cos(angle) - vectors[:, i] * math.sin(angle)
    return out


def test_raysup_is_its_definition(perturbed):
    peer = doubled(RaysUp(), perturbed)
    image, features = torch.randn(1, 3, 16, 18).double(), torch.randn(1, 8, 8, 9).double()
    guidance = peer.image_tokenizer["img_encoder"](image)[0]
    queries, keys = guidance, F.adaptive_avg_pool2d(guidance, (8, 9))
    found = peer(image, features)[0]
    for i in (0, 6, 15):
        for j in (0, 7, 17):
            rows = [min(max(i // 2 - 3, 0), 8 - 6) + n for n in range(6)]
            columns = [min(max(j // 2 - 3, 0), 9 - 6) + n for n in range(6)]
            cells = [(m, n) for m in rows for n in columns]
            query = rotated(queries[:, i, j].view(4, 64), (i + 0.5) / 16, (j + 0.5) / 18)
            turned = [rotated(keys[:, m, n].view(4, 64), (m + 0.5) / 8, (n + 0.5) / 9) for m, n in cells]
            weights = torch.stack([(query * key).sum(1) / 8 for key in turned]).softmax(0)  # (36,4)
            values = torch.stack([features[0, :, m, n].view(4, 2) for m, n in cells])  # two channels for each head
            expected = (weights[..., None] * values).sum(0).flatten()
            torch.testing.assert_close(found[:, i, j], expected, atol=1e-9, rtol=0)


def test_raysup_encodes_pixels_rows_columns_and_corners():
    """Which pixels each branch sees of a change in the middle, after its one stem and its blocks."""
    encoder = RaysUp().image_tokenizer["img_encoder"].double()
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # it looks at the whole image
    image = torch.zeros(1, 3, 17, 17).double()
    other = image.clone()
    other[..., 8, 8] = 1
    changed = [(part != 0).any(0) for part in (encoder(other) - encoder(image))[0].chunk(4)]
    reach = torch.arange(17) - 8
    rows, columns = reach[:, None].abs(), reach[None].abs()
    assert torch.equal(changed[0], (rows == 0) & (columns == 0))
    assert torch.equal(changed[1], (rows == 0) & (columns <= 3))
    assert torch.equal(changed[2], (rows <= 3) & (columns == 0))
    odd = (rows % 2 == 1) & (columns % 2 == 1) & (rows <= 3) & (columns <= 3)
    assert torch.equal(changed[3], odd)


@pytest.mark.parametrize(("mode", "finer"), [("reflect", 1), ("replicate", 2)])
def test_weighted_sums_over_neighbours_in_tiles(mode, finer):
    """Against a loop over positions and neighbours; sizes that the tiles do not divide."""
    side, reach, size = 2, 1, (5, 3)
    offsets = [(0, 0), (-1, 1), (1, 0)]
    values = torch.randn(2, 3, *size, dtype=torch.float64)
    weights = torch.randn(2, 3, *(finer * n for n in size), dtype=torch.float64)
    padded, expected = (
        F.pad(values, (reach,) * 4, mode=mode),
        torch.zeros(2, 3, *weights.shape[2:], dtype=torch.float64),
    )
    for y, x in itertools.product(*map(range, weights.shape[2:])):
        for k, (i, j) in enumerate(offsets):
            near = padded[:, :, y // finer + i + reach, x // finer + j + reach]
            expected[:, :, y, x] += weights[:, k, None, y, x] * near
    found = weighted_sums(weights, values, offsets, side, mode)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["weighted_sums", "guided_filter"])
def test_autocast_does_not_round_sums_over_features(name):
    """They are no layer's products. In bfloat16 the sums would be off by 4e-3 of the largest value or so."""
    image, features = torch.randn(1, 3, 24, 24), torch.randn(1, 5, 6, 6)
    weights = torch.rand(1, 2, 6, 6)
    calls = {
        "weighted_sums": lambda: weighted_sums(weights, features, [(0, 0), (1, -1)], 2, "reflect"),
        "guided_filter": lambda: make_peer("guided_filter")(image, features, (12, 12)),
    }
    expected = calls[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = calls[name]()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
