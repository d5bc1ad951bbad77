"""Offline runs, killed runs and killed uploads, with a real store (a database; over HTTP: test_tracking.py)."""

import logging
import os
import random
import re
import runpy
import shutil
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from test_spool import CHILDREN, spawned

from experiments.tracking import recording
from experiments.tracking import store as tracking
from experiments.tracking.spool import folders
from experiments.tracking.store import TrackingUnavailable, open_store, track
from experiments.tracking.sync import sync

ROOT = Path(__file__).parent.parent
SPOOL = Path("outputs/spool")
OFFLINE = "tracking.offline=true"


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("upsample", ["tracking.system_metrics_s=null", *overrides])


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A store nothing has happened in; to make one takes seconds."""
    folder, before = tmp_path_factory.mktemp("database"), Path.cwd()
    os.chdir(folder)
    try:
        open_store()
    finally:
        os.chdir(before)
    return folder / "mlflow.db"


@pytest.fixture
def store(database, tmp_path, monkeypatch):
    """The working directory has a store; -> a client of it."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recording, "git_state", lambda source: ("0" * 40, ""))
    shutil.copy(database, "mlflow.db")
    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def all_runs(store):
    return list(store.search_runs([found.experiment_id for found in store.search_experiments()]))


def steps(store, run_id, key="loss"):
    return [point.step for point in store.get_metric_history(run_id, key)]


def text(store, run_id, name):
    return Path(store.download_artifacts(run_id, name)).read_text()


def test_offline_asks_for_no_store(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with track(config(OFFLINE)) as run:
        run.metrics({"loss": 1.0})
    assert re.fullmatch("[0-9a-f]{32}", run.run_id)
    assert "python -m experiments.sync" in caplog.text
    before = {path: path.read_bytes() for path in SPOOL.rglob("*") if path.is_file()}
    with pytest.raises(TrackingUnavailable):
        sync(SPOOL)
    assert {path: path.read_bytes() for path in SPOOL.rglob("*") if path.is_file()} == before


def test_a_parent_and_its_children_offline_and_in_other_processes(store):
    with track(config(OFFLINE, "tracking.run_name=parent")) as parent, track(config(OFFLINE), parent=parent):
        pass
    with track(config(OFFLINE), parent=parent.run_id):
        pass
    assert [outcome.left for outcome in sync(SPOOL)] == ["", "", ""]
    runs = {run.data.tags["spool.id"]: run for run in all_runs(store)}
    assert len(runs) == 3
    top = runs.pop(parent.run_id)
    assert top.info.run_name == "parent"
    assert "mlflow.parentRunId" not in top.data.tags
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {top.info.run_id}
    with track(config(), parent=parent.run_id) as later:
        pass
    assert store.get_run(later.run_id).data.tags["mlflow.parentRunId"] == top.info.run_id


def run_command(folder, *arguments):
    os.chdir(folder)
    sys.argv = ["experiments.sync", *arguments]
    with Path("said.txt").open("w") as said, redirect_stdout(said):
        runpy.run_module("experiments.sync", run_name="__main__")


def test_the_command(store, tmp_path):
    with track(config(OFFLINE, "tracking.spool_dir=elsewhere")) as run:
        run.metrics({"loss": 1.0})
    with (Path("elsewhere") / run.run_id / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metr')
    with spawned(run_command, tmp_path, "spool_dir=elsewhere") as child:
        child.join()
        said = Path("said.txt").read_text()
        assert child.exitcode == 0
    (found,) = all_runs(store)
    assert f"{run.run_id} (FINISHED, 6 records): uploaded as {found.info.run_id}" in said
    assert "the last line of its journal is incomplete" in said
    assert "1 of 1 runs uploaded to sqlite:///mlflow.db" in said
    assert not list(Path("elsewhere").iterdir())
    with track(config(OFFLINE)), spawned(run_command, tmp_path) as child:
        child.join()
        assert "it is still being recorded" in Path("said.txt").read_text()
        assert child.exitcode == 1


def test_what_did_not_arrive_stays(store, monkeypatch):
    with track(config(OFFLINE)) as run:
        for step in range(5):
            run.metrics({"loss": step}, step)
        run.text("hello", "a/b.txt")
    real = tracking.MlflowStore.log
    monkeypatch.setattr(tracking.MlflowStore, "log", lambda self, run_id, points, tags: None)
    (outcome,) = sync(SPOOL)
    assert "5 of 5 points of loss are missing in the store" in outcome.left
    assert folders(SPOOL)
    monkeypatch.setattr(tracking.MlflowStore, "log", real)
    shutil.rmtree("mlruns")
    (outcome,) = sync(SPOOL)
    assert outcome.left == ""
    assert not folders(SPOOL)
    (found,) = all_runs(store)
    assert steps(store, found.info.run_id) == list(range(5))
    assert text(store, found.info.run_id, "a/b.txt") == "hello"


def sync_here(folder):
    os.chdir(folder)
    sync(SPOOL)


def test_uploads_killed_at_random_moments(store, tmp_path):
    with track(config(OFFLINE)) as parent:
        for number in range(3):
            with track(config(OFFLINE, f"seed={number}"), parent=parent) as run:
                for step in range(800):
                    run.metrics({"loss": step / 7, "cosine": number}, step)
                    if step % 200 == 0:
                        run.text(f"{number} {step}", f"texts/{step}.txt")
                run.tag("number", str(number))
    dice, kills = random.Random(0), 0
    while folders(SPOOL):
        assert kills < 100
        with spawned(sync_here, tmp_path) as child:
            child.join(dice.uniform(0.05, 0.4) * (1 + kills / 5))
            kills += child.is_alive()
    assert kills >= 3
    assert sync(SPOOL) == []
    runs = all_runs(store)
    assert len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = {run.data.tags["number"]: run for run in runs if "number" in run.data.tags}
    for number, run in children.items():
        assert run.data.params["seed"] == number
        assert steps(store, run.info.run_id) == list(range(800))
        assert {point.value for point in store.get_metric_history(run.info.run_id, "cosine")} == {int(number)}
        assert [text(store, run.info.run_id, f"texts/{step}.txt") for step in (0, 600)] == [
            f"{number} 0",
            f"{number} 600",
        ]


def train(folder, said, run_id=None, count=10**9, *overrides):
    """A training: tells its identifier, and each step once it is recorded."""
    os.chdir(folder)
    with track(config(*overrides), run_id=run_id) as run:
        said.send(run.run_id)
        for step in range(count):
            run.metrics({"loss": step}, step)
            said.send(step)
            time.sleep(0.002)


def told(hear):
    """All a dead child has said."""
    said = []
    try:
        while True:
            said.append(hear.recv())
    except EOFError:
        return said
    finally:
        hear.close()


def killed_training(folder, seconds, *overrides):
    """(identifier, last step it had recorded) of a training killed -9 after some seconds."""
    hear, said = CHILDREN.Pipe(duplex=False)
    with spawned(train, folder, said, None, 10**9, *overrides) as child:
        said.close()
        assert hear.poll(60)
        time.sleep(seconds)
        child.kill()
        child.join()
    run_id, *steps = told(hear)
    return run_id, max(steps, default=-1)


def test_runs_killed_at_random_moments_are_no_orphans(store, tmp_path, caplog):
    dice = random.Random(1)
    killed = dict(killed_training(tmp_path, dice.uniform(0, 2.5)) for _ in range(4))
    # Each start has found the one before it.
    assert [store.get_run(run_id).info.status for run_id in killed] == ["KILLED"] * 3 + ["RUNNING"]
    with track(config()) as run:
        assert {store.get_run(run_id).info.status for run_id in killed} == {"KILLED"}
        assert store.get_run(run.run_id).info.status == "RUNNING"
    assert "4 earlier runs wait in outputs/spool; upload them with: python -m experiments.sync" in caplog.text
    outcomes = sync(SPOOL)
    assert {(outcome.store_id, outcome.status, outcome.left) for outcome in outcomes} == {
        (run_id, "KILLED", "") for run_id in killed
    }
    for run_id, last in killed.items():
        found, arrived = store.get_run(run_id), steps(store, run_id)
        assert arrived == list(range(len(arrived)))
        assert len(arrived) > last
        history = store.get_metric_history(run_id, "loss")
        if history:
            assert found.info.end_time == history[-1].timestamp, "when it was killed, not when that was found"
        assert text(store, run_id, "run/config.yaml")
    assert len(all_runs(store)) == 5


def test_a_killed_run_that_goes_on_is_one_run(store, tmp_path, caplog):
    run_id, last = killed_training(tmp_path, 0.5)
    with track(config("max_size=100"), run_id=run_id) as run:
        assert run.run_id == run_id
        run.metrics({"loss": 10**6}, 10**6)
        for _ in range(600):
            found = store.get_run(run_id)
            if found.info.status == "RUNNING" and "process.pid" in found.data.tags:
                break
            time.sleep(0.1)
        assert found.data.tags["process.pid"] == str(os.getpid())
        assert found.info.status == "RUNNING"
    (found,) = all_runs(store)
    assert found.info.status == "FINISHED"
    arrived = steps(store, run_id)
    assert arrived[:-1] == list(range(len(arrived) - 1))
    assert len(arrived) > last + 1
    assert arrived[-1] == 10**6
    assert found.data.params["max_size"] == "448", "what it was begun with"
    assert "max_size: 448" in text(store, run_id, "run/config.yaml")
    (again,) = [file.path for file in store.list_artifacts(run_id, "run") if "resumed" in file.path]
    assert "max_size: 100" in text(store, run_id, f"{again}/config.yaml")
    assert not folders(SPOOL)


def test_an_offline_run_goes_on_offline_and_online(store):
    with track(config(OFFLINE)) as first:
        first.metrics({"loss": 0.0}, 0)
    with track(config(OFFLINE), run_id=first.run_id) as second:
        second.metrics({"loss": 1.0}, 1)
    with track(config(), run_id=first.run_id) as third:
        third.metrics({"loss": 2.0}, 2)
    with track(config(OFFLINE), run_id=first.run_id) as fourth:
        fourth.metrics({"loss": 3.0}, 3)
    assert {run.run_id for run in (second, third, fourth)} == {first.run_id}
    (outcome,) = sync(SPOOL)
    assert outcome.left == ""
    (found,) = all_runs(store)
    assert steps(store, found.info.run_id) == [0, 1, 2, 3]
    assert found.info.status == "FINISHED"


def test_a_run_the_store_does_not_know_begins_anew_there(store, caplog):
    caplog.set_level(logging.WARNING)
    with track(config(), run_id="0123abcd") as run:
        run.metrics({"loss": 0.0})
    assert "a new run is made there" in caplog.text
    with track(config(), run_id="0123abcd"):
        pass
    (found,) = all_runs(store)
    assert found.data.tags["spool.id"] == "0123abcd"
    assert found.info.status == "FINISHED"


def test_what_is_alive_is_left_alone(store, tmp_path):
    hear, said = CHILDREN.Pipe(duplex=False)
    with spawned(train, tmp_path, said) as child:
        said.close()
        assert hear.poll(60)
        run_id = hear.recv()
        (outcome,) = sync(SPOOL)
        assert outcome.left == "it is still being recorded"
        with track(config()), pytest.raises(TrackingUnavailable, match="in use by another process"):
            track(config(), run_id=run_id).__enter__()
        assert store.get_run(run_id).info.status == "RUNNING"
        before = hear.recv()
        while hear.poll():
            before = hear.recv()
        assert hear.poll(30)
        assert child.is_alive()
        assert hear.recv() > before
    hear.close()


def test_a_spool_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingUnavailable, match=r"Change tracking\.spool_dir"):
        track(config("tracking.spool_dir=file/spool")).__enter__()
    assert [run.info.status for run in all_runs(store)] == ["FAILED"]
