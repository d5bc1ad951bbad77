"""The contract of all peers, driven by one table. A peer without a row fails.

A row says how to make the peer small, and what is true of it. Weights are new ones, moved off their initial values.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from core.backbones import load_backbone
from core.registry import discover, signature_fields
from experiments.peers import CannotUpsample, Peer, peer_from_config, peer_identity, peers
from experiments.peers.base import peer_settings
from experiments.peers.guidance import rgb_of, sized
from experiments.settings import SettingError
from experiments.sweeps.arms import composed
from experiments.training.loop import train

SIZES = [  # image, features, output: odd, not square, not a whole number of times
    ((37, 53), (5, 7), (13, 17)),
    ((24, 32), (3, 4), None),
    ((31, 18), (4, 9), (29, 11)),
    ((20, 20), (7, 6), (3, 4)),  # smaller than the features
]
NOT_CHANGING = {"weights", "channels", "any_size", "checkpoint", "encoder", "encoder_weights"}
"""Settings that leave the output of a call as it is, or say whose features are upsampled."""


@dataclass
class Row:
    """What is true of one peer."""

    weights: str = ""
    """Of the features in each output: `mean`, positive and with sum 1; `sum 1`; or nothing of that kind."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Another value than the default for each setting; each of them changes the output."""
    made: dict[str, Any] = field(default_factory=dict)
    """Settings that it is made with here."""
    of: str = ""
    """The encoder whose features it takes; empty: it takes random ones."""
    channels: tuple[int, ...] = (7, 1, 384)
    sizes: list = field(default_factory=lambda: SIZES)
    """The first size, and number of channels, is used by all other tests."""
    mirrors: bool = True
    """Whether a mirrored image and mirrored features give the mirrored output."""
    trains: dict[str, Any] | None = None
    """Settings with which `experiments.train` trains it on `of`, or on the 87 channels of `hog8`; None: it has no
    weights."""
    roundings: int = 256
    """An output's error in units of rounding of the largest feature. Of a mean of at most 25 products, each weight,
    and their sum, is rounded about 5 times."""
    refused: dict[str, tuple[tuple, int, str]] = field(default_factory=dict)
    """What is refused: title -> (image, grid, output), C, the reason."""


ROWS = {
    "nearest": Row("mean"),
    "bilinear": Row("mean"),
    "bicubic": Row("sum 1"),
    "joint_bilateral": Row("mean", {"window": 3, "sigma_space": 1.5, "sigma_colour": 0.05}),
    "lanczos": Row("sum 1"),
    "area_bilinear": Row("mean", {"shrink": 3}),
    "guided_filter": Row("sum 1", {"radius": 2, "ridge": 0.1}, roundings=2**14),  # inverts variances near the ridge
    "anyup": Row("mean", made={"checkpoint": "bundled"}, mirrors=False, trains=None, channels=(7, 384)),
    "anyup_bilateral": Row("mean", {"share": 0.2}, made={"checkpoint": "bundled"}, mirrors=False, channels=(7, 384)),
    "anyup_guided": Row("sum 1", {"share": 0.2}, {"checkpoint": "bundled"}, mirrors=False, channels=(7, 384)),
    "anyup_regression": Row("sum 1", {"ridge": 0.3}, {"checkpoint": "bundled"}, mirrors=False, channels=(7, 384)),
    "jafar": Row(
        "mean",
        {"embed_dim": 32, "num_heads": 2},
        {"channels": 7, "embed_dim": 16},
        mirrors=False,
        trains={"channels": 87, "embed_dim": 16},
        refused={"fixed C": (SIZES[0], 8, "takes features of 7 channels, got 8: choose the backbone")},
    ),
    "naf": Row(
        "mean",
        {"embed_dim": 64, "num_heads": 2, "window": 3, "num_blocks": 1},
        {"embed_dim": 32},
        mirrors=False,
        trains={"embed_dim": 32, "window": 3},
    ),
    "featup_jbu": Row(
        "",
        {"stages": 1},
        {"channels": 7, "stages": 2, "any_size": True},
        sizes=[*SIZES[:3], ((20, 20), (7, 6), (3, 4)), ((40, 24), (5, 3), (20, 12))],
        mirrors=False,
        trains={"channels": 87, "stages": 1},
        refused={
            "fixed C": (SIZES[0], 8, "takes features of 7 channels, got 8"),
            "grid below its window": (((8, 8), (1, 5), (8, 8)), 7, "reflects 3 pixels .* at least 2x2, got 1x5"),
        },
    ),
    "featup_implicit": Row(
        "",
        {"num_steps": 3, "num_views": 4, "views_per_step": 1, "components": 8, "kernel": 5},
        {"encoder": "hog8", "num_steps": 2, "num_views": 3, "views_per_step": 2, "components": 16, "kernel": 7},
        of="hog8",
        channels=(87,),
        mirrors=False,
        refused={"not its features": (SIZES[0], 86, "takes features of 87 channels, got 86")},
    ),
    "lift": Row(
        "",
        {"patch": 8, "num_steps": 2},
        {"channels": 8, "any_size": True},
        mirrors=False,
        trains={"channels": 87},
        refused={"fixed C": (SIZES[0], 7, "takes features of 8 channels, got 7")},
    ),
    "loftup": Row(
        "",
        {"num_heads": 2},
        {"channels": 8},
        mirrors=False,
        trains={"channels": 87, "num_heads": 1},
        refused={"fixed C": (SIZES[0], 7, "takes features of 8 channels, got 7")},
        roundings=1024,  # its layer norms divide by deviations
    ),
    "raysup": Row("mean", {"embed_dim": 32, "num_heads": 2, "window": 4}, {"embed_dim": 64}, mirrors=False, trains={}),
    "uplift": Row(
        "mean",
        {"patch": 14},
        {"channels": 8},
        mirrors=False,
        trains={"channels": 87},
        refused={"fixed C": (SIZES[0], 7, "takes features of 8 channels, got 7")},
    ),
    "upsample_anything": Row("mean", {"num_steps": 4, "radius": 3}, {"num_steps": 2}),
    "vit_up": Row(
        "",
        {},
        {"encoder": "embedded"},
        of="embedded",
        channels=(192,),
        sizes=[((37, 53), (2, 3), (13, 17)), ((24, 32), (3, 4), None), ((20, 20), (7, 6), (3, 4))],
        mirrors=False,
        trains={"encoder": "embedded"},
        refused={"fixed C": (SIZES[0], 7, "takes features of 192 channels, got 7")},
    ),
}
every_peer = pytest.mark.parametrize("name", list(ROWS))
learned = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.trains is not None])


@pytest.fixture
def make(perturbed):
    """name, more settings -> the peer, in eval mode."""
    return lambda name, **more: perturbed(peer_from_config({"peer": name, **ROWS[name].made, **more})).eval()


def inputs(name, size=None, batch=1, channels=None):
    image, grid, _ = size or ROWS[name].sizes[0]
    image = 0.2 * torch.randn(batch, 3, *image)
    if ROWS[name].of and channels in (None, *ROWS[name].channels):
        encoder = load_backbone(ROWS[name].of)
        seen = sized(rgb_of(image), tuple(n * encoder.patch_size for n in grid))
        return image, encoder(seen).detach()
    channels = channels or ROWS[name].made.get("channels") or ROWS[name].channels[0]
    return image, torch.randn(batch, channels, *grid)


def output_of(name):
    image, _, output = ROWS[name].sizes[0]
    return output or image


def close(ours, theirs, features, name):
    """Equal but for roundings of values as large as the features."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, atol=ROWS[name].roundings * eps * features.abs().max().item(), rtol=0)


def test_every_peer_has_a_row():
    assert set(ROWS) == set(peers())
    for name, cls in peers().items():
        fields = set(signature_fields(cls)) - NOT_CHANGING
        assert set(ROWS[name].settings) == fields, name
        assert ("weights" in signature_fields(cls)) == (ROWS[name].trains is not None), name


@every_peer
def test_any_size_and_number_of_channels(name, make):
    row = ROWS[name]
    for channels in [row.made["channels"]] if "channels" in row.made else row.channels:
        for size in row.sizes:
            image, features = inputs(name, size, channels=channels)
            given = image.clone(), features.clone()
            upsampled = make(name)(image, features, size[2])
            assert upsampled.shape == (1, channels, *(size[2] or size[0])), size
            assert upsampled.isfinite().all(), size
            assert torch.equal(image, given[0]), size
            assert torch.equal(features, given[1]), size


@every_peer
def test_images_of_a_batch_do_not_see_each_other(name, make):
    image, features = inputs(name, batch=3)
    peer, size = make(name), output_of(name)
    together = peer(image, features, size)
    for i in range(3):
        close(together[i : i + 1], peer(image[i : i + 1], features[i : i + 1], size), features, name)


@every_peer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_features(name, dtype, make):
    image, features = inputs(name)
    upsampled = make(name).to(dtype)(image.to(dtype), features.to(dtype), output_of(name))
    assert upsampled.dtype == dtype
    assert upsampled.isfinite().all()


@every_peer
def test_the_same_inputs_give_the_same_output(name):
    image, features = inputs(name)
    node, size = {"peer": name, **ROWS[name].made}, output_of(name)
    first = peer_from_config(node)(image, features, size)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(peer_from_config(node)(image, features, size), first)
    assert torch.equal(torch.get_rng_state(), before)  # and nobody else's random numbers change


@every_peer
def test_weights_have_the_sum_1_and_no_mean_leaves_the_features(name, make):
    image, features = inputs(name)
    peer, size = make(name), output_of(name)
    if not ROWS[name].weights:
        assert not peer.linear_in_values
        return
    constant = torch.full_like(features, 2.0)
    close(peer(image, constant, size), torch.full((1, features.shape[1], *size), 2.0), constant, name)
    if ROWS[name].weights == "mean":
        slack = ROWS[name].roundings * torch.finfo(torch.float32).eps * features.abs().max()
        upsampled = peer(image, features, size)
        assert (upsampled.amax((2, 3)) <= features.amax((2, 3)) + slack).all()
        assert (upsampled.amin((2, 3)) >= features.amin((2, 3)) - slack).all()


@pytest.mark.parametrize("name", [name for name in ROWS if peers()[name].linear_in_values])
def test_a_linear_head_may_come_first(name, make):
    """Where a class says so: W up(F) = up(W F)."""
    image, features = inputs(name)
    weight, peer, size = torch.randn(5, features.shape[1]) / features.shape[1] ** 0.5, make(name), output_of(name)
    after = torch.einsum("kc,bcij->bkij", weight, peer(image, features, size))
    peer.channels = None  # classes instead of channels
    close(peer(image, torch.einsum("kc,bcij->bkij", weight, features), size), after, features, name)


@every_peer
@pytest.mark.parametrize("axis", [-1, -2])
def test_no_half_cell_shift(name, axis, make):
    if not ROWS[name].mirrors:
        pytest.skip("it has a position embedding or kernels without this symmetry")
    image, features = inputs(name, ((24, 32), (3, 4), None))
    mirrored = make(name)(image.flip(axis), features.flip(axis), (6, 8)).flip(axis)
    close(mirrored, make(name)(image, features, (6, 8)), features, name)


@every_peer
def test_settings_go_through_a_configuration_and_back(name):
    row = ROWS[name]
    usual = {key: default for key, (_, default) in signature_fields(peers()[name]).items()}
    node = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create({"peer": name, **row.made, **row.settings})))
    assert peer_settings(node) == {"name": name, **usual, **row.made, **row.settings}
    image, features = inputs(name)
    default = peer_from_config({"peer": name, **row.made})(image, features, output_of(name))
    for key, value in row.settings.items():
        changed = {"peer": name, **row.made, key: value}
        assert not torch.equal(peer_from_config(changed)(image, features, output_of(name)), default), key
        assert peer_identity(changed) != peer_identity({"peer": name, **row.made})
        written_out = {"peer": name, **row.made, key: row.made.get(key, usual[key])}
        assert peer_identity(written_out) == peer_identity({"peer": name, **row.made})  # the default, written out


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, row in ROWS.items() for case in row.refused], ids=str
)
def test_what_it_does_not_support_is_refused(name, case, make):
    size, channels, reason = ROWS[name].refused[case]
    image, features = inputs(name, size, channels=channels)
    with pytest.raises(CannotUpsample, match=reason):
        make(name)(image, features, size[2])


# Those that learn


@learned
def test_every_weight_that_asks_for_one_gets_a_gradient(name, make):
    image, features = inputs(name, batch=2)
    peer = make(name).train()
    loss = peer(image, features, output_of(name)).square().mean()
    loss.backward()
    for key, weight in peer.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, key
            assert weight.grad.isfinite().all(), key
            assert weight.grad.any(), key


@learned
def test_weights_and_settings_go_through_a_file(name, make, tmp_path):
    row, (image, features) = ROWS[name], inputs(name)
    peer = make(name, **{key: value for key, value in row.settings.items() if key not in row.made})
    peer.save(tmp_path / "w.safetensors")
    again = peer_from_config({"peer": name, "weights": str(tmp_path / "w.safetensors")})
    expected = {key: value for key, value in peer.settings.items() if key != "weights"}
    assert {key: value for key, value in again.settings.items() if key != "weights"} == expected
    assert torch.equal(again(image, features, output_of(name)), peer(image, features, output_of(name)))
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-40])
    with pytest.raises(SettingError, match=f"peer={name}: .*damaged"):
        peer_from_config({"peer": name, "weights": str(tmp_path / "w.safetensors"), **row.made})


@learned
def test_it_trains_two_steps(name, tmp_path):
    discover()
    quick = [f"backbones=[{{name: {ROWS[name].of or 'hog8'}}}]", "views.view=32", "batch_size=1", "views.crops=1",
             "data.last=2", "steps=2", "validate_every=0", "objective.self_consistency=0", "tracking.enabled=false",
             "device=cpu", f"out_dir={tmp_path}"]  # fmt: skip
    settings = [f"peer.{key}={value}" for key, value in ROWS[name].trains.items()]
    trained = train(composed("train", [*quick, f"peer={name}", *settings]))
    before = peer_from_config({"peer": name, **ROWS[name].trains}).state_dict()
    after = peer_from_config({"peer": name, "weights": str(trained.checkpoint)})
    assert isinstance(after, Peer)
    moved = [key for key, value in after.named_parameters() if not torch.equal(value, before[key])]
    assert set(moved) == {key for key, value in after.named_parameters() if value.requires_grad}
