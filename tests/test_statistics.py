"""Statistics of sweeps: against brute force, against scipy, and against sweeps whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.stats import bootstrap

from experiments.reports.power import needed
from experiments.reports.simulation import write_simulation
from experiments.settings import SettingError
from experiments.statistics.intervals import Spread, holm, pseudo_values, spread, two_way_bootstrap
from experiments.statistics.power import Components, check_settings, components_of, curves, power, read_components
from experiments.statistics.scores import ScoreError, frame, image_rows, value
from experiments.statistics.simulation import Scenario, draw_scores, simulate, true_difference

SPREADS = [{"seed": 0, "image": 0}, {"seed": 0.1, "image": 0.3}, {"seed": 0.5, "image": 0.3, "residual": 0.1}]


def values(num_seeds, num_images, seed=0, effect=0.0):
    random = np.random.default_rng(seed)
    shape = num_seeds, num_images
    return effect + random.normal(size=shape) + random.normal(size=(num_seeds, 1)) + random.normal(size=(1, num_images))


def test_the_parts_of_a_spread_are_those_of_the_analysis_of_variance():
    x = values(3, 7)
    found = spread(x)
    assert found.mean == pytest.approx(x.mean())
    assert found.seeds == pytest.approx(sum((x[s].mean() - x.mean()) ** 2 for s in range(3)) / 2 / 3)
    assert found.images == pytest.approx(sum((x[:, i].mean() - x.mean()) ** 2 for i in range(7)) / 6 / 7)
    rest = sum((x[s, i] - x[s].mean() - x[:, i].mean() + x.mean()) ** 2 for s in range(3) for i in range(7)) / 12
    assert found.both == pytest.approx(min(rest / 21, found.seeds, found.images))
    squared = stats.t.ppf(0.975, 2) ** 2 * found.seeds + stats.t.ppf(0.975, 6) ** 2 * found.images
    assert found.half_width(0.05) == pytest.approx(np.sqrt(squared - stats.norm.ppf(0.975) ** 2 * found.both))


def test_with_one_seed_it_is_the_t_test():
    x = values(1, 12, effect=0.7)
    found, known = spread(x), stats.ttest_1samp(x.ravel(), 0)
    low, high = known.confidence_interval(0.95)
    interval = found.interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert found.p_value() == pytest.approx(known.pvalue, rel=1e-6)


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
def test_of_one_image_nothing_is_known_of_others(num_seeds):
    found = spread(3 + values(num_seeds, 1))
    assert found.interval().low is None
    assert found.p_value() == 1
    assert not found.known


def test_p_values_and_intervals_agree():
    found = spread(np.stack([values(3, 20, seed, 0.8) for seed in range(40)]))
    p = found.p_value()
    for error in (0.001, 0.01, 0.05, 0.3):
        assert ((p < error) == (np.abs(found.mean) > found.half_width(error))).all()
    assert (np.diff([found.half_width(error) for error in (0.5, 0.05, 0.001, 1e-9)], axis=0) > 0).all()


def test_seeds_that_gave_the_same_count_as_one():
    x = values(1, 9)
    found = spread(np.repeat(x, 3, 0))
    assert (found.num_seeds, found.seeds) == (1, 0)
    assert found.interval() == spread(x).interval()


def test_no_difference_at_all_is_not_shown():
    assert spread(np.zeros((3, 5))).p_value() == 1
    assert spread(np.ones((3, 5))).p_value() < 1e-9


def test_pseudo_values_of_a_mean_are_its_values_and_of_a_ratio_those_of_the_jackknife():
    random = np.random.default_rng(0)
    numerator = random.random((2, 6, 1))
    assert pseudo_values(lambda weights: value(numerator, np.ones_like(numerator), weights), 6) == pytest.approx(
        numerator[..., 0]
    )
    denominator = random.random((2, 6, 3)) + 0.1
    numerator = random.random((2, 6, 3)) * denominator

    def miou(kept):
        return (numerator[:, kept].sum(1) / denominator[:, kept].sum(1)).mean(1)

    whole, pseudo = miou(list(range(6))), np.empty((2, 6))
    for i in range(6):
        pseudo[:, i] = 6 * whole - 5 * miou([j for j in range(6) if j != i])
    found = pseudo_values(lambda weights: value(numerator, denominator, weights), 6)
    assert found.mean(1) == pytest.approx(whole)
    assert found - found.mean(1, keepdims=True) == pytest.approx(pseudo - pseudo.mean(1, keepdims=True))


def test_holm_against_its_definition():
    random = np.random.default_rng(0)
    for count in (1, 2, 5):
        p = random.random(count) ** 3
        order, largest = np.argsort(p), 0.0
        for rank, at in enumerate(order):
            largest = max(largest, min(1, (count - rank) * p[at]))
            assert holm(p)[at] == largest
    assert holm([[0.01, 0.04], [0.5, 0.5]]).tolist() == [[0.02, 0.04], [1, 1]]


def test_the_two_way_bootstrap_of_one_seed_is_that_over_images():
    x = values(1, 40)
    low, high = two_way_bootstrap(lambda weights: weights @ x.T / 40, 40, num_resamples=20_000)
    known = bootstrap((x[0],), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    assert (low, high) == pytest.approx(known.confidence_interval, abs=0.03)


# Known truths


@pytest.mark.parametrize("measure", ["mean", "miou"])
@pytest.mark.parametrize("spreads", SPREADS)
def test_identical_arms_are_called_different_in_one_of_twenty_sweeps_at_most(measure, spreads):
    rates = simulate(Scenario(**{"residual": 0.3, "measure": measure, **spreads}), 150)
    assert rates.false_positives <= 0.05 + 2.5 * (0.05 * 0.95 / 150) ** 0.5
    assert rates.coverage >= 0.94


def test_intervals_hold_true_differences_and_large_ones_are_shown():
    rates = simulate(Scenario(measure="miou", seed=0.05, image=0.1, residual=0.3, num_images=40), 100, effect=0.8)
    assert rates.coverage >= 0.94
    assert rates.false_positives > 0.9


def test_the_bootstrap_is_too_narrow_for_three_seeds():
    rates = simulate(Scenario(seed=0.5, image=0.3, residual=0.1), 60, num_resamples=300)
    assert rates.bootstrap_coverage < 0.85 < 0.93 < rates.coverage
    assert rates.bootstrap_false_positives > 0.2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize("measure", ["mean", "miou"])
@pytest.mark.parametrize("size", [(3, 30), (3, 100), (5, 30)])
@pytest.mark.parametrize("spreads", SPREADS)
def test_five_hundred_sweeps(spreads, size, measure, heavy_tails):
    scenario = Scenario(*size, **{"residual": 0.3, **spreads}, measure=measure, heavy_tails=heavy_tails)
    same, other = simulate(scenario, 500), simulate(scenario, 500, effect=0.3, seed=1)
    assert same.false_positives <= 0.05 + 2 * (0.05 * 0.95 / 500) ** 0.5
    assert min(same.coverage, other.coverage) >= 0.94


def test_the_true_difference_of_a_simulated_miou_is_that_of_a_large_sample():
    scenario = Scenario(num_seeds=40, num_images=1500, num_arms=1, measure="miou", seed=0.05, image=0.2, residual=0.2)
    drawn = [draw_scores(scenario, 0.4, np.random.default_rng(seed)) for seed in range(8)]
    differences = [value(*arm).mean() - value(*baseline).mean() for baseline, arm in drawn]
    error = np.std(differences, ddof=1) / 8**0.5
    assert error < 0.003
    assert true_difference(scenario, 0.4) == pytest.approx(np.mean(differences), abs=3 * error + 0.001)


# Power


def test_components_are_found_again():
    random = np.random.default_rng(0)
    x = 2 * random.normal(size=(60, 1)) + random.normal(size=(1, 80)) + 3 * random.normal(size=(60, 80))
    found = components_of(x)
    assert (found.seed, found.image, found.residual) == pytest.approx((2, 1, 3), rel=0.25)
    with pytest.raises(SettingError, match="1 seed does not show how seeds differ: give scores of at least two seeds"):
        components_of(x[:1])
    with pytest.raises(SettingError, match="1 image does not show how images differ: give scores of at least two"):
        components_of(x[:, :1])


def test_power_is_that_of_simulated_sweeps():
    known = Components(0.1, 0.2, 0.4)
    scenario = Scenario(4, 50, 1, *(deviation / 2**0.5 for deviation in (0.1, 0.2, 0.4)))
    assert power(known, 0.25, 4, 50) == pytest.approx(simulate(scenario, 400, 0.25).false_positives, abs=0.08)


def test_power_grows_with_effect_seeds_and_images_and_falls_with_arms():
    known = Components(0.1, 0.5, 0.5)
    chances = [power(known, *at) for at in ((0.0, 3, 50), (0.3, 3, 50), (0.3, 3, 400), (0.3, 10, 400))]
    assert chances == sorted(chances)
    assert chances[0] < 0.05 < 0.9 < chances[-1]
    assert power(known, 0.3, 5, 100, num_arms=8) < power(known, 0.3, 5, 100)


def settings(**changes):
    from experiments.sweeps.arms import composed

    made = composed("power", ["components={seed:0.1,image:0.2,residual:0.3}"])
    for key, new in changes.items():
        made[key] = new
    return made


def test_the_command_writes_curves(tmp_path, monkeypatch):
    from experiments import power as module

    module.main.__wrapped__(settings(out_dir=str(tmp_path), effects=[0.1, 0.5], seeds=[2, 5], images=[10, 100]))
    text = (tmp_path / "power.md").read_text()
    assert "| seeds | 10 images | 100 images |" in text
    assert "a chance of 80% needs" in text
    assert (tmp_path / "power.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds must be a list of whole numbers from 1"),
        ({"seeds": 3}, "seeds must be a list of whole numbers from 1, got 3"),
        ({"seeds": [2, 5, 2]}, r"seeds=\[2, 5, 2\] names one twice"),
        ({"images": [1, 30]}, "images must be a list of whole numbers from 2"),
        ({"images": [30, 30]}, r"images=\[30, 30\] names one twice"),
        ({"effects": ["a"]}, "effects must be a list of numbers"),
        ({"effects": [0.1, 0.1]}, r"effects=\[0.1, 0.1\] names one twice"),
        ({"num_arms": 0}, "num_arms must be a whole number from 1"),
        ({"num_arms": 1.5}, "num_arms must be a whole number from 1"),
        ({"num_draws": "many"}, "num_draws must be a whole number from 100"),
        ({"wanted": "much"}, "wanted must lie between 0 and 1"),
        ({"confidence": "high"}, "confidence must lie between 0.5 and 1"),
        ({"name": "a/b"}, "name must be a file name"),
        ({"simulate": 0}, "simulate must be a whole number from 1"),
    ],
)
def test_power_refuses(changes, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        check_settings(settings(out_dir=str(tmp_path), **changes))


def test_power_is_zero_with_one_image_however_large_the_effect():
    assert power(Components(0.1, 0.1, 0.1), 100.0, 5, 1) == 0


def test_simulated_sweeps_are_written_up(tmp_path):
    row = {"measure": "mean", "seeds": 3, "images": 30, "spread": "all three", "tails": "normal", "false": 0.02,
           "coverage": 0.9612, "coverage, arms differ": 0.95, "bootstrap: false": 0.1,
           "bootstrap: coverage": 0.8}  # fmt: skip
    files = write_simulation(pd.DataFrame([row, row | {"seeds": 5}]), 300, 0.95, tmp_path, "statistics")
    assert [file.name for file in files] == ["statistics.md", "statistics.csv", "statistics.png"]
    text = files[0].read_text()
    for part in ("## Simulated sweeps\n\n    experiments.power", "300 sweeps of 4 arms", "(bootstrap: 200, ",
                 "| mean | 3 | 30 | all three | normal | 0.020 | 0.961 | 0.950 | 0.100 | 0.800 |",
                 "(statistics.png)"):  # fmt: skip
        assert part in text


def test_more_seeds_are_offered_only_where_they_save_images():
    sizes = [(2, 100, 0.1), (5, 100, 0.9), (10, 100, 0.95), (20, 30, 0.9)]
    table = pd.DataFrame([{"effect": 0.1, "seeds": s, "images": n, "power": p} for s, n, p in sizes])
    assert needed(table, 0.1, 0.8) == "a chance of 80% needs 5 seeds and 100 images, or 20 seeds and 30 images:"


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "scores.md").write_text("# scores")
    with pytest.raises(ScoreError, match=r"scores.md cannot be read as a table of scores"):
        read_components(settings(components=None, scores=str(tmp_path / "scores.md")))


def test_power_takes_the_task_that_has_the_measure(tmp_path):
    random, tables = np.random.default_rng(0), []
    for task, measure in (("fidelity/2x", "cosine"), ("segmentation", "accuracy")):
        for arm in ("baseline", "one"):
            for seed in range(2):
                rows = [row for i in range(4) for row in image_rows(f"{i}", {measure: float(random.uniform(0.1, 0.9))})]
                tables.append(frame(rows, {"task": task, "data": "d", "backbone": "b", "arm": arm, "seed": seed}))
    file = tmp_path / "scores.parquet"
    pd.concat(tables).to_parquet(file)
    assert read_components(settings(components=None, scores=str(file), measure="cosine")).residual > 0
    with pytest.raises(SettingError, match="choose measure="):
        read_components(settings(components=None, scores=str(file)))
    with pytest.raises(SettingError, match="arm=baseline is the baseline"):
        read_components(settings(components=None, scores=str(file), measure="cosine", arm="baseline"))


@pytest.mark.parametrize(("num_seeds", "num_images", "lacking"), [(1, 4, "seed"), (3, 1, "image"), (1, 1, "seed")])
def test_power_says_what_scores_lack(num_seeds, num_images, lacking, tmp_path):
    random, tables = np.random.default_rng(0), []
    for arm in ("baseline", "one"):
        for seed in range(num_seeds):
            rows = [row for i in range(num_images) for row in image_rows(f"{i}", {"cosine": float(random.random())})]
            tables.append(frame(rows, {"task": "t", "data": "d", "backbone": "b", "arm": arm, "seed": seed}))
    pd.concat(tables).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(
        SettingError, match=f"1 {lacking} does not show how {lacking}s differ: give scores of at least two"
    ):
        read_components(settings(components=None, scores=str(tmp_path / "scores.parquet")))


def test_what_power_reads_is_named(tmp_path):
    with pytest.raises(SettingError, match="give either scores"):
        read_components(settings(scores="x.parquet"))
    with pytest.raises(SettingError, match=r"scores=gone.parquet does not exist"):
        read_components(settings(scores="gone.parquet", components=None))
    for wrong in (3, "abc", [1, 2, 3], {"seed": 1}, {"seed": 1, "image": 1, "residual": 1, "more": 1}):
        with pytest.raises(SettingError, match=r"components must be \{seed: \.\.\., image: .*\}, got"):
            read_components(settings(components=wrong))
    for wrong in (math.nan, -1, "abc", True):
        with pytest.raises(SettingError, match=r"components\.residual must be a deviation, a finite number from 0"):
            read_components(settings(components={"seed": 1, "image": 1.5, "residual": wrong}))
    assert len(curves(settings(effects=[0.1], seeds=[2, 3], images=[10]), Components(0.1, 0.1, 0.1))) == 2


def test_a_spread_of_arrays_is_many_spreads():
    x = np.stack([values(3, 9, seed) for seed in range(4)])
    together = spread(x)
    for i in range(4):
        assert spread(x[i]).p_value() == pytest.approx(together.p_value()[i])
    assert isinstance(replace(together, mean=together.mean + 1), Spread)
