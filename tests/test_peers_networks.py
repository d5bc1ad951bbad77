"""LiFT, UPLiFT, LoftUp, RaysUp and ViT-Up: the parameters and files of the authors, and settings that are refused."""

import hashlib
import re

import pytest
import torch
from safetensors.torch import save_file

from experiments.peers import peer_from_config
from experiments.peers.lift import LiFT
from experiments.peers.loftup import LoftUp
from experiments.peers.raysup import RaysUp
from experiments.peers.uplift import UPLiFT
from experiments.peers.vit_up import ViTUp
from experiments.settings import SettingError

# The authors' parameters: name of a sheet in the shared folder, number of parameters, digest of its names and shapes
MADE = {
    "lift": (lambda: LiFT(channels=384), 1_187_280, "27a77d75a46c99a6"),
    "uplift": (lambda: UPLiFT(channels=384), 789_521, "69e675d6962a9278"),
    "loftup": (lambda: LoftUp(channels=384), 4_303_894, "ae82f1fa944fd518"),
    "raysup": (RaysUp, 102_592, "eef57e455f114671"),
    "vitup": (lambda: ViTUp("dinov3_vits16plus", "random"), 24_273_792, "22e91cff44387e23"),
}
OTHERS = [
    (lambda: LoftUp(channels=512), 7_165_462),
    (lambda: LoftUp(channels=768), 15_051_286),
    (lambda: ViTUp("dinov3_vitb16", "random"), 96_618_240),
]


def lines_of(peer):
    return {f"{name} {tuple(tensor.shape)}" for name, tensor in peer.state_dict().items()}


def digest(lines):
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", list(MADE))
def test_parameters_have_the_names_and_shapes_of_the_authors(name):
    make, count, expected = MADE[name]
    with torch.device("meta"):
        peer = make()
    assert sum(parameter.numel() for parameter in peer.parameters()) == count
    assert digest(lines_of(peer)) == expected


@pytest.mark.parametrize("name", list(MADE))
def test_the_digests_are_those_of_the_sheets(name, shared):
    found = re.findall(r"^   (\S+) (\(.*\))$", shared(f"rivals/{name}.md").read_text(), re.MULTILINE)
    lines = {f"{key} {shape}" for key, shape in found}
    for part, num in (("vit_up_blocks", 6), ("decoder_mlp", 7)):  # of which a sheet lists the first
        lines |= {line.replace(f"{part}.0.", f"{part}.{i}.") for line in lines for i in range(num)}
    assert digest(lines) == MADE[name][2]


@pytest.mark.parametrize(("make", "count"), OTHERS, ids=lambda value: str(value) if isinstance(value, int) else "")
def test_parameters_of_other_widths(make, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == count


# Their files


def saved_lift(state, path):
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)  # of DataParallel


def saved_uplift(state, path):
    save_file(state, path)


def saved_loftup(state, path):
    torch.save(state, path)


def trained_loftup(state, path):
    renamed = {name.replace("channelnorm.", "model.1."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**renamed, "model.0.cls_token": torch.zeros(1)}, "epoch": 1}, path)


def saved_raysup(state, path):
    torch.save({"raysup": state, "step": 3}, path)


FILES = [
    ("lift", saved_lift, "w.pth", {"channels": 6}),
    ("uplift", saved_uplift, "w.safetensors", {"channels": 6}),
    ("loftup", saved_loftup, "w.bin", {"channels": 8}),
    ("loftup", trained_loftup, "w.ckpt", {"channels": 8}),
    ("raysup", saved_raysup, "w.ckpt", {}),
]


@pytest.mark.parametrize(("name", "save", "file", "settings"), FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_authors_files_load(name, save, file, settings, tmp_path, perturbed):
    theirs = perturbed(peer_from_config({"peer": name, **settings}))
    save(theirs.state_dict(), tmp_path / file)
    ours = peer_from_config({"peer": name, "weights": str(tmp_path / file)})  # C is the file's
    image, features = torch.randn(1, 3, 32, 32), torch.randn(1, settings.get("channels", 8), 2, 3)
    size = (4, 6)
    assert torch.equal(ours(image, features, size), theirs.eval()(image, features, size))
    if settings:
        with pytest.raises(SettingError, match=f"its weights take features of {settings['channels']} channels: leave"):
            peer_from_config({"peer": name, "weights": str(tmp_path / file), "channels": 12})
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SettingError, match=f"peer={name}: weights .*other.pth are not those of "):
        peer_from_config({"peer": name, "weights": str(tmp_path / "other.pth")})


REFUSED = [
    ("lift", {"channels": 6, "patch": 14}, "lift needs two channels, patch 8 or 16, and at least one step, got .*14"),
    ("lift", {"channels": 6, "num_steps": 0}, "at least one step, got channels=6, patch=16, num_steps=0"),
    ("lift", {}, "made for one encoder: give weights=FILE, or for new weights channels=C"),
    ("uplift", {"channels": 6, "patch": 0}, "uplift needs a patch of at least one pixel, got patch=0"),
    ("loftup", {"channels": 6}, "loftup has 26 channels for C 6: num_heads=4 cannot share them"),
    ("raysup", {"embed_dim": 48}, "raysup needs embed_dim as a multiple of 32 and of 2 num_heads, .*embed_dim=48"),
    ("raysup", {"window": 0}, "a window of at least one cell, got .*window=0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=str)
def test_settings_that_they_cannot_have(name, settings, message):
    with pytest.raises(SettingError, match=f"peer={name}: .*{message}"):
        peer_from_config({"peer": name, **settings})
