"""The leaderboard: ranks and pairs against truths that are known, and a small board from training to files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy import stats
from torch.nn import functional as F

from core.registry import discover
from experiments.leaderboard import leaderboard
from experiments.measuring.evaluation import Evaluation
from experiments.measuring.tasks import tasks
from experiments.peers import Peer, register_peer
from experiments.predict import predict_from
from experiments.settings import SettingError
from experiments.statistics.ranks import columns_of, pairs, rank, wins
from experiments.statistics.scores import frame, image_rows
from experiments.sweeps.arms import composed, standalone
from experiments.sweeps.board import NEEDS_TRAINING, encoders_of, sweep_of, tasks_of
from experiments.sweeps.members import read_tasks
from experiments.training.loop import Training

FOLDER = Path(__file__).resolve().parent.parent / "configs/experiment"
RECIPES = sorted(path.stem for path in FOLDER.glob("leaderboard*.yaml"))
tasks()


def scores(values, task="fidelity/2x", measure="detail", backbone="e"):
    """`values`: arm -> (seeds,images)."""
    parts = []
    for arm, of_arm in values.items():
        for seed, row in enumerate(np.atleast_2d(of_arm)):
            rows = [one for i, value in enumerate(row) for one in image_rows(f"i{i}", {measure: float(value)})]
            parts.append(frame(rows, {"task": task, "data": "d", "backbone": backbone, "arm": arm, "seed": seed}))
    return pd.concat(parts, ignore_index=True)


ASPECTS = {"detail": ["fidelity/*/detail"], "error": ["fidelity/*/error"], "depth": ["depth/*"]}


def test_ranks_are_means_over_measures_of_an_aspect_and_then_over_aspects():
    images = np.random.default_rng(0).normal(size=30)
    first = {"a": images + 9, "b": images + 5, "c": images + 1}
    table = pd.concat(
        [
            scores(first),
            scores(first, backbone="f"),
            scores({"a": images + 9, "b": images + 1, "c": images + 5}, measure="error"),  # less is better
        ],
        ignore_index=True,
    )
    found = rank("all", columns_of(table, ASPECTS, ["a", "b", "c"]), ["a", "b", "c"])
    assert {name: one.value for name, one in found.aspects["detail"].items()} == {"a": 1, "b": 2, "c": 3}
    assert {name: one.value for name, one in found.aspects["error"].items()} == {"b": 1, "c": 2, "a": 3}
    assert {name: one.value for name, one in found.overall.items()} == {"b": 1.5, "a": 2, "c": 2.5}
    assert found.methods == ["b", "a", "c"]
    assert found.overall["b"].low == found.overall["b"].high == 1.5, "the same on every image, so in every resample"
    assert found.first == {"b": 1.0, "a": 0.0, "c": 0.0}


def test_ranks_are_as_uncertain_as_the_values():
    random = np.random.default_rng(1)
    near = {name: random.normal(size=20) for name in "ab"} | {"c": random.normal(size=20) + 9}
    found = rank("all", columns_of(scores(near), ASPECTS, list(near)), list(near))
    assert (found.overall["c"].low, found.overall["c"].high) == (1, 1)
    assert (found.overall["a"].low, found.overall["a"].high) == (2, 3)
    seeds = random.normal(size=(6, 1)) + np.zeros((6, 20))
    same = {"a": seeds, "b": np.zeros(20)}
    found = rank("all", columns_of(scores(same), ASPECTS, ["a", "b"]), ["a", "b"])
    assert (found.overall["a"].low, found.overall["a"].high) == (1, 2), "images agree, seeds do not"


def test_a_method_that_lacks_a_measure_is_named_and_not_ranked():
    values = {name: np.arange(4.0) + i for i, name in enumerate("abc")}
    table = pd.concat([scores(values), scores({"a": np.arange(4.0), "b": np.ones(4)}, backbone="f")], ignore_index=True)
    found = rank("all", columns_of(table, ASPECTS, list("abc")), list("abc"))
    assert sorted(found.methods) == ["a", "b"]
    assert found.incomplete == {"c": ["fidelity/2x/detail on d, f"]}
    assert rank("all", columns_of(table, ASPECTS, list("abc")), ["a", "c"]) is None


def test_a_measure_counts_for_one_aspect_and_controls_for_none():
    table = pd.concat(
        [scores({"a": np.ones(3)}), scores({"a": np.ones(3)}, measure="error_blurred")], ignore_index=True
    )
    with pytest.raises(SettingError, match="fidelity/2x/detail is in one and in two"):
        columns_of(table, {"one": ["*/detail"], "two": ["fidelity/*"]}, ["a"])
    assert [column.measure for column in columns_of(table, {"one": ["*"]}, ["a"])] == ["detail"]


def test_pairs_are_t_tests_over_images_corrected_by_holm():
    random = np.random.default_rng(2)
    values = {name: random.normal(size=12) + 0.7 * i for i, name in enumerate("abc")}
    found = pairs(columns_of(scores(values, measure="error"), ASPECTS, list("abc")), list("abc"))
    raw = [stats.ttest_rel(values[row.one], values[row.other]).pvalue for row in found.itertuples()]
    order, expected, least = np.argsort(raw), {}, 0.0
    for place, at in enumerate(order):
        least = max(least, (3 - place) * raw[at])
        expected[at] = min(1.0, least)
    assert found["p"].to_numpy() == pytest.approx([expected[i] for i in range(3)], rel=1e-4)
    assert np.sign(found["difference"]).tolist() == [1, 1, 1], "less error is better, and a has the least"
    table = wins(found.assign(p=[0.01, 0.04, 0.2]), list("abc"))
    assert table.to_numpy().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]


def test_equal_methods_rarely_beat_each_other():
    """At most 5 % of columns may have any false win; more than 9 of 80 have a probability below 0.01."""
    random = np.random.default_rng(3)
    of_seeds, of_images = random.normal(size=(80, 4, 2, 1)), random.normal(size=(80, 4, 1, 10))
    values = of_seeds + of_images + random.normal(size=(80, 4, 2, 10))  # (columns,methods,seeds,images)
    at = pd.MultiIndex.from_product([map(str, range(size)) for size in values.shape])
    table = (
        pd.Series(values.ravel(), at).rename_axis(["backbone", "arm", "seed", "image"]).reset_index(name="numerator")
    )
    table = table.assign(task="fidelity/2x", data="d", measure="detail", part=0, denominator=1.0)
    found = pairs(columns_of(table, ASPECTS, list("0123")), list("0123"))
    wrong = sum(wins(rows, list("0123")).to_numpy().any() for _, rows in found.groupby("backbone"))
    assert wrong <= 9


def small(tmp_path, *overrides):
    """The recipe for checks, smaller still."""
    discover()
    given = ["trained=[lift]", "peers=[bilinear]", "seeds=[0]", "cost=null", "tracking.enabled=false", "device=cpu"]
    made = composed("leaderboard", ["experiment=leaderboard_tiny", *given, f"out_dir={tmp_path}", *overrides])
    OmegaConf.set_struct(made, False)
    made.tasks = {"fidelity": made.tasks.fidelity}
    made.aspects = {"detail": ["fidelity/*/detail"], "cosine": ["fidelity/*/cosine"]}
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    return folder, leaderboard(small(folder))


def test_methods_for_one_encoder_cannot_enter_an_unseen_one(made):
    folder, found = made
    seen, unseen = (ranks for ranks, _ in found.ranks)
    assert set(seen.methods) == {"anyup", "bundled", "bilinear_blurred", "lift", "bilinear"}
    assert "lift" not in unseen.methods
    assert found.board.absent == {("hog16", "lift"): NEEDS_TRAINING}
    text = (folder / "leaderboard_tiny.md").read_text()
    assert "| lift | trained | needs training |" in text
    assert "lift on hog16: needs training" in text


def test_blur_beside_an_arm_blurs_it(made):
    values = pd.read_csv(made[0] / "leaderboard_tiny_values.csv").query("measure == 'detail' and backbone == 'hog16'")
    of = values.set_index("method")["value"]
    assert of["bilinear_blurred"] != pytest.approx(of["bilinear"], abs=1e-4)


def test_a_method_for_any_encoder_is_trained_once(made):
    trained = [path.parent.name.partition("-")[0] for path in made[0].glob("members/*/trained.json")]
    assert sorted(trained) == ["anyup", "lift"]
    anyup = next(made[0].glob("members/anyup-*"))
    assert len(list(anyup.glob("fidelity-*.parquet"))) == 2, "measured on both encoders"


def test_predict_reads_the_scores(made, tmp_path):
    asked = [
        f"scores=[{made[0]}/leaderboard_tiny_scores.parquet]",
        "targets=['fidelity/*/cosine']",
        f"out_dir={tmp_path}",
    ]
    found = predict_from(composed("predict", asked))
    assert len(found.methods) == 6  # five, and the encoder at a higher resolution
    assert "fidelity/2x/detail" in found.predictors


def test_run_again_it_repeats_nothing_and_measures_only_a_method_that_is_new(made, monkeypatch, own_registry):
    measured, scores_of = [], Evaluation.scores

    def noted(self, model, arm, seed):
        measured.append((arm, self.names[1]))
        return scores_of(self, model, arm, seed)

    monkeypatch.setattr(Evaluation, "scores", noted)
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("trained again"))
    again = leaderboard(small(made[0]))
    assert measured == []
    assert again.ranks[0][0].overall == made[1].ranks[0][0].overall

    @register_peer("dropped_in")
    class DroppedIn(Peer):
        def forward(self, image, features, output_size=None):
            return F.interpolate(features, output_size, mode="bicubic")

    config = small(made[0], "peers=null")
    assert {"dropped_in", "bilinear", "lanczos"} <= set(sweep_of(config, encoders_of(config)[0], [])[0].peers)
    found = leaderboard(small(made[0], "peers=[bilinear,dropped_in]"))
    assert measured == [("dropped_in", "embedded"), ("dropped_in", "hog16")]
    assert all("dropped_in" in ranks.methods for ranks, _ in found.ranks)


def test_a_board_that_was_stopped_goes_on(tmp_path, monkeypatch):
    calls, scores_of = [], Evaluation.scores

    def stopped(self, model, arm, seed):
        calls.append(arm)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scores_of(self, model, arm, seed)

    monkeypatch.setattr(Evaluation, "scores", stopped)
    given = ("trained=[]", "~arms.anyup", "unseen=[]")
    with pytest.raises(KeyboardInterrupt):
        leaderboard(small(tmp_path, *given))
    leaderboard(small(tmp_path, *given))
    assert calls == ["bundled", "bilinear_blurred", "bilinear", "bilinear", "encoder"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoders=[]"], "encoders is empty: give at least one"),
        (["unseen=[{name: embedded}]"], "names one twice"),
        (["trained=[nearest]"], "trained=nearest is no peer that can be trained; there are: .*naf"),
        (["+settings.nearest=[]"], "settings.nearest is no peer that can be trained"),
        (["aspects={}"], "aspects is empty"),
        (["aspects={a: [nothing]}", "unseen=[]", "trained=[]", "~arms.anyup"], "no measure of the"),
        (["+tasks_with={camvid: {camvid: [task=fidelity]}}"], "there is no setting camvid: add"),
        (["arms.bilinear_blurred.blur=-1"], "arm bilinear_blurred: blur must be a number of cells from 0, got -1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides, message, tmp_path):
    config = small(tmp_path, *(text for text in overrides if not text.startswith(("aspects", "+tasks_with"))))
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key in ("aspects", "tasks_with"):
            config[key] = OmegaConf.create(value) if value != "{}" else {}
    with pytest.raises(SettingError, match=message):
        leaderboard(config)


def test_the_tasks_that_need_data_can_be_taken_out():
    config = composed("leaderboard", ["experiment=leaderboard_training_free", "~tasks_with"])
    found, left_out = tasks_of(config)
    assert list(found) == ["fidelity", "matching"]
    assert not left_out


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_says_can_be_understood(name, tmp_path):
    discover()
    given = ["tracking.enabled=false", "device=cpu", f"out_dir={tmp_path}"]
    config = composed("leaderboard", [f"experiment={name}", *given])
    if name != "leaderboard_small":  # which says of all methods that can be trained that they take the encoder
        config.trained = []
    if "multi" in config:
        config.multi = config.paper = "bundled"
    config = standalone(config)
    found = encoders_of(config)
    sweep, absent = sweep_of(config, found[0], found)
    assert not absent
    assert config.baseline in sweep.arms
    assert len(sweep.arms) + len(sweep.peers) >= 6
    assert [task.name for task in read_tasks(sweep)] == list(tasks_of(config)[0])
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"python -m experiments.leaderboard experiment={name}" in text
    assert "# Measured: " in text
