"""The fidelity command: what it measures, writes and records, and what it refuses."""

import shutil
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

import core
from experiments import fidelity as command
from experiments.data import DataError, open_data
from experiments.data.image_files import NoImages
from experiments.fidelity import measure_fidelity
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.metrics import FidelityError, fidelity, fidelity_case
from experiments.peers import peers
from experiments.reports.fidelity import cells, metrics, plot, rich_table, summarise
from experiments.reports.fidelity_pictures import WorstImages, comparison
from experiments.settings import SettingError

ROOT = Path(__file__).parent.parent
QUICK = ("tracking.enabled=false", "backbone=hog8", "view=32", "scales=[2]", "num_resamples=200")


def config(*overrides):
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
    for seed in (1, 2):
        core.save(core.build([f"seed={seed}", "embed_dim=16"]), folder / f"seed{seed}.safetensors")
    return folder


def test_every_arm_is_measured_on_every_image(weights):
    report = measure_fidelity(
        config("data.path=[photos]", f"checkpoints=[{weights}/seed1.safetensors]", "scales=[2,3]", "guidance=16")
    )
    arms = [*peers(), "seed1", "encoder", "oracle_cosine", "oracle_error"]
    frame = pd.read_parquet("outputs/fidelity/fidelity_hog8_images.parquet")
    pd.testing.assert_frame_equal(frame, report.images)
    expected = [(image, scale, arm) for image in "abc" for scale in (2, 3) for arm in arms]
    assert list(frame[["image", "scale", "arm"]].itertuples(index=False, name=None)) == expected
    enlarged = {(row.image, row.scale) for row in frame.itertuples() if row.enlarged}
    assert enlarged == {("a", 3), ("b", 3), ("c", 2), ("c", 3)}

    backbone, model = core.load_backbone("hog8"), core.load(weights / "seed1.safetensors").eval()
    case = fidelity_case(open_data(config("data.path=[photos]").data)[1].image, backbone, 3, 32, 16)
    with torch.no_grad():
        by_hand = {
            "seed1": model(case.guidance, case.features, (12, 12)),
            "bilinear": F.interpolate(case.features, (12, 12), mode="bilinear"),
            "encoder": backbone(case.image),
        }
    for arm, output in by_hand.items():
        row = frame[(frame.image == "b") & (frame.scale == 3) & (frame.arm == arm)].iloc[0]
        measured = fidelity(output, case)
        assert set(measured) == {"cosine", "error", "edge_cosine", "edge_error"}
        assert row[list(measured)].to_dict() == pytest.approx(measured, rel=1e-5)


def test_what_is_written_says_how_it_came_about(weights):
    report = measure_fidelity(config("data.path=[photos]", "name=mine", "out_dir=here", "seed=3"))
    names = ["mine.csv", "mine.md", "mine.png", "mine_images.parquet", "mine_worst.png"]
    assert sorted(path.name for path in Path("here").iterdir()) == names
    assert sorted(path.name for path in report.files) == names
    text = Path("here/mine.md").read_text()
    fingerprint = open_data(config("data.path=[photos]").data).fingerprint
    for part in ("Feature fidelity: hog8", f"3 images, data=images, fingerprint {fingerprint[:12]}", "seed 3",
                 "show no more detail: 1 at 2x", "from Python", "## 2x, 1 of 3 images enlarged"):  # fmt: skip
        assert part in text
    table = pd.read_csv("here/mine.csv")
    means = report.images.groupby("arm")["cosine"].mean()
    found = table[table.measure == "cosine"].set_index("arm")
    assert found["mean"].to_dict() == pytest.approx(means.to_dict())
    shares = (means - means["bilinear"]) / (means["encoder"] - means["bilinear"])
    assert found.loc["oracle_cosine", "gap_closed"] == pytest.approx(shares["oracle_cosine"])
    assert found.loc["nearest", "difference"] == pytest.approx(means["nearest"] - means["bilinear"])
    assert f"| bilinear | {means['bilinear']:.4f} |" in text
    with Image.open("here/mine.png") as picture:
        assert picture.size[0] > 500
    with Image.open("here/mine_worst.png") as picture:
        one_row = comparison_of(report).size
        assert picture.size == (one_row[0], one_row[1] * len(peers()))


def comparison_of(report):
    backbone = core.load_backbone("hog8")
    case = fidelity_case(open_data({"name": "images", "path": ["photos"]})[0].image, backbone, 2, 32)
    return comparison(case, case.target, "a", "b")


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


def test_each_arm_keeps_its_own_worst_image(weights):
    backbone = core.load_backbone("hog8")
    data = open_data({"name": "images", "path": ["photos"]})
    cases = {name: fidelity_case(data[i].image, backbone, 2, 32) for i, name in enumerate(data.names)}
    worst = WorstImages()
    with pytest.raises(ValueError, match="no results"):
        worst.sheet()
    for arm, bad in (("one", "b"), ("two", "a")):
        for name, case in cases.items():
            result = -case.target if name == bad else case.target
            worst.offer(2, arm, name, fidelity(result, case), case, result)
    assert worst.images == {(2, "one"): "b", (2, "two"): "a"}
    for arm, (name, row) in {"one": ("b", 0), "two": ("a", 1)}.items():
        expected = np.asarray(comparison(cases[name], -cases[name].target, name, f"2x {arm} -1.000"))
        found = np.asarray(worst.sheet())[row * len(expected) : (row + 1) * len(expected)]
        assert (found == expected).all()


def test_features_are_computed_once_and_shared(weights, monkeypatch):
    seen = []
    of_hog = core.load_backbone("hog8")
    monkeypatch.setattr(command, "backbone_from_config", lambda _: of_hog)
    monkeypatch.setattr(
        of_hog, "features", lambda image, layer, own=of_hog.features: seen.append(1) or own(image, layer)
    )
    measure_fidelity(config("data.path=[photos]", f"checkpoints={{one:{weights}/seed1.safetensors,two:"
                            f"{weights}/seed2.safetensors}}", "ceilings=[oracle_error]"))  # fmt: skip
    assert len(seen) == 3 * 2  # low resolution, and all crops at once


def frame_of(values, scale=2, **other):
    """arm -> values per image, as `summarise` takes them."""
    rows = [
        {"image": f"i{n}", "scale": scale, "arm": arm, "enlarged": False, "cosine": value, "error": 1 - value, **other}
        for arm, column in values.items()
        for n, value in enumerate(column)
    ]
    return pd.DataFrame(rows)


def test_results_of_known_numbers():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.8, 50)
    gain = generator.normal(0.01, 0.004, 50)
    frame = frame_of({"mine": base + gain, "bilinear": base, "encoder": base + 0.02, "worse": base - gain})
    results = {(result.arm, result.measure): result for result in summarise(frame.sample(frac=1, random_state=0))}
    mine = results["mine", "cosine"]
    assert mine.num_images == 50
    assert mine.mean == pytest.approx((base + gain).mean())
    assert mine.difference.value == pytest.approx(gain.mean())
    half = 1.96 * gain.std(ddof=1) / 50**0.5
    assert mine.difference.low == pytest.approx(gain.mean() - half, abs=0.15 * half)
    assert mine.gap_closed.value == pytest.approx(gain.mean() / 0.02)
    assert results["mine", "error"].gap_closed.value == pytest.approx(gain.mean() / 0.02)  # less error is better
    assert results["mine", "error"].difference.value == pytest.approx(-gain.mean())
    assert results["worse", "cosine"].gap_closed.value == pytest.approx(-gain.mean() / 0.02)
    assert results["bilinear", "cosine"].difference is None
    assert results["encoder", "cosine"].gap_closed is None
    assert metrics(list(results.values()))["2x/mine/cosine_gap_closed"] == mine.gap_closed.value


@pytest.mark.parametrize("sign", [0.0, -0.1])
def test_no_share_of_a_gap_that_is_not_there(sign):
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.8, 30)
    frame = frame_of({"bilinear": base, "mine": base + 0.01, "encoder": base + sign + generator.normal(0, 0.05, 30)})
    assert all(result.gap_closed is None for result in summarise(frame))
    assert all(result.gap_closed is None for result in summarise(frame[frame.arm != "encoder"]))


def test_one_image_has_no_intervals_and_can_be_shown():
    results = summarise(frame_of({"bilinear": [0.5], "mine": [0.6], "encoder": [0.7]}, edge_cosine=0.3))
    assert metrics(results)["2x/mine/cosine_difference"] == pytest.approx(0.1)
    assert not [key for key in metrics(results) if key.endswith(("low", "high"))]
    assert cells(results, 2)[1] == ["mine", "0.6000 +0.1000", "0.4000 -0.1000", "0.3000 +0.0000", "", "", ""]
    assert len(rich_table(results)) == 1
    assert len(plot(results).axes) == 2


def test_a_missing_value_is_refused_by_name_and_missing_edges_are_counted():
    values = {"bilinear": [0.5, 0.4, 0.3], "mine": [0.6, float("nan"), 0.2]}
    with pytest.raises(FidelityError, match=r"image i1, arm mine: cosine is nan \(1 such"):
        summarise(frame_of(values))
    complete = frame_of({"bilinear": [0.5, 0.4, 0.3], "mine": [0.6, 0.7, 0.2]})
    with pytest.raises(FidelityError, match="image i2, arm mine: cosine is nan"):
        summarise(complete.iloc[:-1])
    edges = complete.assign(edge_cosine=complete["cosine"].where(complete["image"] != "i1"))
    counts = {(result.arm, result.measure): result.num_images for result in summarise(edges)}
    assert counts["mine", "edge_cosine"] == 2
    assert counts["mine", "cosine"] == 3
    lost = edges.assign(edge_cosine=edges["edge_cosine"].where(~((edges.image == "i0") & (edges.arm == "mine"))))
    with pytest.raises(FidelityError, match="image i0, arm mine: edge_cosine"):
        summarise(lost)
    with pytest.raises(ValueError, match="no rows of bilinear"):
        summarise(complete[complete.arm == "mine"])
    with pytest.raises(ValueError, match="duplicate"):
        summarise(pd.concat([complete, complete]))


def test_nan_features_of_one_image_stop_the_run_with_its_name(weights, monkeypatch):
    model = core.load(weights / "seed1.safetensors")
    calls = []

    def broken(image, features, size):
        calls.append(1)
        return F.interpolate(features, size) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(model, "forward", broken)
    monkeypatch.setattr(core, "load", lambda path: model)
    with pytest.raises(FidelityError, match=r"image b at 2x, arm seed1: 192 of \d+ values|image b at 2x, arm seed1: "):
        measure_fidelity(config("data.path=[photos]", "checkpoints=[seed1.safetensors]"))
    assert not list(Path("outputs/fidelity").iterdir())
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("photos/blank.png")
    with pytest.raises(FidelityError, match=r"image blank at 2x: .*is the image blank"):
        measure_fidelity(config("data.path=[photos]"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scales=[]", "scales must be a list"),
        ("scales=2", "scales must be a list"),
        ("scales=[1]", "scales must be a list of whole numbers from 2"),
        ("scales=[2.5]", "scales must be a list of whole numbers from 2"),
        ("scales=[2,4,2]", "names one twice"),
        ("view=0", "view must be"),
        ("view=4", "view=4 cannot be used: backbone hog8: the image is 4x4"),
        ("guidance=65", "guidance must be null or a number of pixels up to 64"),
        ("ceilings=[sky]", "ceilings may be encoder, oracle_cosine"),
        ("ceilings=[encoder,encoder]", "each once"),
        ("peers=[nearest]", "lacks bilinear"),
        ("peers=[bilinear,trilinear]", "peer=trilinear is not registered"),
        ("peers=[bilinear,bilinear]", "two arms are called bilinear"),
        ("confidence=95", "confidence must lie between"),
        ("num_resamples=10", "num_resamples must be"),
        ("name=a/b", "name must be that of a file"),
        ("device=abacus", "device=abacus"),
        ("checkpoints=some.safetensors", "checkpoints must be"),
        ("checkpoints=[missing.safetensors]", "checkpoints: .*missing.safetensors"),
        ("checkpoints=[photos/a.png]", "checkpoints: .*a.png"),
        ("checkpoints={encoder:x.safetensors}", "two arms are called encoder"),
        ("backbone.weights=w.safetensors", "hog8 is a classical descriptor"),
        ("out_dir=photos/a.png", "out_dir=photos/a.png cannot be written"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(SettingError, match=message):
        measure_fidelity(config("data.path=[photos]", override))


def test_arms_of_one_name_and_bad_data_are_refused(weights):
    (weights / "other").mkdir(exist_ok=True)
    shutil.copy(weights / "seed1.safetensors", weights / "other")
    both = f"checkpoints=[{weights}/seed1.safetensors,{weights}/other/seed1.safetensors]"
    with pytest.raises(SettingError, match="two arms are called seed1: give them names"):
        measure_fidelity(config("data.path=[photos]", both))
    with pytest.raises(NoImages, match="nowhere"):
        measure_fidelity(config("data.path=[nowhere]"))
    Path("photos/d.jpg").write_bytes(b"no photograph")
    with pytest.raises(DataError, match="cannot be read"):
        measure_fidelity(config("data.path=[photos]"))


def test_the_command_line_is_told_in_the_table_and_the_run_is_recorded(weights):
    arguments = [argument for argument in QUICK if not argument.startswith("tracking")]
    command_line = [sys.executable, "-m", "experiments.fidelity", *arguments, "peers=[bilinear,nearest]"]
    command_line += ["data.path=[photos]", f"checkpoints={{mine:{weights}/seed2.safetensors}}"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "feature fidelity at 2x, 3 images" in done.stdout
    assert "mine" in done.stdout
    text = Path("outputs/fidelity/fidelity_hog8.md").read_text()
    assert "python -m experiments.fidelity backbone=hog8 view=32" in text
    store = sqlite3.connect("mlflow.db")
    ((status,),) = store.execute("select status from runs").fetchall()
    assert status == "FINISHED"
    logged = dict(store.execute("select key, value from metrics").fetchall())
    assert logged["2x/mine/cosine"] > 0
    kept = {path.name for path in Path("mlruns").rglob("*") if path.is_file()}
    assert kept >= {"fidelity_hog8.md", "fidelity_hog8_images.parquet", "fidelity_hog8.png", "fidelity_hog8_worst.png"}
    refused = subprocess.run(
        [*command_line, "scales=[1]"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert refused.returncode == 2
    assert "scales must be" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_ceilings_are_known_to_the_configuration():
    assert list(config().ceilings) == list(CEILINGS)
