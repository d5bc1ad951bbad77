"""Reports of sweeps: verdicts from scores, what must not be compared, tables and pictures."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from torch import nn

from experiments.cost.arm_cost import measure_costs
from experiments.measuring.tasks import tasks
from experiments.peers import make_peer
from experiments.reports import evaluation as evaluation_report
from experiments.reports.costs import cost_section
from experiments.reports.figures import cost_quality, forest, front
from experiments.reports.markdown import Table, number, signed, times_faster, with_interval
from experiments.reports.results import Plan, Planned, Results
from experiments.reports.tables import markdown, rich_tables, write_report
from experiments.settings import SettingError, check_confidence, check_count, check_name, check_seeds
from experiments.statistics.intervals import Interval, holm, pseudo_values, spread
from experiments.statistics.score_files import read_scores, write_scores
from experiments.statistics.scores import ScoreError, check, frame, image_rows
from experiments.statistics.simulation import Scenario, draw_scores, simulate
from experiments.statistics.verdicts import bases, compare, difference, table
from experiments.sweeps.arms import composed
from experiments.sweeps.results import SweepError, Unit, gather, means
from experiments.tracking.provenance import Origin

SEEDS, IMAGES = (0, 1, 2), [f"image{i}" for i in range(12)]
NOISE = np.random.default_rng(0).normal(0, 0.01, (9, 3, 12))
tasks()  # which say what their measures mean


def scores_of(arm, level, seed=0, measure="detail", noise=1.0, task="fidelity/2x", images=IMAGES):
    which = sum(arm.encode()) % 9
    values = [level + noise * NOISE[which, seed, i] + 0.1 * (i % 4) for i in range(len(images))]
    rows = [row for name, number in zip(images, values, strict=True) for row in image_rows(name, {measure: number})]
    return frame(rows, {"task": task, "data": "d", "backbone": "b", "arm": arm, "seed": seed})


def sweep_scores(levels, seeds=SEEDS, **how):
    return pd.concat([scores_of(arm, level, seed, **how) for arm, level in levels.items() for seed in seeds])


def found(comparisons):
    return {one.arm: one for one in comparisons}


# Verdicts


def test_better_helps_worse_hurts_and_the_same_is_not_shown():
    scores = sweep_scores({"baseline": 0.5, "up": 0.6, "down": 0.4, "same": 0.5})
    of = found(compare(scores, "baseline", ["baseline", "up", "down", "same"]))
    assert [of[arm].verdict for arm in ("baseline", "up", "down", "same")] == [
        "baseline",
        "helps",
        "hurts",
        "not shown",
    ]
    assert of["up"].difference.value == pytest.approx(0.1, abs=0.02)
    assert of["up"].difference.low > 0 > of["same"].difference.low
    of = found(compare(scores.assign(measure="rmse"), "baseline", ["up", "down"]))  # less is better
    assert (of["up"].verdict, of["down"].verdict, of["same"].verdict) == ("hurts", "helps", "reference")
    assert of["same"].p_value is None


def test_the_difference_is_paired():
    """Images differ far more than arms: only pairs show the difference."""
    scores = sweep_scores({"baseline": 0.5, "up": 0.52}, noise=0.2)
    scores["numerator"] += scores["image"].map({name: i for i, name in enumerate(IMAGES)})
    assert found(compare(scores, "baseline", ["up"]))["up"].verdict == "helps"


def test_with_one_seed_the_verdict_speaks_of_images_only():
    one = found(compare(sweep_scores({"baseline": 0.5, "up": 0.6}, seeds=(0,)), "baseline", ["up"]))["up"]
    assert (one.verdict, one.basis) == ("helps", "one seed: over images only")


def test_of_one_image_there_is_no_interval_with_any_number_of_seeds():
    scores = sweep_scores({"baseline": 0.5, "up": 0.6, "bilinear": 0.4, "encoder": 0.7}, images=IMAGES[:1])
    for some in (scores, scores[scores["seed"] == 0]):
        of = found(compare(some, "baseline", ["up"]))
        assert (of["up"].verdict, of["up"].basis, of["up"].p_value) == ("not shown", "one image: no interval", 1)
        assert of["up"].difference.low is of["up"].difference.high is None
        assert of["up"].gap_closed is None
        assert bases(of.values()) == "one image: no interval"


def test_the_more_arms_the_harder():
    """Holm's correction: what is shown alone is not among many."""
    levels = {"baseline": 0.5, "up": 0.525} | {f"arm{i}": 0.5 for i in range(12)}
    scores = sweep_scores(levels)
    alone, among = (found(compare(scores, "baseline", arms))["up"] for arms in (["up"], list(levels)[1:]))
    assert alone.p_value < among.p_value
    assert alone.difference == among.difference
    assert (alone.verdict, among.verdict) == ("helps", "not shown")


def test_a_peer_with_one_seed_is_the_same_for_all():
    scores = pd.concat([sweep_scores({"baseline": 0.5}), scores_of("bilinear", 0.4)])
    one = found(compare(scores, "baseline", []))["bilinear"]
    assert (one.num_seeds, one.verdict) == (1, "reference")
    values = [
        scores_of("bilinear", 0.4)["numerator"].to_numpy() - scores_of("baseline", 0.5, s)["numerator"] for s in SEEDS
    ]
    known = spread(np.array(values)).interval()
    assert (one.difference.low, one.difference.high) == pytest.approx((known.low, known.high))


def test_the_gap_closed_is_between_bilinear_and_encoder():
    levels = {"baseline": 0.5, "up": 0.55, "bilinear": 0.4, "encoder": 0.6}
    of = found(compare(sweep_scores(levels, noise=0.05), "baseline", ["up"]))
    assert of["up"].gap_closed.value == pytest.approx(0.75, abs=0.02)
    assert of["up"].gap_closed.low < 0.75 < of["up"].gap_closed.high
    assert of["baseline"].gap_closed.value == pytest.approx(0.5, abs=0.02)
    assert of["bilinear"].gap_closed is of["encoder"].gap_closed is None
    levels["encoder"] = 0.4  # no gap
    assert all(one.gap_closed is None for one in compare(sweep_scores(levels), "baseline", ["up"]))
    levels["encoder"] = 0.3  # an encoder that is worse
    assert all(one.gap_closed is None for one in compare(sweep_scores(levels), "baseline", ["up"]))


def test_images_without_the_measure_do_not_count():
    scores = sweep_scores({"baseline": 0.5, "up": 0.6})
    edges = sweep_scores({"baseline": 0.5, "up": 0.6}, measure="edge_detail")
    edges = edges[~edges["image"].isin(IMAGES[:4])]
    of = {(one.measure, one.arm): one for one in compare(pd.concat([scores, edges]), "baseline", ["up"])}
    assert (of["detail", "up"].num_images, of["edge_detail", "up"].num_images) == (12, 8)


def test_a_measure_that_one_arm_lacks_of_an_image_is_refused():
    """All arms have the image, by another measure."""
    errors = sweep_scores({"baseline": 0.5, "up": 0.6}, measure="detail_error")
    scores = sweep_scores({"baseline": 0.5, "up": 0.6})
    scores = scores[~((scores["arm"] == "up") & (scores["image"] == IMAGES[2]))]
    with pytest.raises(ScoreError, match=f"arm up, seed 0 lacks 1 images that other arms have, the first: {IMAGES[2]}"):
        check(pd.concat([scores, errors]))


def test_what_is_said_is_what_was_simulated():
    """`compare`, which goes through tables, and the simulation, which is tested against known truths, agree."""
    scenario = Scenario(num_images=10, num_arms=2, measure="miou", seed=0.05, image=0.1, residual=0.2)
    drawn = draw_scores(scenario, 0.5, np.random.default_rng(0))
    tables = []
    for arm, (numerator, denominator) in zip(("baseline", "one", "two"), drawn, strict=True):
        for seed in range(3):
            values = [{"miou": (numerator[seed, i], denominator[seed, i])} for i in range(10)]
            rows = [row for i in range(10) for row in image_rows(f"{i}", values[i])]
            tables.append(frame(rows, {"task": "t", "data": "d", "backbone": "b", "arm": arm, "seed": seed}))
    of = found(compare(pd.concat(tables), "baseline", ["one", "two"]))
    spreads = [
        spread(pseudo_values(lambda weights, arm=arm: difference(arm, drawn[0], weights), 10)) for arm in drawn[1:]
    ]
    assert [of["one"].p_value, of["two"].p_value] == pytest.approx(holm([float(one.p_value()) for one in spreads]))
    assert of["two"].difference.high == pytest.approx(spreads[1].interval().high)
    assert simulate(scenario, 2).num_sweeps == 2


def test_arms_with_other_seeds_or_without_a_baseline_are_refused():
    scores = pd.concat([sweep_scores({"baseline": 0.5}), sweep_scores({"up": 0.6}, seeds=(0, 1))])
    with pytest.raises(ScoreError, match=r"d/b, detail: arm up has seeds \[0, 1\], the baseline \[0, 1, 2\]"):
        compare(scores, "baseline", ["up"])
    with pytest.raises(ScoreError, match="the baseline missing has no scores; there are: baseline, up"):
        compare(sweep_scores({"baseline": 0.5, "up": 0.6}), "missing", ["up"])


# Gathering


PLAN = Plan(
    "sweep",
    "baseline",
    0.95,
    [Planned(arm, kind, seed, f"key of {arm}", ["one"]) for seed in SEEDS
     for arm, kind in (("baseline", "trained"), ("up", "trained"), ("bilinear", "peer"), ("encoder", "ceiling"))
     if kind == "trained" or seed == 0],
)  # fmt: skip
LEVELS = {"baseline": 0.5, "up": 0.6, "bilinear": 0.4, "encoder": 0.7}


def units(**changes):
    return [
        Unit(
            planned.arm,
            planned.seed,
            "one",
            planned.key,
            "images",
            scores_of(planned.arm, LEVELS[planned.arm], planned.seed),
        )
        for planned in PLAN.members
    ]


def test_a_plan_survives_json():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.competing == ["baseline", "up"]


def test_an_arm_without_one_of_its_seeds_does_not_count():
    some = [unit for unit in units() if (unit.arm, unit.seed) != ("up", 2)]
    results = gather(PLAN, some, {})
    assert results.failures == {"up": "not measured: one with seed 2"}
    assert set(results.scores["arm"]) == {"baseline", "bilinear", "encoder"}
    assert gather(PLAN, some, {"up": "seed 2: it burnt"}).failures == {"up": "seed 2: it burnt"}
    with pytest.raises(SweepError, match="the baseline baseline failed, so nothing can be compared: seed 1: it burnt"):
        gather(PLAN, units(), {"baseline": "seed 1: it burnt"})


def test_no_result_is_counted_twice():
    twice = gather(PLAN, [*units(), *units()], {})
    assert twice.scores.equals(gather(PLAN, units(), {}).scores)
    other = units()[1]
    other.scores["numerator"] += 1e-6
    with pytest.raises(SweepError, match="two different results of arm up, seed 0, task one: of key of up on images"):
        gather(PLAN, [*units(), other], {})


def test_two_kinds_of_data_under_one_key_are_refused():
    changed = units()
    changed[-1] = Unit("up", 2, "one", "key of up", "others", changed[-1].scores)
    with pytest.raises(
        SweepError, match="task one was measured on different data: arm baseline, seed 0 on images, arm up"
    ):
        gather(PLAN, changed, {})
    with pytest.raises(SweepError, match="arm up, seed 0, task one belong to another arm"):
        gather(PLAN, [Unit("up", 0, "one", "k", "images", scores_of("down", 0.1))], {})


def test_what_an_arm_lacks_is_named():
    lacking = units()
    lacking[1] = Unit("up", 0, "one", "key of up", "images", lacking[1].scores.query("image != 'image5'"))
    with pytest.raises(ScoreError, match="arm up, seed 0 lacks 1 images that other arms have, the first: image5"):
        gather(PLAN, lacking, {})


def test_scores_say_in_their_file_what_they_were_made_with(tmp_path):
    file = tmp_path / "one.parquet"
    unit = Unit("up", 1, "one", "key of up", "images", scores_of("up", 0.6, 1), ["one: a note"])
    unit.write(file)
    read = Unit.read(file, "up", 1, "one")
    pd.testing.assert_frame_equal(read.scores, unit.scores)
    assert replace(read, scores=unit.scores) == unit
    assert read_scores(file)[1] == {"member": "key of up", "fingerprint": "images", "notes": ["one: a note"]}


def test_scores_of_earlier_versions_are_read_and_those_of_unknown_origin_refused(tmp_path):
    scores, file = scores_of("up", 0.6, 1), tmp_path / "one.parquet"
    scores.attrs = {"member": "key of up", "fingerprint": "images", "task": "one", "notes": ["one: a note"]}
    scores.to_parquet(file, index=False)  # as sweeps once wrote them
    read = Unit.read(file, "up", 1, "one")
    assert (read.member, read.fingerprint, read.notes) == ("key of up", "images", ["one: a note"])
    assert read.scores.attrs == {}
    scores.attrs = {}
    scores.to_parquet(file, index=False)
    with pytest.raises(ScoreError, match=r"one.parquet does not say what its scores were made with \(member, finger"):
        Unit.read(file, "up", 1, "one")
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ScoreError, match=r"one.parquet cannot be read as a table of scores"):
        read_scores(file)


def test_means_are_of_the_whole_set():
    assert means(scores_of("up", 0.5, noise=0.0)) == {"fidelity/2x/d/b/detail": pytest.approx(0.65)}


# How tables, numbers and headers look


def test_a_table_is_the_same_in_markdown_and_on_the_terminal():
    made = Table(["arm", "ms", "remark"], [["up", "3.1", "a|b\nc"], ["[red]down", "14", ""]], left=("arm", "remark"))
    assert made.markdown().splitlines() == [
        "| arm | ms | remark |",
        "| --- | ---: | --- |",
        "| up | 3.1 | a\\|b c |",
        "| [red]down | 14 |  |",
    ]
    console = Console(file=io.StringIO(), width=60)
    console.print(made.rich())
    assert [line.split() for line in console.file.getvalue().splitlines() if "down" in line] == [["[red]down", "14"]]
    assert [column.justify for column in made.rich(["arm", "ms"]).columns] == ["left", "right"]
    with pytest.raises(ValueError, match="2 columns has a row of 1 cells"):
        Table(["arm", "ms"], [["up"]])


def test_numbers_and_intervals():
    assert signed(Interval(0.12345, -0.1, 0.2)) == "+0.1235 [-0.1000, +0.2000]"
    assert signed(Interval(-0.5, None, None), 2) == "-0.50"
    assert signed(None) == number(None, 2) == number(float("nan"), 2) == ""
    assert number(1234.5, 0) == "1234"
    assert with_interval(2, 1.8, 2.25, 1) == "2.0 [1.8, 2.2]"
    assert (times_faster(2.5, 2.4, 2.6), times_faster(2.5, None, None)) == ("2.50 (2.40-2.60)", "2.50")
    assert times_faster(None, None, None) == ""


def test_a_header_says_where_a_report_comes_from():
    origin = Origin(
        "python -m x a=1", "today", "0123456789abcdef", True, "Python 3", "a CPU", {"one": "f" * 64}, ("n",)
    )
    assert origin.header("title", ["seeds 0, 1"]).splitlines() == [
        "# title", "", "    python -m x a=1", "", "- today, commit 0123456789ab with uncommitted changes", "- a CPU",
        "- seeds 0, 1", f"- fingerprints: one {'f' * 12}", "- Python 3", "- n",
    ]  # fmt: skip
    assert Origin.from_json(origin.to_json()) == origin
    earlier = '{"command": "c", "date": "d", "commit": "", "changed": false, "packages": "p"}'
    assert Origin.from_json(earlier).header("t") == "# t\n\n    c\n\n- d, commit unknown\n- p"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (check_name, ["a/b"], "name must be a file name without folders, got 'a/b'"),
        (check_name, [""], "name must be a file name without folders"),
        (check_name, [".."], "name must be a file name without folders"),
        (check_name, [2024], r"got 2024, which is not text: write 'name=\"2024\"'"),
        (check_seeds, [3], "seeds must be a list of whole numbers from 0, got 3"),
        (check_seeds, [[True]], "seeds must be a list of whole numbers from 0"),
        (check_seeds, [[1, 0, 1]], r"seeds=\[1, 0, 1\] names one twice"),
        (check_confidence, [0.5], "confidence must lie between 0.5 and 1, got 0.5"),
        (check_confidence, [None], "confidence must lie between 0.5 and 1, got None"),
        (check_confidence, [float("nan")], "confidence must lie between 0.5 and 1, got nan"),
        (check_count, ["num_arms", True], "num_arms must be a whole number from 1 up, got True"),
        (check_count, ["worker", -1, 0], "worker must be a whole number from 0 up, got -1"),
    ],
)
def test_what_commands_check_alike(function, arguments, message):
    with pytest.raises(SettingError, match=message):
        function(*arguments)


# Tables and pictures


@pytest.fixture
def results():
    made = gather(PLAN, units(), {})
    made.costs = pd.DataFrame(
        [
            {"arm": "baseline", "parameters": 1200, "memory_mb": 10.0, "time_ms": 4.0, "time_ratio": 1.0,
             "time_ratio_low": 1.0, "time_ratio_high": 1.0, "memory_ratio": 1.0},
            {"arm": "up", "parameters": 2400, "memory_mb": 20.0, "time_ms": 8.0, "time_ratio": 2.0,
             "time_ratio_low": 1.8, "time_ratio_high": 2.2, "memory_ratio": 2.0},
            {"arm": "bilinear", "parameters": 0, "memory_mb": float("nan"), "time_ms": float("nan"),
             "time_ratio": float("nan"), "time_ratio_low": float("nan"), "time_ratio_high": float("nan"),
             "memory_ratio": float("nan")},
        ]
    )  # fmt: skip
    return made


def test_a_report_is_written_and_can_be_read(results, tmp_path):
    results.failures = {"lost": "seed 1: it burnt"}
    report = write_report(results, tmp_path)
    assert sorted(file.name for file in report.files) == sorted(
        [
            "sweep.md",
            "sweep.csv",
            "sweep_scores.parquet",
            "sweep_costs.csv",
            "sweep_forest.png",
            "sweep_cost_quality.png",
        ]
    )
    rows = pd.read_csv(tmp_path / "sweep.csv").set_index("arm")
    assert rows.loc["up", "verdict"] == "helps"
    assert rows.loc["up", "bootstrap_low"] > 0
    assert rows.loc["up", "difference_low"] < rows.loc["up", "difference"] < rows.loc["up", "difference_high"]
    text = (tmp_path / "sweep.md").read_text()
    assert "- FAILED: lost: seed 1: it burnt" in text
    assert "| up | 0.7" in text
    assert "| 2.00 [1.80, 2.20] |" in text
    assert "| bilinear | 0 | out of memory |" in text
    for name in ("sweep_forest.png", "sweep_cost_quality.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
    assert [len(shown.rows) for shown in rich_tables(report)] == [4, 3]


def test_an_arm_whose_cost_cannot_be_measured_does_not_take_the_others_along():
    class Refuses(nn.Module):
        def forward(self, image, features, size=None):
            raise RuntimeError("not today")

    cost = OmegaConf.create({"image": 32, "patch": 8, "channels": 4, "num_runs": 3})
    costs = measure_costs({"bilinear": make_peer("bilinear"), "idea": Refuses()}, "bilinear", cost, torch.device("cpu"))
    text = cost_section(costs)
    assert "4x4 features of 4 channels to 32x32, one image, float32; median of 3 forwards" in text
    assert "| idea | 0 | RuntimeError: not today |" in text
    assert costs.set_index("arm").loc["bilinear", "time_ratio"] == 1


def test_without_costs_there_are_none(results, tmp_path):
    bare = Results(results.plan, results.scores)
    assert "Cost" not in markdown(bare, compare(bare.scores, "baseline", ["up"]))
    assert not any("cost" in file.name for file in write_report(bare, tmp_path).files)


def test_a_sweep_whose_origin_is_known_says_it(results):
    results.origin, results.notes = Origin("python -m x", "today", "abc", False, "Python 3"), ["a note"]
    text = markdown(results, compare(results.scores, "baseline", ["up"]))
    assert text.startswith(
        "# sweep\n\n    python -m x\n\n- today, commit abc\n"
        "- seeds 0, 1, 2; baseline baseline; 2 arms; intervals of 95%\n"
        "- fingerprints: one images\n- Python 3\n- a note\n\n## "
    )
    results.origin = None
    text = markdown(results, compare(results.scores, "baseline", ["up"]))
    assert "run does not say how it was made.\n\n- seeds 0, 1, 2; " in text
    assert "- a note\n" in text


@pytest.mark.parametrize(
    ("seeds", "images", "said"),
    [
        (SEEDS, IMAGES, "over seeds and images"),
        ((0,), IMAGES, "one seed: over images only"),
        ((0, 1), IMAGES[:1], "one image: no interval"),
    ],
)
def test_an_evaluation_says_over_what_its_intervals_are(seeds, images, said, tmp_path):
    scores = sweep_scores({"bilinear": 0.5, "up": 0.6, "encoder": 0.7}, seeds=seeds, images=images)
    results = compare(scores, "bilinear", ["up"], num_resamples=0)
    config = composed("evaluate", ["task=fidelity", "backbone=hog8", f"out_dir={tmp_path}", "name=one"])
    files = evaluation_report.write(results, scores, None, config, Origin("c", "d", "", False, "p"))
    text = files[0].read_text()
    assert f"\n\nIntervals: {said}.\n\n| arm | detail correlation | gap closed | verdict |\n" in text
    assert text.count("over seeds and images") == (said == "over seeds and images")
    assert ("[" in text.partition("| up |")[2].partition("\n")[0]) == ("no interval" not in said)
    (shown,) = evaluation_report.rich_tables(results)
    assert shown.caption == f"intervals: {said}"
    assert forest(compare(scores, "bilinear", ["up"]), 0.95).get_suptitle().endswith(f"intervals of 95%: {said}")
    assert read_scores(files[2])[1]["command"] == "c"


def test_pictures_show_intervals_and_the_front(results):
    comparisons = compare(results.scores, "baseline", ["baseline", "up"])
    (axes,) = forest(comparisons, 0.95).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["up", "bilinear", "encoder"]
    up = found(comparisons)["up"].difference
    low, high = axes.get_xlim()
    assert low < min(0, up.low) < max(0, up.high) < high
    beyond = [one for one in comparisons if one.difference and not low <= one.difference.value <= high]
    assert [text.get_text().strip() for text in axes.texts] == [f"{one.difference.value:+.3g}" for one in beyond]
    assert beyond
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[up.value], [up.low, up.high]]
    (axes,) = cost_quality(comparisons, results.costs).axes
    assert {text.get_text() for text in axes.texts} == {"baseline", "up"}
    points = [(1, 0.5), (2, 0.4), (3, 0.6), (1, 0.3)]
    assert front(points, +1) == [(1, 0.5), (3, 0.6)]
    assert front(points, -1) == [(1, 0.3)]


def test_the_table_has_a_row_for_each_comparison(results):
    comparisons = compare(results.scores, "baseline", ["up"], num_resamples=0)
    rows = table(comparisons)
    assert list(rows["arm"]) == ["baseline", "up", "bilinear", "encoder"]
    assert rows["bootstrap_low"].isna().all()
    assert rows.loc[0, ["difference", "p_value"]].isna().all()


def test_blur_is_no_help():
    """Of a measure that blur improves: to help is to beat the best blurred baseline too, and to hurt needs no blur."""
    levels = {"bilinear": 0.45, "baseline": 0.5, "little": 0.6, "more": 0.8, "less": 0.4}
    blurred = {"bilinear": 0.65, "baseline": 0.55, "little": 0.6, "more": 0.8, "less": 0.4}
    scores = pd.concat([sweep_scores(levels, measure="cosine"), sweep_scores(blurred, measure="cosine_blurred")])
    competing = ["little", "more", "less"]
    of = {one.arm: one for one in compare(scores, "baseline", competing) if one.measure == "cosine"}
    assert {arm: of[arm].verdict for arm in competing} == {"little": "not shown", "more": "helps", "less": "hurts"}
    assert of["little"].difference.low > 0, "it is above the baseline, but blurred bilinear is above it"
    assert of["little"].beyond_blur.value == pytest.approx(-0.05, abs=0.01)
    assert of["more"].beyond_blur.value == pytest.approx(0.15, abs=0.01)
    assert of["baseline"].blurred == pytest.approx(0.55, abs=0.2)
    without = compare(sweep_scores(levels, measure="cosine"), "baseline", competing)
    assert {one.verdict for one in without if one.arm == "more"} == {"not shown"}, "no control, no claim"
    plain = compare(sweep_scores(levels, measure="detail"), "baseline", competing)
    assert {one.arm: one.verdict for one in plain}["little"] == "helps"
    assert all(one.beyond_blur is None for one in plain)


def test_commands_that_only_read_scores_know_their_measures(tmp_path):
    """Alone in its process, as users start it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    scores = pd.concat([sweep_scores({"baseline": 0.5, "up": 0.6})])
    write_scores(tmp_path / "scores.parquet", scores, {})
    power = [
        "-m",
        "experiments.power",
        "scores=scores.parquet",
        "measure=detail",
        "task=fidelity/2x",
        "effects=[0.1]",
        "out_dir=out",
    ]
    fetch = "import experiments.sweeps.stored as r\ntry: r.fetch()\nexcept r.SettingError: pass\n"
    report = ["-c", fetch + "from experiments.statistics.scores import MEASURES\nassert 'detail' in MEASURES"]
    for arguments in (power, report):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
