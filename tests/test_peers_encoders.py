"""Peers that have the encoder themselves: ViT-Up and FeatUp's implicit form."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from core.backbones import Backbone, imagenet_normalize, load_backbone, normalize
from experiments.peers import CannotUpsample, make_peer, peer_from_config, peer_identity
from experiments.peers.featup_implicit import (
    FeatUpImplicit,
    Network,
    Pooling,
    Scale,
    blur_loss,
    drawn_moves,
    magnitude,
    moved,
    principal_axes,
    step,
    variation,
    view_loss,
)
from experiments.peers.guidance import rgb_of
from experiments.peers.vit_up import ViTUp, rotated
from experiments.settings import SettingError

# The encoder


@pytest.fixture(scope="module")
def vit_up():
    return peer_from_config({"peer": "vit_up", "encoder": "embedded"})


def of_hog(size=(40, 48), batch=1):
    """Image, and its features of hog8."""
    rgb = torch.rand(batch, 3, *size)
    return imagenet_normalize(rgb), load_backbone("hog8")(rgb)


def test_the_encoder_moves_with_the_peer_and_is_no_part_of_its_weights(vit_up):
    assert not any(key.startswith(("encoder", "trunk")) for key in vit_up.state_dict())
    assert {id(p) for p in vit_up.encoder.parameters()}.isdisjoint(id(p) for p in vit_up.parameters())
    peer = peer_from_config({"peer": "vit_up", "encoder": "embedded"}).double().train()
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in peer.encoder.parameters())
    assert not peer.encoder.training


def test_another_file_of_the_encoder_is_another_peer(tmp_path):
    state = load_backbone("embedded").trunk.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file({key: 2 * value for key, value in state.items()}, tmp_path / "b.safetensors")
    nodes = [{"peer": "vit_up", "encoder": "embedded", "encoder_weights": str(tmp_path / f"{x}.safetensors")}
             for x in "ab"]  # fmt: skip
    assert peer_identity(nodes[0]) != peer_identity(nodes[1])
    image, features = torch.randn(1, 3, 32, 32), torch.randn(1, 192, 2, 2)
    first, other = (peer_from_config(node)(image, features, (4, 4)) for node in nodes)
    own = peer_from_config({"peer": "vit_up", "encoder": "embedded"})(image, features, (4, 4))
    assert torch.equal(first, own)
    assert not torch.allclose(other, own)


def test_the_encoder_sees_the_image_with_one_patch_for_each_feature(vit_up):
    rgb = torch.rand(1, 3, 30, 50)
    features = torch.randn(1, 192, 2, 3)
    seen = vit_up.seen(imagenet_normalize(rgb), features)
    torch.testing.assert_close(seen, F.interpolate(rgb, (32, 48), mode="bilinear", antialias=True), atol=1e-5, rtol=0)
    exact = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(vit_up.seen(imagenet_normalize(exact), features), exact)


# ViT-Up


def test_rotations_look_at_differences_of_places_only():
    query, key = torch.randn(2, 1, 3, 5, 64).double()
    first, second, shift = torch.rand(5, 2).double(), torch.rand(5, 2).double(), torch.tensor([3.7, -1.2]).double()
    products = [
        rotated(query, first + move) @ rotated(key, second + move).mT for move in (torch.zeros(2).double(), shift)
    ]
    torch.testing.assert_close(products[0], products[1])
    one = rotated(torch.eye(64).double()[None, None], torch.tensor([[0.3, 0.6]]).double().expand(64, 2))[0, 0]
    for pair, place in ((0, 0.6), (5, 0.6), (16, 0.3), (31, 0.3)):  # columns, then rows
        angle = 2 * math.pi * place / 100 ** ((pair % 16) / 16)
        expected = [math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)]
        torch.testing.assert_close(
            one[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2].flatten(), torch.tensor(expected).double()
        )


def slow_vit_up(peer, image, features, point):
    """One query at a point (row, column) of the unit square, by the paper's equations -> (C,)."""
    rgb, encoder = rgb_of(image), peer.encoder
    h, w = features.shape[2:]
    layers = []
    hook = [encoder.trunk.blocks[i].register_forward_hook(lambda _, __, out: layers.append(out[0, 1:])) for i in (1, 3)]
    encoder(rgb)
    for one in hook:
        one.remove()
    layers = [layers[0], features[0].flatten(1).T]  # the last is given
    large = F.interpolate(rgb, scale_factor=8, mode="bilinear")
    patches = encoder.trunk.patch_embed.proj(normalize(large, encoder.mean, encoder.std))[0]  # (C,8h,8w)
    y, x = point[0] * 8 * h - 0.5, point[1] * 8 * w - 0.5
    query = torch.zeros(patches.shape[0], dtype=patches.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            query = query + share * patches[:, min(max(row, 0), 8 * h - 1), min(max(column, 0), 8 * w - 1)]
    place = torch.tensor([[point[0] * h, point[1] * w]]).to(query)
    places = torch.tensor([[m + 0.5, n + 0.5] for m in range(h) for n in range(w)]).to(query)
    nearest = int(place[0, 0]) * w + int(place[0, 1])
    inside = [2 * (place[0, k] - int(place[0, k])) - 1 for k in (1, 0)]
    freqs = [1 + 4 * i / 15 for i in range(16)]
    code = torch.stack([(math.pi * f * z).sin() for z in inside for f in freqs]
                       + [(math.pi * f * z).cos() for z in inside for f in freqs] + inside)  # fmt: skip
    for block, tokens in zip(peer.vit_up_blocks, layers, strict=True):
        query = query + block.transition_mlp.mlp(query)
        attention, found = block.cross_attention, []
        q, t = attention.q_proj(block.norm_q_global(query)), block.norm_h_global(tokens)
        k, v = attention.k_proj(t), attention.v_proj(t)
        for head in range(len(query) // 64):
            own = slice(64 * head, 64 * head + 64)
            turned = rotated(q[own][None, None, None], place)[0, 0, 0], rotated(k[None, None, :, own], places)[0, 0]
            found.append((turned[1] @ turned[0] / 8).softmax(0) @ v[:, own])
        query = query + attention.out_proj(torch.cat(found))
        gain, shift = block.featx.gamma_beta_mlp.mlp(code).chunk(2)
        local = block.featx.norm_input(tokens[nearest]) * (1 + gain) + shift
        query = query + block.norm_h_local(block.featx.post_mlp.mlp(local))
        query = query + block.mlp.mlp(block.norm_post(query))
    return peer.decoder_mlp[-1].mlp(query)


@torch.no_grad()
def test_vit_up_is_its_definition(perturbed):
    peer = perturbed(peer_from_config({"peer": "vit_up", "encoder": "embedded"})).double()
    image, features = torch.randn(1, 3, 32, 48).double(), torch.randn(1, 192, 2, 3).double()
    output = peer(image, features, (5, 7))
    for i, j in ((0, 0), (2, 3), (4, 1), (1, 6)):
        expected = slow_vit_up(peer, image, features, ((i + 0.5) / 5, (j + 0.5) / 7))
        torch.testing.assert_close(
            output[0, :, i, j], expected, atol=1e-6, rtol=0
        )  # the encoder's range check is single


def test_vit_up_gives_a_point_the_same_whatever_the_grid(vit_up, monkeypatch):
    image, features = torch.randn(1, 3, 32, 48), torch.randn(1, 192, 2, 3)
    with torch.no_grad():
        fine = vit_up(image, features, (15, 21))
        torch.testing.assert_close(fine[..., 1::3, 1::3], vit_up(image, features, (5, 7)), atol=1e-4, rtol=1e-4)
        monkeypatch.setattr("experiments.peers.vit_up._QUERIES_AT_ONCE", 50)
        torch.testing.assert_close(vit_up(image, features, (15, 21)), fine, atol=1e-4, rtol=1e-4)


def test_vit_up_looks_at_every_second_layer():
    for name, layers in (("embedded", [1, 3]), ("vit_tiny16", [1, 3, 5, 7, 9, 11])):
        with torch.device("meta"):
            peer = ViTUp(name, "random")
        assert peer.layers == layers
        assert (len(peer.vit_up_blocks), len(peer.decoder_mlp)) == (len(layers), len(layers) + 1)


# FeatUp's implicit form


def test_moves_and_no_move():
    x = torch.rand(1, 2, 10, 12)
    still = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])
    torch.testing.assert_close(moved(x, still), x)
    torch.testing.assert_close(moved(x, still * torch.tensor([-1.0, 1, 1])), x.flip(-1))
    right = still.clone()
    right[0, 0, 2] = 2 * 3 / 12  # three pixels of twelve
    torch.testing.assert_close(moved(x, right)[..., :9], x[..., 3:])
    torch.testing.assert_close(moved(x, right)[..., 9:], x[..., 9:].flip(-1))  # mirrored at the border
    moves = drawn_moves(2000, (100, 200))
    zoom = 1 / moves[:, 1, 1]
    assert 1 <= zoom.min() < 1.01
    assert 1.79 < zoom.max() <= 1.8
    assert 0.4 < (moves[:, 0, 0] < 0).float().mean() < 0.6
    far = moves[:, :, 2].abs() + torch.stack([moves[:, 0, 0].abs(), moves[:, 1, 1]], 1)  # of a window's border
    limit = 1 + 2 * 30 / torch.tensor([200.0, 100.0])
    assert (far <= limit + 1e-6).all()
    assert (far.amax(0) > limit - 0.05).all()


def test_pooling_is_its_definition():
    pool = Pooling(3, 5, (3, 4)).double().eval().requires_grad_(False)
    fine = torch.randn(1, 3, 12, 15).double()
    axis = torch.exp(-0.5 * torch.arange(-2.0, 3).double() ** 2)
    kernel = torch.outer(axis / axis.sum(), axis / axis.sum())
    padded = F.pad(fine, (2, 2, 2, 2), mode="reflect")[0]
    blurred = torch.stack([
        torch.stack([(padded[:, i : i + 5, j : j + 5] * kernel).sum((1, 2)) for j in range(15)], 1) for i in range(12)
    ], 1)  # fmt: skip
    layer, found = pool.attention[1], pool(fine)[0]
    for m in range(3):
        for n in range(4):
            window = blurred[:, 3 * m : 3 * m + 5, 3 * n : 3 * n + 5].flatten(1)  # strides (12-5)//2 and (15-5)//3
            logits = layer.weight[0, :, 0, 0] @ window + layer.bias
            weights = (logits * pool.gain[:, 0] + pool.bias[:, 0]).softmax(0)
            torch.testing.assert_close(found[:, m, n], window @ weights)


def test_a_step_has_the_gradients_of_the_whole_loss():
    """Although views are taken one by one. Without dropout, which is drawn anew."""
    torch.manual_seed(3)
    parts = [Network(4), Pooling(5, 3, (2, 3)), Scale(4)]
    modules = nn.ModuleList(parts).double().eval()
    rgb, moves = torch.rand(1, 3, 6, 9).double(), drawn_moves(3, (6, 9)).double()
    targets = torch.randn(3, 4, 2, 3).double()
    total = step(*parts, rgb, moves, targets)
    found = [parameter.grad.clone() for parameter in modules.parameters()]
    modules.zero_grad()
    network, pool, scale = parts
    fine = network(network.pixels(rgb, rgb))
    both = torch.cat([magnitude(fine), fine], 1)
    pooled = torch.cat([pool(moved(both, move[None])) for move in moves])
    loss = view_loss(pooled, targets, scale(targets)) + 0.05 * variation(both[:, :1]) + 0.1 * blur_loss(fine)
    loss.backward()
    assert total == pytest.approx(loss.item())
    for ours, parameter in zip(found, modules.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)
        assert parameter.grad.any()


def test_the_loss_of_views_is_its_definition():
    pooled, target, scale = torch.randn(2, 5, 1, 2), torch.randn(2, 4, 1, 2), torch.rand(2, 1, 1, 2) + 0.5
    error = [(pooled[b, 1 + k, 0, j] - target[b, k, 0, j]) ** 2 / (2 * scale[b, 0, 0, j] ** 2) + scale[b, 0, 0, j].log()
             for b in range(2) for k in range(4) for j in range(2)]  # fmt: skip
    lengths = [((pooled[b, 0, 0, j] - target[b, :, 0, j].norm()) ** 2
                + (pooled[b, 1:, 0, j].norm() - target[b, :, 0, j].norm()) ** 2)
               for b in range(2) for j in range(2)]  # fmt: skip
    expected = sum(error) / 16 + 0.001 * sum(lengths) / 4
    torch.testing.assert_close(view_loss(pooled, target, scale), expected)


def test_components_are_those_of_most_variance():
    basis = torch.linalg.qr(torch.randn(6, 6).double())[0]
    features = (torch.randn(4, 25, 6).double() * torch.tensor([5.0, 3, 1, 0, 0, 0])) @ basis.T + 2
    features = features.movedim(-1, 1).unflatten(2, (5, 5))
    mean, axes = principal_axes(features, 3)
    again = torch.einsum("vchw,cd,ed->vehw", features - mean[:, None, None], axes, axes) + mean[:, None, None]
    torch.testing.assert_close(again, features)
    assert principal_axes(features, 128)[1].shape == (6, 6)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3).double())


def test_coordinates_and_colours_of_other_sizes_are_those_of_the_fit():
    rgb = torch.rand(1, 3, 6, 8)
    own = Network.pixels(rgb, rgb)
    torch.testing.assert_close(own[0, 0, :, 0], torch.linspace(-1, 1, 6))
    torch.testing.assert_close(own[0, 1, 0], torch.linspace(-1, 1, 8))
    assert own[:, 2:].amin((0, 2, 3)).tolist() == [-0.5] * 3
    third = Network.pixels(rgb[..., ::2, ::2], rgb)
    fine = Network.pixels(F.interpolate(rgb, (18, 24)), rgb)
    torch.testing.assert_close(fine[:, :2, 1::3, 1::3], own[:, :2])  # the middle of a pixel
    torch.testing.assert_close(third[:, 2:], own[:, 2:, ::2, ::2])


class MeanColours(Backbone):
    """Six mixtures of the colours, averaged over patches of 8 pixels: what is to be found behind the grid is known."""

    def __init__(self):
        super().__init__("mean_colours", (6,), (8,), (0.5,) * 3, (0.5,) * 3)
        self.register_buffer("mix", torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))

    def fine(self, image):
        return torch.einsum("bchw,dc->bdhw", image, self.mix)

    def features(self, image, layer):
        return F.avg_pool2d(self.fine(image), 8)


@pytest.fixture
def mean_colours(monkeypatch):
    encoder = MeanColours().freeze()
    monkeypatch.setattr("experiments.peers.encoders.load_backbone", lambda name, weights: encoder)
    return encoder


def test_the_fit_finds_what_lies_behind_the_grid(mean_colours):
    """A disc: closer to the features of each pixel than interpolation is, and more so the longer it is fitted."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    rgb = (0.2 + 0.6 * (x**2 + y**2 < 0.4).float()).expand(1, 3, -1, -1)
    features, truth = mean_colours(rgb), mean_colours.fine(normalize(rgb, mean_colours.mean, mean_colours.std))
    errors = []
    for steps in (0, 20, 200):
        settings = {"num_steps": steps, "num_views": 60, "views_per_step": 3, "kernel": 9}
        peer = peer_from_config({"peer": "featup_implicit", "encoder": "mean_colours", **settings})
        errors.append((peer(imagenet_normalize(rgb), features) - truth).square().mean().item())
    interpolated = F.interpolate(features, (32, 32), mode="bilinear")
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * (interpolated - truth).square().mean()


# Refusals

REFUSED = [
    ({"peer": "vit_up"}, "peer=vit_up needs a value for encoder"),
    (
        {"peer": "vit_up", "encoder": "hog8"},
        "peer=vit_up: vit_up looks at the layers of a ViT of timm, and hog8 is non",
    ),
    ({"peer": "vit_up", "encoder": "unheard_of"}, "peer=vit_up: no backbone is called 'unheard_of'; there are"),
    ({"peer": "featup_implicit"}, "peer=featup_implicit needs a value for encoder"),
    ({"peer": "featup_implicit", "encoder": "hog8", "num_views": 0}, "num_views, views_per_step, components and ker"),
    (
        {"peer": "featup_implicit", "encoder": "hog8", "encoder_weights": "gone.pth"},
        "its encoder_weights gone.pth does",
    ),
]


@pytest.mark.parametrize(("node", "message"), REFUSED, ids=str)
def test_settings_that_they_cannot_have(node, message):
    with pytest.raises(SettingError, match=message):
        peer_from_config(node)


def test_features_that_the_encoder_does_not_give_are_refused():
    image, features = of_hog()
    peer = FeatUpImplicit("hog8", num_steps=0, num_views=1, kernel=9).eval()
    with pytest.raises(
        CannotUpsample, match=r"these are not the features of encoder hog8 \(mean cosine -?0.\d\d\): set"
    ):
        peer(image, features.roll(40, dims=1).sign() * torch.randn_like(features))
    with pytest.raises(CannotUpsample, match="takes features of 87 channels, got 5"):
        peer(image, features[:, :5])
    peer.kernel = 37
    with pytest.raises(
        CannotUpsample, match=r"kernels of 37 pixels, one for each feature, do not fit into .* 40x48: set"
    ):
        peer(image, features)


def test_nothing_is_fitted_unless_it_is_named():
    from experiments.peers import named_peers

    assert not {"vit_up", "featup_implicit", "upsample_anything"} & set(named_peers(None))
    with pytest.raises(SettingError, match="needs a value for encoder"):
        make_peer("featup_implicit")
