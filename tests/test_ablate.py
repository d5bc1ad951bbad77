"""Ablations: what is refused before anything runs, what is done once and only once, and who fails alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import core
from core.registry import discover
from experiments import ablate as ablate_command
from experiments.data.code_version import _of_module, code_version, evaluation_version
from experiments.data.identity import names_of
from experiments.data.source_digest import meaning
from experiments.lock import lock_folder, unlock_folder
from experiments.measuring.tasks import Ceiling
from experiments.reports.tables import write_report
from experiments.settings import SettingError
from experiments.statistics.score_files import read_scores, write_scores
from experiments.statistics.scores import ScoreError, frame, image_rows
from experiments.sweeps import arms, members
from experiments.sweeps.arms import Arm, check_names, composed, read_arms, strings
from experiments.sweeps.members import read_tasks
from experiments.sweeps.results import SweepError
from experiments.sweeps.stored import fetch, pictures
from experiments.sweeps.sweep import Sweep, ablate
from experiments.tracking.store import open_store

ROOT = Path(__file__).resolve().parent.parent
IMAGES = [f"image{i}" for i in range(5)]


class FakeEvaluation:
    """Scores in no time: a function of the model's weights, the seed and the image; counts what it is asked."""

    asked: list[tuple[str, int]] = []  # noqa: RUF012
    pictures, notes, image_names = (), (), IMAGES

    def __init__(self, config):
        self.task, self.fingerprint = config.task.name, "everything"

    def scores(self, model, arm, seed):
        self.asked.append((arm, seed))
        level = 1.0 if isinstance(model, Ceiling) else 0.5
        if isinstance(model, core.AnyUp):
            level += 0.1 * float(torch.cat([p.detach().flatten() for p in model.parameters()]).std())
        noise = np.random.default_rng([seed, len(arm)]).normal(0, 0.01, len(IMAGES))
        rows = [
            row for name, more in zip(IMAGES, noise, strict=True) for row in image_rows(name, {"cosine": level + more})
        ]
        return frame(rows, {"task": self.task, "data": "d", "backbone": "b", "arm": arm, "seed": seed})


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeEvaluation, "asked", [])
    monkeypatch.setattr(members, "Evaluation", FakeEvaluation)
    return FakeEvaluation


@pytest.fixture
def config(tmp_path):
    """Changes -> the configuration of a tiny sweep in tmp_path, not tracked."""
    discover()

    def make(*overrides, **changes):
        made = composed("ablate", ["experiment=debug/fast", "tracking.enabled=false", "device=cpu", *overrides])
        OmegaConf.set_struct(made, False)
        made.out_dir, made.cost = str(tmp_path / "sweep"), None
        made.train = [*made.train, "checkpoint_every=1"]
        for key, value in changes.items():
            made[key] = value
        return made

    return make


def table_of(report):
    return next(file for file in report.files if file.suffix == ".csv").read_text()


# What is refused before anything is computed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, r"there are no arms: add '\+arms="),
        ({"baseline": "missing"}, "baseline=missing is not an arm; there are: baseline, no_window, nearest"),
        ({"baseline": "bilinear"}, "baseline=bilinear is not an arm"),
        ({"arms": {"baseline": [], "nearest": ["attention=global"]}}, "two arms are called nearest"),
        ({"arms": {"attention=global": [], "baseline": ["attention=window"]}, "product": {"attention": ["global"]}},
         "two arms are called attention=global: one of arms, one of product"),
        ({"arms": {"baseline": [], "again": ["attention=window"]}}, "baseline and again are the same training"),
        ({"arms": {"a/b": []}}, "arm 'a/b': names may only have letters"),
        ({"arms": {"baseline": [], "typo": ["unifier.num_bases=8"]}}, "arm typo: .*num_bases"),
        ({"arms": {"baseline": [], "typo": ["attention=globl"]}}, "arm typo: .*globl"),
        ({"arms": {"baseline": [], "odd": ["attention.num_heads=3"]}}, "arm odd: .*3"),
        ({"arms": {"baseline": {"checkpoint": "gone.safetensors"}}}, "arm baseline: its checkpoint gone.safe"),
        ({"arms": {"baseline": {"file": "x"}}}, "arm baseline must be a list of overrides, or {checkpoint"),
        ({"arms": {"baseline": [3]}}, "arms.baseline must be a list of overrides"),
        ({"arms": {"baseline": [], "lucky": ["seed=5"]}}, r"arm lucky sets a seed: all arms have the same seeds"),
        ({"product": {"unifier": "none"}}, "product.unifier must be a list of at least one value"),
        ({"product": {"unifier": []}}, "product.unifier must be a list of at least one value"),
        ({"seeds": [0, 1, 0]}, "seeds=.* names one twice: it would be counted twice"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"tasks": {}}, "there are no tasks"),
        ({"tasks": {"one": ["task=nothing"]}}, "task one: .*nothing"),
        ({"tasks": {"one": ["task=fidelity"], "two": ["task=fidelity"]}}, "tasks one and two are the same evaluation"),
        ({"peers": ["loftup_of_old"]}, "peer=loftup_of_old is not registered; there are: .*bilinear"),
        ({"ceilings": ["sky"]}, "ceilings=sky is not a ceiling; there are: encoder"),
        ({"confidence": 1.0}, "confidence must lie between"),
        ({"name": "a/b"}, "name must be a file name"),
        ({"worker": -1}, "worker must be"),
        ({"cost": {"image": 8, "patch": 16, "channels": 1, "num_runs": 3}},
         "cost.patch=16 gives less than 2x2 features of cost.image=8"),
        ({"train": ["steps=${nowhere}"]}, "train: .*nowhere"),
        ({"train": ["stop_after=1"]}, "arm baseline: stop_after: a sweep trains to the last step"),
        ({"arms": {"baseline": [], "odd": ["backbones=[{name: gone}]"]}}, "arm odd: .*gone"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(config, fake, changes, message):
    with pytest.raises(SettingError, match=message):
        Sweep(config(**changes))
    assert not fake.asked


@pytest.mark.parametrize(
    ("written", "twice"),
    [
        ("+arms={baseline:[],x:[attention=global],x:[steps=3]}", "arms names x twice"),
        ("+tasks={a: [task=depth], 'b': [\"views={x:1,x:1}\"], 'b': []}", "tasks names b twice"),
        ("arms={baseline:[],x:[init_from=a:b],y:{checkpoint:x}}", None),
        ("+arms.x=[steps=3]", None),
        ("seeds=[1,1]", None),
    ],
)
def test_a_name_that_is_given_twice_on_the_command_line_is_refused(monkeypatch, written, twice):
    """Hydra would keep the last."""
    told = SimpleNamespace(overrides=SimpleNamespace(task=[written]))
    monkeypatch.setattr(arms, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: told))
    with pytest.raises(SettingError, match=twice) if twice else nullcontext():
        check_names("arms", "tasks")


def test_the_key_of_a_task_knows_the_encoders_weights(config, tmp_path):
    """The same path with other content is another task."""
    file, keys = tmp_path / "w.safetensors", []
    for content in (b"a", b"b"):
        file.write_bytes(content)
        made = config(tasks={"one": ["task=fidelity", "backbone=vit_tiny16", f"backbone.weights={file}"]})
        keys.append(read_tasks(made)[0].key)
    assert keys[0] != keys[1]


def test_a_value_that_only_a_task_left_out_would_need_is_asked_for(config, fake):
    made = config()
    made.depth_probe = ["data.path=${rgbd_train}"]
    made.rgbd_train = "???"
    with pytest.raises(SettingError, match=r"rgbd_train; give it a value"):
        Sweep(made)


def test_the_product_adds_an_arm_for_each_combination(config):
    made = config(product={"unifier.num_basis": [16, 24], "attention": ["window", "global"]}, arms={"baseline": []})
    names = [arm.name for arm in read_arms(made) if arm.kind == "trained"]
    assert len(names) == 5
    assert names[:2] == ["baseline", "unifier.num_basis=16,attention=window"]
    arm = read_arms(made)[4].training
    assert (arm.unifier.num_basis, arm.attention.name) == (24, "global")


def test_later_overrides_win_and_lists_may_hold_lists(config):
    made = config(train=["attention=global", "steps=2", "attention=window", "steps=3"], arms={"baseline": ["steps=5"]})
    arm = read_arms(made)[0].training
    assert (arm.attention.name, arm.steps) == ("window", 5)
    nested = OmegaConf.create({"shared": ["a=1", "b=${c}"], "c": 7, "one": ["${shared}", "d=2"]})
    assert strings(nested, "one") == ["a=1", "b=7", "d=2"]


# Keys: what makes a result another one


def test_comments_and_docstrings_are_no_other_code():
    code = 'def f(x):\n    """Says."""\n    return x  # why\n'
    assert meaning(code) == meaning('"""A file."""\n\n\ndef f(x):\n    "Says more."\n\n    return x\n')
    assert meaning(code) != meaning(code.replace("return x", "return 2 * x"))


def test_a_change_of_what_measures_asks_for_no_training(tmp_path, monkeypatch):
    module = sys.modules["experiments.data.code_version"]
    monkeypatch.setattr(module, "ROOT", tmp_path)
    changes = {"core/anyup": (True, True), "experiments/training/views": (True, True),
               "experiments/data/files": (True, True), "experiments/measuring/probes": (False, True),
               "experiments/statistics/scores": (False, True), "experiments/training/curves": (False, True),
               "experiments/training/benchmark": (False, False), "experiments/training/distillation": (False, False),
               "experiments/reports/tables": (False, False)}  # fmt: skip
    for name in changes:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")

    def versions():
        module._own_code.cache_clear()
        return code_version(), evaluation_version()

    try:
        for name, expected in changes.items():
            before = versions()
            (tmp_path / f"{name}.py").write_text("x = 2\n")
            assert tuple(a != b for a, b in zip(before, versions(), strict=True)) == expected, name
    finally:
        module._own_code.cache_clear()


def test_an_extension_counts_only_where_it_is_used(own_registry, tmp_path, monkeypatch):
    """With what it imports of its own package, and without what it does not."""
    package = tmp_path / "somebodys_ideas"
    package.mkdir()
    files = {
        "__init__": "",
        "idea": "from core.attention import WindowAttention\nfrom core.registry import register\n"
        "from . import parts\n\n"
        '@register("idea")\nclass Idea(WindowAttention):\n    factor = 1\n',
        "parts": "from somebodys_ideas.numbers import ONE\n",
        "numbers": "ONE = 1\n",
        "other": "x = 1\n",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    importlib.import_module("somebodys_ideas.idea")

    def versions():
        _of_module.cache_clear()
        return code_version([("attention", "window")]), code_version([("attention", "idea")])

    plain, used = versions()
    assert plain != used
    known = {used}
    for name in ("idea", "parts", "numbers", "other"):
        (package / f"{name}.py").write_text(files[name] + "more = 2\n")
        plain_now, used = versions()
        assert plain_now == plain
        assert (used in known) == (name == "other"), name
        known.add(used)
    _of_module.cache_clear()


def test_a_cell_that_was_changed_is_another_idea(monkeypatch):
    def digest(amount):
        class Cell(core.Decoder):
            def __init__(self, embed_dim: int):
                super().__init__()

            def forward(self, output, context):
                return output + 1.0 if amount == 1 else output

        if amount == 2:
            Cell.forward = lambda self, output, context: output + 2.0
        Cell.__module__ = "__main__"
        monkeypatch.setattr("experiments.data.code_version.choices", lambda hook: {"cell": Cell})
        return code_version([("decoder", "cell")])

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_a_cell_whose_helpers_were_changed_is_another_idea(monkeypatch):
    """A function that it calls through another, a constant, a base class, all from cells; what it does not use: no."""
    cells = """
import core
AMOUNT = 1
UNUSED = 1
def twice(x): return 2 * x
def pushed(x): return twice(x) + AMOUNT
class Base(core.Decoder):
    def __init__(self, embed_dim: int):
        super().__init__()
        self.layers = [x for x in range(3)]
class Cell(Base):
    def forward(self, output, context):
        return (lambda x: pushed(x))(output)
"""

    def digest(before="", after=""):
        namespace = {"__name__": "__main__"}
        exec(cells.replace(before, after), namespace)
        monkeypatch.setattr("experiments.data.code_version.choices", lambda hook: {"cell": namespace["Cell"]})
        return code_version([("decoder", "cell")])

    changes = [("AMOUNT = 1", "AMOUNT = 2"), ("2 * x", "3 * x"), ("range(3)", "range(4)")]
    assert len({digest(), *(digest(*change) for change in changes)}) == 4
    assert digest() == digest() == digest("UNUSED = 1", "UNUSED = 2")


def test_the_key_knows_settings_seed_data_and_files(config, tmp_path):
    def key(*overrides, seed=0):
        return read_arms(config(arms={"baseline": list(overrides)}))[0].key(seed)

    assert key() == key() == key("checkpoint_every=7", "num_workers=2")
    weights = tmp_path / "start.safetensors"
    core.save(core.build(["embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8"]), weights)
    keys = [key(), key(seed=1), key("optimiser.lr=0.1"), key("data.first=1"), key(f"init_from={weights}")]
    core.save(core.build(["embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "seed=1"]), weights)
    keys.append(key(f"init_from={weights}"))
    assert len(set(keys)) == 6
    one, other = Arm("a", "checkpoint", checkpoint=weights).key(0), Arm("b", "checkpoint", checkpoint=weights).key(0)
    assert one != other


# What a sweep does


def test_peers_and_ceilings_are_measured_once_where_the_seed_plays_no_part(config, fake):
    report = ablate(config())
    arms = ("baseline", "no_window")
    of_probe = [(arm, seed) for arm in (*arms, "nearest", "bilinear", "encoder") for seed in (0, 1)]
    of_fidelity = [(arm, seed) for arm in arms for seed in (0, 1)]
    of_fidelity += [(arm, 0) for arm in ("nearest", "bilinear", "encoder")]
    assert sorted(fake.asked) == sorted(of_probe + of_fidelity)
    verdicts = {(one.task, one.arm): one for one in report.comparisons}
    assert verdicts["fidelity", "nearest"].verdict == "reference"
    assert verdicts["fidelity", "baseline"].verdict == "baseline"
    assert verdicts["fidelity", "no_window"].p_value is not None
    assert verdicts["fidelity", "nearest"].num_seeds == 1


def test_what_is_done_is_not_done_again(config, fake, monkeypatch):
    first = table_of(ablate(config()))
    asked = len(fake.asked)

    def must_not(*_):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(members.Training, "run", must_not)
        again = ablate(config())
        assert table_of(again) == first
        assert not again.results.failures
        assert len(fake.asked) == asked
        another = ablate(config(arms={"baseline": [], "no_window": ["attention=global"], "lr": ["optimiser.lr=0.1"]}))
        assert "trained again" in another.results.failures["lr"]  # the new arm is, and only that
    more = ablate(config(arms={"baseline": [], "no_window": ["attention=global"], "lr": ["optimiser.lr=0.1"]}))
    assert {arm for arm, _ in fake.asked[asked:]} == {"lr"}
    assert not more.results.failures


def test_a_failing_arm_fails_alone_and_the_table_says_so(config, fake):
    arms = {"baseline": [], "wild": ["optimiser.lr=1e30", "steps=3"], "no_window": ["attention=global"]}
    report = ablate(config(arms=arms, seeds=[0]))
    assert set(report.results.failures) == {"wild"}
    assert "NonFiniteLoss" in report.results.failures["wild"]
    assert {one.arm for one in report.comparisons} == {"baseline", "no_window", "nearest", "bilinear", "encoder"}
    text = next(file for file in report.files if file.suffix == ".md").read_text()
    assert "- FAILED: wild: seed 0: NonFiniteLoss" in text


@pytest.mark.parametrize("hours", [-1, 1])
def test_failures_are_known_whatever_the_clock_of_their_disk(config, fake, hours):
    """One of this sweep is settled, for all its processes; one of an earlier sweep is tried again."""
    made = config(seeds=[0])
    mine, beside = Sweep(made).members[0], Sweep(made).members[0]
    for reason in ("no memory", "no memory"):  # the second time for the same reason
        later = Sweep(made).members[0]
        assert later.failure == ""
        mine.fail(reason)
        noted = mine.folder / "failed.json"
        os.utime(noted, (time.time() + 3600 * hours,) * 2)
        assert mine.failure == beside.failure == later.failure == reason
    assert Sweep(made).members[0].failure == ""


def test_a_training_in_a_sweep_goes_on_where_it_was_left(config, fake, monkeypatch):
    made = config(arms={"baseline": []}, seeds=[0], cost=None)
    made.train = [*made.train, "steps=4", "checkpoint_every=1"]
    seen, step = [], members.Training.step

    def dies(self, views):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(views.step)
        return step(self, views)

    with monkeypatch.context() as patched:
        patched.setattr(members.Training, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            ablate(made)
    monkeypatch.setattr(members.Training, "step", lambda self, views: seen.append(views.step) or step(self, views))
    ablate(made)
    assert seen == [0, 1, 2, 3]


def test_images_that_were_trained_on_are_told(config, fake, monkeypatch, caplog):
    made = config(seeds=[0], cost=None)
    trained_on = sorted(names_of(read_arms(made)[0].training.data))
    monkeypatch.setattr(FakeEvaluation, "image_names", [*trained_on[:2], "another"])
    report = ablate(made)
    note = "fidelity: 2 of the 3 images were trained on"  # the other task has other data
    assert report.results.notes == [note]
    assert f"- {note}\n" in next(file for file in report.files if file.suffix == ".md").read_text()
    assert f"arm no_window, {note}" in caplog.text


def test_tasks_that_differ_in_settings_only_keep_apart(config, fake):
    """Scores say kind, data and backbone, which is the same of both."""
    tasks = {"near": ["task=fidelity"], "far": ["task=fidelity", "task.view=64"], "other": ["task=segmentation"]}
    report = ablate(config(tasks=tasks, seeds=[0], cost=None))
    assert {one.task for one in report.comparisons} == {"near", "far", "segmentation"}


def test_without_its_baseline_a_sweep_says_nothing(config, fake):
    with pytest.raises(SweepError, match="the baseline baseline failed, so nothing can be compared: seed 0: NonFinite"):
        ablate(
            config(arms={"baseline": ["optimiser.lr=1e30", "steps=3"], "no_window": ["attention=global"]}, seeds=[0])
        )


def test_a_nan_for_one_image_fails_the_arm_and_names_the_image(config, fake, monkeypatch):
    scores = FakeEvaluation.scores

    def broken(self, model, arm, seed):
        found = scores(self, model, arm, seed)
        if arm == "no_window":
            found.loc[found["image"] == "image3", "numerator"] = float("nan")
        return found

    monkeypatch.setattr(FakeEvaluation, "scores", broken)
    report = ablate(config(seeds=[0]))
    assert "ScoreError" in report.results.failures["no_window"]
    assert "image image3" in report.results.failures["no_window"]


def test_one_task_on_two_kinds_of_data_is_refused(config, fake):
    sweep = Sweep(config(seeds=[0]))
    sweep.lead()
    file = sweep.members[1].scores_file(sweep.members[1].tasks[0])
    scores, made = read_scores(file)
    write_scores(file, scores, made | {"fingerprint": "other images"})
    with pytest.raises(
        SweepError, match="task fidelity was measured on different data: arm baseline, seed 0 on everyth"
    ):
        ablate(config(seeds=[0]))


def test_an_arm_that_lacks_an_image_is_refused(config, fake):
    sweep = Sweep(config(seeds=[0]))
    sweep.lead()
    file = sweep.members[1].scores_file(sweep.members[1].tasks[0])
    scores, made = read_scores(file)
    write_scores(file, scores[scores["image"] != "image2"], made)
    with pytest.raises(
        ScoreError, match="arm no_window, seed 0 lacks 1 images that other arms have, the first: image2"
    ):
        ablate(config(seeds=[0]))


def test_who_does_not_lead_leaves_the_report_to_who_does(config, fake):
    sweep = Sweep(config(seeds=[0]))
    lock = lock_folder(sweep.folder / "lead")
    try:
        sweep._note_run("")
        assert ablate(config(seeds=[0])) is None
    finally:
        unlock_folder(sweep.folder / "lead", lock)
    assert all(member.is_done("") for member in sweep.members)  # but the work is done


def test_a_unit_somebody_is_at_is_left_to_them(config, fake):
    sweep = Sweep(config(seeds=[0]))
    taken = sweep.members[0]
    lock = lock_folder(taken.folder)
    assert sweep.work("") is True
    assert not taken.is_done("")
    unlock_folder(taken.folder, lock)
    assert sweep.work("") is False
    assert taken.is_done("")


def test_the_key_of_a_checkpoint_knows_the_code_of_its_fillers(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(arms, "code_version", lambda fillers: used.extend(fillers) or "")
    small = ["embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "decoder=inr"]
    core.save(core.build(small), tmp_path / "w.safetensors")
    arms.Arm("given", "checkpoint", checkpoint=tmp_path / "w.safetensors").key(0)
    assert ("decoder", "inr") in used


def test_a_checkpoint_can_be_an_arm(config, fake, tmp_path):
    core.save(core.build(["embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8"]), tmp_path / "w.safetensors")
    report = ablate(config(arms={"baseline": [], "given": {"checkpoint": str(tmp_path / "w.safetensors")}}))
    of_probe = {(one.task, one.arm): one for one in report.comparisons}
    assert of_probe["segmentation", "given"].num_seeds == 2
    assert of_probe["fidelity", "given"].num_seeds == 1
    assert of_probe["fidelity", "given"].p_value is not None


# Killed


def in_child(work):
    """Forks; the child does `work` and exits."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def killed_sweep(config, reference, kills, seconds):
    """Kills a sweep that often, each time after a random part of what it takes undisturbed, and then lets it end.

    A sweep that ends before its time has to begin anew.
    """
    numbers, died = random.Random(0), 0
    while died < kills:
        pid = in_child(lambda: ablate(config))
        time.sleep(numbers.uniform(0.05, 0.6) * seconds)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            died += 1
        else:
            assert os.waitstatus_to_exitcode(status) == 0
            shutil.rmtree(config.out_dir)
    assert table_of(ablate(config)) == table_of(reference)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_sweep_that_was_killed_ends_with_the_same_table(config, fake, tmp_path):
    started = time.monotonic()
    reference = ablate(config(out_dir=str(tmp_path / "undisturbed")))
    killed_sweep(config(), reference, 2, time.monotonic() - started)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(3600)
def test_twenty_kills_and_every_arm_is_counted_once(config, tmp_path, monkeypatch):
    """With real evaluations and a real MLflow database; tables from files and from MLflow are as undisturbed."""
    monkeypatch.chdir(tmp_path)
    made = config("tracking.enabled=true")
    started = time.monotonic()
    reference = ablate(OmegaConf.merge(made, {"out_dir": str(tmp_path / "undisturbed")}))
    killed_sweep(made, reference, 20, time.monotonic() - started)
    rebuilt = write_report(fetch(), tmp_path / "rebuilt")
    assert table_of(rebuilt) == table_of(reference)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_share_a_sweep(config, fake, tmp_path):
    made = config()
    reference = ablate(config(out_dir=str(tmp_path / "alone")))
    pids = [in_child(lambda worker=worker: ablate(OmegaConf.merge(made, {"worker": worker}))) for worker in (0, 3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert (tmp_path / "sweep/debug_fast.csv").read_text() == table_of(reference)


# Recorded


def test_mlflow_alone_gives_the_same_tables(config, tmp_path, monkeypatch):
    """Real evaluations, a real database; the report is made again after all else is gone."""
    monkeypatch.chdir(tmp_path)
    made = config("tracking.enabled=true", arms={"baseline": [], "wild": ["optimiser.lr=1e30", "steps=3"]},
                  cost={"image": 32, "patch": 8, "channels": 4, "num_runs": 3}, peers=["bilinear"])  # fmt: skip
    ablate(config("tracking.enabled=true", arms={"baseline": []}, cost=None, peers=["bilinear"]))  # of the same results
    report = ablate(made)
    store = open_store()
    assert store.latest("ablate", "sweep").tags["failed"].startswith("wild: seed 0: NonFiniteLoss")
    (child,) = [run for run in store.children(store.latest("ablate", "sweep").run_id) if run.tags["arm"] == "bilinear"
                and run.tags["arm.seed"] == "0"]  # fmt: skip
    assert store.sizes(child.run_id, "pictures/scenes")  # the worst images
    shutil.rmtree(tmp_path / "sweep/members")
    results = fetch()
    drawn = pictures(results, "bilinear")
    assert drawn
    assert len({name.partition("/")[0] for name in drawn}) == 2, "of the probes, and of fidelity"
    assert all(min(image.size) > 32 for image in drawn.values())
    with pytest.raises(SettingError, match="has no run of arm gone; it has baseline, wild, bilinear"):
        pictures(results, "gone")
    assert set(results.failures) == {"wild"}
    assert results.failures == report.results.failures
    rebuilt = write_report(results, tmp_path / "rebuilt")
    assert [file.name for file in rebuilt.files] == [file.name for file in report.files]
    for ours, theirs in zip(rebuilt.files, report.files, strict=True):
        if ours.suffix in (".csv", ".parquet", ".md"):
            assert ours.read_bytes() == theirs.read_bytes(), ours.name
    with pytest.raises(SettingError, match="there is no sweep nowhere in sqlite"):
        fetch("nowhere")
    with pytest.raises(SettingError, match="there is no sweep of experiment other"):
        fetch(experiment="other")


# The command and its launchers


def test_the_command_says_which_arm_failed_and_exits_so(config, fake, caplog, capsys):
    command = ablate_command.main.__wrapped__  # without Hydra, which wants the command line
    with pytest.raises(SystemExit) as left:
        command(config(arms={"baseline": [], "wild": ["optimiser.lr=1e30", "steps=3"]}, seeds=[0]))
    assert left.value.code == 1
    assert "arm wild failed: seed 0: NonFiniteLoss" in caplog.text
    assert "debug_fast.csv" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        command(config(arms={}))
    assert left.value.code == 2


def test_the_slurm_launcher_is_configured():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        made = compose(
            "ablate", ["hydra/launcher=slurm", "name=x", "hydra.launcher.partition=gpu"], return_hydra_config=True
        )
    assert made.hydra.launcher._target_.endswith("SlurmLauncher")
    assert (made.hydra.launcher.gpus_per_node, made.hydra.launcher.partition) == (1, "gpu")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_jobs_of_a_launcher_share_a_sweep(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    extra = ["hydra.launcher.submitit_folder=jobs"] if launcher == "submitit_local" else ["hydra.launcher.n_jobs=2"]
    command = ["-m", "experiments.ablate", "-m", "experiment=debug/fast", "worker=0,1", f"hydra/launcher={launcher}"]
    done = subprocess.run(
        [sys.executable, *command, *extra], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=1200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs/ablate/debug_fast/debug_fast.csv").exists()
