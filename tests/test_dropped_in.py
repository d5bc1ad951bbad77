"""A file is all that a task with a measure of its own, and a head on several layers, need."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from core.registry import discover
from experiments.measuring.evaluation import evaluate
from experiments.measuring.heads import HEADS, LinearHead, register_head
from experiments.statistics.scores import MEASURES, Measure, register_measures

ROOT = Path(__file__).resolve().parent.parent
DROPPED = """
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from experiments.measuring.bench import Bench, Ceiling
from experiments.measuring.heads import Head, register_head
from experiments.measuring.task import Task, register_task
from experiments.statistics.scores import Measure, image_rows, register_measures

register_measures({"roughness": Measure(-1, "of the mean", "how rough")})


@register_task("roughness")
class Roughness(Task):
    def check(self, bench: Bench) -> None:
        pass

    def rows(self, model: nn.Module | Ceiling, seed: int, bench: Bench) -> Iterator[dict[str, object]]:
        upsampler, scale = bench.arm(model)
        for i in range(len(bench.val)):
            case = bench.val.get(i, scale=scale)
            (output,) = bench.upsample(upsampler, [case])
            for row in image_rows(case.name, {"roughness": output.diff(dim=-1).abs().mean().item()}):
                yield {"task": self.choice} | row


@register_head("three_layers")
class ThreeLayers(Head):
    seen: list[int] = []

    def __init__(self, channels: Sequence[int], outputs: int):
        super().__init__()
        self.each = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in channels)

    @classmethod
    def make(cls, channels: Sequence[int], outputs: int, hidden: int) -> "ThreeLayers":
        return cls(channels, outputs)

    @classmethod
    def layers(cls, num_layers: int) -> list[int]:
        return [0, num_layers // 2, num_layers - 1]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        ThreeLayers.seen.append(len(features))
        return sum(conv(layer) for conv, layer in zip(self.each, features, strict=True))
"""


@pytest.fixture
def dropped(tmp_path, monkeypatch, own_registry):
    """The module of a file that was dropped in; forgotten afterwards."""
    monkeypatch.setattr("experiments.statistics.scores.MEASURES", dict(MEASURES))
    for name in ("experiments.statistics.verdicts", "experiments.reports.figures", "experiments.measuring.probes"):
        monkeypatch.setattr(f"{name}.MEASURES", sys.modules["experiments.statistics.scores"].MEASURES)
    kept = dict(HEADS)
    discover()
    (tmp_path / "dropped_in.py").write_text(DROPPED)
    spec = importlib.util.spec_from_file_location("dropped_in", tmp_path / "dropped_in.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dropped_in", module)
    spec.loader.exec_module(module)
    yield module
    HEADS.clear()
    HEADS.update(kept)


def config(tmp_path, *overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        made = compose("evaluate", [
            "data@val_data=scenes", "val_data.num=3", "val_data.size=[48,64]", "data=scenes", "data.num=2",
            "data.seed=1", "data.size=[48,64]", "image_size=[48,64]", "tracking.enabled=false", "device=cpu",
            f"out_dir={tmp_path / 'out'}", "name=run", *overrides])  # fmt: skip
    OmegaConf.set_struct(made, False)
    return made


def test_a_task_with_a_measure_of_its_own(dropped, tmp_path):
    """It goes through to the table, with its direction: less is better, and nearest neighbours are rougher."""
    report = evaluate(config(tmp_path, "task=roughness", "backbone=hog8", "peers=[bilinear,nearest]", "ceilings=[]"))
    assert set(report.scores["measure"]) == {"roughness"}
    by_arm = report.scores.groupby("arm")["numerator"].mean()
    assert by_arm["nearest"] > by_arm["bilinear"]
    table = (tmp_path / "out/run.md").read_text()
    assert "how rough" in table
    assert pd.read_parquet(tmp_path / "out/run.parquet")["measure"].eq("roughness").all()


def test_a_head_on_three_layers_trains(dropped, tmp_path):
    overrides = ["task=depth", "task.head=three_layers", "task.pixels_per_image=null", "task.epochs=2",
                 "task.warmup_epochs=0",
                 "task.batch_size=1", "backbone=embedded", "peers=[bilinear]", "ceilings=[]", "output_size=[12,16]",
                 "encoder_size=[48,64]"]  # fmt: skip
    report = evaluate(config(tmp_path, *overrides))
    assert "rmse" in set(report.scores["measure"])
    assert set(dropped.ThreeLayers.seen) == {3}


def test_names_that_are_taken_are_refused():
    register_measures({"cosine": MEASURES["cosine"]})
    with pytest.raises(ValueError, match="a measure cosine is already registered as"):
        register_measures({"cosine": Measure(-1)})
    register_head("linear")(LinearHead)

    class Other(LinearHead):
        pass

    with pytest.raises(ValueError, match=r"task.head=linear is already registered by experiments.measuring.heads"):
        register_head("linear")(Other)


def test_layers_of_the_dpt_head():
    assert HEADS["dpt"].layers(12) == [2, 5, 8, 11]
    assert HEADS["linear"].layers(12) is None
    assert torch.is_tensor(LinearHead([3], 2)([torch.zeros(1, 3, 2, 2)]))
