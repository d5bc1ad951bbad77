"""The benchmark of whole training steps: what its arms compute, what it writes and what it refuses."""

import csv
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import core
from core.reference import ReferenceAnyUp
from core.registry import discover
from experiments.data import DataError
from experiments.settings import SettingError
from experiments.training import benchmark as module
from experiments.training.benchmark import PreparedTraining, benchmark_training

ROOT = Path(__file__).parent.parent
TINY = ("embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "backbones=[{name: hog8}]", "views.view=32",
        "batch_size=2", "views.crops=2", "objective.self_consistency_size=16", "data.path=[astronaut]", "num_runs=3",
        "tracking.enabled=false", "device=cpu", "out_dir=out")  # fmt: skip


def config(*overrides):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        settings = [one for one in TINY if not (one.startswith("unifier.") and "unifier=none" in overrides)]
        return compose("benchmark_training", [*settings, *overrides])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_children(monkeypatch):
    """Starting processes takes seconds."""
    monkeypatch.setattr(module, "peak_in_child", lambda prepare: 12_345_678)


def test_both_arms_train_alike():
    """Several steps, not only the first: the same losses from the same images, and weights that move."""
    ours, dense = (PreparedTraining(name, config("steps=4")) for name in ("ours", "dense"))
    assert isinstance(dense.training.inner.model, ReferenceAnyUp)
    assert type(ours.training.inner.model) is core.AnyUp
    losses = [(ours.step(), dense.step()) for _ in range(4)]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-4)
    assert len({one for one, _ in losses}) == 4
    assert PreparedTraining("shared", config()).step() is None


def test_what_is_written(no_children):
    rows = {row.arm: row for row in benchmark_training(config("name=steps"))}
    assert list(rows) == ["dense", "ours", "shared"]
    assert rows["ours"].loss == pytest.approx(rows["dense"].loss, rel=1e-4)
    assert all(row.num_runs == 3 and row.time_s > 0 and row.memory_mb == 12.345678 for row in rows.values())
    assert rows["shared"].time_s < rows["ours"].time_s
    assert rows["ours"].ratio_low <= rows["ours"].ratio <= rows["ours"].ratio_high
    text = Path("out/steps.md").read_text()
    for part in ("# Training steps on CPU", "from Python", "batch 2, 2 crops each, view 32", "encoder hog8",
                 "'self_consistency': 0.1", f"| ours | {rows['ours'].time_s:.2f} |"):  # fmt: skip
        assert part in text
    table = {line["arm"]: line for line in csv.DictReader(Path("out/steps.csv").read_text().splitlines())}
    assert float(table["ours"]["steps_per_s"]) == pytest.approx(1 / rows["ours"].time_s)
    assert table["shared"]["loss"] == ""


def test_peaks_are_those_of_a_step_in_a_fresh_process():
    """The dense arm holds at least its logits: heads x queries x keys, for each image."""
    rows = benchmark_training(
        config("arms=[dense,ours]", "views.view=128", "batch_size=1", "objective.self_consistency=0")
    )
    peaks = {row.arm: row.memory_mb for row in rows}
    assert peaks["dense"] > 2 * 32 * 32 * 16 * 16 * 4 / 1e6
    assert peaks["ours"] > 1


def test_an_arm_that_computes_something_else_is_called_wrong(no_children, monkeypatch):
    weights = core.from_config

    def other(settings):
        model = weights(settings)
        model.query_encoder[0].weight.data.mul_(2)
        return model

    arms = iter([weights, other])
    monkeypatch.setattr(core, "from_config", lambda settings: next(arms)(settings))
    dense, ours = benchmark_training(config("arms=[dense,ours]"))
    assert dense.status == "ok"
    assert re.match(r"wrong: its loss is \d.\de-\d\d off dense's, 1e-04 are allowed", ours.status)
    assert ours.time_s is None


def test_an_arm_that_does_not_fit_is_a_result(monkeypatch):
    def peak(prepare):
        if prepare.args[0] == "dense":
            raise MemoryError("no room")
        return 1

    monkeypatch.setattr(module, "peak_in_child", peak)
    dense, ours = benchmark_training(config("arms=[dense,ours]"))
    assert dense.status == "out of memory: no room"
    assert ours.status == "ok"
    assert ours.ratio is None
    assert "out of memory: no room" in Path("out/benchmark_training.md").read_text()


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("arms=[]", SettingError, "arms must name"),
        ("arms=[ours,theirs]", SettingError, "arms must name"),
        ("num_runs=2", SettingError, "num_runs must be a whole number from 3"),
        ("tolerance=0", SettingError, "tolerance must be"),
        ("name=a/b", SettingError, "name must be a file name"),
        ("unifier=none", SettingError, r"arms=\[dense\]: the reference is the baseline only"),
        ("data.min_size=5000", DataError, "at least 5000 pixels"),
        ("backbones_per_step=2", SettingError, "there are 1 backbones"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, error, message):
    with pytest.raises(error, match=message):
        benchmark_training(config(override))
