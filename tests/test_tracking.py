"""Tracking against a real MLflow server over HTTP, against none, and against servers that fail."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from PIL import Image

import experiments.tracking.run
from experiments.data.image_files import bundled
from experiments.tracking import recording
from experiments.tracking import store as tracking
from experiments.tracking.provenance import git_state
from experiments.tracking.store import TrackingUnavailable, scalars, track
from experiments.tracking.sync import sync
from experiments.upsampling.upsample import upsample

tracking._import_mlflow()
from mlflow import MlflowClient  # noqa: E402  (after the warnings of its import are silenced)

ROOT = Path(__file__).parent.parent


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("upsample", list(overrides))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real MLflow server in a process of its own, which can be killed with all its workers and started again."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri, self.artifacts = f"http://127.0.0.1:{self.port}", folder / "artifacts"

    def start(self):
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/db", "--artifacts-destination", str(self.artifacts)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *where, *stores],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        wait_for(f"{self.uri}/health", self.process, self.folder / "log")

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait(30)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(running):
    return running.uri, running.artifacts


def wait_for(url, process, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture
def over_http(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server[0])
    monkeypatch.setattr(tracking, "_FIRST_CALL_S", 60)  # a busy machine is no reason to fail
    return server


def recorded(run_id, uri, artifacts):
    """(run as the server tells it, its artifacts by name as they lie on the server's disk)."""
    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    folder = artifacts / run.info.experiment_id / run_id / "artifacts"
    return run, {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


def test_a_run_can_be_found_again_over_http(over_http):
    (Path.cwd() / "weights.bin").write_bytes(b"123")
    with track(config("attention=global", "tracking.run_name=first"), torch.device("cpu")) as run:
        run.metrics({"loss": 2.0}, step=0)
        run.metrics({"loss": 1.0, "cosine": torch.tensor(0.5)}, step=1)
        run.text("a,b", "tables/result.csv")
        run.picture(Image.new("RGB", (5, 4), "red"), "pictures/red.png")
        run.figure(Figure(), "plots/empty.png")
        run.file(Path("weights.bin"), "checkpoint/weights.bin")
        run.file(Path("weights.bin"))
        run.tag("claim", "none")
    found, artifacts = recorded(run.run_id, *over_http)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    tags, params, metrics = found.data.tags, found.data.params, found.data.metrics
    assert tags["hook.attention"] == "global"
    assert tags["hook.unifier"] == "learned_basis"
    assert {key for key in tags if key.startswith("hook.")} == {f"hook.{hook}" for hook in recording.HOOK_POINTS}
    assert tags["device"] == "cpu"
    assert tags["claim"] == "none"
    assert {"git.commit", "git.dirty"} <= tags.keys()
    assert params["seed"] == "0"
    assert params["dtype"] == "float32"
    assert params["attention.name"] == "global"
    assert metrics["loss"] == 1
    assert metrics["cosine"] == 0.5
    assert metrics["time_s"] > 0
    assert metrics["peak_memory_mb"] > 50
    assert {"run/config.yaml", "run/environment.json", "tables/result.csv", "plots/empty.png"} <= artifacts.keys()
    assert artifacts["checkpoint/weights.bin"].read_bytes() == b"123" == artifacts["weights.bin"].read_bytes()
    with Image.open(artifacts["pictures/red.png"]) as picture:
        assert picture.size == (5, 4)
    assert "name: global" in artifacts["run/config.yaml"].read_text()
    assert json.loads(artifacts["run/environment.json"].read_text())["packages"]["torch"] == version("torch")
    here = {path.relative_to(Path.cwd()).as_posix() for path in Path.cwd().rglob("*")}
    assert here == {"weights.bin", "outputs", "outputs/spool"}, "nothing is kept here as well"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_says_so(over_http, error, status):
    runs = []

    def work():
        with track(config()) as run:
            runs.append(run)
            run.metrics({"loss": 3.0})
            raise error

    with pytest.raises(error):
        work()
    run = runs[0]
    found, _ = recorded(run.run_id, *over_http)
    assert found.info.status == status
    assert found.data.metrics["loss"] == 3
    assert found.data.metrics["time_s"] >= 0


def test_upsampling_is_recorded_over_http(over_http):
    (Path.cwd() / "in" / "deep").mkdir(parents=True)
    shutil.copy(bundled("chelsea"), "in/deep/ä b#1%20.png")
    summary = upsample(config("images=[coffee,in]", "max_size=48", "backbone=hog8"))
    found, artifacts = recorded(summary.run_id, *over_http)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["images_done"] == 2
    assert found.data.metrics["median_upsampler_ms"] > 0
    assert found.data.metrics["median_backbone_ms"] > 0
    assert artifacts["pictures/coffee.png"].read_bytes() == summary.done[0].picture.read_bytes()
    assert "pictures/deep/ä b_1_20.png" in artifacts


def test_a_server_goes_away_and_comes_back(over_http, running, caplog):
    with track(config("tracking.system_metrics_s=0.5")) as run:
        run.metrics({"loss": -1.0}, step=0)
        running.stop(signal.SIGKILL)
        started = time.perf_counter()
        for step in range(1, 200):
            run.metrics({"loss": step / 7}, step)
            if step % 50 == 0:
                run.text(f"at {step}", f"texts/{step}.txt")
        assert time.perf_counter() - started < 5, "nobody waits for the server"
        while "goes on without the tracking store" not in caplog.text:
            time.sleep(0.1)
        running.start()
        run.metrics({"loss": 200 / 7}, 200)
    found, artifacts = recorded(run.run_id, *over_http)
    assert found.info.status == "FINISHED"
    points = MlflowClient(over_http[0]).get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(0, -1.0)] + [(step, step / 7) for step in range(1, 201)]
    assert {artifacts[f"texts/{step}.txt"].read_text() for step in (50, 100, 150)} == {"at 50", "at 100", "at 150"}
    assert found.data.metrics["system/process_memory_usage_megabytes"] > 50
    assert not list(Path("outputs/spool").iterdir())
    assert caplog.text.count("goes on without the tracking store") == 1


def test_a_server_that_stays_away_is_brought_the_rest_later(over_http, running, caplog):
    with track(config("tracking.patience_s=1")) as run:
        running.stop(signal.SIGKILL)
        run.metrics({"loss": 1.0}, step=3)
        ending = time.time()
    assert time.time() - ending < 20
    assert f"run {run.run_id} is kept in" in caplog.text
    assert "upload it with: python -m experiments.sync" in caplog.text
    running.start()
    deadline = time.monotonic() + 60  # the last request may still wait for its answer
    while [outcome.left for outcome in sync(Path("outputs/spool"))] == ["it is still being recorded"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not list(Path("outputs/spool").iterdir())
    found, _ = recorded(run.run_id, *over_http)
    assert found.info.status == "FINISHED"
    assert abs(found.info.end_time / 1000 - ending) < 10, "when it ended, not when it was uploaded"
    assert found.data.metrics["loss"] == 1


def everything(offline):
    with track(config(f"tracking.offline={offline}", "tracking.system_metrics_s=null", "tracking.run_name=x")) as run:
        for step in range(30):
            run.metrics({"loss": 1 / (1 + step), "odd/name": float("nan"), "inf": -float("inf")}, step)
        run.tag("claim", "ä" * 3000)
        run.data("train", "0123")
        run.picture(Image.new("RGB", (5, 4), "red"), "pictures/ä b#.png")
        run.text("a,b", "a/b/c.csv")
        with track(config(f"tracking.offline={offline}", "tracking.system_metrics_s=null"), parent=run):
            pass
    return run.run_id


def test_offline_and_uploaded_is_as_online(over_http, monkeypatch):
    def clock():
        return next(times)

    client, ids = MlflowClient(over_http[0]), {}
    monkeypatch.setattr(recording, "peak_memory_mb", lambda: 1.0)
    monkeypatch.setattr(recording.time, "perf_counter", lambda: 0.0)
    for module in (recording, experiments.tracking.run):
        monkeypatch.setattr(module, "now_ms", clock)
    for offline in (False, True):
        times = iter(range(10**12, 10**12 + 1000))
        ids[offline] = everything(offline)
    assert [outcome.left for outcome in sync(Path("outputs/spool"))] == ["", ""]
    experiment = client.get_experiment_by_name("upsample").experiment_id
    (uploaded,) = client.search_runs([experiment], f"tags.`spool.id` = '{ids[True]}'")
    online, files = recorded(ids[False], *over_http)
    offline, same_files = recorded(uploaded.info.run_id, *over_http)
    for name in ("status", "start_time", "end_time", "run_name"):
        assert getattr(online.info, name) == getattr(offline.info, name), name
    assert online.info.start_time == 10**12
    assert offline.data.params == online.data.params | {"tracking.offline": "True"}
    assert offline.data.tags == online.data.tags | {"spool.id": ids[True]}
    assert online.data.tags["claim"] == "ä" * 3000
    assert offline.data.metrics.keys() == online.data.metrics.keys()
    for key in online.data.metrics:
        both = [client.get_metric_history(run.info.run_id, key) for run in (online, offline)]
        first, second = ([(point.timestamp, point.step, repr(point.value)) for point in points] for points in both)
        assert first == second, key
    assert files.keys() == same_files.keys() >= {"pictures/ä b_.png", "a/b/c.csv", "run/config.yaml"}
    different = {name for name in files if files[name].read_bytes() != same_files[name].read_bytes()}
    assert different == {"run/config.yaml"}  # offline: true
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{uploaded.info.run_id}'")
    assert len(children) == 1


@pytest.mark.parametrize("folder", ["one", "another"])  # in one process: each working directory has its own
def test_the_default_store_is_a_database_beside_its_artifacts(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(recording, "git_state", lambda source: ("0" * 40, f"changed: {folder}"))
    with track(config()) as run:
        run.text("hello", "a.txt")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["mlflow.db", "mlruns", "outputs"]
    assert not list(Path("outputs/spool").iterdir())
    assert [path.read_text() for path in Path("mlruns").rglob("a.txt")] == ["hello"]
    assert [path.read_text() for path in Path("mlruns").rglob("uncommitted.diff")] == [f"changed: {folder}"]
    with track(config()) as again:
        pass
    uri = f"sqlite:///{Path.cwd()}/mlflow.db"
    first, second = (recorded(one.run_id, uri, tmp_path)[0] for one in (run, again))
    assert first.info.experiment_id == second.info.experiment_id
    assert first.data.tags["git.commit"] == "0" * 40
    assert first.data.tags["git.dirty"] == "yes"


def test_switched_off_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with track(config("tracking.enabled=false")) as run:
        run.metrics({"loss": 1.0})
        run.text("hello", "a.txt")
        run.file(tmp_path / "missing")
        run.tag("a", "b")
        run.picture(Image.new("RGB", (2, 2)), "a.png")
    assert run.run_id == ""
    assert not list(tmp_path.iterdir())


def silent_server():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def refuses_at_once(uri, seconds):
    reached = False
    started = time.perf_counter()
    with pytest.raises(TrackingUnavailable) as refused, track(config()):
        reached = True
    assert not reached
    assert time.perf_counter() - started < seconds
    message = str(refused.value)
    assert uri in message
    assert "Start it" in message
    assert "unset MLFLOW_TRACKING_URI" in message
    assert "tracking.enabled=false" in message


def test_an_unreachable_server_is_told_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tracking._import_mlflow()  # takes seconds of its own
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = dict(os.environ)
    refuses_at_once(uri, seconds=30)
    assert dict(os.environ) == before
    with pytest.raises(TrackingUnavailable):
        upsample(config("images=coffee", "max_size=48", "backbone=hog8", "out_dir=made"))
    assert not list(Path("made").iterdir())


def test_a_server_that_never_answers(monkeypatch):
    tracking._import_mlflow()
    monkeypatch.setattr(tracking, "_FIRST_CALL_S", 1)
    listener, uri = silent_server()
    with listener:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        refuses_at_once(uri, seconds=30)


@pytest.mark.parametrize(
    "uri", ["sqlite:///broken.db", "sqlite:///folder", "sqlite:////proc/none/x.db", "mlruns", "nothing://x"]
)
def test_a_store_that_cannot_be_one(monkeypatch, tmp_path, uri):
    tracking._import_mlflow()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.db").write_bytes(b"no database" * 100)
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refuses_at_once(uri, seconds=30)


def test_an_idea_that_is_not_committed_yet_is_kept(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path / "core" / "model.py") == ("", ""), "no checkout"
    source = tmp_path / "core" / "model.py"
    source.parent.mkdir()
    source.write_text("width = 1\n")
    git("init")
    git("add", ".")
    assert git_state(tmp_path / "other.py") == ("", ""), "a file that is not of the checkout"
    git("commit", "-m", "first")
    commit, changes = git_state(source)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert changes == ""
    source.write_text("width = 2\n")
    (tmp_path / "extensions").mkdir()
    (tmp_path / "extensions" / "idea.py").write_text("class Idea: ...\n")
    changed_commit, changes = git_state(source)
    assert changed_commit == commit
    assert "+width = 2" in changes
    assert "+class Idea: ..." in changes


def test_parameters_are_scalars_under_dotted_keys():
    nested = {"a": {"b": 1, "c": {"d": "x", "e": [1, 2]}}, "f": None, "g": True}
    assert scalars(nested) == {"a.b": 1, "a.c.d": "x", "f": None, "g": True}


def test_only_tracking_knows_mlflow_and_only_when_a_run_starts():
    sources = [path for folder in ("core", "extensions", "experiments") for path in (ROOT / folder).rglob("*.py")]
    knowing = [path.name for path in sources if re.search(r"^\s*(import|from) mlflow", path.read_text(), re.MULTILINE)]
    assert knowing == ["store.py"]
    code = "import sys, experiments.tracking.store; sys.exit('mlflow' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_all_pages_of_a_search_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client, search = MlflowClient(uri), MlflowClient.search_runs
    experiment = client.create_experiment("pages")
    for _ in range(3):
        client.create_run(experiment, tags={"mlflow.parentRunId": "above"})
    monkeypatch.setattr(
        MlflowClient,
        "search_runs",
        lambda self, *which, page_token: search(self, *which, max_results=2, page_token=page_token),
    )
    assert len(tracking.MlflowStore(client, uri).children("above")) == 3


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(tmp_path, monkeypatch):
    """Between asking for it and making it, another process makes it: this one asks in vain once."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    theirs = MlflowClient(uri).create_experiment("shared")
    ask, asked = MlflowClient.get_experiment_by_name, []
    monkeypatch.setattr(
        MlflowClient, "get_experiment_by_name", lambda self, name: ask(self, name) if asked or asked.append(1) else None
    )
    assert tracking.MlflowStore(MlflowClient(uri), uri)._experiment("shared") == theirs
