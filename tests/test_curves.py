"""Curves of a training: the table beside the checkpoints, what the store has of them, and their pictures."""

import math
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from core.registry import discover
from experiments.settings import SettingError
from experiments.tracking import recording
from experiments.training.curves import CURVES_NAME, Curves, Point, draw, plot, read_run, read_table, read_training
from experiments.training.loop import train

ROOT = Path(__file__).parent.parent
TINY = ("embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "backbones=[{name: hog8}]", "views.view=32",
        "batch_size=2", "views.crops=2", "objective.self_consistency=0", "steps=4", "checkpoint_every=2", "log_every=1",
        "validate_every=2", "val_images=1", "data.path=[astronaut]", "val_data.path=[chelsea]",
        "tracking.system_metrics_s=null", "device=cpu", "out_dir=out")  # fmt: skip


def config(name, *overrides):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose(name, [*(TINY if name == "train" else ()), *overrides])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(recording, "git_state", lambda source: ("0" * 40, ""))


def test_values_come_back_to_the_last_bit(tmp_path):
    curves = Curves(tmp_path / CURVES_NAME)
    values = np.random.default_rng(0).normal(size=20).tolist()
    for step, value in enumerate(values):
        curves.add(step, {"loss": value, 'odd, "name"': -value})
    curves.save()
    assert read_table(tmp_path / CURVES_NAME) == curves.points
    again = Curves(tmp_path / CURVES_NAME, until=7)
    assert again.points == [point for point in curves.points if point.step <= 7]
    assert Curves(tmp_path / CURVES_NAME).points == []  # a training that starts anew


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no table of curves"), ("a,b\n", "no table of curves"), ("step,name,value\n1,loss\n", "line 2 is damaged"),
     ("step,name,value\n1,loss,2\n1.5,loss,2\n", "line 3 is damaged")],
)  # fmt: skip
def test_damaged_tables_are_named(text, message):
    Path(CURVES_NAME).write_text(text)
    with pytest.raises(SettingError, match=rf"{CURVES_NAME}.* {message}.*move"):
        read_table(Path(CURVES_NAME))


def test_a_training_keeps_its_curves_here_and_in_the_store():
    trained = train(config("train"))
    points = read_table(trained.curves)
    assert points == read_training(Path("out"))
    names = {point.name for point in points}
    assert {"loss", "reconstruction_loss", "input_consistency_loss", "grad_norm", "lr", "val/hog8/gain"} <= names
    assert [point.step for point in points if point.name == "loss"] == [1, 2, 3, 4]
    assert [point.step for point in points if point.name == "val/detail"] == [0, 2, 4]
    last = {point.name: point.value for point in points if point.step == 4}
    assert last["loss"] == pytest.approx(sum(trained.state.losses.values()))
    assert {name: last[name] for name in trained.state.validation} == trained.state.validation

    stored = read_run(trained.run_id)
    assert set(points) <= set(stored)
    assert {point.name for point in stored} - names == {"steps_per_s", "time_s", "peak_memory_mb"}
    kept = {path.name for path in Path("mlruns").rglob("*") if path.is_file()}
    assert {CURVES_NAME, "curves.png", "last.safetensors", "best.safetensors"} <= kept
    trained.curves.unlink()
    assert read_training(Path("out")) == stored  # a training of before there were tables
    with pytest.raises(SettingError, match="has no run 0123"):
        read_run("0123")


def test_losses_of_several_encoders_are_told_apart():
    more = ["backbones=[{name: hog8}, {name: daisy8}]", "tracking.enabled=false", "validate_every=0"]
    points = read_table(train(config("train", *more)).curves)
    totals = {point.step: point.value for point in points if point.name == "loss"}
    of_each = [point for point in points if point.name.startswith("loss/")]
    assert {point.step: point.value for point in of_each} == totals
    assert {point.name for point in of_each} == {"loss/hog8", "loss/daisy8"}


def test_a_run_that_goes_on_logs_steps_again_and_the_last_count(monkeypatch):
    found = [("loss", 9.0, 1, 2), ("loss", 1.0, 1, 1), ("loss", 3.0, 5, 2)]
    monkeypatch.setattr("experiments.training.curves.read_metrics", lambda run_id: found)
    assert read_run("x") == [Point(1, "loss", 1.0), Point(2, "loss", 3.0)]


def test_what_is_drawn():
    points = [Point(step, name, value) for step in range(1, 101) for name, value in
              (("loss", 2 + math.sin(step)), ("a_loss", 1.0), ("lr", 1e-3))]  # fmt: skip
    points += [Point(step, f"val/{name}/gain", step / 1e4) for step in (0, 50, 100) for name in ("hog8", "vit")]
    losses, gains = plot({"one": points, "two": points}, crops_per_step=16).axes
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["one: loss", "one: a_loss", "two: loss", "two: a_loss"]
    assert [text.get_text() for text in gains.get_legend().get_texts()][:2] == ["one: hog8", "one: vit"]
    smooth, raw = (losses.get_lines()[i].get_xydata() for i in (0, 4))  # the medians of four curves come first
    assert raw[:, 0].tolist() == [16 * step for step in range(1, 101)]
    assert smooth[50, 1] == pytest.approx(np.median(raw[48:53, 1]))  # one in 25 of 100 points, centred: five
    spike = [*points, Point(101, "loss", 1e8)]
    assert plot({"one": spike}).axes[0].get_ylim()[1] < 10  # one step does not hide all others
    assert gains.get_lines()[0].get_xydata()[:, 1].tolist() == [0, 0.005, 0.01]
    mixed = [*points, *(Point(step, f"loss/{name}", 1.0) for step, name in ((1, "hog8"), (2, "vit"), (3, "hog8")))]
    assert [line.get_label() for line in plot({"one": mixed}).axes[0].get_lines()[:2]] == ["hog8", "vit"]
    assert plot({"empty": []}).axes[0].get_legend() is None


def test_the_command_draws_folders_and_tables():
    curves = Curves(Path("a") / CURVES_NAME)
    curves.add(1, {"loss": 1.0})
    curves.save()
    out = draw(config("curves", "trainings={first:a,second:a/curves.csv}", "out=pictures/curves.png"))
    with Image.open(out) as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to draw"),
        (["trainings=a"], "trainings must be null"),
        (["trainings=[a/x,b/x]"], "trainings: two have the same name"),
        (["trainings=[nowhere]"], "nowhere is no training's folder"),
        (["trainings=[nowhere]", "out=a.jpg"], "out must name a .png file"),
        (["trainings=[nowhere]", "crops_per_step=0"], "crops_per_step must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(overrides, message):
    with pytest.raises(SettingError, match=message):
        draw(config("curves", *overrides))


def test_an_untracked_training_without_table_has_no_curves():
    train(config("train", "tracking.enabled=false", "validate_every=0", "steps=1")).curves.unlink()
    with pytest.raises(SettingError, match="was not tracked"):
        read_training(Path("out"))
    with Path("out/state.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        read_training(Path("out"))
