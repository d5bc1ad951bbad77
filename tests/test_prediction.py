"""Which measure predicts which: rank correlations over methods, against scipy and against truths that are known."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from scipy import stats

from core.registry import discover
from experiments.measuring.tasks import tasks
from experiments.predict import predict_from
from experiments.settings import SettingError
from experiments.statistics.prediction import chosen, method_values, predict, spearman
from experiments.statistics.score_files import write_scores
from experiments.statistics.scores import ScoreError, frame, image_rows

ROOT = Path(__file__).resolve().parent.parent
tasks()


def table(columns, encoders=("e",)):
    """Values of methods m0, m1, ...: name -> (encoders,methods)."""
    arrays = {name: np.atleast_2d(values) for name, values in columns.items()}
    methods = next(iter(arrays.values())).shape[1]
    index = pd.MultiIndex.from_product([encoders, [f"m{i}" for i in range(methods)]], names=["backbone", "arm"])
    return pd.DataFrame({name: values.ravel() for name, values in arrays.items()}, index=index)


def scores(values, task, measure, backbone="e", data="d", num_images=3):
    """`values`: arm -> value; images scatter around it."""
    parts = []
    for arm, value in values.items():
        rows = [
            row for i in range(num_images) for row in image_rows(f"i{i}", {measure: value + (i - (num_images - 1) / 2)})
        ]
        names = {"task": task, "data": data, "backbone": backbone, "arm": arm, "seed": 0}
        parts.append(frame(rows, names))
    return pd.concat(parts, ignore_index=True)


def test_spearman_is_scipys_with_ties_too():
    random = np.random.default_rng(0)
    for _ in range(20):
        x, y = random.integers(0, 5, 9), random.normal(size=9)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), y[:5]))


def test_a_correlation_is_the_mean_over_encoders_of_those_who_have_both():
    random = np.random.default_rng(1)
    p, t = random.normal(size=(2, 3, 8))
    t[2, 3:] = np.nan  # the third encoder has three methods with both
    t[1, 0] = np.nan
    found = predict(table({"p": p, "t": t}, ("a", "b", "c")), ["p"], ["t"])
    each = [spearman(p[0], t[0]), spearman(p[1, 1:], t[1, 1:]), spearman(p[2, :3], t[2, :3])]
    assert found.correlation[0, 0] == pytest.approx(np.mean(each))
    assert (found.num_methods[0, 0], found.num_encoders[0, 0]) == (3, 3)


def test_the_interval_is_the_jackknife_over_families_on_fishers_scale():
    random = np.random.default_rng(2)
    values = table({"p": random.normal(size=8), "t": random.normal(size=8)})
    pairs = {"first": ["m0", "m1"], "second": ["m2", "m3"]}
    found = predict(values, ["p"], ["t"], pairs)
    assert found.num_families == 6
    p, t = values["p"].to_numpy(), values["t"].to_numpy()
    groups = [[0, 1], [2, 3], [4], [5], [6], [7]]
    each = np.arctanh([spearman(np.delete(p, group), np.delete(t, group)) for group in groups])
    half = stats.t.ppf(0.975, 5) * np.sqrt(5 / 6 * ((each - each.mean()) ** 2).sum())
    whole = np.arctanh(spearman(p, t))
    interval = found.interval[0][0]
    assert (interval.low, interval.high) == pytest.approx((np.tanh(whole - half), np.tanh(whole + half)))


def test_intervals_hold_for_other_methods():
    """Of 150 draws of 12 methods, at most one in nine intervals misses the correlation of very many methods: with the
    nominal one in twenty, more misses have a probability below 0.001."""
    random = np.random.default_rng(3)

    def draw(num):
        common = random.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], num)
        return common.T[:, None] + 0.4 * random.normal(size=(2, 2, num))  # (measures,encoders,methods)

    truth = np.mean([spearman(*pair) for pair in draw(50_000).swapaxes(0, 1)])
    missed = 0
    for _ in range(150):
        p, t = draw(12)
        interval = predict(table({"p": p, "t": t}, ("a", "b")), ["p"], ["t"]).interval[0][0]
        missed += not interval.low <= truth <= interval.high
    assert missed <= 150 / 9


def test_without_a_spread_there_is_no_interval():
    found = predict(table({"p": np.arange(6), "t": np.arange(6)}), ["p"], ["t"])
    assert (found.interval[0][0].value, found.interval[0][0].low) == (pytest.approx(1), None)
    constant = predict(table({"p": np.ones(6), "t": np.arange(6)}), ["p"], ["t"])
    assert constant.interval[0][0] is None
    assert constant.mean == [None]


def test_the_best_predictor_comes_first_and_others_are_compared_with_it():
    random = np.random.default_rng(4)
    t = random.normal(size=14)
    good, poor = t + 0.3 * random.normal(size=14), random.normal(size=14)
    found = predict(table({"poor": poor, "good": good, "t": t, "u": t**3}), ["poor", "good"], ["t", "u"])
    assert [found.predictors[i] for i in found.order] == ["good", "poor"]
    assert found.difference[1] is None
    assert found.difference[0].high < 0, "the poor one is shown to be worse"
    assert found.mean[1].value == pytest.approx(found.correlation[1].mean())


def test_values_are_means_over_images_with_more_being_better_and_blurred_controls_left_out():
    arms = {f"m{i}": float(i) for i in range(4)}
    values = method_values(
        pd.concat(
            [
                scores(arms, "fidelity/2x", "error"),
                scores(arms, "fidelity/2x", "error_blurred"),
                scores(arms, "segmentation/upsampled", "accuracy", data="one"),
                scores(arms, "segmentation/upsampled", "accuracy", data="two"),
            ],
            ignore_index=True,
        )
    )
    assert list(values) == [
        "fidelity/2x/error",
        "segmentation/upsampled@one/accuracy",
        "segmentation/upsampled@two/accuracy",
    ]
    assert values.loc[("e", "m3"), "fidelity/2x/error"] == pytest.approx(-3)
    assert values.loc[("e", "m3"), "segmentation/upsampled@one/accuracy"] == pytest.approx(3)


def test_patterns_choose_measures():
    names = ["fidelity/2x/detail", "fidelity/4x/detail", "depth/rmse"]
    assert chosen(names, ["depth/*", "fidelity/*"], "targets") == ["depth/rmse", *names[:2]]
    with pytest.raises(SettingError, match=r"targets: normals/\* is none of the measures: fidelity/2x/detail"):
        chosen(names, ["normals/*"], "targets")


def config(tmp_path, *overrides):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("predict", [f"out_dir={tmp_path}", *overrides])


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(5)
    probe = random.normal(size=7)
    for name, task, measure, values in (
        ("a", "fidelity/2x", "detail", probe + 0.2 * random.normal(size=7)),
        ("b", "segmentation/upsampled", "accuracy", probe),
    ):
        arms = {f"m{i}": float(value) for i, value in enumerate(values)} | {"split_half": 99.0}
        write_scores(tmp_path / f"{name}.parquet", scores(arms, task, measure), {})
    return f"scores=[{tmp_path}/a.parquet,{tmp_path}/b.parquet]"


def test_the_command_writes_a_table_and_a_picture(files, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "experiments.predict", files, f"out_dir={tmp_path}/out"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "out/predict.md").read_text()
    assert "fidelity/2x/detail" in text
    assert "over 7 upsamplers" in text
    assert "split_half" not in text.split("Methods:")[1]
    rows = pd.read_csv(tmp_path / "out/predict.csv")
    assert rows["correlation"].between(0.5, 1).all()
    assert (tmp_path / "out/predict.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["targets=['*']"], "all measures of the scores are targets"),
        (["families={x: [m0, m99]}"], "families.x: there is no arm m99; there are: m0"),
        (["families={x: [m0, m1], y: [m1, m2]}"], "m1 is in x and in y"),
        (["families={x: [m0, m1, m2, m3, m4]}"], "3 families of methods .* are too few"),
        (["confidence=95"], "confidence must lie between"),
        (["scores=[]"], "names no file"),
    ],
)
def test_what_cannot_be_predicted(files, tmp_path, overrides, message):
    with pytest.raises(SettingError, match=message):
        predict_from(config(tmp_path, files, *overrides))


def test_the_same_scores_twice_and_missing_files_are_errors(files, tmp_path):
    with pytest.raises(ScoreError, match="occur twice"):
        predict_from(config(tmp_path, f"scores=[{tmp_path}/a.parquet,{tmp_path}/a.parquet]"))
    with pytest.raises(ScoreError, match="cannot be read"):
        predict_from(config(tmp_path, f"scores=[{tmp_path}/none.parquet]"))
