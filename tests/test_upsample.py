"""The upsample command: what it writes, what it refuses, and what it leaves when something goes wrong."""

import errno
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from PIL import Image
from safetensors.torch import load_file

import core
from core.backbones.classical import HogBackbone
from experiments import atomic
from experiments.atomic import CannotWrite, replacing
from experiments.data.image_files import NoImages, read, shrink
from experiments.measuring.checkpoints import load_model
from experiments.settings import SettingError, output_grid
from experiments.upsampling.upsample import upsample

ROOT = Path(__file__).parent.parent
QUICK = ("tracking.enabled=false", "backbone=hog8", "max_size=48", "checkpoint=null")


def config(*overrides, command_line=False):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose("upsample", [*QUICK, *overrides], return_hydra_config=command_line)
    if command_line:
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed.hydra  # as Hydra's main does
    return composed


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture
def photos(tmp_path):
    """Two photographs with a damaged and a tiny one between them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff no photograph")
    Image.fromarray(noise[:4, :4]).save(folder / "c.png")
    Image.fromarray(noise[:, ::-1]).save(folder / "d.png")
    return folder


def made(folder="outputs/upsample"):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def expected(path, size=None):
    """What the settings of QUICK must give, computed by hand."""
    rgb = shrink(read(path), 48)
    with torch.no_grad():
        features = core.load_backbone("hog8")(rgb)
        return core.build().eval()(core.imagenet_normalize(rgb), features, size)[0], features[0]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_the_features_are_those_of_the_model(photos, kind):
    summary = upsample(config(f"images={photos}/a.png", f"features={kind}", "output_size=[20,30]"))
    path = Path(f"outputs/upsample/a.{kind}")
    output, low = expected(photos / "a.png", (20, 30))
    written = torch.from_numpy(np.load(path)) if kind == "npy" else load_file(path)["features"]
    torch.testing.assert_close(written, output, atol=1e-5, rtol=1e-5)
    if kind == "safetensors":
        torch.testing.assert_close(load_file(path)["low_res"], low)
    assert made() == [f"a.{kind}", "a.png"] or made() == ["a.png", f"a.{kind}"]
    assert path.stat().st_mode & 0o777 == 0o644
    done = summary.done[0]
    assert (done.grid, done.output_size) == ((4, 6), (20, 30))
    assert done.backbone_ms > 0
    assert done.upsampler_ms > 0
    assert summary.exit_code == 0


def test_a_mapped_file_is_filled_band_by_band_where_that_is_possible(photos, monkeypatch, own_registry):
    @core.register("shift")
    class Shift(core.Refiner):
        """Adds one, and asks for the whole output."""

        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, context):
            return output + 1

    settings = (f"images={photos}/a.png", "features=npy")
    upsample(config(*settings, "refiner=shift"))
    output, _ = expected(photos / "a.png")
    np.testing.assert_allclose(np.load("outputs/upsample/a.npy"), output.numpy() + 1, atol=1e-5)
    monkeypatch.setattr(core.AnyUp, "_output_memory", lambda *_: pytest.fail("the whole output was in memory"))
    upsample(config(*settings))
    np.testing.assert_allclose(np.load("outputs/upsample/a.npy"), output.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["npy", "none"])
def test_with_a_temporal_filler_images_are_frames_of_a_video(photos, own_registry, kind, caplog):
    """The state goes from one to the next; a frame of another size begins a new video."""
    seen = []

    @core.register("counts")
    class Counts(core.Temporal):
        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, context, state):
            seen.append(state)
            return output + (state or 0), (state or 0) + 1

    noise = np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "e.png")
    caplog.set_level(logging.INFO)
    upsample(config(f"images={photos}", "temporal=counts", f"features={kind}"))
    assert seen == [None, 1, None]
    assert "a new video begins" in caplog.text
    if kind == "npy":
        output, _ = expected(photos / "d.png")
        np.testing.assert_allclose(np.load("outputs/upsample/d.npy"), output.numpy() + 1, atol=1e-5)


def test_the_picture_has_four_columns(photos):
    upsample(config(f"images={photos}/a.png", "max_size=56"))
    with Image.open("outputs/upsample/a.png") as picture:
        assert picture.size == (4 * 224 + 50, 160 + 46)
        columns = np.asarray(picture)[36:196, 10:].reshape(160, -1, 3)
    image, low, bilinear, anyup = (columns[:, i * 234 : i * 234 + 224].astype(float) for i in range(4))
    spread = [np.abs(np.diff(column, axis=1)).mean() for column in (image, low, bilinear, anyup)]
    assert all(np.ptp(column) > 30 for column in (image, low, bilinear, anyup))
    assert len(set(spread)) == 4


@pytest.mark.parametrize("kind", ["none", "npy"])
def test_uncertainty_is_written_and_drawn_beside_the_features(photos, kind):
    upsample(config(f"images={photos}/a.png", "max_size=56", f"features={kind}"))
    with Image.open("outputs/upsample/a.png") as picture:
        plain = np.asarray(picture)
    upsample(config(f"images={photos}/a.png", "max_size=56", f"features={kind}", "uncertainty=true", "out_dir=out"))
    assert made("out") == sorted({"a.png", "a.uncertainty.safetensors"} | ({"a.npy"} if kind == "npy" else set()))
    found = load_file("out/a.uncertainty.safetensors")
    rgb = read(photos / "a.png")
    features = core.load_backbone("hog8")(rgb)
    _, wanted = core.build().eval().with_uncertainty(core.imagenet_normalize(rgb), features)
    assert set(found) == {"rarity", "variance", "entropy"}
    for name, values in found.items():
        torch.testing.assert_close(values, getattr(wanted, name)[0, 0], atol=1e-4, rtol=1e-4)
    with Image.open("out/a.png") as picture:
        assert picture.size == (3 * 224 + 40, 2 * (160 + 36) + 10)  # six pictures in two rows
        drawn = np.asarray(picture)
    np.testing.assert_array_equal(drawn[:196, : 3 * 234], plain[:196, : 3 * 234])
    for column in (1, 2):
        assert np.ptp(drawn[232:392, 10 + column * 234 : 234 + column * 234].astype(float)) > 100


def test_odd_images_are_skipped_and_told(photos, caplog):
    summary = upsample(config(f"images={photos}"))
    assert [done.name for done in summary.done] == ["a", "d"]
    assert made() == ["a.png", "d.png"]
    assert [Path(path).name for path in summary.skipped] == ["b.jpg", "c.png"]
    assert "not an image" in summary.skipped[f"{photos}/b.jpg"]
    assert "4 x 4 pixels are too few, backbone hog8 needs 16" in summary.skipped[f"{photos}/c.png"]
    assert summary.exit_code == 1
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("skipped" in message for message in warned) == 2


def test_features_that_cannot_be_are_skipped_and_told(photos, monkeypatch):
    """A backbone that refuses a size, and one that gives NaN."""
    encode = HogBackbone.features

    def odd(self, image, layer):
        if "a" in odd.left:
            odd.left.remove("a")
            raise ValueError("I want 224 pixels")
        return encode(self, image, layer) * math.nan

    odd.left = ["a"]
    monkeypatch.setattr(HogBackbone, "features", odd)
    summary = upsample(config(f"images=[{photos}/a.png,{photos}/d.png]", "features=npy"))
    assert not summary.done
    assert not made()
    first, second = summary.skipped.values()
    assert "backbone hog8 refuses it: I want 224 pixels" in first
    assert "features of backbone hog8 in float32 are not finite" in second


def test_nothing_but_odd_images(photos):
    summary = upsample(config(f"images=[{photos}/b.jpg,{photos}/c.png]"))
    assert summary.exit_code == 2
    assert not summary.done
    assert made() == []


def test_folders_keep_their_shape(photos):
    (photos / "deep").mkdir()
    (photos / "a.png").rename(photos / "deep" / "a.b.png")
    upsample(config(f"images={photos}/deep/.."))
    assert made() == ["d.png", "deep/a.b.png"]


def test_an_untrained_model_is_called_untrained(photos, caplog):
    upsample(config(f"images={photos}/a.png"))
    assert any("UNTRAINED" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)


@pytest.mark.parametrize("kind", ["none", "npy", "safetensors"])
def test_a_full_disk_loses_nothing_and_leaves_no_half_file(photos, monkeypatch, kind):
    Path("out").mkdir()
    Path("out", "d.png").write_bytes(b"of an earlier run")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, path: full() if path.name.startswith("d.") else real(part, path))
    with pytest.raises(CannotWrite, match=r"out/d\..*: No space left on device\. 1 images before it are complete"):
        upsample(config(f"images=[{photos}/a.png,{photos}/d.png]", "out_dir=out", f"features={kind}"))
    assert made("out") == sorted({"a.png", "d.png"} | ({f"a.{kind}"} if kind != "none" else set()))
    assert Path("out", "d.png").read_bytes() == b"of an earlier run"
    with Image.open("out/a.png") as picture:
        picture.load()


def test_space_is_reserved_before_a_mapped_file_is_filled(tmp_path, monkeypatch):
    """A full disk must raise; filling a mapped file without space would end the process by a signal."""
    array = atomic.allocate_array(tmp_path / "a.npy", (3, 100, 100), np.dtype("float32"))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(CannotWrite, match=r"b\.npy cannot be written: No space left"),
        replacing(tmp_path / "b.npy") as p,
    ):
        atomic.allocate_array(p, (3, 100, 100), np.dtype("float32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy"]


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path):
    (tmp_path / "a").write_text("earlier")

    def write():
        with replacing(tmp_path / "a") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (tmp_path / "a").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_size=0", "output_size must be null, a positive number, or .*got 0"),
        ("output_size=[4,-1]", "output_size must be"),
        ("output_size=[4,5,6]", "output_size must be"),
        ("output_size=large", "output_size must be"),
        ("max_size=0", "max_size must be a positive number"),
        ("features=zip", "features must be one of none, npy, safetensors, got zip"),
        ("uncertainty=3", "uncertainty must be true or false, got 3"),
        ("dtype=int8", "dtype must be one of float32, float16, bfloat16, got int8"),
        ("device=abacus", "device=abacus cannot be used"),
        ("checkpoint=none.pth", "none.pth"),
        ("out_dir=file", "out_dir=file cannot be written to"),
        ("out_dir=/proc/none", "out_dir=/proc/none cannot be written to"),
        ("backbone=vit_tiny16 backbone.weights=none.pth", "none.pth: there is no such file"),
        ("features=npy dtype=bfloat16", "cannot hold bfloat16: choose features=safetensors"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(photos, override, message, monkeypatch):
    Path("file").touch()
    monkeypatch.setattr("experiments.upsampling.upsample.upsample_image", lambda *_: pytest.fail("computed already"))
    with pytest.raises(SettingError, match=message):
        upsample(config(f"images={photos}/a.png", *override.split()))


def test_no_image_is_refused_first(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImages, match="empty"):
        upsample(config("images=empty"))


def test_output_grids():
    assert output_grid(None, (30, 40)) == (30, 40)
    assert output_grid(80, (30, 40)) == (60, 80)
    assert output_grid([7, 9], (30, 40)) == (7, 9)
    assert output_grid(2, (1, 400)) == (1, 2)


@pytest.fixture
def checkpoint(tmp_path):
    model = core.build(["attention=global", "attention.num_heads=2", "unifier.ordering=released", "seed=5"])
    core.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_checkpoint_decides_what_the_model_is(checkpoint, photos, caplog):
    settings = config(f"checkpoint={checkpoint}")
    model, told = load_model(settings)
    assert model.config == core.load(checkpoint).config
    assert told.attention == {"name": "global", "num_heads": 2}
    assert told.max_size == settings.max_size
    assert not caplog.records
    assert not model.check_finite
    assert load_model(config(f"checkpoint={checkpoint}", "check_finite=true"))[0].check_finite
    summary = upsample(config(f"images={photos}/a.png", f"checkpoint={checkpoint}", "features=npy"))
    assert summary.exit_code == 0
    untrained, _ = expected(photos / "a.png")
    assert not np.allclose(np.load("outputs/upsample/a.npy"), untrained.numpy(), atol=1e-4), "the weights are used"


@pytest.mark.parametrize("command_line", [True, False])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unifier=none", r"unifier=none \(the checkpoint has learned_basis\)"),
        ("embed_dim=64", r"embed_dim=64 \(the checkpoint has 128\)"),
        ("attention=window", r"attention=window \(the checkpoint has global\)"),
        ("attention.num_heads=4", r"attention.num_heads=4 \(the checkpoint has 2\)"),
        ("unifier.num_basis=64", r"unifier.num_basis=64 \(the checkpoint has 128\)"),
        ("attention=global", None),
        ("unifier.ordering=released", None),
        ("attention=global attention.num_heads=2", None),
    ],
)
def test_a_choice_that_the_checkpoint_contradicts_is_never_ignored(checkpoint, override, message, command_line):
    settings = config(f"checkpoint={checkpoint}", *override.split(), command_line=command_line)
    if message is None:
        load_model(settings)
        return
    if not command_line and override in ("attention=window", "attention.num_heads=4"):
        load_model(settings)  # from Python, a default cannot be told from a choice
        return
    with pytest.raises(SettingError, match=message):
        load_model(settings)


@pytest.fixture(scope="module")
def run_on_the_command_line(tmp_path_factory):
    """One real process over a good and a damaged image, with nothing switched off."""
    folder = tmp_path_factory.mktemp("cli")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "experiments.upsample", "images=[good.png,bad.png]", "backbone=hog8"]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_line_ends_with_a_summary_and_its_exit_code(run_on_the_command_line):
    folder, result = run_on_the_command_line
    assert result.returncode == 1, result.stderr
    assert "1 image upsampled" in result.stdout
    assert "skipped: bad.png: not an image" in result.stdout
    assert "Pictures (image | low-res | bilinear | AnyUp): outputs/upsample/" in result.stdout
    assert result.stdout.count("-m experiments.upsample") == 4, "it says what to try next"
    assert made(folder / "outputs/upsample") == ["good.png"]
    assert {path.name for path in folder.iterdir()} == {"good.png", "bad.png", "outputs", "mlflow.db", "mlruns"}


def test_the_command_line_keeps_to_the_point(run_on_the_command_line):
    _, result = run_on_the_command_line
    for noise in (
        "Traceback",
        "alembic",
        "Creating initial MLflow",
        "View run",
        "Deprecat",
        "UserWarning",
        "FutureWarn",
    ):
        assert noise not in result.stderr + result.stdout


def test_an_error_on_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "experiments.upsample", "images=nothing-here", "tracking.enabled=false"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("ERROR 'nothing-here': no such file")
    assert "Traceback" not in result.stderr


def test_the_trained_baseline_is_the_default_and_goes_into_variants(photos, caplog):
    (trained,) = upsample(config(f"images={photos}/a.png", "checkpoint=pretrained")).done
    assert trained
    assert "UNTRAINED" not in caplog.text
    upsample(config(f"images={photos}/a.png", "checkpoint=pretrained", "attention.window_ratio=0.03"))
    assert "UNTRAINED" not in caplog.text
    upsample(config(f"images={photos}/a.png", "checkpoint=pretrained", "unifier.num_basis=8"))
    assert "unifier.encoder.0.basis, " in caplog.text
    assert ": UNTRAINED" in caplog.text
    caplog.clear()
    upsample(config(f"images={photos}/a.png", "checkpoint=pretrained", "unifier.ordering=released"))
    assert "UNTRAINED" not in caplog.text
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        assert compose("upsample").checkpoint == "pretrained"


def test_a_filler_is_added_to_a_checkpoint_that_has_none(photos, tmp_path, caplog):
    core.save(core.build(), tmp_path / "plain.safetensors")
    settings = (f"images={photos}/a.png", f"checkpoint={tmp_path}/plain.safetensors", "temporal=statistics_drift")
    model, made_of = load_model(config(*settings, "temporal.strength=0.4"))
    assert model.temporal.strength == made_of.temporal.strength == 0.4
    upsample(config(*settings))
    assert "UNTRAINED" not in caplog.text


def test_a_filler_that_extends_the_checkpoints_takes_its_place(tmp_path):
    """What was chosen is taken, and all other settings that both have are the checkpoint's."""
    core.save(core.build(["attention.num_heads=2", "attention.window_ratio=0.3"]), tmp_path / "plain.safetensors")
    chosen = (f"checkpoint={tmp_path}/plain.safetensors", "attention=bilateral_prior", "attention.share_at_start=0.25")
    model, made_of = load_model(config(*chosen))
    assert made_of.attention.name == "bilateral_prior"
    assert (model.attention.num_heads, model.attention.window_ratio) == (2, 0.3)
    assert model.attention.share.item() == pytest.approx(0.25)
    with pytest.raises(SettingError, match=r"num_heads cannot be changed after training: the checkpoint has 2"):
        load_model(config(*chosen, "attention.num_heads=1"))


def test_the_trained_baseline_has_the_ordering_that_is_asked_for():
    model, _ = load_model(config("checkpoint=pretrained", "unifier.ordering=released"))
    released = core.AnyUp.from_pretrained("bundled_released").state_dict()
    assert all(torch.equal(value, released[name]) for name, value in model.state_dict().items())
