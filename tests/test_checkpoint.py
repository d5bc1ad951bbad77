"""Checkpoints: what is saved comes back, what is published loads, what is broken or dangerous is refused by name."""

import json
import os
import pickle
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import core
from core.checkpoint import read
from core.published import rename_published, to_published
from core.reference import ReferenceAnyUp
from core.weight_files import WeightsError
from experiments.training.state import State, read_state, save_state

IMAGE, FEATURES = torch.randn(1, 3, 32, 40), torch.randn(1, 5, 4, 6)
SMALL = ["embed_dim=16", "unifier.num_basis=8"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    with pytest.raises(OSError, match=r"model.safetensors cannot be written: No space left"):
        core.save(core.build([*SMALL, "seed=1"]), path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]


def test_a_filler_without_a_name_cannot_be_saved(tmp_path):
    class Anonymous(core.Decoder):
        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, context):
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
    torch.testing.assert_close(
        model(IMAGE, FEATURES).double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


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
    with pytest.raises(WeightsError, match=f"cut{suffix}: truncated or damaged .*copy or download it again"):
        core.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
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
    assert names(tmp_path / "saved") == ["README.md", "model.safetensors"]
    loaded = core.AnyUp.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert torch.equal(loaded(IMAGE, FEATURES), model.eval()(IMAGE, FEATURES))
    for other in (core.load(tmp_path / "saved"), core.load(str(tmp_path / "saved"))):
        assert torch.equal(other(IMAGE, FEATURES), loaded(IMAGE, FEATURES))
    assert core.warm_start(core.build([*SMALL, "attention=global"]), tmp_path / "saved") == []


def _metadata(path: Path) -> dict[str, str]:
    assert load_file(path)
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    core.save(core.build(SMALL), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_file_says_what_is_in_it(saved):
    """Weights under the hook points' names, and the configuration as JSON, for other programs."""
    metadata = _metadata(saved)
    assert metadata["format"] == "anyup_lab/1"
    config = json.loads(metadata["config"])
    assert config["unifier"] == {"name": "learned_basis", "num_basis": 8, "kernel_size": 5, "ordering": "paper"}
    assert config["attention"] == {"name": "window", "num_heads": 4, "window_ratio": 0.1}
    assert {name.split(".")[0] for name in load_file(saved)} == {
        "image_encoder", "rotary", "query_encoder", "key_encoder", "aggregation", "unifier", "attention"
    }  # fmt: skip
    assert saved.stat().st_mode & 0o777 == 0o644


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = core.build(SMALL).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    core.save(model, tmp_path / "model.safetensors")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_disk_that_is_really_full(saved):
    """The system itself refuses to write on: files may not grow beyond 10 kB."""
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors cannot be written"):
            core.save(core.build([*SMALL, "seed=1"]), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["model.safetensors"]


def test_an_interrupt_leaves_no_part(saved, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        core.save(core.build([*SMALL, "seed=1"]), saved)
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["model.safetensors"]


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model.safetensors"):
        core.save(core.build(SMALL), tmp_path / "model.safetensors")
    assert names(tmp_path) == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        core.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model.pth", "model"])
def test_other_suffixes_are_refused(tmp_path, name):
    """`load` would take such a file for a pickle."""
    with pytest.raises(ValueError, match=r"safetensors"):
        core.save(core.build(SMALL), tmp_path / name)
    assert not list(tmp_path.iterdir())


# --- reading our own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_dtypes(tmp_path, dtype):
    """Halves are read as they are; the model computes in float32, or where asked."""
    model = core.build(SMALL).to(dtype)
    core.save(model, tmp_path / "model.safetensors")
    loaded = core.load(tmp_path / "model.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].float()), name


def test_loading_leaves_the_random_state_alone_and_does_not_depend_on_it(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = core.load(saved)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), core.load(saved).parameters(), strict=True))


def test_loaded_weights_can_be_trained(saved):
    model = core.load(saved)
    model(IMAGE, FEATURES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def rewritten(path: Path, config: str | None) -> Path:
    """The file with another configuration."""
    metadata = {"format": "anyup_lab/1"} | ({} if config is None else {"config": config})
    save_file(load_file(path), path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"name": "gone"}}, r"attention=gone is not registered; there are: .*global.*window"),
        (
            {"attention": {"name": "window", "reach": 2}},
            r"attention=window has no setting reach; it has: num_heads, wi",
        ),
        (
            {"embed_dim": 24},
            r"model.safetensors is of another architecture than the model: weights .* of another shape",
        ),
        (
            {"unifier": {"name": "none"}},
            r"model.safetensors is of another architecture .* unexpected \(unifier.encoder",
        ),
        ({"embed_dim": 12}, r"embed_dim must be a positive multiple of 8"),
    ],
)
def test_configurations_that_do_not_fit(saved, change, message):
    config = json.loads(_metadata(saved)["config"]) | change
    with pytest.raises(ValueError, match=message):
        core.load(rewritten(saved, json.dumps(config)))


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"embed_dim": 16}', '{"attention": {}}'])
def test_damaged_configurations_are_named(saved, config):
    with pytest.raises(WeightsError, match=r"model.safetensors"):
        core.load(rewritten(saved, config))


def test_a_checkpoint_of_an_extension_that_is_gone(saved, own_registry):
    @core.register("passing")
    class Passing(core.Decoder):
        def __init__(self, embed_dim: int, depth: int = 2):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(depth))

        def forward(self, output, context):
            return output * self.weight.mean()

    core.save(core.build([*SMALL, "decoder=passing", "decoder.depth=3"]), saved)
    assert core.load(saved).decoder.weight.shape == (3,)
    core.registry._fillers["decoder"].known.pop("passing")
    with pytest.raises(ValueError, match=r"decoder=passing is not registered; there are: .*none"):
        core.load(saved)


# --- reading published ones ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", ["anyup", "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_nested_and_older_files(tmp_path, published, nest, zipped):
    path = tmp_path / "nested.pth"
    torch.save({nest: published, "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
    assert core.load(path).config["embed_dim"] == 16


def test_the_training_scripts_whole_configuration(tmp_path, published):
    """Every kind of value that OmegaConf keeps: nothing in it is needed, nothing may be in the way."""
    settings = OmegaConf.create(
        {
            "text": "a",
            "number": 1,
            "real": 0.5,
            "on": False,
            "nothing": None,
            "list": [1, "b", 2.5, None, [3, {"deep": True}]],
            "nested": {"model": {"_target_": "anyup.model.AnyUp", "qk_dim": 16}, "empty": {}, "none": []},
            "pointer": "${nested.model.qk_dim}",
            "missing": "???",
        }
    )
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    content = {"optimizer_anyup": optimizer.state_dict(), "epoch": 7, "cfg": settings, "anyup": published}
    torch.save(content, tmp_path / "whole.pth")
    assert core.load(tmp_path / "whole.pth").config["unifier"]["ordering"] == "released"


def test_a_training_scripts_scheduler_and_scaler(tmp_path, published):
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    content = {"scheduler": scheduler.state_dict(), "best": np.float64(0.5).item(), "anyup": published}
    torch.save(content, tmp_path / "more.pth")
    assert core.load(tmp_path / "more.pth").config["embed_dim"] == 16


@pytest.mark.parametrize("drop", ["image_encoder.0.weight", "rope.freqs", "key_encoder.1.block.0.bias"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_published_state_dict_that_misses_a_weight(tmp_path, published, drop, suffix):
    published.pop(drop)
    path = tmp_path / f"short{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(published, path)
    with pytest.raises(WeightsError, match=r"short\."):
        core.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_features_encoder.0.basis", torch.zeros(8)),
        ("key_features_encoder.0.basis", torch.zeros(8, 1, 3, 5)),
        ("key_features_encoder.0.basis", torch.zeros(9, 1, 5, 5)),
        ("cross_decode.cross_attn.attention.in_proj_weight", torch.zeros(2, 2)),
        ("image_encoder.0.weight", torch.zeros(())),
        ("image_encoder.0.weight", torch.zeros(12, 3, 1, 1)),
        ("rope.freqs", torch.zeros(3, 16)),
    ],
)
def test_a_published_state_dict_of_other_shapes(tmp_path, published, name, value):
    path = tmp_path / "odd.safetensors"
    save_file(published | {name: value}, path)
    with pytest.raises(WeightsError, match=r"odd\.safetensors"):
        core.load(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, published, prefix, suffix):
    path = tmp_path / f"wrapped{suffix}"
    state = {prefix + name: tensor for name, tensor in published.items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert torch.equal(core.load(path).rotary.freqs, published["rope.freqs"])


def test_an_outer_key_is_named_with_the_way_out(tmp_path, published):
    path = tmp_path / "both.pth"
    torch.save({"student": published, "teacher": published, "epoch": 3}, path)
    with pytest.raises(
        WeightsError, match=r"both\.pth: no state dict .*; it has one under each of student, teacher"
    ) as caught:
        core.load(path)
    way_out = re.search(r"torch\.save\(.*\)", str(caught.value)).group()
    assert way_out == "torch.save(torch.load('both.pth', weights_only=True)['student'], \"FILE.pth\")"
    torch.save(torch.load(path, weights_only=True)["student"], path)
    assert core.load(path).config["embed_dim"] == 16


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_outer_name_is_named_with_the_way_out(tmp_path, published, ours, suffix):
    """Not a wrapper's: that it can be taken off would be a guess."""
    path, state = tmp_path / f"ema{suffix}", core.build(SMALL).state_dict() if ours else published
    state = {f"ema.net.{name}": tensor for name, tensor in state.items()} | {"updates": torch.zeros(1)}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    with pytest.raises(WeightsError, match=r"has these weights under ema\.net\.: save them alone, without the prefix"):
        core.load(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bare_state_dict_of_ours_says_what_to_do(tmp_path, suffix):
    path, model = tmp_path / f"bare{suffix}", core.build([*SMALL, "seed=4"])
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    for call in (lambda: core.load(path), lambda: core.warm_start(core.build(SMALL), path)):
        with pytest.raises(WeightsError, match=r"is a bare state dict of this project.*core\.build.*core\.save"):
            call()


@pytest.mark.parametrize(
    "content", [[], {}, {"anyup": None}, {"anyup": {"a": 1}}, torch.zeros(3), "text", {"epoch": 3}]
)
def test_pickles_without_a_state_dict(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"other\.pth: no state dict"):
        core.load(path)


def test_a_whole_module_in_a_pickle_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"module\.pth: refused"):
        core.load(tmp_path / "module.pth")


# --- damage and malice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zipped", "legacy", "safetensors"])
def test_altered_bytes_never_escape_as_another_error(tmp_path, published, kind):
    suffix = ".safetensors" if kind == "safetensors" else ".pth"
    path = tmp_path / f"altered{suffix}"
    if kind == "safetensors":
        save_file(published, path)
    else:
        torch.save({"anyup": published}, path, _use_new_zipfile_serialization=kind == "zipped")
    content, draw, refused = path.read_bytes(), np.random.default_rng(1), 0
    for _ in range(60):
        altered = np.frombuffer(content, np.uint8).copy()
        altered[draw.integers(0, min(len(content), 3000), 6)] = draw.integers(0, 256, 6)
        path.write_bytes(altered.tobytes())
        try:
            core.load(path)
        except WeightsError as error:
            refused += path.name in str(error)
    assert refused > 10


class Call:
    """Pickled, it calls `function` when loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["bare", "in cfg", "under anyup", "as a tensor"])
@pytest.mark.parametrize("how", ["zipped", "legacy", "plain pickle"])
@pytest.mark.parametrize("function", ["system", "exec", "torch"])
def test_malice_in_every_place_is_refused_and_not_executed(tmp_path, published, place, how, function):
    target, path = tmp_path / "executed", tmp_path / "malicious.pth"
    bomb = {
        "system": Call(os.system, f"touch '{target}'"),
        "exec": Call(exec, f"open({str(target)!r}, 'w')"),
        "torch": Call(torch.save, {}, str(target)),
    }[function]
    content = {
        "bare": bomb,
        "in cfg": {"anyup": published, "cfg": {"deep": [bomb]}},
        "under anyup": {"anyup": bomb},
        "as a tensor": {**published, "rope.freqs": bomb},
    }[place]
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zipped")
    with pytest.raises(WeightsError, match=r"malicious\.pth"):
        core.load(path)
    with pytest.raises(WeightsError, match=r"malicious\.pth"):
        core.warm_start(core.build(SMALL), path)
    assert not target.exists()


def test_the_bombs_are_armed(tmp_path):
    """Guards the test above: unpickled carelessly, they do go off."""
    target = tmp_path / "executed"
    pickle.loads(pickle.dumps(Call(exec, f"open({str(target)!r}, 'w').close()")))
    assert target.exists()


def test_what_is_trusted_in_a_checkpoint_stays_there(tmp_path, published):
    """OmegaConf's classes are allowed while a checkpoint is read, and no longer."""
    torch.save({"cfg": OmegaConf.create({"a": 1}), "anyup": published}, tmp_path / "with_cfg.pth")
    core.load(tmp_path / "with_cfg.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "with_cfg.pth", weights_only=True)


def test_suffix_and_content_disagree(tmp_path, published):
    torch.save(published, tmp_path / "pickle.safetensors")
    save_file(published, tmp_path / "tensors.pth")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("pickle.safetensors", "tensors.pth", "archive.pth", "text.pth"):
        with pytest.raises(WeightsError, match=name):
            core.load(tmp_path / name)


# --- warm start ------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_warm_start_of_the_same_model_is_loading(saved):
    model = core.build([*SMALL, "seed=9"])
    assert core.warm_start(model, saved) == []
    with torch.no_grad():
        assert torch.equal(model(IMAGE, FEATURES), core.load(saved)(IMAGE, FEATURES))
    assert model.training
    assert model.config["seed"] == 9


@pytest.mark.parametrize(
    ("variant", "untouched"),
    [
        (["attention=global"], set()),
        (["attention.num_heads=2"], set()),
        (["attention.window_ratio=0.3"], set()),
        (["unifier.ordering=released"], set()),
        (["unifier.kernel_size=3"], {"unifier.encoder.0.basis"}),
    ],
)
def test_warm_start_takes_what_fits_of_a_switched_filler(saved, variant, untouched):
    model = core.build([*SMALL, *variant, "seed=4"])
    fresh, trained = weights(model), weights(core.load(saved))
    assert set(core.warm_start(model, saved)) == untouched
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh if name in untouched else trained)[name]), name


def test_warm_start_into_a_filler_with_weights_of_its_own(saved, own_registry):
    @core.register("gated")
    class Gated(core.Decoder):
        def __init__(self, embed_dim: int):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(3))

        def forward(self, output, context):
            return output * (1 + self.gate.sum())

    variant = core.build([*SMALL, "decoder=gated", "seed=2"])
    assert core.warm_start(variant, saved) == ["decoder.gate"]
    with torch.no_grad():
        assert torch.equal(variant(IMAGE, FEATURES), core.load(saved)(IMAGE, FEATURES))
    core.save(variant, saved)
    back = core.build([*SMALL, "seed=7"])
    assert core.warm_start(back, saved) == []  # and the gate is left out


def test_warm_start_from_the_ablation_into_the_baseline(tmp_path):
    path = tmp_path / "image_only.safetensors"
    core.save(core.build(["embed_dim=16", "unifier=none", "seed=3"]), path)
    model = core.build(SMALL)
    fresh = weights(model)
    untouched = core.warm_start(model, path)
    assert set(untouched) == {name for name in fresh if name.startswith("unifier.")}
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in untouched)
    assert not torch.equal(model.key_encoder[0].weight, fresh["key_encoder.0.weight"])


def test_warm_start_from_a_published_checkpoint(tmp_path, published):
    path = tmp_path / "published.pth"
    torch.save({"anyup": published}, path)
    model = core.build(SMALL)  # ordering: paper
    assert core.warm_start(model, path) == []
    assert torch.equal(model.rotary.freqs, published["rope.freqs"])
    assert torch.equal(model.unifier.encoder[0].basis, published["key_features_encoder.0.basis"])


def tampered(path: Path, drop: str = "", **extra: torch.Tensor) -> Path:
    state, metadata = load_file(path), _metadata(path)
    state.pop(drop, None)
    save_file(state | extra, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "key_encoder.0.weight"}, r"1 missing \(key_encoder.0.weight\)"),
        ({"rotary.more": torch.zeros(2)}, r"1 unexpected \(rotary.more\)"),
        ({"attention.conv.bias": torch.zeros(16)}, r"1 unexpected \(attention.conv.bias\)"),
        ({"drop": "attention.conv.weight"}, r"1 missing \(attention.conv.weight\)"),
        ({"image_encoder.0.weight": torch.zeros(8, 3, 1, 1)}, r"1 of another shape \(image_encoder.0.weight\)"),
    ],
)
def test_warm_start_excuses_only_switched_hook_points(saved, change, message):
    """Here the unifier is switched: nothing else may miss a weight. A refused model is as it was."""
    model = core.build(["embed_dim=16", "unifier=none"])
    fresh = weights(model)
    with pytest.raises(WeightsError, match=message):
        core.warm_start(model, tampered(saved, **change))
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())


def test_warm_start_with_settings_that_are_lists(saved, own_registry):
    """JSON knows no tuples: the same setting must not count as another, which would excuse missing weights."""

    @core.register("sized")
    class Sized(core.Decoder):
        def __init__(self, embed_dim: int, sizes: tuple[int, ...] = (1, 2)):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(len(sizes)))

        def forward(self, output, context):
            return output * self.weight.mean()

    model = core.AnyUp(decoder=Sized, embed_dim=16)
    core.save(model, saved)
    with pytest.raises(WeightsError, match=r"1 missing \(decoder.weight\)"):
        core.warm_start(core.AnyUp(decoder=Sized, embed_dim=16), tampered(saved, drop="decoder.weight"))


# --- wrapped models --------------------------------------------------------------------------------------------------


def wrapped(model: core.AnyUp, how: str) -> nn.Module:
    if how == "compiled part":
        model.image_encoder = torch.compile(model.image_encoder)
        return model
    for wrap in how.split(" of "):
        model = {"compile": torch.compile, "parallel": nn.DataParallel, "average": AveragedModel}[wrap](model)
    return model


@pytest.mark.parametrize(
    "how", ["compile", "parallel", "average", "compile of parallel", "parallel of compile", "compiled part"]
)
def test_a_wrapped_model_is_saved_as_what_is_inside(tmp_path, how):
    model = core.build([*SMALL, "seed=3"])
    config, kept = model.config, weights(model)
    core.save(wrapped(model, how), tmp_path / "model.safetensors")
    loaded = core.load(tmp_path / "model.safetensors")
    assert loaded.config == config
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items())
    assert load_file(tmp_path / "model.safetensors").keys() == kept.keys()


def test_a_model_in_distributed_training_is_saved(tmp_path):
    model = core.build(SMALL)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        core.save(nn.parallel.DistributedDataParallel(model), tmp_path / "model.safetensors")
    finally:
        torch.distributed.destroy_process_group()
    assert core.load(tmp_path / "model.safetensors").config == model.config


def test_a_wrapped_model_is_warm_started(saved):
    model = core.build([*SMALL, "seed=9"])
    assert core.warm_start(torch.compile(model), saved) == []
    assert torch.equal(model.rotary.freqs, core.load(saved).rotary.freqs)
    assert torch.equal(model.key_encoder[0].weight, core.load(saved).key_encoder[0].weight)


def test_what_is_no_anyup_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="DataParallel is no AnyUp, nor a known wrapper of one"):
        core.save(nn.DataParallel(nn.Linear(2, 2)), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_of_a_compiled_model_in_an_earlier_file(saved):
    """What `save` once wrote of a compiled model."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in load_file(saved).items()}
    save_file(state, saved, _metadata(saved))
    assert core.load(saved).config["embed_dim"] == 16


# --- the state of a training -----------------------------------------------------------------------------------------


def test_a_truncated_state_says_what_to_do(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, State(step=3), {"weight": torch.zeros(100)}, {"steps": 5})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"state\.safetensors: truncated.*delete it, .*resume=never.*last\.safe"):
        read_state(path)


class TestFillersAddedToACheckpoint:
    @pytest.fixture
    def saved(self, tmp_path):
        core.save(core.build(["embed_dim=16", "unifier.num_basis=8"]), tmp_path / "plain.safetensors")
        return tmp_path / "plain.safetensors"

    def test_what_has_no_weights_is_there(self, saved, caplog):
        plain, mixed = core.load(saved), core.load(saved, {"temporal": "statistics_drift"})
        assert type(mixed.temporal).__name__ == "StatisticsDrift"
        image, features = torch.randn(1, 3, 16, 16), torch.randn(1, 5, 4, 4)
        assert torch.equal(plain(image, features), mixed(image, features))
        assert not caplog.records
        other = {"temporal": {"name": "statistics_drift", "strength": 0.3}, "attention.window_ratio": 0.3}
        changed = core.load(saved, other)
        assert (changed.temporal.strength, changed.attention.window_ratio) == (0.3, 0.3)
        assert core.load(saved, {"temporal": "statistics_drift", "temporal.strength": 0.2}).temporal.strength == 0.2

    def test_new_weights_are_named_and_the_old_ones_kept(self, saved, caplog):
        mixed = core.load(saved, {"decoder": "inr"})
        assert "decoder.gate" in caplog.text
        assert ": UNTRAINED" in caplog.text
        for name, weight in core.load(saved).state_dict().items():
            assert torch.equal(weight, mixed.state_dict()[name])
        assert not mixed.training

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"temporal": "nobody"}, "temporal=nobody"),
            ({"temporal": {"name": "statistics_drift", "haste": 1}}, "haste"),
            ({"attention": "global"}, "attention=global cannot be added: .*may be replaced by .*pyramid"),
            ({"attention": {"name": "bilateral_prior", "num_heads": 1}}, "attention.num_heads cannot be changed after"),
            ({"embed_dim": 8}, "embed_dim cannot be changed after training; these can: .*attention, decoder"),
        ],
    )
    def test_what_cannot_be_added(self, saved, changes, message):
        with pytest.raises(ValueError, match=message):
            core.load(saved, changes)

    def test_what_is_there_already(self, saved, tmp_path):
        core.save(core.load(saved, {"temporal": "statistics_drift"}), tmp_path / "mixed.safetensors")
        for name in ("statistics_drift", "temporal_consistency"):
            with pytest.raises(
                ValueError, match=f"temporal={name} (is in|cannot be added: the checkpoint was trained)"
            ):
                core.load(tmp_path / "mixed.safetensors", {"temporal": name})
