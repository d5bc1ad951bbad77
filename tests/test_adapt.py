"""The command `adapt`: its curve, its delta, and what it says when adaptation does not help."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import core
from core.registry import discover
from experiments.adapt import main
from experiments.adaptation.adapt import adapt
from experiments.adaptation.curve import Curve
from experiments.data.image_files import NoImages
from experiments.measuring.evaluation import evaluate
from experiments.settings import SettingError
from experiments.sweeps.arms import Arm

SMALL = ["embed_dim=8", "unifier.num_basis=8", "attention.num_heads=2"]
TINY = [
    "backbone=hog8", "view=64", "guidance=32", "held_out=2", "num_support=2", "steps=2", "measure_every=1",
    "tracking.enabled=false", "device=cpu",
]  # fmt: skip


@pytest.fixture
def config(tmp_path, perturbed):
    """Overrides -> the configuration of a tiny adaptation in tmp_path."""
    discover()
    core.save(perturbed(core.build(SMALL)), tmp_path / "base.safetensors")

    def make(*overrides: str, name: str = "adapt") -> DictConfig:
        own = [*TINY, f"checkpoint={tmp_path / 'base.safetensors'}", f"out_dir={tmp_path / 'out'}"]
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            return compose(name, [*(own if name == "adapt" else []), *overrides])

    return make


def state(path: Path) -> dict[str, torch.Tensor]:
    return core.load(path).state_dict()


@pytest.mark.parametrize("targets", ["features", "encoder"])
def test_it_writes_a_curve_and_deltas(config, tmp_path, targets):
    found = adapt(config(f"targets={targets}", "save_at=[0,1]", "write=always"))
    with (tmp_path / "out" / "hog8.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "1", "2"}
    assert {row["measure"] for row in rows} == {"loss", "detail"}
    assert len(rows) == 3 * 2 * 2
    assert (tmp_path / "out" / "hog8.png").stat().st_size > 1000
    assert [path.name for path in found.deltas] == [f"hog8{end}.safetensors" for end in ("_step0", "_step1", "")]
    base, *states = [state(path) for path in (tmp_path / "base.safetensors", *found.deltas)]
    assert all(torch.equal(base[name], states[0][name]) for name in base)
    assert any(not torch.equal(states[1][name], states[2][name]) for name in base)


def test_the_measured_detail_is_that_of_fidelity(config, tmp_path):
    """An evaluation with the deltas as checkpoints gives the curve's numbers on the held-out images."""
    found = adapt(config("save_at=[1]", "write=always"))
    last, base = found.deltas[-1], tmp_path / "base.safetensors"
    made = config(
        "backbone=hog8", "task.view=64", "task.guidance=32", "task.scales=[2]", "peers=[bilinear]", "ceilings=[]",
        f"checkpoints={{base: {base}, one: {found.deltas[0]}, two: {{checkpoint: {base}, delta: {last}}}}}",
        f"val_data.first={len(core_names()) - 2}", f"out_dir={tmp_path / 'ev'}", "tracking.enabled=false",
        "device=cpu", name="fidelity",
    )  # fmt: skip
    scores = evaluate(made).scores
    for arm, step in (("base", 0), ("one", 1), ("two", 2)):
        own = scores[(scores["arm"] == arm) & (scores["measure"] == "detail")].set_index("image")
        for name, value in found.curve.values("detail").loc[step].items():
            # the evaluation rounds features to half precision, and the image too
            assert own.loc[name, "numerator"] == pytest.approx(value, abs=5e-3)


def core_names() -> list[str]:
    from experiments.data.images import ImageFolder

    return ImageFolder().names


def test_no_steps_write_nothing_and_say_so(config, caplog):
    found = adapt(config("steps=0"))
    assert found.deltas == []
    assert not found.helped
    assert "no delta is written, for held-out images are not better with it; write=always" in caplog.text
    assert "no help shown, gain +0.0000" in found.curve.verdict()


def test_a_training_with_maml_gives_a_checkpoint_that_adapts_by_itself(config, tmp_path, perturbed):
    model = perturbed(core.build(SMALL))
    learner = core.build_filler("learner", {"name": "maml", "inner_steps": 2, "rates": "tensor", "inner_lr": 0.1})
    learner.prepare(model)
    core.save(model, tmp_path / "meta.safetensors", learner=learner)
    made = config(
        f"checkpoint={tmp_path / 'meta.safetensors'}", "by_learner=true", "write=always", "measure_detail=false"
    )
    found = adapt(made)
    assert set(found.curve.table["step"]) == {0, 2}
    base, adapted = state(tmp_path / "meta.safetensors"), state(found.deltas[0])
    assert any(not torch.equal(base[name], adapted[name]) for name in base)
    with pytest.raises(SettingError, match=r"by_learner=true, but checkpoint=.*base.safetensors has none"):
        adapt(config("by_learner=true"))


def curve_of(gains: list[float]) -> Curve:
    curve = Curve([f"image {i}" for i in range(len(gains))], 0.95)
    curve.add(0, [{"detail": 0.2, "loss": 1.0} for _ in gains])
    curve.add(5, [{"detail": 0.2 + gain, "loss": 1.0 + gain} for gain in gains])
    return curve


def test_the_verdict_follows_the_interval():
    """Student's t over images; of the loss less is better."""
    gains = [0.01, 0.02, 0.03, 0.02]
    curve = curve_of(gains)
    gain = curve.gain("detail", 5)
    half = 3.182446 * np.std(gains, ddof=1) / 2
    assert [gain.low, gain.value, gain.high] == pytest.approx([0.02 - half, 0.02, 0.02 + half], rel=1e-5)
    assert curve.gain("loss", 5).value == pytest.approx(-0.02)
    assert curve.primary == "detail"
    assert "0.2000 before, 0.2200 after 5 steps: it helped, gain +0.0200 (+0.0070" in curve.verdict()
    assert "it hurt" in curve_of([-gain for gain in gains]).verdict()
    assert "no help shown" in curve_of([0.01, -0.01, 0.02, 0.0]).verdict()
    assert "one image gives no interval" in curve_of([0.01]).verdict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["held_out=100"], r"data has \d+ images, and held_out=100 .*none is left to adapt to"),
        (["num_support=50"], r"num_support=50, but of \d+ images held_out=2"),
        (["targets=labels"], r"targets must be one of features, encoder, got labels"),
        (["descent=adam"], r"descent must be one of sgd, adamw, got adam"),
        (["parts=[head]"], r"the model has no part 'head'"),
        (["save_at=[7]"], r"save_at=\[7\]: each must be a step from 0 to 2, not 7"),
        (["view=16", "guidance=16"], r"features of 2x2 cells are too small for scale 2"),
        (["checkpoint=null"], r"checkpoint must be a file or a name"),
        (["lr=0"], r"lr must be a number above 0"),
        (["write=never"], r"write must be one of if_better, always"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, overrides, message):
    with pytest.raises(SettingError, match=message):
        adapt(config("measure_detail=false", *overrides))


def test_a_folder_without_images_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImages, match="empty"):
        adapt(config(f"data.path=[{tmp_path / 'empty'}]"))


@pytest.mark.parametrize("write", ["always", "if_better"])
def test_the_command_reports_and_its_exit_code_tells(config, capsys, write):
    with pytest.raises(SystemExit) as ended:
        main.__wrapped__(config("steps=0", f"write={write}"))
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "detail on 2 held-out images" in printed
    assert ("usable as checkpoint=FILE" in printed) == (write == "always")


def test_an_evaluation_adapts_its_checkpoints_first(config, tmp_path):
    """Its arm is what `core.adapt` makes of the first images; peers stay, and arms are compared with the one named."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    given = [
        "backbone=hog8", "task.view=64", "task.guidance=32", "task.scales=[2]", "peers=[bilinear]", "ceilings=[]",
        "val_data.first=4", "tracking.enabled=false", "device=cpu", "name=ev", "data=images", "data.last=2",
        "adapt.view=64", "adapt.guidance=32", "adapt.steps=1", "adapt.lr=0.5",
    ]  # fmt: skip
    delta = adapt(config("steps=1", "lr=0.5", "descent=sgd", "targets=encoder", "write=always")).deltas[-1]
    plain = evaluate(config(*given, f"checkpoints={{base: {base}, adapted: {delta}}}", "baseline=base",
                            f"out_dir={out / 'plain'}", name="fidelity"))  # fmt: skip
    first = evaluate(config(*given, f"checkpoints={{base: {base}}}", "adapt.images=2", f"out_dir={out / 'first'}",
                            name="fidelity"))  # fmt: skip

    def values(found, arm: str) -> list[float]:
        own = found.scores
        return own[(own["arm"] == arm) & (own["measure"] == "detail")]["numerator"].tolist()

    assert values(first, "base") == pytest.approx(values(plain, "adapted"), abs=1e-5)
    assert values(first, "bilinear") == values(plain, "bilinear")
    assert values(plain, "base") != pytest.approx(values(plain, "adapted"), abs=1e-5)
    differences = {one.arm: one.difference for one in plain.results if one.measure == "detail"}
    assert differences["base"] is None
    expected = np.mean(np.subtract(values(plain, "adapted"), values(plain, "base")))
    assert differences["adapted"].value == pytest.approx(expected)
    assert "mean paired difference to base," in (out / "plain" / "ev.md").read_text()
    with pytest.raises(SettingError, match=r"adapt.images=3, but data has 2 images"):
        evaluate(config(*given, "adapt.images=3", f"out_dir={out}", name="fidelity"))
    with pytest.raises(SettingError, match=r"baseline must be one of bilinear, got other"):
        evaluate(config(*given, "baseline=other", f"out_dir={out}", name="fidelity"))


def test_an_arm_of_a_sweep_may_have_a_delta(config, tmp_path):
    """Its results depend on the delta's content, wherever that was written."""
    base, delta = tmp_path / "base.safetensors", tmp_path / "delta.safetensors"
    model = core.load(base)
    core.save_delta(model, delta, base)
    arm = Arm("one", "checkpoint", checkpoint=base, changes={"delta": str(delta), "attention.window_ratio": 0.2})
    before = arm.key(0)
    with torch.no_grad():
        model.rotary.freqs += 1
    core.save_delta(model, delta, base)
    assert arm.key(0) != before
    assert torch.equal(arm.model().rotary.freqs, model.rotary.freqs)
    assert arm.model().attention.window_ratio == 0.2
    other = Arm("one", "checkpoint", checkpoint=base, changes={"attention.window_ratio": 0.2})
    assert other._code == arm._code != ""
