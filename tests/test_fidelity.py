"""The fidelity command, a preset of `evaluate task=fidelity`: what it measures, writes and records, what it refuses."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

import core
from core.registry import discover
from experiments.cost.measure import count_flops
from experiments.data import DataError, open_data
from experiments.data.image_files import NoImages
from experiments.measuring import equal_cost
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.evaluation import evaluate
from experiments.measuring.metrics import FidelityCase, fidelity, fidelity_case
from experiments.peers import named_peers
from experiments.reports.fidelity_pictures import comparison
from experiments.settings import SettingError

ROOT = Path(__file__).parent.parent
QUICK = ("tracking.enabled=false", "backbone=hog8", "task.view=32", "task.scales=[2]", "device=cpu")
PHOTOS = "val_data.path=[photos]"


def config(*overrides):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("fidelity", [*QUICK, *overrides])


@pytest.fixture(autouse=True)
def in_a_folder_of_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    for name, size in (("a", (72, 90)), ("b", (64, 64)), ("c", (40, 50))):
        coarse = generator.integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(f"photos/{name}.png")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    core.save(core.build(["seed=1", "embed_dim=16"]), folder / "seed1.safetensors")
    return folder


def test_every_arm_is_measured_on_every_image_at_every_scale(weights):
    report = evaluate(
        config(PHOTOS, f"checkpoints=[{weights}/seed1.safetensors]", "task.scales=[2,3]", "task.guidance=16")
    )
    frame = report.scores
    arms = {*named_peers(None), "seed1", *CEILINGS}
    found = set(frame[frame.measure == "cosine"][["image", "task", "arm"]].itertuples(index=False, name=None))
    assert found == {(image, f"fidelity/{scale}x", arm) for image in "abc" for scale in (2, 3) for arm in arms}
    backbone, model = core.load_backbone("hog8"), core.load(weights / "seed1.safetensors")
    case = fidelity_case(open_data({"name": "images", "path": ["photos"]})[1].image, backbone, 3, 32, 16)
    with torch.no_grad():
        by_hand = {
            "seed1": model(case.guidance, case.features, (12, 12)),
            "bilinear": F.interpolate(case.features, (12, 12), mode="bilinear"),
            "encoder": backbone(case.image),
        }
    for arm, output in by_hand.items():
        rows = frame[(frame.image == "b") & (frame.task == "fidelity/3x") & (frame.arm == arm)]
        measured = (rows.set_index("measure").numerator / rows.set_index("measure").denominator).to_dict()
        measured = {name: value for name, value in measured.items() if not name.endswith("_blurred")}
        # the features went through half precision
        assert measured == pytest.approx(fidelity(output, case), rel=5e-3, abs=1e-3)


def test_tables_pictures_and_notes(weights):
    report = evaluate(config(PHOTOS, "name=mine", "out_dir=here", "peers=[bilinear,nearest]"))
    names = {path.name for path in Path("here").iterdir()}
    assert names == {"mine.csv", "mine.md", "mine.parquet", "mine_worst"}
    text = Path("here/mine.md").read_text()
    for part in ("show no more detail", "1 of 3 images are smaller", "val_data=images", "from Python"):
        assert part in text
    means = report.scores[report.scores.measure == "cosine"].groupby("arm")["numerator"].mean()
    closed = {one.arm: one.gap_closed for one in report.results if one.measure == "cosine"}
    share = (means["oracle_cosine"] - means["bilinear"]) / (means["encoder"] - means["bilinear"])
    assert closed["oracle_cosine"].value == pytest.approx(share)
    saved = pd.read_parquet("here/mine.parquet")
    assert len(saved) == len(report.scores)


def test_each_arm_keeps_its_own_worst_image_at_each_scale():
    report = evaluate(config(PHOTOS, "peers=[bilinear,nearest]", "task.scales=[2,3]"))
    drawn = sorted(path.name for path in Path("outputs/fidelity/fidelity_hog8_worst").iterdir())
    scores = report.scores[report.scores.measure == "detail"]
    worst = [
        f"{arm}_{scale}x_{rows.loc[rows.numerator.idxmin(), 'image']}.png"
        for arm in ("bilinear", "nearest")
        for scale in (2, 3)
        for rows in [scores[(scores.arm == arm) & (scores.task == f"fidelity/{scale}x")]]
    ]
    assert drawn == worst
    assert [path.name for path in report.pictures] == worst
    with Image.open(f"outputs/fidelity/fidelity_hog8_worst/{worst[0]}") as picture:
        assert picture.size[0] > 1000, "image, features, target, result and error, side by side"


def test_the_error_map_shows_where_the_result_is_wrong():
    backbone = core.load_backbone("hog8")
    case = fidelity_case(open_data({"name": "images", "path": ["photos"]})[0].image, backbone, 2, 32)
    result = case.target.clone()
    result[..., :4, :4] *= -1  # the upper left quarter points the other way
    row = np.asarray(comparison(case, result, "image", "result"))
    column = row[36:260, -234:-10]  # the last of five, 224 pixels square
    assert column.shape == (224, 224, 3)
    assert (column[:112, :112] == 255).all()
    assert (column[112:] == 0).all()
    assert (column[:112, 112:] == 0).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.scales=[1]", "task.scales must be"),
        ("task.scales=[]", "task.scales must be"),
        ("task.guidance=65", "task.guidance null or up to 64"),
        ("task.view=4", "needs at least"),
        ("ceilings=[oracle]", "ceilings of task=fidelity may be"),
        ("task.crop_step=null", "ceilings of task=fidelity may be encoder, .*, got split_half"),
        ("peers=[nearest]", "lacks bilinear"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(SettingError, match=message):
        evaluate(config(PHOTOS, override))


def test_arms_of_one_name_and_bad_data_are_refused(weights):
    with pytest.raises(SettingError, match="two arms are called bilinear"):
        evaluate(config(PHOTOS, f"checkpoints={{bilinear:{weights}/seed1.safetensors}}"))
    with pytest.raises(NoImages, match="nowhere"):
        evaluate(config("val_data.path=[nowhere]"))
    Path("photos/d.jpg").write_bytes(b"no photograph")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(config(PHOTOS))


def test_the_command_line_is_told_in_the_table_and_the_run_is_recorded(weights):
    arguments = [argument for argument in QUICK if not argument.startswith("tracking")]
    command_line = [sys.executable, "-m", "experiments.fidelity", *arguments, "peers=[bilinear,nearest]"]
    command_line += [PHOTOS, f"checkpoints={{mine:{weights}/seed1.safetensors}}"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fidelity/2x, 3 images" in done.stdout
    assert "mine" in done.stdout
    text = Path("outputs/fidelity/fidelity_hog8.md").read_text()
    assert "python -m experiments.fidelity backbone=hog8 task.view=32" in text
    store = sqlite3.connect("mlflow.db")
    ((status,),) = store.execute("select status from runs").fetchall()
    assert status == "FINISHED"
    kept = {path.name for path in Path("mlruns").rglob("*") if path.is_file()}
    assert kept >= {"fidelity_hog8.md", "fidelity_hog8.parquet"}
    refused = subprocess.run(
        [*command_line, "task.scales=[1]"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert refused.returncode == 2
    assert "scales must be" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_encoder_at_equal_cost_sees_the_largest_image_that_it_can_afford(monkeypatch):
    """Of an encoder whose cost is known: 12 products a pixel, and AnyUp's set to that of some more pixels."""

    class Flat(nn.Module):
        patch_size = 4

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 4, stride=4)

        def forward(self, rgb):
            return self.layer(rgb)

    backbone = Flat()
    assert equal_cost.encoder_flops(backbone, 8) == 2 * 4 * 2 * 48  # multiply-adds of 4 outputs, 2 channels, 48 inputs
    image, features, guidance = torch.rand(1, 3, 64, 64), torch.randn(1, 2, 8, 8), torch.randn(1, 3, 32, 32)
    for affordable in (32, 44, 60, 64, 100):
        extra = 2 * 2 * 48 * (affordable**2 - 32**2) // 16
        monkeypatch.setattr(equal_cost, "anyup_flops", lambda *_, extra=extra: extra)
        seen = equal_cost.enlarged_image(backbone, image, features, guidance, (16, 16))
        assert seen.shape == (1, 3, *[min(64, affordable)] * 2)
    case = FidelityCase(image, guidance, features, torch.zeros(1, 2, 16, 16), None)
    output, _ = CEILINGS["encoder_equal_cost"](case, backbone)
    torch.testing.assert_close(output, backbone(image).detach())


def test_what_anyup_costs_is_counted():
    few, many = (equal_cost.anyup_flops(8, (4, 4), (32, 32), size) for size in ((8, 8), (16, 16)))
    model = core.AnyUp().twice_differentiable()
    with torch.no_grad():
        assert few == count_flops(lambda: model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, 4, 4), (8, 8)))
    assert many > few


def test_ceilings_are_known_to_the_configuration():
    assert list(config().ceilings) == list(CEILINGS)


def test_an_arm_may_be_the_mean_of_others():
    report = evaluate(config(PHOTOS, "peers=[bilinear,nearest]", "means={both: [nearest, bilinear]}", "ceilings=[]"))
    errors = report.scores[report.scores.measure == "error"].groupby("arm")["numerator"].mean()
    assert errors["both"] < errors["nearest"]
    assert set(errors.index) == {"bilinear", "nearest", "both"}
    for wrong in ("{both: [nearest]}", "{both: [nearest, nobody]}", "{both: [nearest, nearest]}"):
        with pytest.raises(SettingError, match="takes at least two of the arms bilinear, nearest"):
            evaluate(config(PHOTOS, "peers=[bilinear,nearest]", f"means={wrong}"))
    with pytest.raises(SettingError, match="two arms are called nearest"):
        evaluate(config(PHOTOS, "peers=[bilinear,nearest]", "means={nearest: [nearest, bilinear]}"))


def test_a_checkpoint_may_be_changed():
    node = "{checkpoint: bundled, attention.window_ratio: 0.5}"
    arms = f"checkpoints={{plain: bundled, wide: {node}}}"
    report = evaluate(config(PHOTOS, "peers=[bilinear]", arms, "ceilings=[]"))
    errors = report.scores[report.scores.measure == "error"].groupby("arm")["numerator"].mean()
    assert errors["plain"] != errors["wide"]
    for node, message in (
        ("{file: bundled}", "a checkpoint must be FILE, or {checkpoint: FILE, delta: FILE, temporal: NAME"),
        ("{checkpoint: bundled, embed_dim: 8}", "embed_dim cannot be changed after training"),
    ):
        with pytest.raises(SettingError, match=message):
            evaluate(config(PHOTOS, "peers=[bilinear]", f"checkpoints={{odd: {node}}}"))


def test_an_arm_may_be_the_blur_of_another():
    report = evaluate(config(PHOTOS, "peers=[bilinear,nearest]", "blurs={smooth: {nearest: 0.5}}", "ceilings=[]"))
    errors = report.scores[report.scores.measure == "error"].groupby("arm")["numerator"].mean()
    assert errors["smooth"] < errors["nearest"]
    for wrong in ("{smooth: {nobody: 0.5}}", "{smooth: nearest}", "{smooth: {nearest: 1, bilinear: 1}}"):
        with pytest.raises(SettingError, match=r"give {ARM: WIDTH} with one of the arms bilinear, nearest"):
            evaluate(config(PHOTOS, "peers=[bilinear,nearest]", f"blurs={wrong}"))
    with pytest.raises(SettingError, match=r"blurs.smooth: the width must be a number of cells above 0, got 0"):
        evaluate(config(PHOTOS, "peers=[bilinear,nearest]", "blurs={smooth: {nearest: 0}}"))
    with pytest.raises(SettingError, match="two arms are called nearest"):
        evaluate(config(PHOTOS, "peers=[bilinear,nearest]", "blurs={nearest: {nearest: 1}}"))


def test_what_the_encoder_refuses_is_a_setting_that_cannot_be_used(monkeypatch):
    backbone = core.load_backbone("hog8")
    monkeypatch.setattr("experiments.measuring.evaluation.backbone_from_config", lambda _: backbone)

    def features(image, layer):
        raise ValueError("32 pixels do not suit me")

    monkeypatch.setattr(backbone, "features", features)
    with pytest.raises(SettingError, match="backbone=hog8 cannot encode image a: 32 pixels do not suit me"):
        evaluate(config(PHOTOS, "peers=[bilinear]"))


def test_all_crops_may_be_asked_for():
    quick = (PHOTOS, "peers=[bilinear]", "ceilings=[]")
    few, every = (evaluate(config(*quick, f"task.num_crops={n}")).scores for n in (4, "null"))
    assert not few.equals(every)
