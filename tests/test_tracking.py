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

from experiments import recording, tracking
from experiments.images import bundled
from experiments.provenance import git_state
from experiments.tracking import TrackingUnavailable, scalars, track
from experiments.upsample import upsample

ROOT = Path(__file__).parent.parent


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("upsample", list(overrides))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server in a process of its own, stopped with all its workers."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *stores],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{uri}/health", process, folder / "log")
        yield uri, folder / "artifacts"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(url, process, log):
    for _ in range(600):
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
    return server


def recorded(run_id, uri, artifacts):
    """(run as the server tells it, its artifacts by name as they lie on the server's disk)."""
    from mlflow import MlflowClient

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
    refuses_at_once(uri, seconds=5)
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
        refuses_at_once(uri, seconds=5)


@pytest.mark.parametrize(
    "uri", ["sqlite:///broken.db", "sqlite:///folder", "sqlite:////proc/none/x.db", "mlruns", "nothing://x"]
)
def test_a_store_that_cannot_be_one(monkeypatch, tmp_path, uri):
    tracking._import_mlflow()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.db").write_bytes(b"no database" * 100)
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refuses_at_once(uri, seconds=5)


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
    assert knowing == ["tracking.py"]
    code = "import sys, experiments.tracking; sys.exit('mlflow' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
