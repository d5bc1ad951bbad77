"""JAFAR, NAF and FeatUp: their definitions in float64, state dicts of the published names, and published files."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.peers import CannotUpsample, peer_from_config
from experiments.peers.blocks import blocks
from experiments.peers.featup_jbu import Stage
from experiments.peers.naf import AxialRotary, block_attention
from experiments.settings import SettingError

JAFAR_FILE = "weights/jafar_vit_small_patch14_dinov2.pth"
FEATUP_FILES = {"dinov2": (384, 172_772), "clip": (512, 287_588), "maskclip": (512, 287_588)}


def count(peer):
    return sum(weight.numel() for weight in peer.parameters())


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / max(1, math.prod(shape[1:])) ** 0.5
            for name, shape in shapes.items()}  # fmt: skip


# JAFAR


def jafar_shapes(channels, width):
    """Names and shapes of the published state dict."""
    shapes = {"rope.freqs": (2, width)}
    inputs = {"image_encoder": 3, "key_encoder": width, "query_encoder": width, "key_features_encoder": channels}
    for encoder, into in inputs.items():
        shapes[f"{encoder}.0.weight"] = (width, into, 1, 1)
        for block in (1, 2):
            for number in (1, 2):
                shapes[f"{encoder}.{block}.norm{number}.weight"] = shapes[f"{encoder}.{block}.norm{number}.bias"] = (
                    width,
                )
                shapes[f"{encoder}.{block}.conv{number}.weight"] = (width, width, 1, 1)
    attention = "cross_decode.cross_attn"
    shapes |= {f"{attention}.norm_q.weight": (width,), f"{attention}.norm_k.weight": (width,),
               f"{attention}.norm_v.weight": (channels,), f"{attention}.attention.q_proj_weight": (width, width),
               f"{attention}.attention.k_proj_weight": (width, width),
               f"{attention}.attention.v_proj_weight": (width, channels),
               f"{attention}.attention.in_proj_bias": (3 * width,),
               f"{attention}.attention.out_proj.weight": (width, width),
               f"{attention}.attention.out_proj.bias": (width,),
               "cross_decode.conv2d.weight": (width, width, 3, 3),
               "sft_key.gamma.weight": (width, width, 1, 1), "sft_key.beta.weight": (width, width, 1, 1)}  # fmt: skip
    return shapes


def jafar_defined(state, image, features, size, num_heads):
    """The paper's equations on the published names, with PyTorch's own attention, in float64."""
    s = {name: tensor.double() for name, tensor in state.items()}
    image, features = image.double(), features.double()

    def encoded(name, x):
        x = F.conv2d(x, s[f"{name}.0.weight"])
        for block in (f"{name}.1", f"{name}.2"):
            y = x
            for i in (1, 2):
                y = F.silu(F.group_norm(y, 8, s[f"{block}.norm{i}.weight"], s[f"{block}.norm{i}.bias"]))
                y = F.conv2d(y, s[f"{block}.conv{i}.weight"])
            x = x + y
        return x

    def sequence(x):
        return x.flatten(2).transpose(1, 2)

    x = encoded("image_encoder", image)
    height, width = x.shape[-2:]
    rows, columns = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (height, width))
    angle = (torch.cartesian_prod(rows, columns) @ s["rope.freqs"]).T.unflatten(1, (height, width))
    first, second = x.chunk(2, 1)
    x = x * angle.cos() + torch.cat([-second, first], 1) * angle.sin()
    query = F.group_norm(F.adaptive_avg_pool2d(encoded("query_encoder", x), size), 8)
    key = F.group_norm(F.adaptive_avg_pool2d(encoded("key_encoder", x), features.shape[-2:]), 8)
    f = encoded("key_features_encoder", features / features.norm(dim=1, keepdim=True))
    key = F.conv2d(f, s["sft_key.gamma.weight"]) * key + F.conv2d(f, s["sft_key.beta.weight"])
    query = F.conv2d(query, s["cross_decode.conv2d.weight"], padding=1)
    embed, channels = query.shape[1], features.shape[1]
    attention = nn.MultiheadAttention(embed, num_heads, vdim=channels, kdim=embed, batch_first=True).double()
    prefix = "cross_decode.cross_attn."
    attention.load_state_dict({name.removeprefix(f"{prefix}attention."): tensor for name, tensor in s.items()
                               if name.startswith(f"{prefix}attention.")})  # fmt: skip
    q = F.rms_norm(sequence(query), (embed,), s[f"{prefix}norm_q.weight"])
    k = F.rms_norm(sequence(key), (embed,), s[f"{prefix}norm_k.weight"])
    weights = attention(q, k, sequence(features), average_attn_weights=True)[1]  # (B,Q,h·w)
    return (weights @ sequence(features)).transpose(1, 2).unflatten(2, size)


def test_jafar_is_its_definition_on_the_published_names(tmp_path):
    state = random_state(jafar_shapes(6, 16))
    torch.save({"jafar": state}, tmp_path / "jafar.pth")
    peer = peer_from_config({"peer": "jafar", "weights": str(tmp_path / "jafar.pth"), "embed_dim": 16}).double()
    image, features = torch.randn(2, 3, 11, 17).double(), torch.randn(2, 6, 3, 4).double()
    expected = jafar_defined(state, image, features, (7, 5), 4)
    with torch.no_grad():
        torch.testing.assert_close(peer(image, features, (7, 5)), expected, atol=1e-10, rtol=0)
    for missing in ("sft_key.beta.weight", "cross_decode.cross_attn.norm_q.weight"):
        torch.save({"jafar": {k: v for k, v in state.items() if k != missing}}, tmp_path / "less.pth")
        with pytest.raises(SettingError, match="are not those of JAFAR: Missing key"):
            peer_from_config({"peer": "jafar", "weights": str(tmp_path / "less.pth"), "embed_dim": 16})
    torch.save({"jafar": {**state, "surprise": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.raises(SettingError, match=r"Unexpected key.*surprise"):
        peer_from_config({"peer": "jafar", "weights": str(tmp_path / "more.pth"), "embed_dim": 16})


def test_jafars_published_weights(shared):
    """All of them but those that no output depends on; the output is the definition's."""
    file = shared(JAFAR_FILE)
    peer = peer_from_config({"peer": "jafar", "weights": str(file)})
    unused = 128 * 384 + 128 * 128 + 128 + 2 * 128 + 384  # value and output projections, biases of key, value, norm_v
    assert peer.channels == 384
    assert count(peer) == 628_480 - unused
    state = torch.load(file, map_location="cpu", weights_only=True)["jafar"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == jafar_shapes(384, 128)
    image, features = torch.randn(1, 3, 28, 42), torch.randn(1, 384, 2, 3)
    expected = jafar_defined(state, image, features, (9, 14), 4)
    with torch.no_grad():
        torch.testing.assert_close(
            peer(image, features, (9, 14)).double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
        )


# NAF


def naf_shapes(width=256, num_blocks=2):
    """Names and shapes of the published state dict."""
    half, shapes = width // 2, {"image_encoder.rope.periods": (width // 16,)}
    for encoder, k in (("encoder", 1), ("sem_encoder", 3)):
        name = f"image_encoder.{encoder}"
        shapes |= {f"{name}.0.weight": (half, 3, k, k), f"{name}.0.bias": (half,)}
        for block in range(1, num_blocks + 1):
            for i in (1, 2):
                shapes |= {
                    f"{name}.{block}.{part}{i}.{kind}": (half,)
                    for part in ("norm", "conv")
                    for kind in ("weight", "bias")
                }
                shapes[f"{name}.{block}.conv{i}.weight"] = (half, half, k, k)
    return shapes


def test_naf_has_the_published_names_and_sizes():
    peer = peer_from_config("naf")
    assert {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()} == naf_shapes()
    assert count(peer) == 662_528
    assert count(peer_from_config({"peer": "naf", "embed_dim": 768, "num_blocks": 5})) == 14_780_928  # NAF++


def dilated(query, key, value, num_heads, window):
    """The published rule, literally: each pixel attends to a dilated window of nearest-enlarged keys and values."""
    (height, width), (h, w) = query.shape[-2:], key.shape[-2:]

    def near(p, length, step):
        start = min(max(p // step - window // 2, 0), length // step - window)
        return [p % step + (start + j) * step for j in range(window)]

    key, value = (F.interpolate(x, (height, width), mode="nearest-exact") for x in (key, value))
    output = torch.empty(*value.shape[:2], height, width, dtype=value.dtype)
    for y in range(height):
        for x in range(width):
            rows, columns = near(y, height, height // h), near(x, width, width // w)
            parts = []
            for q, k, v in zip(*(one.chunk(num_heads, 1) for one in (query, key, value)), strict=True):
                k, v = (one[:, :, rows][..., columns].flatten(2) for one in (k, v))
                logits = torch.einsum("bd,bdk->bk", q[:, :, y, x], k) * q.shape[1] ** -0.5
                parts.append(torch.einsum("bk,bck->bc", logits.softmax(1), v))
            output[:, :, y, x] = torch.cat(parts, 1)
    return output


@pytest.mark.parametrize(("grid", "times", "window"), [((5, 7), (3, 2), 5), ((9, 10), (2, 1), 9), ((3, 4), (4, 4), 3)])
def test_block_attention_is_the_dilated_window(grid, times, window):
    size = tuple(n * t for n, t in zip(grid, times, strict=True))
    query, key, value = (torch.randn(2, c, *n).double() for c, n in ((8, size), (8, grid), (4, grid)))
    expected = dilated(query, key, value, 2, window)
    torch.testing.assert_close(block_attention(query, key, value, 2, window), expected, atol=1e-13, rtol=0)


def test_block_attention_where_the_published_rule_ends():
    """Unequal cells, a grid smaller than the window, and heads that do not divide the channels."""
    query, key, value = (
        torch.randn(1, 6, 7, 5).double(),
        torch.randn(1, 6, 3, 4).double(),
        torch.randn(1, 5, 3, 4).double(),
    )
    found = block_attention(query, key, value, 3, 3)
    for y, x in ((0, 0), (3, 2), (6, 4), (5, 1)):
        row, column = (2 * y + 1) * 3 // 14, (2 * x + 1) * 4 // 10  # the cell with the pixel's centre
        rows, columns = slice(0, 3), slice(min(max(column - 1, 0), 1), min(max(column - 1, 0), 1) + 3)
        assert row < 3
        expected = []
        for head, channels in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
            q, k = query[0, 2 * head : 2 * head + 2, y, x], key[0, 2 * head : 2 * head + 2, rows, columns].flatten(1)
            weights = (q @ k / 2**0.5).softmax(0)
            expected.append(value[0, channels, rows, columns].flatten(1) @ weights)
        torch.testing.assert_close(found[0, :, y, x], torch.cat(expected), atol=1e-13, rtol=0)


def test_blocks_hold_every_position_once():
    for length, outputs, window in ((4, 9, 3), (7, 3, 9), (5, 5, 1), (1, 6, 3)):
        found = blocks(length, outputs, window)
        assert found.members.flatten()[found.slots].tolist() == list(range(outputs))
        assert sum(found.counts) == outputs
        assert found.windows.shape == (len(found.counts), min(window, length))


def test_nafs_heads_filter_channels_of_their_own(perturbed):
    """Swapping channels within a head's group commutes with it, across groups it does not; a constant stays."""
    peer = perturbed(peer_from_config({"peer": "naf", "embed_dim": 32, "window": 3})).double().eval()
    image, features = torch.randn(1, 3, 20, 24).double(), torch.randn(1, 8, 5, 6).double()
    output = peer(image, features)
    within, across = [1, 0, 2, 3, 4, 5, 7, 6], [4, 1, 2, 3, 0, 5, 6, 7]
    torch.testing.assert_close(peer(image, features[:, within]), output[:, within], atol=1e-12, rtol=0)
    assert (peer(image, features[:, across]) - output[:, across]).abs().max() > 1e-3
    constant = torch.full_like(features, 3.0)
    torch.testing.assert_close(peer(image, constant), constant.new_full(output.shape, 3.0), atol=1e-12, rtol=0)


def test_nafs_rotation_is_its_definition():
    rotary = AxialRotary(8, 2).double().eval()
    x = torch.randn(1, 16, 3, 5).double()
    turned = rotary(x)
    for head in range(2):
        for i in range(4):  # pairs (i, i + 4): two of rows, two of columns
            for y in range(3):
                for column in range(5):
                    at = (2 * y + 1) / 3 - 1 if i < 2 else (2 * column + 1) / 5 - 1
                    angle = 2 * math.pi * at / 100 ** (4 * (i % 2) / 8)
                    a, b = (x[0, 8 * head + i + j, y, column].item() for j in (0, 4))
                    expected = (a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle))
                    found = tuple(turned[0, 8 * head + i + j, y, column].item() for j in (0, 4))
                    assert found == pytest.approx(expected, abs=1e-5)  # periods are float32
    rotary.train()
    assert not torch.equal(rotary(x), rotary(x))  # another scale of the coordinates in every call
    assert torch.equal(rotary.eval()(x), turned)


def test_naf_reduces_a_large_image_first(perturbed):
    peer = perturbed(peer_from_config({"peer": "naf", "embed_dim": 32})).eval()
    image, features = torch.randn(1, 3, 60, 33), torch.randn(1, 4, 2, 3)
    small = F.interpolate(image, (24, 24), mode="bilinear")
    torch.testing.assert_close(peer(image, features, (6, 8)), peer(small, features, (6, 8)))


# FeatUp


def stage_defined(stage, source, image):
    """One position after the other, in float64."""
    (h, w), channels = source.shape[-2:], source.shape[1]
    size = (2 * h, 2 * w)
    guidance = F.adaptive_avg_pool2d(image, size)[0]

    def layers(block, x):  # of one position
        first, second = block[0], block[3]
        hidden = F.gelu(first.weight[:, :, 0, 0] @ x + first.bias)
        return second.weight[:, :, 0, 0] @ hidden + second.bias

    def reflected(i, n):
        return -i if i < 0 else 2 * n - 2 - i if i >= n else i

    enlarged = F.interpolate(source, size, mode="bicubic")[0]
    output = torch.empty(channels, *size, dtype=source.dtype)
    temperature = stage.range_temp.exp().clamp(1e-4, 1e4)
    for y in range(size[0]):
        for x in range(size[1]):
            offsets = [(i, j) for i in range(-3, 4) for j in range(-3, 4)]
            near = [(reflected(y + i, size[0]), reflected(x + j, size[1])) for i, j in offsets]
            own = layers(stage.range_proj, guidance[:, y, x])
            alike = torch.stack([own @ layers(stage.range_proj, guidance[:, a, b]) for a, b in near])
            gaussian = [
                math.exp(-((i / 3) ** 2 + (j / 3) ** 2) / (2 * stage.sigma_spatial.item() ** 2)) for i, j in offsets
            ]
            kernel = (temperature * alike).softmax(0) * torch.tensor(gaussian, dtype=source.dtype)
            kernel = kernel / kernel.sum()
            kernel = kernel + 0.1 * layers(stage.fixup_proj, torch.cat([kernel, guidance[:, y, x]]))
            output[:, y, x] = sum(weight * enlarged[:, a, b] for weight, (a, b) in zip(kernel, near, strict=True))
    return output[None]


def test_a_stage_of_featup_is_its_definition(perturbed):
    stage = perturbed(Stage()).double().eval()
    source, image = torch.randn(1, 3, 2, 3).double(), torch.randn(1, 3, 9, 11).double()
    with torch.no_grad():
        expected = stage_defined(stage, source, image)
        torch.testing.assert_close(stage(source, image), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FEATUP_FILES)
def test_featups_published_stacks(name, shared):
    file, (channels, parameters) = shared(f"weights/{name}_jbu_stack_cocostuff.ckpt"), FEATUP_FILES[name]
    peer = peer_from_config({"peer": "featup_jbu", "weights": str(file)})
    assert (peer.channels, peer.factor, count(peer)) == (channels, 16, parameters)
    image, features = torch.randn(1, 3, 48, 64), torch.randn(1, channels, 2, 3)
    with torch.no_grad():
        output = peer(image, features, (32, 48))
        step = features
        for name in ("up1", "up2", "up3", "up4"):
            step = getattr(peer, name)(step, image)
        torch.testing.assert_close(output, step + 0.1 * peer.fixup_proj[1](step))
        with pytest.raises(CannotUpsample, match="enlarges 16 times, 2x3 features to 32x48, not to 48x64: choose"):
            peer(image, features)


def test_featup_reads_stages_and_channels_from_its_weights(tmp_path):
    made = peer_from_config({"peer": "featup_jbu", "channels": 5, "stages": 2})
    theirs = {f"upsampler.{name}": tensor for name, tensor in made.state_dict().items()}
    torch.save({"state_dict": theirs | {"model.0.weight": torch.zeros(3)}}, tmp_path / "stack.ckpt")
    read = peer_from_config({"peer": "featup_jbu", "weights": str(tmp_path / "stack.ckpt")})
    assert (read.channels, read.factor) == (5, 4)
    with pytest.raises(SettingError, match="its weights take features of 5 channels: leave out channels=6"):
        peer_from_config({"peer": "featup_jbu", "weights": str(tmp_path / "stack.ckpt"), "channels": 6})
