"""Notebooks and command lines: the same settings, the same keys, shared results; mistyped names; what is shown."""

import inspect
import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

import core
from experiments import api
from experiments.api import ablation, comparison, evaluation, training
from experiments.api.overrides import overrides_of, text
from experiments.data.image_files import bundled
from experiments.settings import SettingError
from experiments.sweeps import members
from experiments.sweeps.arms import composed
from experiments.sweeps.sweep import ablate as engine
from experiments.training import loop
from experiments.training.state import ChangedConfig

TINY_MODEL = {"embed_dim": 16, "attention.num_heads": 2, "unifier.num_basis": 8}
TINY_VIEWS = {"view": 32, "crops": 2}
TINY = TINY_MODEL | {
    "backbones": ["hog8"], "data.last": 3, "steps": 2, "batch_size": 2, "views": TINY_VIEWS,
    "objective.self_consistency_size": 16, "validate_every": 0,
}  # fmt: skip
FIDELITY = {
    "task": {"name": "fidelity", "view": 32, "scales": [2]},
    "backbone": "hog8",
    "val_data": {"name": "images", "first": 3},
}
CELL = """
import core
@core.register("of_a_cell")
class OfACell(core.Decoder):
    def __init__(self, embed_dim: int, amount: float = 0.0):
        super().__init__()
        self.amount = amount
    def forward(self, output, context):
        return output * 1.0 + self.amount
"""


def in_a_cell(code):
    namespace = {"__name__": "__main__"}
    exec(code, namespace)
    return namespace["OfACell"]


def on_the_command_line(folder, command, *overrides):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", f"experiments.{command}", *overrides]
    told = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


@pytest.fixture
def sweep(tmp_path):
    """Calls `ablate` with everything of debug/fast as Python values."""

    def run(arms, **changes):
        settings = {"seeds": [0, 1], "peers": ["nearest", "bilinear"], "overrides": {"cost": None}, "device": "cpu"}
        where = {"out_dir": tmp_path / "sweep", "tracking": False, "train": TINY}
        return api.ablate(arms, {"fidelity": FIDELITY}, **(settings | where | changes))

    return run


def no_more(patch):
    """From here on nothing may be trained or measured."""
    for cls, name in ((loop.Training, "step"), (members.Evaluation, "scores")):
        patch.setattr(cls, name, lambda *_, **__: pytest.fail("computed again"))


# Shared results


@pytest.mark.timeout(300)
def test_a_sweep_of_the_command_line_is_not_computed_again_here_nor_the_other_way(sweep, tmp_path, monkeypatch):
    common = ["experiment=debug/fast", "+arms.lr=['optimiser.lr=1']", "~tasks.scenes", "cost=null", "seeds=[0]"]
    common += ["tracking.enabled=false", "device=cpu", "name=ablation", f"out_dir={tmp_path}/sweep"]
    on_the_command_line(tmp_path, "ablate", *common)
    arms = {"baseline": {}, "no_window": {"attention": "global"}, "lr": {"optimiser": {"lr": 1.0}}}
    of_baseline = sorted((tmp_path / "sweep/members").glob("baseline-0-*/*.parquet"))
    with monkeypatch.context() as patch:
        no_more(patch)
        found = sweep(arms, seeds=[0])
    assert not found.failures
    assert sorted((tmp_path / "sweep/members").glob("baseline-0-*/*.parquet")) == of_baseline != []
    of_command = pd.read_csv(tmp_path / "sweep/ablation.csv")
    pd.testing.assert_frame_equal(found.table[["arm", "mean"]], of_command[["arm", "mean"]])

    sweep(arms | {"more": {"decoder": {"name": "inr"}}}, seeds=[0])
    no_more(monkeypatch)
    report = engine(composed("ablate", [*common, "+arms.more=['decoder=inr']"]))
    assert not report.results.failures


def test_a_training_of_the_command_line_is_not_computed_again(tmp_path, monkeypatch):
    overrides = ["embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "data.last=3", "batch_size=2"]
    overrides += ["views.crops=2", "objective.self_consistency_size=16", "optimiser.clip=1"]
    line = ["backbones=[{name: hog8}]", "steps=2", "views.view=32", "validate_every=0", "tracking.enabled=false"]
    loop.train(composed("train", [*overrides, *line, f"out_dir={tmp_path}/run", "device=cpu"]))
    given = {"steps": 2, "backbones": ["hog8"], "batch_size": 2, "view": 32, "validate_every": 0, "device": "cpu"}
    given |= {"out_dir": tmp_path / "run", "tracking": False}
    monkeypatch.setattr(loop.Training, "step", lambda *_: pytest.fail("computed again"))
    for more in (overrides, TINY_MODEL | {"views.crops": 2, "data.last": 3, "optimiser.clip": 1.0}):
        more = more if isinstance(more, list) else more | {"objective": {"self_consistency_size": 16}}
        found = api.train(**given, overrides=more)
    assert found.steps == 2
    assert list(found.curves.index) == [2]
    assert found.curves["loss"].notna().all()
    assert isinstance(found.model(), core.AnyUp)
    with pytest.raises(SettingError, match="validate_every"):
        found.model(best=True)
    assert "2 steps" in repr(found)
    assert "<img" in found._repr_html_()


@pytest.mark.parametrize(("function", "command"), [(training.train, "train"), (evaluation.evaluate, "evaluate")])
def test_defaults_are_those_of_the_command(function, command, monkeypatch):
    asked = []

    def seen(config):
        asked.append(config)
        raise KeyboardInterrupt

    module = sys.modules[function.__module__]
    monkeypatch.setattr(module.loop if command == "train" else module.evaluation, command, seen)
    with pytest.raises(KeyboardInterrupt):
        function()
    assert OmegaConf.to_container(asked[0]) == OmegaConf.to_container(composed(command, []))


def test_defaults_of_a_sweep_are_those_of_the_command(monkeypatch):
    asked = []

    def seen(config):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation.sweep, "ablate", seen)
    for given, overrides in (({"recipe": "quickstart"}, ["experiment=quickstart"]), ({}, ["name=ablation"])):
        with pytest.raises(KeyboardInterrupt):
            api.ablate(**given, **({} if given else {"arms": {"baseline": {}}}))
        expected = OmegaConf.to_container(composed("ablate", overrides))
        expected["arms"] = expected["arms"] or {"baseline": []}
        assert OmegaConf.to_container(asked.pop()) == expected
    brackets = re.findall(r"\[([^\[\]]+)\]\.$", api.ablate.__doc__, re.MULTILINE)
    assert {"0, 1, 2", "0.95", '"scratch"', "nearest, bilinear, bicubic, joint_bilateral"} <= set(brackets)


# Classes of a cell


@pytest.fixture
def counted(monkeypatch):
    """Counts steps of training."""
    steps, real = [], loop.Training.step
    monkeypatch.setattr(loop.Training, "step", lambda self, views: steps.append(views.step) or real(self, views))
    return steps


def test_a_class_that_was_defined_anew_is_computed_anew(sweep, counted, own_registry):
    quick = {"peers": ["bilinear"], "ceilings": [], "evaluate": {"max_val_images": 1}}

    def run(cls):
        counted.clear()
        found = sweep({"baseline": {}, "idea": {"decoder": partial(cls, amount=0.5)}}, seeds=[0], **quick)
        assert not found.failures
        table = found.table.set_index(["measure", "arm"])["mean"]
        return len(counted), table["error", "idea"]

    first = run(in_a_cell(CELL))
    assert first[0] == 4
    assert run(in_a_cell(CELL)) == (0, first[1])
    other = run(in_a_cell(CELL.replace("* 1.0", "* 2.0")))
    assert other[0] == 2
    assert other[1] != first[1]
    assert run(in_a_cell(CELL)) == (0, first[1])


def test_a_training_of_a_class_that_was_defined_anew_does_not_go_on(tmp_path, own_registry):
    def run(cls):
        settings = {"steps": 1, "backbones": ["hog8"], "batch_size": 1, "view": 32, "validate_every": 0}
        more = TINY_MODEL | {"objective.self_consistency": 0}
        api.train(**settings, decoder=cls, out_dir=tmp_path / "run", tracking=False, device="cpu", overrides=more)

    run(in_a_cell(CELL))
    run(in_a_cell(CELL))
    with pytest.raises(ChangedConfig, match=r"class\.OfACell=.*resume=never"):
        run(in_a_cell(CELL.replace("* 1.0", "* 2.0")))


def test_a_folder_that_changed_is_measured_anew(sweep, tmp_path, counted):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee"):
        (photos / f"{name}.png").write_bytes(bundled(name).read_bytes())
        task = FIDELITY | {"val_data": {"name": "images", "path": [photos]}}
        more = {"baseline": {"checkpoint": "bundled"}}
        found = api.ablate(
            more, {"photos": task}, seeds=[0], peers=["bilinear"], ceilings=[], tracking=False, device="cpu",
            out_dir=tmp_path / "sweep", overrides={"cost": None},
        )  # fmt: skip
    assert set(found.scores["image"]) == {"astronaut", "coffee"}


def test_a_class_of_another_name_or_hook_is_refused(own_registry):
    former, now = in_a_cell(CELL), in_a_cell(CELL)
    assert overrides_of("train", {"decoder": now}, "arm")[0] == "decoder=of_a_cell"
    assert overrides_of("train", {"decoder": partial(now, amount=2)}, "arm")[1] == "decoder.amount=2"
    for values, said in (({"decoder": former}, "defined again"), ({"refiner": now}, "fills decoder")):
        with pytest.raises(TypeError, match=said):
            overrides_of("train", values, "arm")
    with pytest.raises(TypeError, match="register"):
        overrides_of("train", {"decoder": nn.Linear}, "arm")


# Mistyped names


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: api.train(decoder="imr"), r"decoder 'imr'.*mean inr\? There are: inr, none"),
        (lambda: api.train(backbones=["dinov2_vits41"]), r"backbone 'dinov2_vits41'.*mean dinov2_vits14\?"),
        (lambda: api.train(overrides={"optimiser.lrr": 1}), r"mean optimiser\.lr\?"),
        (lambda: api.train(overrides={"views": {"gidance": 1}}), r"mean views\.guidance\? There are: views\.aug"),
        (lambda: api.train(overrides={"window_ratio": 1}), r"mean attention\.window_ratio\?"),
        (lambda: api.train(overrides=["stepps=3"]), r"mean steps\? There are: .*seed"),
        (lambda: api.train(overrides=["decoder=imr"]), r"mean inr\?"),
        (lambda: api.train(overrides={"decoder": {"name": "inr", "witdh": 3}}), r"There are: decoder\."),
        (lambda: api.evaluate(task="segmantation"), r"mean segmentation\? There are: depth"),
        (lambda: api.evaluate(backbone="hog9"), r"backbone 'hog9'.*mean hog"),
        (lambda: api.evaluate(peers=["bilinaer"]), r"mean bilinear\?"),
        (lambda: api.evaluate(overrides={"val_data": "scnes"}), r"mean scenes\?"),
        (lambda: api.ablate(recipe="quickstrat"), r"mean quickstart\? There are: .*debug/fast"),
        (lambda: api.ablate({"base": {}}, ["fidelity"]), r"baseline 'baseline'.*mean base\?"),
        (lambda: api.ablate({"baseline": {"decodr": "inr"}}, ["fidelity"]), r"arm baseline: .*mean decoder\?"),
        (lambda: api.ablate({"baseline": {"peer": "nearst"}}, ["fidelity"]), r"mean nearest\?"),
        (lambda: api.ablate({"baseline": {}}, ["fidelty"]), r"task fidelty: .*mean fidelity\?"),
        (lambda: api.ablate({"baseline": {}}, ["fidelity"], ceilings=["encodr"]), r"mean encoder\?"),
        (lambda: api.ablate({"baseline": {}}, ["fidelity"], overrides={"confidnce": 1}), r"mean confidence\?"),
        (lambda: api.compare("irn"), r"filler 'irn'.*mean inr\?"),
        (lambda: api.compare("none"), "say which, such as unifier=none"),
        (lambda: api.compare("decoder=window"), r"filler 'window'.*There are: inr, none"),
    ],
)
def test_a_mistyped_name_is_refused_with_the_nearest(call, said):
    with pytest.raises(SettingError, match=said):
        call()


def test_one_string_is_no_list_of_overrides():
    with pytest.raises(TypeError, match=r"\['steps=10'\]"):
        api.train(overrides="steps=10")


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "",
        "a b",
        'a"b',
        "a\\",
        'a\\"',
        "it's, [x] {y}: z=1",
        3,
        -1.5,
        1e-7,
        True,
        None,
        [1, [2, "x y"]],
        {"k": "v"},
    ],
)
def test_values_arrive_as_they_are(value):
    assert OverridesParser.create().parse_override(f"key={text(value)}").value() == value


def test_other_kinds_of_values():
    assert text(Path("a b")) == '"a b"'
    assert text((1, torch.tensor(2.5))) == "[1,2.5]"
    with pytest.raises(TypeError, match="a setting cannot be"):
        text(object())


# One call for an idea


@pytest.fixture
def asked(monkeypatch):
    """What `compare` asks `ablate` for."""
    seen = {}
    monkeypatch.setattr(comparison, "ablate", lambda arms, tasks, **more: seen.update(more, arms=arms, tasks=tasks))
    return seen


def test_compare_divides_a_folder(asked, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").touch()
    api.compare("inr", images=tmp_path, backbone="hog8")
    assert asked["train"]["data"] == {"name": "images", "path": [str(tmp_path)], "last": 4}
    assert asked["tasks"]["fidelity"]["val_data"] == {"name": "images", "path": [str(tmp_path)], "first": 4}
    assert asked["arms"] == {"baseline": {}, "inr": {"decoder": "inr"}}
    assert asked["train"]["backbones"] == [asked["tasks"]["fidelity"]["backbone"]] == [{"name": "hog8"}]
    with pytest.raises(SettingError, match="leaves none to train on"):
        api.compare("inr", images=tmp_path, num_test=5)
    with pytest.raises(SettingError, match="images=FOLDER"):
        api.compare("inr", num_test=5)


def test_compare_trains_the_idea_alone_or_nothing(asked):
    api.compare("inr", only_filler=True, start="published")
    frozen = asked["arms"]["inr"]["freeze"]
    assert asked["arms"]["baseline"] == {"checkpoint": "anyup_multi_backbone"}
    assert "attention" in frozen
    assert "decoder" not in frozen
    api.compare("statistics_drift", steps=0)
    assert asked["arms"]["statistics_drift"] == {"checkpoint": "bundled", "temporal": "statistics_drift"}
    assert asked["train"] == {}
    for wrong in ({"filler": "detail", "only_filler": True}, {"filler": "inr", "steps": 0, "start": "scratch"}):
        with pytest.raises(SettingError, match="leave these out"):
            api.compare(**wrong)


# What is shown


def test_a_sweep_shows_itself(sweep):
    found = sweep({"baseline": {}, "no_window": {"attention": "global"}}, seeds=[0], peers=["bilinear"])
    assert isinstance(found.table, pd.DataFrame)
    assert isinstance(found.scores, pd.DataFrame)
    assert set(found.verdict["no_window"].values()) <= {"helps", "hurts", "not shown"}
    with pytest.raises(KeyError, match="no_window"):
        found.verdict["bilinear"]
    for shown in (repr(found), found._repr_html_()):
        assert "no_window" in shown
        assert "bilinear" in shown
        assert str(found.verdict) in shown.replace("&#x27;", "'")
    assert found.figure._repr_png_().startswith(b"\x89PNG")
    gains = found.gains("no_window")
    assert list(gains) == sorted(gains)
    assert len(gains) == found.scores["image"].nunique()
    with pytest.raises(SettingError, match="mean no_window"):
        found.gains("no_windw")
    assert all(path.exists() for path in found.files)
    with pytest.raises(SettingError, match="cost"):
        found.cost_figure  # noqa: B018


def test_an_arm_that_fails_is_named(sweep, own_registry):
    broken = in_a_cell(
        CELL.replace(
            "return output * 1.0",
            'if output.shape[-1] < 0 or True: raise RuntimeError("no & luck")\n        return output',
        )
    )
    found = sweep({"baseline": {}, "broken": {"decoder": broken}}, seeds=[0], peers=["bilinear"])
    assert "no & luck" in found.failures["broken"]
    assert "FAILED: broken" in repr(found)
    assert "no &amp; luck" in found._repr_html_()


def test_signatures_are_explicit_and_documented():
    for function in (api.train, api.evaluate, api.ablate, api.compare, api.read_ablation):
        for name, parameter in inspect.signature(function).parameters.items():
            assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            assert re.search(rf"\b{name}\b[^:]*:", function.__doc__.partition("Args:")[2]), (function.__name__, name)


def test_it_is_cheap_to_import():
    code = "import sys, experiments.api as a; print(set(a.__all__) <= set(dir(a)), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "False"]
    assert all(getattr(api, name) for name in api.__all__)
    with pytest.raises(AttributeError, match="ablate"):
        api.ablte  # noqa: B018


def test_evaluate_shows_itself(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    found = api.evaluate(
        {"ours": "bundled"}, task=FIDELITY["task"], backbone="hog8", images=["astronaut", "coffee"], peers=["bilinear"],
        tracking=False, out_dir=tmp_path, device="cpu", overrides={"cost": None},
    )  # fmt: skip
    assert set(found.table["arm"]) == {"ours", "bilinear", "encoder"}
    assert "ours" in repr(found.verdict)
    assert "<img" in found._repr_html_()
    assert set(found.pictures)
    assert all(path.exists() for path in found.files)


# What the documentation says


def test_the_examples_of_the_documentation_are_understood(tmp_path, monkeypatch):
    """Up to the engines: names, settings, choices and data are checked, and nothing is computed."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee"):
        (photos / f"{name}.png").write_bytes(bundled(name).read_bytes())
    asked = []

    def seen(config):
        asked.append(config)
        results = SimpleNamespace(plan=SimpleNamespace(baseline="a", confidence=0.95))
        trained = {"checkpoint": tmp_path / "a.safetensors", "best": None, "run_id": "", "state": None, "curves": None}
        measured = {"scores": None, "costs": None, "notes": [], "pictures": []}
        return SimpleNamespace(results=results, comparisons=[], files=[], **trained, **measured)

    for module, name in ((ablation.sweep, "ablate"), (training.loop, "train"), (evaluation.evaluation, "evaluate")):
        monkeypatch.setattr(module, name, seen)
    monkeypatch.setattr(evaluation.Evaluation, "__init__", lambda *_: None)
    for name in ("verdict", "figure", "table"):
        monkeypatch.setattr(ablation.Ablation, name, property(lambda _: None))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/notebook_api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, {"__name__": "__main__"})
    compared, ablated, trained, evaluated = asked
    assert compared.start == "published"
    assert "backbone=dinov2_vits14" in compared.tasks.fidelity
    assert list(ablated.arms.wide) == ["attention.window_ratio=0.2"]
    assert trained.decoder.name == "inr"
    assert evaluated.checkpoints.inr == str(tmp_path / "a.safetensors")
    said = re.search(r"```text\narm wide: (.*?) There are: ", text)[1]
    with pytest.raises(SettingError, match=re.escape(said)):
        api.ablate({"wide": {"attention.window_ration": 1}, "baseline": {}}, ["fidelity"])
