"""Training: what each step sees, what an update is, and that a killed training ends as an undisturbed one."""

import json
import math
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import core
from core.registry import discover
from core.streams import generator
from experiments.atomic import CannotWrite
from experiments.data import DataError, feature_cache, open_data
from experiments.data.feature_cache import FeatureCache, NotFinite, fingerprint
from experiments.data.image_files import NoImages, centre_square
from experiments.measuring.metrics import fidelity_case
from experiments.measuring.targets import CropSettings
from experiments.settings import SettingError
from experiments.tracking.store import Run
from experiments.training.curves import CURVES_NAME, read_table
from experiments.training.loop import NonFiniteLoss, Training, train
from experiments.training.optimiser import Optimiser, OptimiserSettings
from experiments.training.setup import alone_in
from experiments.training.state import STATE_NAME, ChangedConfig, read_state
from experiments.training.views import Views, ViewSettings

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "embed_dim=16",
    "attention.num_heads=2",
    "unifier.num_basis=8",
    "backbones=[{name: hog8}]",
    "views.view=32",
    "batch_size=2",
    "views.crops=2",
    "objective.self_consistency_size=8",
    "steps=6",
    "checkpoint_every=2",
    "validate_every=0",
    "log_every=1",
    "tracking.enabled=false",
    "device=cpu",
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Seven small pictures with edges and texture."""
    folder = tmp_path_factory.mktemp("photographs")
    numbers = np.random.default_rng(0)
    for i in range(7):
        rows, columns = 70 + 3 * i, 80 - 2 * i
        picture = numbers.integers(0, 255, (5, 6, 3), np.uint8)
        Image.fromarray(picture).resize((columns, rows), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(photographs, tmp_path):
    """Overrides -> the configuration of a tiny training in tmp_path."""
    discover()

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            return compose(
                "train", [*TINY, f"data.path=[{photographs}]", f"val_data.path=[{photographs}]",
                          f"out_dir={tmp_path / 'out'}", *overrides]
            )  # fmt: skip

    return make


def state_of(config: DictConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out_dir) / STATE_NAME)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


DEFAULTS = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/train.yaml"))


def view_settings(**settings) -> ViewSettings:
    return ViewSettings(**{**DEFAULTS["views"], **settings})


def optimiser_settings(**settings) -> OptimiserSettings:
    return OptimiserSettings(**{**DEFAULTS["optimiser"], **settings})


# What a step sees


def views_of(photographs, shard=(0, 1), **settings) -> Views:
    data = open_data({"name": "images", "path": [str(photographs)]})
    return Views(data, view_settings(**{"view": 32, "crops": 3, **settings}), [8, 16], 5, 2, 20, shard)


def test_a_step_sees_the_same_whenever_it_is_asked(photographs):
    first, second = views_of(photographs), views_of(photographs)
    later = [second[step] for step in (9, 3, 0)]
    for views in later:
        again = first[views.step]
        assert again.names == views.names
        assert again.backbone == views.backbone
        for name in ("guidance", "augmented", "whole", "crops", "corners"):
            assert torch.equal(getattr(again, name), getattr(views, name)), name
    assert not torch.equal(later[0].corners, later[1].corners)
    assert {views_of(photographs)[step].backbone for step in range(20)} == {0, 1}


def test_each_step_draws_one_of_the_grids(photographs):
    grids = [{"scale": 4}, {"view": 16, "guidance": 24}]
    views, alone = views_of(photographs, others=grids), views_of(photographs)
    seen = {}
    for step in range(20):
        one, backbones = views[step], [views.of_backbone(step, backbone) for backbone in (0, 1)]
        s = one.settings
        assert all(other.settings is s for other in backbones)  # tasks of a step look at one grid
        assert one.whole.shape[-1] == one.crops.shape[-1] == s.view
        assert one.guidance.shape[-1] == (s.guidance or s.view)
        assert one.names == alone[step].names  # the same images, whatever the grid
        seen[s.view, s.guidance, s.scale] = one
    assert seen.keys() == {(32, None, 2), (32, None, 4), (16, 24, 2)}
    assert seen[32, None, 4].corners.max() > seen[32, None, 2].corners.max()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([{"flip": 0.5}], "views.others has .*flip.*view, guidance, scale"),
        ([{}], "each entry gives one or more of view"),
        ([{"view": 24}], "views.view=24 is no multiple of the backbone's stride 16"),
        ([{"scale": 1}], "views.scale must be at least 2, got 1"),
    ],
)
def test_grids_that_cannot_be_are_refused(photographs, others, message):
    with pytest.raises(SettingError, match=message):
        views_of(photographs, others=others)


def test_every_pass_shows_every_image_once_in_another_order(photographs):
    views = views_of(photographs)
    names = [name for step in range(7) for name in views[step].names]
    assert sorted(names[:7]) == sorted(names[7:]) == sorted(views.data.names)
    assert names[:7] != names[7:]


@pytest.mark.parametrize("backbone", [0, 1])
def test_crops_lie_on_the_grid_of_the_whole(photographs, backbone):
    """Each crop is, pixel by pixel, the square image from its corner on; and the whole is that square, shrunk."""
    views = views_of(photographs)
    patch, seen = views.patch_sizes[backbone], set()
    for step in range(10):
        one = views.of_backbone(step, backbone)
        for at, name in enumerate(one.names):
            square = centre_square(views.data[views.data.names.index(name)].image[None], 64)[0]
            for i in range(3):
                row, column = one.corners[3 * at + i].tolist()
                seen |= {row, column}
                expected = square[:, row * patch : row * patch + 32, column * patch : column * patch + 32]
                assert torch.equal(one.crops[3 * at + i], expected)
    assert seen == set(range(32 // patch + 1))
    assert one.whole.shape == one.guidance.shape == (2, 3, 32, 32)


def test_processes_share_a_batch(photographs):
    together = views_of(photographs)[4]
    halves = [views_of(photographs, shard=(rank, 2))[4] for rank in range(2)]
    for name in ("guidance", "augmented", "whole", "crops", "corners"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(together, name)), name


def test_crops_of_a_pool_repeat(photographs):
    views = views_of(photographs, crop_pool=4)
    corners: dict[str, set] = {}
    for step in range(20):
        one = views.of_backbone(step, 0)
        for at, name in enumerate(one.names):
            three = {tuple(corner) for corner in one.corners[3 * at : 3 * at + 3].tolist()}
            corners[name] = corners.get(name, set()) | three
    assert all(len(found) <= 4 for found in corners.values())
    assert max(len(found) for found in corners.values()) == 4


def test_no_crops_means_the_whole_image_at_the_higher_resolution(photographs):
    one = views_of(photographs, crops=0, guidance=16, augment=0)[0]
    assert one.crops.shape == (2, 3, 64, 64)
    assert one.corners is None
    assert one.guidance.shape[-1] == 16
    assert torch.equal(one.augmented, one.guidance)


def test_mirrored_images_are_mirrored_before_anything_else_is_made_of_them(photographs):
    """Each image by a draw of its own; its crops lie at the same corners."""
    views, plain = (views_of(photographs, flip=flip, augment=0) for flip in (0.5, 0))
    counts = [0, 0]
    for step in range(12):
        ours, theirs = views[step], plain[step]
        assert torch.equal(ours.corners, theirs.corners)
        for at, name in enumerate(ours.names):
            flipped = not torch.equal(ours.whole[at], theirs.whole[at])
            counts[flipped] += 1
            for part in ("guidance", "augmented", "whole"):
                expected = getattr(theirs, part)[at]
                torch.testing.assert_close(getattr(ours, part)[at], expected.flip(-1) if flipped else expected)
            square = centre_square(views.data[views.data.names.index(name)].image[None], 64)
            square = square.flip(-1) if flipped else square
            for k in range(3 * at, 3 * at + 3):
                patch = views.patch_sizes[ours.backbone]
                row, column = (patch * corner for corner in ours.corners[k].tolist())
                assert torch.equal(ours.crops[k], square[0, :, row : row + 32, column : column + 32])
    assert min(counts) >= 4
    again = views_of(photographs, flip=0.5, augment=0)
    halves = [views_of(photographs, (rank, 2), flip=0.5, augment=0)[4] for rank in range(2)]
    assert torch.equal(torch.cat([half.whole for half in halves]), again[4].whole)


def test_other_channels_are_the_same_for_features_and_target(config):
    """Products of features and target vectors stay when channels are mixed; dropped ones are gone from both."""
    few = ["views.crops=0", "objective.self_consistency=0"]
    batches = {}
    for name, more in (("plain", []), ("mixed", ["views.mix_channels=1"]), ("dropped", ["views.drop_channels=0.5"])):
        training = Training(config(*few, *more))
        batches[name] = [training.batch(training.views[step]) for step in range(4)]
    vectors = lambda batch: [x.movedim(1, -1).flatten(0, 2) for x in (batch.features, batch.target)]  # noqa: E731
    for mixed, plain in zip(batches["mixed"], batches["plain"], strict=True):
        (a, b), (c, d) = vectors(mixed), vectors(plain)
        torch.testing.assert_close(a @ b.T, c @ d.T, rtol=1e-3, atol=1e-3 * (c @ d.T).abs().max().item())
        assert (a - c).abs().max() > 0.1 * c.abs().max()
    kept = set()
    for dropped, plain in zip(batches["dropped"], batches["plain"], strict=True):
        channels = dropped.features.shape[1]
        kept.add(channels)
        assert plain.features.shape[1] / 2 <= channels <= plain.features.shape[1]
        of = [i for i in range(plain.features.shape[1]) if any(
            torch.equal(plain.features[:, i], x) for x in dropped.features.unbind(1))]  # fmt: skip
        assert all(torch.equal(x, plain.target[:, of[i]]) for i, x in enumerate(dropped.target.unbind(1)))
    assert len(kept) > 1, "each step draws its own"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, "views.flip must lie between 0 and 1, got 1.5"),
        ({"mix_channels": -0.5}, "views.mix_channels must lie between 0 and 1, got -0.5"),
        ({"drop_channels": 1}, "views.drop_channels must be at least 0 and below 1, got 1"),
        ({"view": 8}, "views.view must be at least 16"),
        ({"scale": 1}, "views.scale"),
        ({"crops": 5, "crop_pool": 3}, "views.crop_pool=3 has fewer"),
        ({"average": 2}, "set views.crops=0, or views.average=0"),
        ({"crops": 0, "average": -1}, "views.average must be at least 0"),
        ({"augment": 2}, "views.augment"),
        ({"guidance": 4}, "views.guidance"),
        ({"view": 36}, "views.view=36 is no multiple of the backbone's stride 8"),
    ],
)
def test_views_that_cannot_be_cut_are_refused(photographs, settings, message):
    with pytest.raises(SettingError, match=message):
        views_of(photographs, **settings)


# What an update is


def optimiser_of(weight: torch.nn.Module, num_steps=10, **settings) -> Optimiser:
    return Optimiser(weight, optimiser_settings(**settings), num_steps, Accelerator(cpu=True))


def test_rates_rise_linearly_and_fall_as_a_cosine():
    settings = optimiser_settings(lr=2.0, warmup=4)
    rates = [settings.rate(step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2
    assert rates[8] == pytest.approx(1)
    assert rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert [optimiser_settings(lr=2.0, schedule="constant").rate(step, 12) for step in (0, 11)] == [2, 2]


def test_accumulated_steps_are_one_step_on_their_mean():
    torch.manual_seed(0)
    inputs = torch.randn(6, 3)
    results = []
    for accumulate, groups in ((1, [inputs[:4], inputs[4:]]), (2, list(inputs.split(2)))):
        layer = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(layer.weight, 0.5)
        torch.nn.init.zeros_(layer.bias)
        optimiser = optimiser_of(layer, len(groups), lr=0.1, accumulate=accumulate, schedule="constant")
        for group in groups:
            optimiser.zero_grad()
            optimiser.backward(layer(group).square().mean())
            optimiser.step()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)  # the last group of the second is a single step: its mean is over itself


def test_gradients_are_clipped_and_weights_averaged():
    layer = torch.nn.Linear(2, 1, bias=False)
    optimiser = optimiser_of(layer, lr=0.1, clip=0.5, ema=0.75, weight_decay=0)
    start = layer.weight.detach().clone()
    optimiser.backward((layer.weight * torch.tensor([[30.0, 40.0]])).sum())
    optimiser.step()
    assert optimiser.grad_norm == pytest.approx(50)
    assert layer.weight.grad.norm() == pytest.approx(0.5, rel=1e-4)
    moved = layer.weight.detach().clone()
    with optimiser.averaged():
        torch.testing.assert_close(layer.weight.detach(), 0.75 * start + 0.25 * moved)
    assert torch.equal(layer.weight, moved)


def test_the_average_rests_where_the_scaler_skips_an_update():
    """A finite loss whose scaled gradient is not: half precision's scaler leaves the weights as they are."""
    layer = torch.nn.Linear(2, 1, bias=False)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimiser = Optimiser(layer, optimiser_settings(lr=0.1, ema=0.5), 10, accelerator)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)  # so that an average that moved would show
    moved = layer.weight.detach().clone()
    optimiser.backward((layer.weight * 1e36).sum())
    optimiser.step()
    assert optimiser.adam.step_was_skipped
    assert torch.equal(layer.weight, moved)
    assert torch.equal(optimiser.ema["weight"], start)
    optimiser.zero_grad()
    optimiser.backward(layer.weight.sum())
    optimiser.step()
    assert not torch.equal(layer.weight, moved)
    assert not torch.equal(optimiser.ema["weight"], start)


@pytest.fixture
def one_process_group(tmp_path):
    """A group of one process: what goes between processes can be counted without a second."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_go_between_processes_once_an_update(one_process_group):
    """Not with each of the accumulated steps; the last two of these five steps are an update of their own."""
    layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    sent: list[int] = []

    def count(_, bucket):
        sent.append(optimiser.step_number)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    layer.register_comm_hook(None, count)
    optimiser = optimiser_of(layer, 5, accumulate=3)
    for _ in range(5):
        loss = layer(torch.randn(2, 3)).square().mean()  # a learner's forward comes before its backward
        optimiser.zero_grad()
        optimiser.backward(loss)
        optimiser.step()
    assert sent == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "optimiser.schedule must be one of cosine, constant"),
        ({"lr": -1}, "optimiser.lr"),
        ({"lr": math.nan}, "optimiser.lr"),
        ({"ema": 1}, "optimiser.ema"),
        ({"accumulate": 0}, "optimiser.accumulate"),
    ],
)
def test_updates_that_cannot_be_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        optimiser_settings(**settings)


# Training


def test_training_lowers_the_loss_and_keeps_the_best(config):
    made = config(
        "steps=40", "validate_every=20", "val_images=3", "optimiser.lr=3e-3", "objective.self_consistency=0",
        "views.crops=0", "data.last=2", "val_data.last=2",
    )  # fmt: skip
    training = Training(made)
    losses = [training.step(training.views[step]) for step in range(40)]
    means = [sum(sum(loss.values()) for loss in part) / 5 for part in (losses[:5], losses[-5:])]
    assert means[1] < 0.95 * means[0]
    trained = train(made)
    assert trained.state.step == 40
    assert trained.state.best > 0
    assert core.load(trained.best).config == core.load(trained.checkpoint).config
    assert not core.load(trained.checkpoint).training


def test_the_same_configuration_gives_the_same_weights(config, tmp_path):
    first, second = config(f"out_dir={tmp_path / 'a'}"), config(f"out_dir={tmp_path / 'b'}", "num_workers=1")
    assert train(first).state.losses == train(second).state.losses
    same(state_of(first), state_of(second))
    third = config(f"out_dir={tmp_path / 'c'}", "seed=1")
    assert train(third).state.losses != train(first).state.losses


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_training_goes_on_bit_for_bit(config, tmp_path, stop):
    """In the middle of accumulated steps too, with a moving average, a cache, and two backbones a step."""
    more = [
        "optimiser.accumulate=2", "optimiser.ema=0.9", "optimiser.warmup=2", "optimiser.clip=1",
        "backbones=[{name: hog8}, {name: daisy8}]", "backbones_per_step=2", "views.crop_pool=3",
    ]  # fmt: skip
    undisturbed = config(*more, f"out_dir={tmp_path / 'a'}", f"cache.folder={tmp_path / 'cache_a'}")
    expected = train(undisturbed)
    stopped = [*more, f"out_dir={tmp_path / 'b'}", f"cache.folder={tmp_path / 'cache_b'}"]
    assert train(config(*stopped, f"stop_after={stop}")).state.step == stop
    finished = train(config(*stopped, "resume=must"))
    assert finished.state.losses == expected.state.losses
    same(state_of(undisturbed), state_of(config(*stopped)))
    same(load_file(expected.checkpoint), load_file(finished.checkpoint))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("pool", [0, 5])
def test_an_averaged_target_is_that_of_fidelity(config, scale, pool):
    """For encoders of two strides: what is learnt is what is measured."""
    made = config(
        "views.crops=0", "views.average=2", f"views.scale={scale}", f"views.crop_pool={pool}",
        "backbones=[{name: hog8}, {name: hog16}]",
    )  # fmt: skip
    training = Training(made)
    for index, backbone in enumerate(training.backbones):
        views = training.views.of_backbone(0, index)
        batch = training.batch(views)
        cells = 32 // backbone.patch_size
        assert batch.target.shape[-2:] == (scale * cells, scale * cells) == batch.output_size
        assert batch.corners is None
        settings = CropSettings(2, pool or None)
        for image, target in zip(views.crops, batch.target, strict=True):
            expected = fidelity_case(image, backbone, scale, 32, crops=settings).target[0]
            torch.testing.assert_close(target, expected, atol=2e-3, rtol=2e-3)  # kept in half precision


def test_a_stopped_training_with_averaged_targets_goes_on_bit_for_bit(config, tmp_path):
    more = ["views.crops=0", "views.average=2", "views.crop_pool=6", "backbones=[{name: hog8}, {name: daisy8}]"]
    undisturbed = config(*more, f"out_dir={tmp_path / 'a'}", f"cache.folder={tmp_path / 'cache'}")
    expected = train(undisturbed)
    stopped = [*more, f"out_dir={tmp_path / 'b'}"]  # and without a cache it is the same
    assert train(config(*stopped, "stop_after=3")).state.step == 3
    assert train(config(*stopped, "resume=must")).state.losses == expected.state.losses
    same(state_of(undisturbed), state_of(config(*stopped)))


def test_validation_reports_detail_and_keeps_the_best_by_it(config):
    trained = train(config("validate_every=2", "val_images=2"))
    values = [point.value for point in read_table(trained.curves) if point.name == "val/detail"]
    assert len(values) == 4
    assert trained.state.best == max(values)


def test_a_stopped_training_of_several_grids_goes_on_bit_for_bit(config, tmp_path):
    averaged = ["views.crops=0", "views.average=1", "views.crop_pool=4", "objective.self_consistency=0"]
    several = [*averaged, "views.others=[{scale: 3}, {view: 48}]", "steps=8"]
    training, sizes = Training(config(*several)), set()
    for step in range(8):
        training.step(training.views[step])
        (batch,) = training.tasks
        assert tuple(batch.target.shape[-2:]) == batch.output_size
        sizes.add((batch.features.shape[-1], batch.output_size[-1]))
    assert sizes == {(4, 8), (4, 12), (6, 12)}
    train(config(*several, f"out_dir={tmp_path / 'whole'}"))
    train(config(*several, "stop_after=3"))
    train(config(*several))
    same(state_of(config()), state_of(config(f"out_dir={tmp_path / 'whole'}")))


def test_a_training_with_other_settings_is_not_resumed(config):
    train(config("stop_after=2"))
    with pytest.raises(ChangedConfig, match=r"optimiser\.lr=0\.5 \(was 0\.0002\)"):
        train(config("optimiser.lr=0.5"))
    with pytest.raises(ChangedConfig, match="data_fingerprint"):
        train(config("data.last=3"))
    assert train(config("resume=never", "optimiser.lr=0.5")).state.step == 6
    with pytest.raises(ChangedConfig):
        train(config())


def test_a_new_training_in_a_used_folder_reports_nothing_of_the_former(config, monkeypatch):
    """Neither returned, uploaded, nor left beside its own: best weights, last weights, curves and state."""
    former = train(config("validate_every=3", "val_images=1"))
    assert former.best is not None
    uploaded, figures = [], []

    class Recorder(Run):
        def file(self, path, name=None):
            uploaded.append(path.name)

        def figure(self, figure, name):
            figures.append(name)

    training = Training(config("resume=never", "stop_after=1", "checkpoint_every=4", "seed=1"))
    training.resume()
    monkeypatch.setattr(training, "_save", lambda: None)  # killed in front of its first checkpoint
    training.run(Run())
    assert not [path.name for path in former.checkpoint.parent.iterdir() if path.name != "lock"]
    monkeypatch.undo()
    train(config("validate_every=3", "val_images=1"))  # as it was
    training = Training(config("resume=never", "seed=1"))
    training.resume()
    trained = training.run(Recorder(run_id="a"))
    assert trained.best is None
    assert uploaded == ["last.safetensors", CURVES_NAME]
    assert figures
    assert not former.best.exists()
    assert {point.name for point in read_table(trained.curves) if point.name.startswith("val/")} == set()


def test_a_training_that_goes_on_keeps_its_best(config):
    more = ["validate_every=2", "val_images=1"]
    best = train(config(*more, "stop_after=4")).best
    kept = best.read_bytes()
    assert train(config(*more, "stop_after=4")).best.read_bytes() == kept


EXTENDED = [
    "optimiser.schedule=constant", "optimiser.accumulate=2", "optimiser.ema=0.9", "optimiser.warmup=3",
    "optimiser.clip=1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("stop", "more"), [("null", []), (3, ["backbones=[{name: hog8}, {name: daisy8}]", "backbones_per_step=2"])]
)
def test_an_extended_training_is_one_that_was_longer_from_the_start(config, tmp_path, stop, more):
    """Bit for bit, whether it had come to its end or not."""
    whole, parts = [[*EXTENDED, *more, f"out_dir={tmp_path / name}"] for name in ("whole", "parts")]
    expected = train(config(*whole, "steps=8"))
    train(config(*parts, "steps=4", f"stop_after={stop}"))
    with pytest.raises(ChangedConfig, match=r"steps=8 \(was 4\)\. extend=true lets it go on to step 8"):
        train(config(*parts, "steps=8"))
    extended = train(config(*parts, "steps=8", "extend=true", "resume=must"))
    assert extended.state.losses == expected.state.losses
    same(state_of(config(*whole)), state_of(config(*parts)))
    same(load_file(expected.checkpoint), load_file(extended.checkpoint))
    assert train(config(*parts, "steps=8")).state.step == 8  # a training of 8 steps from then on


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        (
            ["stop_after=1"],
            ["steps=8"],
            r"optimiser.schedule=cosine falls to zero at step 6.*init_from=.*last.safetensors",
        ),
        ([*EXTENDED, "stop_after=1"], ["steps=4"], "Fewer steps are stop_after=4"),
        ([*EXTENDED, "steps=5"], ["steps=8"], "its steps from 4 on were one update"),
        ([*EXTENDED, "stop_after=1"], ["steps=8", "seed=1"], r"seed=1 \(was 0\), steps=8 \(was 6\)"),
    ],
)
def test_trainings_that_cannot_be_extended_say_why(config, start, more, message):
    train(config(*start))
    for extend in ("true", "false"):
        with pytest.raises(ChangedConfig, match=message):
            train(config(*start, *more, f"extend={extend}"))


def test_resume_must_needs_a_state_and_a_damaged_one_is_named(config):
    with pytest.raises(SettingError, match="resume=must"):
        train(config("resume=must"))
    path = train(config()).checkpoint.with_name(STATE_NAME)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(core.WeightsError, match=STATE_NAME):
        train(config())


def test_warm_start_and_freezing(config, tmp_path):
    source = train(config(f"out_dir={tmp_path / 'a'}")).checkpoint
    wider = config(
        f"out_dir={tmp_path / 'b'}", f"init_from={source}", "attention=global", "freeze=[image_encoder, unifier]"
    )
    trained, before = core.load(train(wider).checkpoint).state_dict(), core.load(source).state_dict()
    for name, weight in trained.items():
        frozen = name.startswith(("image_encoder.", "unifier."))
        assert torch.equal(weight, before[name]) == frozen, name
    with pytest.raises(SettingError, match="freeze=head: the model has no such part; there are: image_encoder"):
        train(config("freeze=[head]"))


def test_a_loss_that_is_not_finite_stops_with_its_batch_saved(config, monkeypatch):
    made = config()
    calls = []
    measure = core.training.cosine_mse

    def breaks_in_step_2(prediction, target):
        calls.append(1)
        return measure(prediction, target) * (math.nan if len(calls) > 2 * 3 else 1)

    monkeypatch.setattr(core.training, "cosine_mse", breaks_in_step_2)
    with pytest.raises(NonFiniteLoss, match="step 2: the loss is not finite") as raised:
        train(made)
    (saved,) = Path(made.out_dir).glob("non_finite_step_2.safetensors")
    assert saved.name in str(raised.value)
    assert load_file(saved)["target"].shape == (4, *load_file(saved)["features"].shape[1:])
    assert read_state(Path(made.out_dir) / STATE_NAME)[0].step == 2
    monkeypatch.undo()
    assert train(made).state.step == 6


def test_of_several_backbones_in_a_step_the_batch_that_fails_is_saved(config, monkeypatch):
    """The loss of the step's first encoder is NaN; that of the second, of another width, is not."""
    made = config("backbones=[{name: hog8}, {name: daisy8}]", "backbones_per_step=2")
    seen = []
    measure = core.training.cosine_mse

    def breaks_at_once(prediction, target):
        seen.append(prediction.shape[1])
        return measure(prediction, target) * (math.nan if prediction.shape[1] == seen[0] else 1)

    monkeypatch.setattr(core.training, "cosine_mse", breaks_at_once)
    with pytest.raises(NonFiniteLoss, match="step 0: the loss is not finite"):
        train(made)
    (saved,) = Path(made.out_dir).glob("non_finite_step_0.safetensors")
    assert len(set(seen)) == 2
    assert load_file(saved)["features"].shape[1] == seen[0]


def test_validation_on_images_that_are_trained_on_is_told(config, caplog):
    train(config("validate_every=2", "val_images=1", "data.first=1", "steps=1"))
    assert "trained on" not in caplog.text
    train(config("validate_every=2", "val_images=2", "data.first=1", "steps=2", "resume=never"))
    assert "val_data has images that are trained on" in caplog.text


def test_small_images_are_counted_or_refused(config, caplog):
    train(config("steps=1"))
    assert "enlarged" not in caplog.text
    train(config("steps=1", "views.view=64", "resume=never"))
    assert "images are smaller than 128 pixels" in caplog.text
    with pytest.raises(SettingError, match=r"all \d+ images of data are smaller than views.view=512 \(the largest has"):
        Training(config("views.view=512"))


def test_features_that_are_not_finite_are_named(config, monkeypatch):
    training = Training(config())
    monkeypatch.setattr(
        training.backbones[0], "features", lambda image, layer: torch.full((len(image), 87, 4, 4), math.nan)
    )
    with pytest.raises(NotFinite, match="backbone hog8 gives features that are NaN, or too large for half precision"):
        training.step(training.views[0])


def test_bfloat16(config):
    assert math.isfinite(sum(train(config("mixed_precision=bf16")).state.losses.values()))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["mixed_precision=fp16"], SettingError, "fp16 needs a GPU"),
        (["mixed_precision=fp8"], SettingError, "mixed_precision must be"),
        (["steps=0"], SettingError, "steps must be at least 1"),
        (["batch_size=2.5"], SettingError, "batch_size must be at least 1, a whole number, got 2.5"),
        (["validate_every=-1"], SettingError, "validate_every must be at least 0"),
        (["stop_after=0"], SettingError, r"stop_after must be null \(none\) or at least 1"),
        (["stop_after=-1"], SettingError, "stop_after must be null"),
        (["extend=1"], SettingError, "extend must be true or false"),
        (["resume=maybe"], SettingError, "resume must be one of auto, never, must"),
        (["backbones=[]"], SettingError, "backbones is empty"),
        (["backbones_per_step=2"], SettingError, "but there are 1 backbones"),
        (["backbones=[{name: hog8}, {name: hog16}]", "backbones_per_step=2"], SettingError, "hog8 8, hog16 16"),
        (["backbones=[{name: squeezenet, weights: random}]", "views.view=64"], SettingError, "squeezenet gives 3x3"),
        (["backbones=[{name: hog9}]"], SettingError, "no backbone is called 'hog9'"),
        (["backbones=[hog8]"], SettingError, "backbones has 'hog8': each is {name: NAME}"),
        (["embed_dim=12"], SettingError, "embed_dim"),
        (["data.min_size=500"], DataError, "at least 500 pixels"),
        (["data.path=[/nowhere/at/all]"], NoImages, "no such file or folder"),
        (["init_from=/nowhere.safetensors"], FileNotFoundError, "there is no such file"),
        (["val_images=0", "validate_every=1"], SettingError, "val_images"),
        (["cache.max_gb=0"], SettingError, "cache.max_gb"),
    ],
)
def test_trainings_that_cannot_be_are_refused(config, overrides, error, message):
    with pytest.raises(error, match=message):
        train(config(*overrides))


def test_an_empty_folder_and_an_unwritable_one(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImages, match="holds no image"):
        train(config(f"data.path=[{tmp_path / 'empty'}]"))
    (tmp_path / "file").write_text("")
    for key in ("cache.folder", "out_dir"):
        with pytest.raises(SettingError, match="cannot be written to"):
            train(config(f"{key}={tmp_path / 'file' / 'below'}"))


# The cache


@pytest.fixture
def encoder():
    return core.load_backbone("hog8")


def test_cached_features_are_the_computed_ones(encoder, tmp_path):
    images = torch.rand(3, 3, 16, 24)
    cache = FeatureCache(tmp_path)
    first = cache.encode(encoder, images, ["a", "b", "c"])
    torch.testing.assert_close(first, encoder(images), rtol=1e-3, atol=1e-3)
    assert torch.equal(FeatureCache(None).encode(encoder, images, ["a", "b", "c"]), first)  # a folder changes nothing
    again = FeatureCache(tmp_path)
    assert torch.equal(again.encode(encoder, images.flip(0), ["c", "b", "a"]).flip(0), first)
    assert (again.hits, again.misses) == (3, 0)
    other = core.load_backbone("daisy8")
    assert again.encode(other, images, ["a", "b", "c"]).shape[1] == other.channels


class DependsOnCompany:
    """An encoder whose numbers depend on how many images it gets at once and on autocast, as real ones' last bits."""

    name, default_layer, mean, std = "company", 0, (0.0,) * 3, (1.0,) * 3

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        rounded = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        return (images[..., ::8, ::8] + 0.01 * len(images)).to(rounded).float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


def test_features_are_the_same_bits_with_and_without_a_folder(tmp_path):
    """Whichever images are asked for together, whichever of them are known, and under autocast too."""
    images, names = torch.rand(4, 3, 16, 24), list("abcd")
    expected = FeatureCache(None).encode(DependsOnCompany(), images, names)
    cache = FeatureCache(tmp_path)
    assert torch.equal(cache.encode(DependsOnCompany(), images[1:2], ["b"]), expected[1:2])
    assert torch.equal(cache.encode(DependsOnCompany(), images, names), expected)
    assert (cache.hits, cache.misses) == (1, 4)
    for split in (1, 2):
        parts = [FeatureCache(None).encode(DependsOnCompany(), part, names[:split]) for part in images.split(split)]
        assert torch.equal(torch.cat(parts), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FeatureCache(None).encode(DependsOnCompany(), images, names), expected)


def test_an_entry_that_is_swept_while_it_is_read_stays_swept(encoder, tmp_path, monkeypatch, caplog):
    """Another run removes it; marking it as used must not make it again, empty, to be found damaged."""
    image = torch.rand(1, 3, 16, 16)
    expected = FeatureCache(tmp_path).encode(encoder, image, ["a"])
    (entry,) = tmp_path.glob("*/*.safetensors")
    checksum = feature_cache._checksum

    def swept_meanwhile(features):
        entry.unlink(missing_ok=True)
        return checksum(features)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_checksum", swept_meanwhile)
        assert torch.equal(FeatureCache(tmp_path).encode(encoder, image, ["a"]), expected)
    assert not entry.exists()
    assert torch.equal(FeatureCache(tmp_path).encode(encoder, image, ["a"]), expected)
    assert "damaged" not in caplog.text


def test_an_encoder_of_other_code_is_another(monkeypatch):
    before = fingerprint(core.load_backbone("hog8"))
    assert fingerprint(core.load_backbone("hog8")) == before
    monkeypatch.setattr("experiments.data.feature_cache.encoder_version", lambda: "another")
    assert fingerprint(core.load_backbone("hog8")) != before


def test_a_damaged_entry_is_computed_again(encoder, tmp_path, caplog):
    image = torch.rand(1, 3, 16, 16)
    expected = FeatureCache(tmp_path).encode(encoder, image, ["a"])
    (entry,) = tmp_path.glob("*/*.safetensors")
    whole = entry.read_bytes()
    for damaged in (whole[:40], whole[:-7], b"", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
        entry.write_bytes(damaged)
        caplog.clear()
        assert torch.equal(FeatureCache(tmp_path).encode(encoder, image, ["a"]), expected)
        assert "damaged" in caplog.text
        assert entry.read_bytes() == whole


def test_the_cache_stays_within_its_bound(encoder, tmp_path):
    cache = FeatureCache(tmp_path, max_gb=1e-5)
    for i in range(20):
        cache.encode(encoder, torch.rand(1, 3, 16, 16), [str(i)])
    newest = max(tmp_path.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    cache.sweep()
    left = list(tmp_path.glob("*/*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in left) <= 1e4
    assert newest in left


def test_a_full_disk_ends_caching_and_nothing_else(encoder, tmp_path, caplog, monkeypatch):
    cache = FeatureCache(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.data.feature_cache.save_file", full)
    image = torch.rand(1, 3, 16, 16)
    features = cache.encode(encoder, image, ["a"])
    assert features.shape == (1, encoder.channels, 2, 2)
    assert "are no longer cached" in caplog.text
    assert "No space left" in caplog.text
    assert not list(tmp_path.glob("*/*"))
    cache.encode(encoder, image, ["a"])


# A disk that is really full


@pytest.fixture
def disk():
    """A file system of its own, with 1 MB of room; not in tmp_path, which pytest clears, maybe while it is in use."""
    folder = Path(tempfile.mkdtemp())
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
        )
    except FileNotFoundError:
        folder.rmdir()
        pytest.skip("needs mount")
    if done.returncode:
        folder.rmdir()
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # files may still be mapped into memory,
    shutil.rmtree(folder, ignore_errors=True)  # and then the folder is busy on some systems


def fill(disk: Path, room: int) -> Path:
    """Leaves `room` bytes, to the page -> what takes the rest."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - room))
    return ballast


@pytest.mark.parametrize("room", [0, 12_000, 60_000])
def test_a_training_on_a_full_disk_loses_nothing(config, disk, tmp_path, room):
    """Whatever is still written, of curves, state and weights: it is whole, and the training goes on from it."""
    more = ["validate_every=2", "val_images=1", "optimiser.ema=0.9"]
    expected = train(config(*more, f"out_dir={tmp_path / 'roomy'}"))
    mine = f"out_dir={disk / 'out'}"
    train(config(*more, mine, "stop_after=2"))
    ballast = fill(disk, room)
    with pytest.raises(
        CannotWrite, match=r"No space left on device.*Once there is room, the same command goes on from"
    ):
        train(config(*more, mine))
    left = [path for path in (disk / "out").iterdir() if path.name not in ("lock", CURVES_NAME)]
    assert {path.name for path in left} == {STATE_NAME, "last.safetensors", "best.safetensors"}
    for path in left:
        load_file(path)
    assert step_of(disk / "out" / STATE_NAME) in (2, 4)
    ballast.unlink()
    finished = train(config(*more, mine, "resume=must"))
    for name in (STATE_NAME, "last.safetensors", "best.safetensors"):
        same(load_file(tmp_path / "roomy" / name), load_file(disk / "out" / name))
    assert expected.curves.read_bytes() == finished.curves.read_bytes()


def test_a_training_without_a_checkpoint_says_that_it_starts_anew(config, disk):
    (disk / "out").mkdir()
    fill(disk, 0)
    with pytest.raises(CannotWrite, match=r"No space left on device.*goes on from its beginning"):
        train(config(f"out_dir={disk / 'out'}"))
    assert [path.name for path in (disk / "out").iterdir()] == ["lock"]


def test_a_cache_on_a_full_disk_changes_no_number(config, disk, tmp_path, caplog):
    fill(disk, 30_000)
    roomy = config(f"cache.folder={tmp_path / 'cache'}", f"out_dir={tmp_path / 'a'}")
    full = config(f"cache.folder={disk / 'cache'}", f"out_dir={tmp_path / 'b'}")
    train(roomy)
    train(full)
    same(state_of(roomy), state_of(full))
    assert caplog.text.count("computed features are no longer cached") == 1
    assert "No space left on device" in caplog.text
    entries = list(disk.glob("cache/*/*"))
    assert 0 < len(entries) < len(list(tmp_path.glob("cache/*/*")))
    for entry in entries:
        load_file(entry)
    caplog.clear()
    train(config(f"cache.folder={disk / 'cache'}", f"out_dir={tmp_path / 'c'}"))  # and those that are there are read
    assert "damaged" not in caplog.text


def test_two_trainings_do_not_share_a_folder(config):
    made = config()
    with alone_in(Path(made.out_dir)), pytest.raises(SettingError, match="another training is running in out_dir="):
        train(made)
    (Path(made.out_dir) / ".state.safetensors.1.part").write_text("what a killed training left")
    train(made)
    assert not list(Path(made.out_dir).glob(".*"))


def test_trainings_of_one_process_share_encoders_and_what_was_checked(config, tmp_path, monkeypatch):
    """A sweep: the second training loads no encoder and decodes no image until it needs it."""
    weights = Path(shutil.copy(ROOT / "core" / "weights" / "embedded.safetensors", tmp_path))
    more = [f"backbones=[{{name: embedded, weights: {weights}}}]"]
    first = Training(config(*more))
    monkeypatch.setattr("experiments.data.images.read", None)
    second = Training(config(*more, "seed=1"))
    assert second.backbones[0] is first.backbones[0]
    assert second.data.fingerprint == first.data.fingerprint
    assert second.inner.model is not first.inner.model
    changed = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights)
    os.utime(weights, ns=(1, 1))
    third = Training(config(*more)).backbones[0]
    assert third is not first.backbones[0]
    assert not torch.equal(next(third.parameters()), next(first.backbones[0].parameters()))


# Processes

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
TRAIN = """
import sys
from omegaconf import OmegaConf
from experiments.tracking.store import Run
from experiments.training.loop import Training, train
if __name__ == "__main__":
    for path in sys.argv[2:]:
        training = Training(OmegaConf.load(path))
        training.resume()
        training.run(Run())
        training.accelerator.wait_for_everyone()  # the leader has saved
    train(OmegaConf.load(sys.argv[1]))  # which ends the group of processes
"""
FORKS = """
import os, sys
import torch
from omegaconf import OmegaConf
from experiments.training.loop import train
torch.set_num_threads(1)
for line in sys.stdin:  # a training in a new process for each line; everything is imported already
    child = os.fork()
    if not child:
        train(OmegaConf.load(line.strip()))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def written(config: DictConfig, name: str = "config.yaml") -> Path:
    path = Path(config.out_dir).with_name(name)
    path.write_text(OmegaConf.to_yaml(config, resolve=True))
    return path


def gradients(config: DictConfig, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of all weights, averaged over the steps of a training without an update -> them, and the losses of the last."""
    training, losses = Training(config), {}
    trainable = training.inner.to(dtype)
    for step in range(config.steps):
        torch.manual_seed(generator(config.seed, "step", step, 0).initial_seed())
        batch = training.batch(training.views[step])
        batch = replace(batch, **{name: getattr(batch, name).to(dtype) for name in IN_BATCH})
        [losses] = trainable([batch])
        (sum(losses.values()) / config.steps).backward()
    return {name: w.grad.double() for name, w in trainable.named_parameters()}, {k: v.item() for k, v in losses.items()}


IN_BATCH = ("image", "features", "target", "augmented_image")


def test_two_processes_train_as_one(config, tmp_path):
    """`accelerate launch`, gloo: losses and gradients of two accumulated steps are one process's, to rounding.

    The truth is computed in float64. Whoever sums the same terms in float32 in another order is away from it by an
    error of the same size as one process: of the two here each has half of the terms, and their mean has one rounding
    more. Ten times that error is allowed; leaving out a step or a process changes gradients by parts of themselves.
    And a training stopped between the two steps goes on bit for bit: what was accumulated differs among processes.
    """
    more = ["steps=2", "optimiser.accumulate=2", "optimiser.ema=0.5"]
    truth, exact_losses = gradients(config(*more), torch.float64)
    plain, plain_losses = gradients(config(*more), torch.float32)
    shared, stopped = (config(*more, f"out_dir={tmp_path / name}") for name in ("two", "stopped"))
    first = config(*more, "stop_after=1", f"out_dir={tmp_path / 'stopped'}")
    (tmp_path / "script.py").write_text(TRAIN)
    paths = [written(one, f"{i}.yaml") for i, one in enumerate((shared, first, stopped))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launch, f"--main_process_port={port}", str(tmp_path / "script.py"), *map(str, paths)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    state, settings, tensors = read_state(tmp_path / "two" / STATE_NAME)
    assert settings["processes"] == 2
    moments = {name: tensors[f"adam/exp_avg/{name}"].double() / 0.1 for name in truth}  # after one update: gradients

    def error(found: dict[str, torch.Tensor]) -> float:
        return math.hypot(*((found[name] - truth[name]).norm() / truth[name].norm() for name in truth))

    assert error(moments) <= 10 * error(plain)
    for name, exact in exact_losses.items():
        channels = 100  # more than there are; a cosine near 1 is a sum of that many terms, and its distance from 1
        rounding = channels * torch.finfo(torch.float32).eps  # has the sum's error, however small it is itself
        assert abs(state.losses[name] - exact) <= 10 * abs(plain_losses[name] - exact) + rounding, name
    same(state_of(shared), state_of(stopped))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_any_moment_change_nothing(config, tmp_path, kills):
    """-9 at random moments, then started again: the same files bit for bit, nothing half-written, one finished run."""
    tracked = ["tracking.enabled=true", "tracking.system_metrics_s=null"] if kills > 2 else []
    more = [f"steps={5 * kills + 10}", "checkpoint_every=1", "optimiser.ema=0.9", "views.crop_pool=3",
            "validate_every=8", "val_images=2"]  # fmt: skip
    expected = train(config(*more, f"out_dir={tmp_path / 'a'}", f"cache.folder={tmp_path / 'cache_a'}"))
    disturbed = config(*more, *tracked, f"out_dir={tmp_path / 'b'}", f"cache.folder={tmp_path / 'cache'}")
    state, draw = tmp_path / "b" / STATE_NAME, random.Random(1)
    path = written(disturbed)
    errors = tmp_path / "errors"
    with (
        errors.open("w") as told,
        subprocess.Popen([sys.executable, "-c", FORKS], env=ENVIRONMENT, cwd=tmp_path, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told) as server,
    ):  # fmt: skip

        def start() -> int:
            print(path, file=server.stdin, flush=True)
            return int(server.stdout.readline())

        for kill in range(kills):
            before, child = step_of(state), start()
            soon = kill % 2 == 0  # while it starts, resumes, encodes; the others once it has gone on
            while not soon and step_of(state) < before + 1 and Path(f"/proc/{child}").exists():
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.4 if soon else 0.3))
            os.kill(child, signal.SIGKILL)
            assert int(server.stdout.readline()) == -9, (kill, errors.read_text()[-3000:])
            assert soon or step_of(state) > before, f"kill {kill}"
        start()
        assert int(server.stdout.readline()) == 0, errors.read_text()[-3000:]
        server.stdin.close()
    for name in ("last.safetensors", "best.safetensors"):
        same(load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name))
    same(state_of(config(f"out_dir={tmp_path / 'a'}")), state_of(disturbed))
    assert expected.curves.read_bytes() == (tmp_path / "b" / CURVES_NAME).read_bytes()
    assert not list(tmp_path.glob("b/.*.part"))
    for entry in tmp_path.glob("cache/*/*.safetensors"):
        load_file(entry)
    if tracked:
        runs = dict(sqlite3.connect(tmp_path / "mlflow.db").execute("select run_uuid, status from runs").fetchall())
        assert runs.pop(read_state(state)[0].run_id) == "FINISHED"
        assert set(runs.values()) <= {"KILLED"}  # of starts that were killed in front of their first checkpoint


def step_of(path: Path) -> int:
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])["step"]
