"""Peers in AnyUp's place in a training: what is written, resumed, refused, and how sweeps and evaluations take it."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from core.registry import discover
from experiments.peers import CannotUpsample, Peer, peer_from_config, peer_identity, register_peer
from experiments.peers.base import peer_settings, resampled
from experiments.settings import SettingError
from experiments.sweeps.arms import composed, read_arms
from experiments.sweeps.members import Member
from experiments.training.loop import train
from experiments.training.setup import deciding_settings
from experiments.training.state import ChangedConfig

TINY = ["backbones=[{name: hog8}]", "views.view=32", "batch_size=2", "views.crops=2", "data.last=3",
        "objective.self_consistency_size=8", "steps=4", "checkpoint_every=2", "validate_every=2",
        "val_images=1", "val_data.first=2", "log_every=1",
        "tracking.enabled=false", "device=cpu"]  # fmt: skip


@pytest.fixture
def blend(own_registry):
    """A peer made for one encoder, with dropout and a weight that no output depends on."""

    @register_peer("blend")
    class Blend(Peer):
        def __init__(self, weights: Path | None = None, channels: int | None = None, gain: float = 1.0):
            super().__init__()
            self.channels = self.channels_of(weights, "layer.weight", channels)
            self.gain, self.drop = gain, nn.Dropout2d(0.5)
            self.layer, self.unused = nn.Conv2d(self.channels, self.channels, 1), nn.Linear(2, 2).requires_grad_(False)
            if weights is not None:
                self.load_weights(weights)

        @classmethod
        def own_names(cls, state):
            return {name.removeprefix("theirs."): tensor for name, tensor in state.items()}

        def forward(self, image, features, output_size=None):
            size = tuple(image.shape[-2:]) if output_size is None else output_size
            guide = F.interpolate(image.mean(1, keepdim=True), size, mode="area")
            return self.gain * (1 + guide) * F.interpolate(self.drop(self.layer(features)), size, mode="bilinear")

    return Blend


def config(tmp_path, *overrides):
    discover()
    return composed("train", [*TINY, f"out_dir={tmp_path}", *overrides])


def tensors(path):
    return load_file(path) if Path(path).exists() else {}


CHANNELS = "peer.channels=87"  # of hog8


def test_a_trained_peer_is_saved_and_loads_as_a_peer(blend, tmp_path):
    trained = train(config(tmp_path, "peer=blend", CHANNELS, "peer.gain=2.5"))
    node = {"peer": "blend", "weights": str(trained.checkpoint)}
    assert peer_settings(node) == {"name": "blend", "weights": trained.checkpoint, "channels": 87, "gain": 2.5}
    peer = peer_from_config(node)
    new = peer_from_config({"peer": "blend", "channels": 87})
    assert peer.channels == 87
    assert not torch.equal(peer.layer.weight, new.layer.weight)  # trained
    assert torch.equal(peer.unused.weight, new.unused.weight)
    assert trained.best is not None
    assert set(trained.state.validation) >= {"val/detail", "val/hog8/gain"}
    with safe_open(trained.checkpoint, "pt") as file:
        assert json.loads(file.metadata()["peer"]) == {"name": "blend", "channels": 87, "gain": 2.5}


def test_a_resumed_training_of_a_peer_ends_as_an_undisturbed_one(blend, tmp_path):
    """Although its dropout draws random numbers."""
    whole = train(config(tmp_path / "whole", "peer=blend", CHANNELS))
    train(config(tmp_path / "parts", "peer=blend", CHANNELS, "stop_after=2"))
    torch.manual_seed(7)
    parts = train(config(tmp_path / "parts", "peer=blend", CHANNELS))
    expected, found = tensors(whole.checkpoint), tensors(parts.checkpoint)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ChangedConfig, match=r"peer.gain=2.0 \(was 1.0\)"):
        train(config(tmp_path / "parts", "peer=blend", CHANNELS, "peer.gain=2"))
    with pytest.raises(ChangedConfig, match=r"settings: .*peer.name=absent \(was blend\)"):
        train(config(tmp_path / "parts"))


def test_a_training_goes_on_from_the_weights_of_a_peer(blend, tmp_path):
    weight = {"theirs.layer.weight": torch.eye(87)[..., None, None], "theirs.layer.bias": torch.zeros(87),
              "theirs.unused.weight": torch.ones(2, 2), "theirs.unused.bias": torch.ones(2)}  # fmt: skip
    torch.save({"state_dict": weight}, tmp_path / "theirs.ckpt")
    still = ["optimiser.lr=0", "optimiser.weight_decay=0", "steps=1", "validate_every=0"]
    trained = train(config(tmp_path / "a", "peer=blend", f"peer.weights={tmp_path / 'theirs.ckpt'}", *still))
    again = peer_from_config({"peer": "blend", "weights": str(trained.checkpoint)})
    assert torch.equal(again.layer.weight, weight["theirs.layer.weight"])
    save_file({name.removeprefix("theirs."): 2 * one for name, one in weight.items()}, tmp_path / "b.safetensors")
    others = [deciding_settings(config(tmp_path, "peer=blend", f"peer.weights={tmp_path / name}"))["peer"]
              for name in ("theirs.ckpt", "b.safetensors")]  # fmt: skip
    assert others[0] != others[1]  # by content


def test_the_seed_decides_the_initial_weights(blend, tmp_path):
    first, again, other = (peer_from_config({"peer": "blend", "channels": 3}, seed).layer.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_generator_decides_the_random_numbers_of_train_mode(blend):
    peer = peer_from_config({"peer": "blend", "channels": 64}).train()
    image, features = torch.randn(1, 3, 16, 16), torch.randn(1, 64, 4, 4)

    def drawn(seed):
        return peer(image, features, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.get_rng_state(), before)


REFUSED = [
    (["peer=blend"], "peer=blend: it is made for one encoder: give weights=FILE, or for new weights channels=C"),
    (["peer=blend", "peer.channels=8"], "backbone hog8 has 87: set peer.channels=87, or choose the backbone"),
    (["peer=bilinear"], "peer=bilinear has no weights to train"),
    (["peer=blend", CHANNELS, "attention=global"], "in the place of AnyUp: leave out attention"),
    (["peer=blend", CHANNELS, "init_from=bundled"], "leave out init_from; peer.weights=FILE starts from its weights"),
    (["peer=blend", CHANNELS, "freeze=[layers]"], "freeze=layers: the model has no such part; there are: drop, layer"),
    (["peer=twice"], "peer=twice enlarges 4 times, and the targets are 2 times finer: set views.scale=4, or peer.any"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_what_cannot_be_trained_is_refused(blend, tmp_path, overrides, message):
    @register_peer("twice")
    class Twice(Peer):
        factor = 4

        def __init__(self, any_size: bool = False):
            super().__init__()
            self.any_size, self.layer = any_size, nn.Conv2d(1, 1, 1)

        def forward(self, image, features, output_size=None):
            return (
                self.layer(features.flatten(0, 1)[:, None])
                .unflatten(0, features.shape[:2])[:, :, 0]
                .repeat_interleave(4, 2)
                .repeat_interleave(4, 3)
            )

    with pytest.raises(SettingError, match=message):
        train(config(tmp_path, *overrides))
    if overrides == ["peer=twice"]:
        train(config(tmp_path, *overrides, "peer.any_size=true", "steps=1", "validate_every=0"))
        with pytest.raises(CannotUpsample, match="not to 5x8: choose that output size, or set any_size=true"):
            peer_from_config("twice")(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 2, 2), (5, 8))


def test_other_sizes_are_means_where_they_shrink_and_bilinear_where_they_grow():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resampled(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    mixed = resampled(x, (2, 8))
    expected = F.interpolate(x.unflatten(2, (2, 2)).mean(3), (2, 8), mode="bilinear")
    torch.testing.assert_close(mixed, expected)


def test_sweeps_train_peers_as_arms(blend, tmp_path):
    made = composed("ablate", ["experiment=debug/fast", "tracking.enabled=false", "device=cpu"])
    OmegaConf.set_struct(made, False)
    made.out_dir, made.peers, made.ceilings = str(tmp_path / "sweep"), [], []
    made.train = [*TINY, "embed_dim=16", "attention.num_heads=2"]  # AnyUp's are not for the peer
    made.arms = {"baseline": [], "blend": ["peer=blend", CHANNELS], "loud": ["peer=blend", CHANNELS, "peer.gain=2"]}
    baseline, arm, loud = read_arms(made)
    assert (arm.kind, arm.competes, arm.training.peer.name) == ("trained", True, "blend")
    assert "peer" not in deciding_settings(baseline.training)
    assert len({baseline.key(0), arm.key(0), arm.key(1), loud.key(0)}) == 4
    member = Member(loud, 0, [], tmp_path)
    member.complete(made, "")
    model = loud.model(member.folder / "last.safetensors")
    assert (model.choice, model.gain, model.channels) == ("blend", 2, 87)
    assert peer_identity({"peer": "blend", "weights": str(member.folder / "last.safetensors")})["gain"] == 2
