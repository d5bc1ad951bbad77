"""What is kept about a run, in MLflow: the only file that imports it, and only when a run starts.

Kept of every run: resolved configuration, one tag per hook point, git commit with the uncommitted changes, seed,
device, package versions, time, peak memory, and whatever the experiment logs. The store is `mlflow.db` with the
artifacts in `mlruns/`, both in the working directory, unless `MLFLOW_TRACKING_URI` names another.
"""

import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from core.hooks import HOOK_POINTS
from experiments.provenance import environment, git_state, peak_memory_mb

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
_PARAMS_PER_CALL = 100  # what MLflow takes at once
_FIRST_CALL_S = 5  # seconds until a silent server counts as unreachable


class TrackingUnavailable(RuntimeError):
    """The tracking store cannot be used; raised before anything is computed."""


class Run:
    """One run, or, with tracking switched off, a stand-in that records nothing."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "") -> None:
        self.client = client
        self.run_id = run_id
        """MLflow's identifier, empty when tracking is switched off."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs scalars of one step."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def figure(self, figure: "Figure", name: str) -> None:
        """Keeps a matplotlib figure as the artifact `name`, such as `plots/time.png`."""
        if self.client is not None:
            self.client.log_figure(self.run_id, figure, name)

    def picture(self, image: Image.Image, name: str) -> None:
        """Keeps a picture as the artifact `name`, such as `pictures/coffee.png`."""
        if self.client is not None:
            self.client.log_image(self.run_id, image, name)

    def text(self, content: str, name: str) -> None:
        """Keeps a text (YAML, JSON, a table) as the artifact `name`."""
        if self.client is not None:
            self.client.log_text(self.run_id, content, name)

    def file(self, path: Path, name: str | None = None) -> None:
        """Keeps a copy of a file (a checkpoint) as the artifact `name`, such as `pictures/a.png`; its own by default.

        `#`, `?` and `%` become `_`: MLflow would cut the name there on its way to a server.
        """
        if self.client is None:
            return
        folder, _, last = re.sub("[#?%]", "_", name or path.name).rpartition("/")
        if last == path.name:
            self.client.log_artifact(self.run_id, str(path), folder or None)
            return
        with tempfile.TemporaryDirectory() as other:
            link = Path(other, last)
            link.symlink_to(path.resolve())
            self.client.log_artifact(self.run_id, str(link), folder or None)

    def tag(self, key: str, value: str) -> None:
        """Sets a tag, to find the run by."""
        if self.client is not None:
            self.client.set_tag(self.run_id, key, value)


@contextmanager
def track(
    config: DictConfig, device: torch.device | str = "cpu", run_id: str | None = None, parent: Run | str | None = None
) -> Iterator[Run]:
    """Runs the block as one MLflow run: FINISHED at its end, FAILED (or KILLED, when interrupted) on an exception.

    `config.tracking` has `enabled`, `experiment` and `run_name`; the whole of `config` is recorded. With `run_id` an
    earlier run goes on; with `parent` (a run or its identifier) the run is listed below another.

    Raises:
        TrackingUnavailable: the store cannot be reached or written, within seconds and before the block starts.
    """
    if not config.tracking.enabled:
        yield Run()
        return
    started = time.perf_counter()
    run = _start(config, str(device), run_id, parent)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _end(run, status, started)


def store_uri() -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI`, or the database in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def _start(config: DictConfig, device: str, run_id: str | None, parent: Run | str | None) -> Run:
    uri = store_uri()
    _import_mlflow()
    with _unavailable(uri):
        client = _connect(uri)
        commit, changes = git_state(Path(__file__))
        tags = {f"hook.{hook}": config[hook].name for hook in HOOK_POINTS if hook in config}
        tags |= {"device": device, "git.commit": commit or "none", "git.dirty": "yes" if changes else "no"}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent.run_id if isinstance(parent, Run) else parent
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")
            return Run(client, run_id)
        experiment = _experiment(client, uri, config.tracking.experiment)
        created = client.create_run(experiment, tags=tags, run_name=config.tracking.run_name)
        run = Run(client, created.info.run_id)
        _log_parameters(client, run.run_id, config)
        run.text(OmegaConf.to_yaml(config, resolve=True), "run/config.yaml")
        run.text(json.dumps(environment(), indent=1), "run/environment.json")
        if changes:
            run.text(changes, "run/uncommitted.diff")
    return run


def _end(run: Run, status: str, started: float) -> None:
    """Closes a run. A store that is lost by now is reported; it must not hide how the run itself ended."""
    from mlflow.exceptions import MlflowException

    used = {"time_s": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
    if torch.cuda.is_available():
        used["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    try:
        run.metrics(used)
        run.client.set_terminated(run.run_id, status)
    except MlflowException as error:
        log.error("the end of run %s (%s) could not be recorded: %s", run.run_id, status, error)


@contextmanager
def _unavailable(uri: str) -> Iterator[None]:
    """Turns what the layers below raise about a store into one error that says what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (ImportError, OSError, SQLAlchemyError, MlflowException) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise TrackingUnavailable(
            f"the tracking store {uri} cannot be used ({reason}). Start it, "
            f"or unset MLFLOW_TRACKING_URI to record into {DEFAULT_URI} here, or add tracking.enabled=false"
        ) from error


def _import_mlflow() -> None:
    """Imports MLflow without its usage reports, its lines about set-up and addresses, and the warning it causes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _connect(uri: str) -> "MlflowClient":
    """A client that has got one answer within seconds; left to itself MLflow tries for minutes."""
    from mlflow import MlflowClient

    if uri == DEFAULT_URI:  # MLflow keeps a store by its address, which must not depend on the working directory
        uri = f"sqlite:///{Path('mlflow.db').resolve()}"
    if uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        _check_database(uri)
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_FIRST_CALL_S)}
    added = {key: value for key, value in limits.items() if key not in os.environ}
    os.environ.update(added)
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    finally:
        for key in added:
            del os.environ[key]
    return client


def _check_database(uri: str) -> None:
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(url)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """The identifier of an experiment, made when there is none; beside a local database go its artifacts."""
    known = client.get_experiment_by_name(name)
    if known is not None:
        return known.experiment_id
    folder = Path("mlruns").resolve().as_uri() if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=folder)


def _log_parameters(client: "MlflowClient", run_id: str, config: DictConfig) -> None:
    from mlflow.entities import Param

    flat = scalars(OmegaConf.to_container(config, resolve=True))
    params = [Param(key, str(value)) for key, value in flat.items()]
    for i in range(0, len(params), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[i : i + _PARAMS_PER_CALL])


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration -> its scalars under dotted keys; lists stay in the YAML, where they are readable."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | int | float | bool):
            flat[f"{prefix}{key}"] = value
    return flat
