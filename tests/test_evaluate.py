"""The evaluation command and `Evaluation`: what arms share, what is written and recorded, and what is refused."""

import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.nn import functional as F

import core
from core.registry import discover
from experiments.measuring import evaluation as command
from experiments.measuring.evaluation import Evaluation, evaluate
from experiments.measuring.tasks import Ceiling, EvaluationError
from experiments.peers import Peer, make_peer, register_peer
from experiments.settings import SettingError
from experiments.statistics.scores import KEYS, VALUES, ScoreError, sums, value

ROOT = Path(__file__).parent.parent
QUICK = (
    "tracking.enabled=false", "backbone=hog8", "image_size=[32,40]", "data.size=[36,40]", "data.num=3", "data.seed=5",
    "val_data.size=[36,40]", "val_data.num=2", "device=cpu",
)  # fmt: skip
PROBE = ("task.epochs=2", "task.pixels_per_image=50")
TRIO = ("nearest", "bilinear", "bicubic")


def config(*overrides, quick=(*QUICK, *PROBE)):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("evaluate", [*quick, *overrides])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    core.save(core.build(["embed_dim=8", "attention.num_heads=1", "unifier.num_basis=8"]), path)
    return path


@pytest.fixture
def encoded(monkeypatch):
    """Sizes of all images that the backbone was given."""
    seen, backbone = [], core.load_backbone("hog8")
    own = backbone.features
    monkeypatch.setattr(command, "backbone_from_config", lambda _: backbone)
    monkeypatch.setattr(backbone, "features", lambda image, layer: seen.append(tuple(image.shape)) or own(image, layer))
    return seen


def test_every_arm_is_measured_on_every_image_with_every_seed(weights):
    report = evaluate(config(f"checkpoints=[{weights}]", "peers=[bilinear,nearest]", "seeds=[0,3]", "name=all"))
    scores = report.scores
    assert list(scores) == [*KEYS, *VALUES]
    arms = ["bilinear", "nearest", "mine", "encoder"]
    tasks = {"segmentation/upsampled", "segmentation/transferred"}
    images = {"scenes/val/000000", "scenes/val/000001"}
    found = set(scores[["task", "arm", "seed", "image"]].itertuples(index=False, name=None))
    assert found == {(task, arm, seed, image) for task in tasks for arm in arms for seed in (0, 3) for image in images}
    assert set(scores["measure"]) == {"miou", "accuracy", "boundary_miou", "boundary_f"}
    assert set(scores["data"]) == {"scenes"}
    assert set(scores["backbone"]) == {"hog8"}
    pd.testing.assert_frame_equal(pd.read_parquet("outputs/evaluate/all.parquet"), scores)

    by_hand = Evaluation(config()).scores(core.load(weights), "mine", 3)
    mine = scores[(scores.arm == "mine") & (scores.seed == 3)].reset_index(drop=True)
    pd.testing.assert_frame_equal(by_hand, mine, check_dtype=False)

    table = pd.read_csv("outputs/evaluate/all.csv").set_index(["task", "measure", "arm"])
    rows = scores[(scores.task == "segmentation/upsampled") & (scores.measure == "miou")]
    means = {arm: value(*sums(rows[rows.arm == arm])[:2]).mean() for arm in arms}
    for arm, mean in means.items():
        assert table.loc["segmentation/upsampled", "miou", arm]["mean"] == pytest.approx(mean)
    difference = table.loc["segmentation/upsampled", "miou", "mine"]["difference"]
    assert difference == pytest.approx(means["mine"] - means["bilinear"])
    text = Path("outputs/evaluate/all.md").read_text()
    for part in ("# segmentation: scenes, hog8", "## segmentation/transferred, 2 images", "seeds: 2", "image [32, 40]",
                 f"| nearest | {means['nearest']:.4f} ", "from Python", "pixels_per_image 50"):  # fmt: skip
        assert part in text
    assert sorted(path.name for path in report.files) == ["all.csv", "all.md", "all.parquet"]
    assert {one.verdict for one in report.results if one.arm == "nearest"} == {"reference"}
    assert {one.verdict for one in report.results if one.arm == "mine"} <= {"helps", "hurts", "not shown"}


def test_arms_and_seeds_share_encodings(encoded):
    evaluation = Evaluation(config())
    assert encoded == []  # nothing before it is needed
    for seed in (0, 1):
        for name in TRIO:
            evaluation.scores(make_peer(name), name, seed)
    assert encoded == [(1, 3, 32, 40)] * 5  # 3 training and 2 validation images, once
    evaluation.scores(Ceiling("encoder"), "encoder", 0)
    assert encoded[5:] == [(1, 3, 64, 80)] * 5


def test_encodings_come_from_the_disk(encoded):
    first = Evaluation(config("cache.folder=features")).scores(make_peer("nearest"), "nearest", 0)
    assert len(encoded) == 5
    again = Evaluation(config("cache.folder=features")).scores(make_peer("nearest"), "nearest", 0)
    assert len(encoded) == 5
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(Evaluation(config()).scores(make_peer("nearest"), "nearest", 0), first)


def test_the_probe_on_low_resolution_features_is_shared(monkeypatch):
    trained = []
    own = command.make_task({"name": "segmentation"}).__class__.loss
    evaluation = Evaluation(config())
    monkeypatch.setattr(
        type(evaluation.task),
        "loss",
        lambda self, prediction, target: trained.append(1) or own(self, prediction, target),
    )
    for name in TRIO:
        evaluation.scores(make_peer(name), name, 0)
    assert len(trained) == 2 * 3  # one step an epoch: low-resolution, nearest, bicubic; bilinear is the first


def test_sizes_of_what_is_seen_and_given():
    class Looking(nn.Module):
        def forward(self, image, features, output_size):
            self.seen = tuple(image.shape), tuple(features.shape), tuple(output_size)
            return nn.functional.interpolate(features, output_size)

    model = Looking()
    overrides = ("encoder_size=40", "guidance_size=[24,30]", "output_size=20")
    scores = Evaluation(config(*overrides)).scores(model, "looking", 0)
    assert model.seen == ((1, 3, 24, 30), (1, 87, 4, 5), (16, 20))
    pixels = scores[(scores.measure == "accuracy")]["denominator"]
    assert pixels.max() == 32 * 40  # predictions are measured at the size of the labels
    Evaluation(config()).scores(model, "looking", 0)
    assert model.seen == ((1, 3, 32, 40), (1, 87, 4, 5), (32, 40))


def test_limits_take_images_from_everywhere():
    evaluation = Evaluation(config("data.num=9", "max_train_images=3", "max_val_images=1"))
    assert evaluation.bench.train.names == [f"scenes/train/00000{i}" for i in (0, 4, 8)]
    scores = evaluation.scores(make_peer("nearest"), "nearest", 0)
    assert set(scores["image"]) == {"scenes/val/000000"}


def test_the_fingerprint_is_that_of_what_scores_depend_on():
    base = Evaluation(config())
    assert base.names == ("scenes", "hog8")
    for same in ("out_dir=elsewhere", "seeds=[4]", "peers=[bilinear]", "cache.memory_gb=1", "encoder_size=[32,40]"):
        assert Evaluation(config(same)).fingerprint == base.fingerprint
    others = ("task.epochs=3", "task=depth", "image_size=32", "output_size=20", "guidance_size=16", "data.num=4",
              "val_data.seed=1", "backbone=hog16", "max_val_images=1", "ceiling_scale=3")  # fmt: skip
    found = {Evaluation(config(other)).fingerprint for other in others}
    assert len(found | {base.fingerprint}) == len(others) + 1


def test_tasks_without_training_open_no_training_data():
    quick = tuple(o for o in QUICK if not o.startswith("data."))
    for task, extra in (("fidelity", ("task.view=16",)), ("temporal", ("val_data.frames=2",))):
        few = ("peers=[bilinear]", "data=camvid")  # without data.path
        report = evaluate(config(f"task={task}", *extra, *few, quick=quick))
        assert set(report.scores["seed"]) == {0}
        assert set(report.scores["task"]) == {{"fidelity": "fidelity/2x", "temporal": "temporal"}[task]}


def test_a_model_in_training_is_measured_in_eval_mode():
    class Modal(nn.Module):
        def forward(self, image, features, output_size):
            assert not self.training
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled(), "a peer may take gradients of its own"
            return nn.functional.interpolate(features, output_size)

    model = Modal().train()
    Evaluation(config()).scores(model, "modal", 0)
    assert model.training


def test_a_measure_that_is_not_finite_is_not_averaged(monkeypatch):
    evaluation = Evaluation(config())
    own, calls = evaluation.task.measures, []

    def measures(prediction, target):
        calls.append(1)
        return own(prediction, target) | ({"accuracy": math.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(evaluation.task, "measures", measures)
    with pytest.raises(ScoreError, match=r"1 scores are not finite, the first: .*arm nearest.*scenes/val/000001, meas"):
        evaluation.scores(make_peer("nearest"), "nearest", 0)


def test_features_that_are_not_finite_name_arm_and_image():
    class Broken(nn.Module):
        def forward(self, image, features, output_size):
            return torch.full((*features.shape[:2], *output_size), math.inf)

    with pytest.raises(
        EvaluationError, match="arm broken, seed 7: image scenes/train/000000: 111360 of 111360 upsampled"
    ):
        Evaluation(config()).scores(Broken(), "broken", 7)


@pytest.mark.parametrize("made", ["means={m: [mine, bilinear]}", "blurs={m: {mine: 0.5}}"])
def test_a_mean_or_a_blur_of_several_trainings_is_refused(made):
    with pytest.raises(SettingError, match="m: arm mine has a training for each seed"):
        evaluate(config("checkpoints={mine: [bundled]}", made))


@pytest.mark.parametrize("task", ["depth", "fidelity"])
def test_trainings_with_several_seeds_are_one_arm(weights, tmp_path, task):
    other = tmp_path / "other.safetensors"
    core.save(core.build(["embed_dim=8", "attention.num_heads=1", "unifier.num_basis=8", "seed=1"]), other)
    arms = f"checkpoints={{fixed: {weights}, trained: [{weights}, {other}], second: {other}}}"
    quick = (*QUICK, *PROBE) if task == "depth" else QUICK
    settings = [f"task={task}", arms, "peers=[bilinear]", "ceilings=[]", "seeds=[0,3]", "baseline=fixed"]
    report = evaluate(config(*settings, quick=quick))
    keys = ["arm", "seed", "task", "measure", "image", "part"]
    parts = report.scores.set_index(keys)["numerator"].sort_index()
    pd.testing.assert_series_equal(parts["trained", 0], parts["fixed", 0])
    pd.testing.assert_series_equal(parts["trained", 3], parts["second", 3])
    assert not parts["trained", 3].equals(parts["fixed", 3])
    if task == "fidelity":  # without probes a fixed arm is the same for all seeds
        pd.testing.assert_series_equal(parts["fixed", 0], parts["fixed", 3])
    of_trained = [one for one in report.results if one.arm == "trained"]
    assert of_trained
    assert {one.num_seeds for one in of_trained} == {2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.epochs=0", "task.epochs must be at least 1"),
        ("seeds=[]", "seeds must be a list of whole numbers"),
        ("seeds=[1,1]", r"seeds=\[1, 1\] names one twice"),
        ("seeds=[-1]", "seeds must be a list of whole numbers"),
        ("peers=[nearest]", "lacks bilinear"),
        ("peers=[bilinear,sharp]", "peer=sharp is not registered"),
        ("checkpoints=[none.safetensors]", "checkpoints: .*none.safetensors"),
        ("checkpoints={mine: [bundled, bundled]}", r"checkpoints.mine has 2 trainings, and there are 1 seeds"),
        ("ceilings=[oracle_error]", "ceilings of task=segmentation may be encoder, got oracle_error"),
        ("ceilings=[encoder,encoder]", "names one twice"),
        ("ceiling_scale=1", "ceiling_scale must be a whole number from 2, got 1"),
        ("image_size=null", r"image_size must be a number or \[rows, columns\], got None"),
        ("image_size=0", "image_size must be null, a positive number"),
        ("encoder_size=[1,2,3]", "encoder_size must be null, a positive number"),
        ("guidance_size=-4", "guidance_size must be null, a positive number"),
        ("output_size=many", "output_size must be null, a positive number"),
        ("encoder_size=12", r"encoder_size=\[10, 12\] is too small: backbone=hog8 needs 16 pixels"),
        ("max_train_images=0", "max_train_images must be null or at least 1"),
        ("cache.memory_gb=-1", "cache.memory_gb must not be negative"),
        ("confidence=1", "confidence must lie between 0.5 and 1"),
        ("name=a/b", "name must be a file name"),
        ("device=cuda:9", "device=cuda:9 cannot be used"),
        ("backbone.weights=x", "backbone hog8 is a classical descriptor and has no weights"),
    ],
)
def test_settings_that_make_no_sense(override, message):
    with pytest.raises(SettingError, match=message):
        evaluate(config(override))
    assert not list(Path().glob("outputs/evaluate/*"))


def test_data_and_tasks_that_do_not_go_together():
    photos = tuple(o for o in (*QUICK, *PROBE) if not o.startswith(("data.", "val_data.")))
    images = ("data=images", "data@val_data=images", "data.path=[coffee]", "val_data.path=[chelsea]")
    with pytest.raises(SettingError, match="task=segmentation needs labels, and data=images has none"):
        evaluate(config(*images, quick=photos))
    depth = tuple(o for o in images if "path" not in o)
    with pytest.raises(SettingError, match="task=depth needs depth, and data=images gives none"):
        evaluate(config("task=depth", *depth, quick=photos))
    with pytest.raises(SettingError, match="task=temporal needs videos, and val_data=scenes has none"):
        evaluate(config("task=temporal", quick=QUICK))
    frames = ("val_data.frames=2", "max_val_images=1")
    with pytest.raises(SettingError, match="task=temporal measures whole videos: max_val_images must be null"):
        evaluate(config("task=temporal", *frames, quick=QUICK))
    with pytest.raises(SettingError, match="task=parsing is not registered; there are: depth, fidelity, matching"):
        Evaluation(OmegaConf.merge(OmegaConf.to_container(config()), {"task": {"name": "parsing"}}))


def test_the_same_images_for_training_and_measuring_are_told(caplog):
    Evaluation(config("val_data.split=train", "val_data.num=3", "val_data.seed=5"))
    assert "data and val_data are the same images" in caplog.text


def test_the_command_records_a_run():
    overrides = [*QUICK[1:], *PROBE, "peers=[bilinear,nearest]", "ceilings=[]", "name=run"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *overrides],
        capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "segmentation/upsampled, 2 images" in done.stdout
    assert "outputs/evaluate/run.parquet" in done.stdout
    with sqlite3.connect("mlflow.db") as store:
        keys = {key for (key,) in store.execute("select key from metrics")}
        (status,) = store.execute("select status from runs").fetchone()
        tags = dict(store.execute("select key, value from tags where key like 'data.%'"))
    store.close()
    assert status == "FINISHED"
    assert {"segmentation/upsampled/bilinear/miou", "segmentation/upsampled/nearest/miou_difference_low"} <= keys
    assert set(tags) == {"data.data", "data.val_data"}
    artifacts = {path.name for path in Path("mlruns").rglob("*") if path.is_file()}
    assert {"run.md", "run.csv", "run.parquet", "000000.png"} <= artifacts
    picture = next(Path("mlruns").rglob("nearest/**/000001.png"))
    with Image.open(picture) as opened:
        assert opened.size[0] > 3 * 200


@pytest.fixture
def measured(monkeypatch):
    """(arm, seed) of all that is really measured; `stop_at` stops it as Ctrl-C would."""
    done, own = [], Evaluation.scores

    def scores(self, model, arm, seed):
        if arm in measured_of.stop_at:
            raise KeyboardInterrupt
        done.append((arm, seed))
        return own(self, model, arm, seed)

    measured_of = SimpleNamespace(done=done, stop_at=())
    monkeypatch.setattr(Evaluation, "scores", scores)
    return measured_of


STOPPED = ("peers={bilinear: bilinear, wide: {peer: joint_bilateral, window: 5}}", "blurs={soft: {bilinear: 0.5}}",
           "ceilings=[encoder]", "seeds=[0,3]")  # fmt: skip


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(measured, weights):
    asked = (*STOPPED, f"checkpoints=[{weights}]")
    whole = evaluate(config(*asked, "name=whole"))
    assert whole.pictures
    assert not Path("outputs/evaluate/whole_unfinished").exists()
    first = [arm for arm, _ in measured.done[:5]]
    measured.done.clear()
    measured.stop_at = (first[-1],)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(*asked, "name=parts"))
    assert [arm for arm, _ in measured.done] == first[:-1]
    measured.done.clear()
    measured.stop_at = ()
    parts = evaluate(config(*asked, "name=parts"))
    assert measured.done == [(first[-1], 0), *((arm, 3) for arm in first)]
    pd.testing.assert_frame_equal(parts.scores, whole.scores)
    assert sorted(path.name for path in parts.pictures) == sorted(path.name for path in whole.pictures)
    assert all(path.exists() for path in parts.pictures)
    assert not Path("outputs/evaluate/parts_unfinished").exists()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["peers.wide.window=7"], ["wide"]),
        (["blurs.soft.bilinear=0.6"], ["soft"]),
        (["task.epochs=3"], ["bilinear", "wide", "mine", "soft"]),
        ([], []),
    ],
    ids=str,
)
def test_kept_scores_of_something_else_are_not_used(measured, weights, change, again):
    asked = (*STOPPED, f"checkpoints=[{weights}]", "name=one")
    measured.stop_at = ("encoder",)
    for overrides in (asked, (*asked, *change)):
        measured.done.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(*overrides))
    assert sorted(arm for arm, _ in measured.done) == sorted(again)


def test_kept_scores_are_those_of_the_weights_and_whole(measured, weights, tmp_path):
    """Other weights under the same name, and a file that is damaged, are measured."""
    mine = tmp_path / "mine.safetensors"
    asked = config(f"checkpoints=[{mine}]", "peers=[bilinear]", "name=one")
    measured.stop_at = ("encoder",)
    for seed in (0, 1):
        core.save(core.build(["embed_dim=8", "attention.num_heads=1", "unifier.num_basis=8", f"seed={seed}"]), mine)
        measured.done.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(asked)
    assert measured.done == [("mine", 0)]
    for path in Path("outputs/evaluate/one_unfinished").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    measured.done.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked)
    assert measured.done == [("bilinear", 0), ("mine", 0)]


@pytest.fixture
def shifted(own_registry):
    """A peer that reads a file which is none of its weights."""

    @register_peer("shifted")
    class Shifted(Peer):
        def __init__(self, file: Path):
            super().__init__()
            self.by = (float(file.read_text()),)

        def forward(self, image, features, output_size=None):
            return F.interpolate(features, output_size, mode="bilinear") + self.by[0]


def test_kept_scores_are_those_of_the_files_that_settings_name(measured, shifted, tmp_path):
    file = tmp_path / "by.txt"
    asked = config(f"peers={{bilinear: bilinear, mine: {{peer: shifted, file: {file}}}}}", "name=one")
    measured.stop_at = ("encoder",)
    for text in ("1", "2"):
        file.write_text(text)
        measured.done.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(asked)
    assert measured.done == [("mine", 0)]


def test_scores_whose_pictures_were_replaced_are_measured_again(measured):
    asked = config("peers=[bilinear,nearest]", "name=one")
    measured.stop_at = ("encoder",)
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked)
    pictures = sorted(Path("outputs/evaluate/one_worst").glob("nearest_*"))
    pictures[0].write_bytes(b"of another evaluation")
    measured.done.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked)
    assert measured.done == [("nearest", 0)]


def test_a_finished_evaluation_leaves_what_another_of_its_name_kept(measured):
    measured.stop_at = ("encoder",)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config("peers=[bilinear,nearest]", "name=one", "task.epochs=3"))
    measured.stop_at = ()
    evaluate(config("peers=[bilinear]", "name=one"))
    assert len(list(Path("outputs/evaluate/one_unfinished").iterdir())) == 2


def test_notes_of_kept_scores_are_told_again(measured, monkeypatch):
    measured.stop_at, own = ("encoder",), Evaluation.scores

    def scores(self, model, arm, seed):
        found = own(self, model, arm, seed)
        self.task.note(f"something about {arm}")
        return found

    monkeypatch.setattr(Evaluation, "scores", scores)
    asked = config("peers=[bilinear]", "name=one")
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked)
    measured.stop_at = ()
    assert evaluate(asked).notes[-2:] == ["something about bilinear", "something about encoder"]
