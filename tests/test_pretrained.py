"""Weights by name, from a folder, from the hub, and through torch.hub."""

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hydra import initialize_config_dir
from torch import nn

import core
from core.checkpoint import BUNDLED
from core.published import PUBLISHED, to_published
from core.reference import ReferenceAnyUp
from core.registry import discover
from core.weight_files import WeightsError
from experiments.data.identity import files_of
from experiments.data.image_files import bundled
from experiments.data.image_files import read as read_image
from experiments.measuring.checkpoints import load_model
from experiments.measuring.metrics import fidelity, fidelity_case
from experiments.measuring.upsamplers import upsamplers
from experiments.sweeps.arms import CONFIGS, composed, read_arms
from experiments.training.setup import make_model

ROOT = str(Path(__file__).resolve().parent.parent)
IMAGE, FEATURES = torch.randn(1, 3, 32, 40), torch.randn(1, 5, 4, 6)
SMALL = ["embed_dim=16", "unifier.num_basis=8"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    """A state dict with the published names, every weight perturbed."""
    state = ReferenceAnyUp(embed_dim=16, num_basis=8).state_dict()
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture
def saved(tmp_path) -> Path:
    core.save(core.build(SMALL), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@contextmanager
def lines_of_the_hubs_library(caplog) -> Iterator[None]:
    """Its logger passes nothing on to the root, where pytest listens."""
    library = logging.getLogger("huggingface_hub")
    library.addHandler(caplog.handler)
    try:
        yield
    finally:
        library.removeHandler(caplog.handler)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_named(monkeypatch, tmp_path):
    """Neither online nor in the cache: what was asked for, and a way out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"(?s)nobody/nothing.*(core\.load|local|offline|cache)"):
        core.AnyUp.from_pretrained("nobody/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "where", ["nowhere", "a/b/nowhere", "/nowhere", "./nowhere", "~/nowhere", Path("a/nowhere")], ids=str
)
def test_a_folder_that_is_not_there_is_named(monkeypatch, tmp_path, where):
    """No repository of the hub is called so, and the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.pretrained.hub_file", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder.*OWNER/NAME.*bundled.*anyup_paper"):
        core.AnyUp.from_pretrained(where)


def test_a_file_is_no_folder(saved):
    with pytest.raises(OSError, match=r"model\.safetensors is a file: core\.load\('.*model\.safetensors'\) reads it"):
        core.AnyUp.from_pretrained(saved)


def test_a_wrong_folder_is_named_and_nothing_else_is_said(tmp_path, caplog):
    for call in (core.AnyUp.from_pretrained, core.load):
        with pytest.raises(FileNotFoundError, match=r"is a folder without model\.safetensors"):
            call(tmp_path)
    with lines_of_the_hubs_library(caplog), pytest.raises(FileNotFoundError):
        core.AnyUp.from_pretrained(tmp_path)
    assert caplog.text == ""


class Broken(BaseHTTPRequestHandler):
    """A hub that answers nothing but that it is down."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(self.path)
        self.send_error(503)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_a_hub_that_is_down_is_asked_once_and_only_we_say_so(tmp_path, monkeypatch, caplog):
    Broken.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with lines_of_the_hubs_library(caplog):
            with pytest.raises(OSError, match="nobody/nothing is no local folder, and cannot be downloaded from"):
                core.AnyUp.from_pretrained("nobody/nothing")
            with pytest.raises(OSError, match="backbone deit_tiny16: no pretrained weights of timm/deit_tiny_patch16"):
                core.load_backbone("deit_tiny16")
        server.shutdown()
    asked = [path.split("/")[1] for path in Broken.asked if "/resolve/" in path]
    assert asked == ["nobody", "timm"], Broken.asked
    assert caplog.text == ""


def test_what_the_hub_once_gave_serves_without_it(tmp_path, monkeypatch):
    """In the hub's own layout of its cache."""
    folder = tmp_path / "models--me--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    core.AnyUp.from_pretrained("bundled").save_pretrained(folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert core.AnyUp.from_pretrained("me/mine", cache_dir=tmp_path).config["embed_dim"] == 128


def test_pushing_uploads_the_checkpoint(monkeypatch):
    """The part before the network: what would be uploaded is a checkpoint that loads."""
    uploaded = {}

    class Hub:
        def __init__(self, *_, **__):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            uploaded[repo_id] = core.load(Path(folder_path) / "model.safetensors").config

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    model = core.build([*SMALL, "attention=global"])
    model.push_to_hub("me/anyup")
    assert uploaded == {"me/anyup": model.config}


# --- weights by name -------------------------------------------------------------------------------------------------

PUBLISHED_NAMES = ("anyup_paper", "anyup_multi_backbone")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder of checkpoints, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def release(tmp_path, published, cache, monkeypatch) -> Path:
    """A release of small weights, downloaded by torch as the real one is, from files."""
    (tmp_path / "release").mkdir()
    for name in PUBLISHED_NAMES:
        path = tmp_path / "release" / f"{name}.pth"
        torch.save(published, path)
        known = replace(PUBLISHED[name], url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setitem(PUBLISHED, name, known)
    return tmp_path / "release"


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_weights_by_name(release, cache, published, name):
    model = core.AnyUp.from_pretrained(name)
    assert not model.training
    assert model.config["unifier"]["ordering"] == "released"
    assert torch.equal(model.rotary.freqs, published["rope.freqs"])
    assert names(cache) == [f"{name}.pth"]
    (release / f"{name}.pth").unlink()  # the second time nothing is downloaded
    for again in (core.load(name), torch.hub.load(ROOT, name, source="local")):
        assert torch.equal(again(IMAGE, FEATURES), model(IMAGE, FEATURES))
    assert core.warm_start(core.build(SMALL), name) == []


def test_a_download_of_other_content_is_refused_and_not_kept(release, cache, published):
    torch.save({**published, "rope.freqs": published["rope.freqs"] + 1}, release / "anyup_paper.pth")
    with pytest.raises(WeightsError, match=r"anyup_paper: the file from file.* is not the published one .*was deleted"):
        core.AnyUp.from_pretrained("anyup_paper")
    assert names(cache) == []


def test_a_cached_file_of_other_content_is_refused(release, cache):
    core.load("anyup_paper")
    with (cache / "anyup_paper.pth").open("ab") as file:
        file.write(b"more")
    with pytest.raises(WeightsError, match=r"anyup_paper\.pth is not the published anyup_paper .*: delete it"):
        core.load("anyup_paper")


def test_published_weights_without_a_network_say_both_ways_out(release, cache):
    (release / "anyup_multi_backbone.pth").unlink()
    with pytest.raises(OSError, match=r"anyup_multi_backbone: .* go online, put the file at .*hub.*, or give its path"):
        core.AnyUp.from_pretrained("anyup_multi_backbone")
    assert not list(cache.glob("*"))


def test_experiments_take_weights_by_name(release, published):
    discover()
    small = ["embed_dim=16", "unifier.num_basis=8"]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        asked = composed("upsample", [*small, "checkpoint=anyup_multi_backbone", "unifier.ordering=released"])
        training = composed("train", [*small, "init_from=anyup_paper"])
        sweep = composed(
            "ablate", ["name=n", "+arms={baseline: {checkpoint: anyup_paper}, ours: {checkpoint: bundled}}"]
        )
        measured = composed("fidelity", ["val_data.path=[x]", "peers=[bilinear]", "checkpoints=[anyup_paper]"])
    theirs, ours, *_ = read_arms(sweep)
    for model in (load_model(asked)[0], make_model(training), theirs.model(), upsamplers(measured)["anyup_paper"]):
        assert torch.equal(model.rotary.freqs, published["rope.freqs"])
    assert ours.model().config["embed_dim"] == 128


def test_what_an_arm_starts_from_by_name_is_in_its_key(monkeypatch, saved):
    before = files_of({"init_from": "bundled"})
    monkeypatch.setitem(BUNDLED, "bundled", saved)
    assert before["bundled"] != files_of({"init_from": "bundled"})["bundled"]


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_the_real_published_weights(shared, cache, name):
    """The files that the hashes were taken of, put where a download would be."""
    cache.mkdir(parents=True)
    (cache / f"{name}.pth").symlink_to(shared(f"weights/{name}.pth"))
    model = core.AnyUp.from_pretrained(name)
    assert sum(parameter.numel() for parameter in to_published(model.state_dict()).values()) == 878_080
    image, features = torch.randn(1, 3, 32, 32), torch.randn(1, 7, 4, 4)
    reference = ReferenceAnyUp().double()
    reference.load_state_dict(torch.load(cache / f"{name}.pth", weights_only=True))
    expected = reference(image.double(), features.double())
    torch.testing.assert_close(model.double()(image.double(), features.double()), expected)


@pytest.mark.parametrize("name", ["bundled", "bundled_released"])
def test_trained_baselines_come_along(name):
    model = core.AnyUp.from_pretrained(name)
    ordering = {"bundled": "paper", "bundled_released": "released"}[name]
    assert model.config["unifier"]["ordering"] == ordering
    assert not model.training
    untrained = core.build([f"unifier.ordering={ordering}"]).state_dict()
    assert not any(torch.equal(value, untrained[key]) for key, value in model.state_dict().items() if value.dim() > 1)


@pytest.mark.parametrize("name", ["bundled", "bundled_released"])
def test_trained_baselines_beat_bilinear_upsampling(name):
    """Three photographs of those that come along, none of which was trained on; features of the embedded encoder."""
    model, encoder = core.AnyUp.from_pretrained(name), core.load_backbone("embedded")
    gains = []
    for photograph in ("astronaut", "coffee", "china"):
        image = read_image(bundled(photograph))[0]
        case = fidelity_case(image, encoder, 2, 224, 112)
        with torch.no_grad():
            ours = model(case.guidance, case.features, case.output_size)
        bilinear = F.interpolate(case.features, case.output_size, mode="bilinear")
        gains.append(fidelity(ours, case)["cosine"] - fidelity(bilinear, case)["cosine"])
    assert min(gains) > 0.001


def test_the_baseline_by_default_is_that_of_the_papers_ordering():
    ours, papers = core.AnyUp.from_pretrained().state_dict(), core.AnyUp.from_pretrained("bundled").state_dict()
    assert all(torch.equal(ours[name], papers[name]) for name in papers)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"bundeld: there is no such file; known names are bundled, .*anyup"):
        core.load("bundeld")


# --- torch.hub -------------------------------------------------------------------------------------------------------


def hub(*arguments, **settings) -> core.AnyUp:
    return torch.hub.load(ROOT, "anyup", *arguments, source="local", **settings)


def test_the_hubs_model_is_trained_unless_another_is_asked_for(saved):
    trained = weights(core.AnyUp.from_pretrained())
    model = hub()
    assert not model.training
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert hub(checkpoint=str(saved)).config == core.load(saved).config
    fresh = hub(checkpoint="scratch", overrides=SMALL)
    assert fresh.config == core.build(SMALL).config
    assert not fresh.training
    assert torch.equal(hub(checkpoint="bundled").rotary.freqs, trained["rotary.freqs"])


def test_overrides_start_from_the_trained_baseline(own_registry):
    trained = weights(core.AnyUp.from_pretrained("bundled_released"))
    variant = hub(overrides=["attention=global", "unifier.ordering=released"])
    assert variant.config["attention"]["name"] == "global"
    assert all(torch.equal(tensor, trained[name]) for name, tensor in variant.state_dict().items())
    with pytest.warns(UserWarning, match=r"untrained weights, .*: .*unifier\.encoder\.0\.basis"):
        hub(overrides=["unifier.kernel_size=3"])
    with pytest.raises(ValueError, match=r'of another architecture .*checkpoint="scratch" gives untrained weights'):
        hub(overrides=SMALL)


def test_a_checkpoint_and_overrides_contradict(saved):
    with pytest.raises(ValueError, match="not both"):
        hub(checkpoint=str(saved), overrides=SMALL)


def test_the_hub_works_beside_another_module_called_core(tmp_path):
    """It is imported before, stays what it is, and can be imported again after."""
    (tmp_path / "core.py").write_text("something = 1\n")
    script = f"""
import core, sys, torch
variant = torch.hub.load({ROOT!r}, "anyup", source="local", checkpoint="scratch", overrides=["decoder=inr"])
assert type(variant).__module__ == "anyup_lab.core.anyup", type(variant)
assert core is sys.modules["core"] and core.something == 1
assert not [name for name in sys.modules if name.split(".")[0] in ("extensions", "experiments")]
"""
    without_ours = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=without_ours, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
