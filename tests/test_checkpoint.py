"""Checkpoints: what is saved comes back, what is published loads, what is broken or dangerous is refused by name."""

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import core
from core.checkpoint import read, rename_published, to_published
from core.reference import ReferenceAnyUp
from core.weight_files import WeightsError

IMAGE, FEATURES = torch.randn(1, 3, 32, 40), torch.randn(1, 5, 4, 6)
SMALL = ["embed_dim=16", "unifier.num_basis=8"]


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    """A state dict with the published names, every weight perturbed."""
    state = ReferenceAnyUp(embed_dim=16, num_basis=8).state_dict()
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["unifier.ordering=released", "unifier.kernel_size=3", "attention.window_ratio=0.2", "attention.num_heads=2"],
        ["unifier=none", "attention=global", "seed=3"],
    ],
)
def test_round_trip_keeps_weights_and_settings(tmp_path, overrides):
    small = [setting for setting in SMALL if "unifier=none" not in overrides or "unifier." not in setting]
    model = core.build(small + overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    core.save(model, tmp_path / "deep" / "model.safetensors")
    loaded = core.load(tmp_path / "deep" / "model.safetensors")
    assert not loaded.training
    assert loaded.config == model.config
    assert torch.equal(loaded(IMAGE, FEATURES), model.eval()(IMAGE, FEATURES))


def test_a_failed_save_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    core.save(core.build(SMALL), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="model.safetensors cannot be written: No space left"):
        core.save(core.build([*SMALL, "seed=1"]), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_filler_without_a_name_cannot_be_saved(tmp_path):
    class Anonymous(core.Decoder):
        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, features, guidance, coords):
            return output

    model = core.AnyUp(embed_dim=16, decoder=Anonymous)
    with pytest.raises(TypeError, match=r"Anonymous.* is not a registered filler .*@register"):
        core.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_checkpoints_load(tmp_path, published, nested, suffix):
    path = tmp_path / f"published{suffix}"
    if suffix == ".safetensors":
        save_file(published, path)
    elif nested:  # as the released training script writes it
        parameter = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()
        settings = OmegaConf.create({"lr": 2e-4, "size": [224, 224], "name": "a", "on": True, "sub": {"none": None}})
        content = {"optimizer_anyup": optimizer.state_dict(), "epoch": 3, "cfg": settings, "anyup": published}
        torch.save(content, path)
    else:
        torch.save(published, path)
    model = core.load(path)
    assert model.config["unifier"]["ordering"] == "released"
    reference = ReferenceAnyUp(embed_dim=16, num_basis=8).double()
    reference.load_state_dict(published)
    expected = reference(IMAGE.double(), FEATURES.double())
    torch.testing.assert_close(model(IMAGE, FEATURES).double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_published_names_and_back(published):
    renamed, _ = rename_published(published)
    again, _ = rename_published(to_published(renamed))
    assert renamed.keys() == again.keys()
    assert all(torch.equal(renamed[name], again[name]) for name in renamed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_files_are_named(tmp_path, published, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(published, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(WeightsError, match=f"cut{suffix}"):
        core.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        core.load(tmp_path / "nowhere.safetensors")


def test_other_architectures_are_refused(tmp_path):
    other = tmp_path / "resnet.safetensors"
    save_file({"layer1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, other)
    with pytest.raises(WeightsError, match=r"resnet.safetensors is not an AnyUp checkpoint: it has 2 tensors such as"):
        core.load(other)
    tampered = tmp_path / "tampered.safetensors"
    core.save(core.build(SMALL), tampered)
    state, metadata = read(tampered)[0], {"format": "anyup_lab/1", "config": _metadata(tampered)["config"]}
    state.pop("attention.conv.weight")
    save_file({**state, "surprise": torch.zeros(1)}, tampered, metadata)
    with pytest.raises(WeightsError, match=r"1 missing \(attention.conv.weight\); 1 unexpected \(surprise\)"):
        core.load(tampered)
    future = tmp_path / "future.safetensors"
    save_file(state, future, {**metadata, "format": "anyup_lab/9"})
    with pytest.raises(WeightsError, match=r"format anyup_lab/9; this version reads anyup_lab/1"):
        core.load(future)


class Bomb:
    """Pickled, it would create a file when loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_malicious_pickle_is_refused_and_not_executed(tmp_path, published):
    target = tmp_path / "executed"
    path = tmp_path / "malicious.pth"
    torch.save({"anyup": published, "cfg": Bomb(target)}, path)
    with pytest.raises(WeightsError, match=r"malicious.pth: refused, .* nothing was executed"):
        core.load(path)
    assert not target.exists()


def test_warm_start_into_a_variant(tmp_path):
    path = tmp_path / "baseline.safetensors"
    baseline = core.build(SMALL)
    core.save(baseline, path)
    variant = core.build(["embed_dim=16", "unifier.num_basis=16", "seed=5"])
    fresh = {name: tensor.clone() for name, tensor in variant.state_dict().items()}
    untouched = core.warm_start(variant, path)
    assert untouched
    assert all(name.startswith("unifier.") for name in untouched)
    for name, tensor in variant.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in untouched else baseline.state_dict()[name]), name
    without = core.build(["embed_dim=16", "unifier=none"])
    assert core.warm_start(without, path) == []
    assert torch.equal(without.attention.conv.weight, baseline.attention.conv.weight)
    wider = core.build(["embed_dim=24"])
    with pytest.raises(WeightsError, match="of another architecture"):
        core.warm_start(wider, path)


def test_save_and_load_through_the_hub_interface(tmp_path):
    model = core.build([*SMALL, "attention=global"])
    model.save_pretrained(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["README.md", "model.safetensors"]
    loaded = core.AnyUp.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert torch.equal(loaded(IMAGE, FEATURES), model.eval()(IMAGE, FEATURES))
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        core.AnyUp.from_pretrained(tmp_path)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    assert load_file(path)
    with safe_open(path, "pt") as file:
        return file.metadata()
