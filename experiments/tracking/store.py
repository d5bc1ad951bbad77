"""Runs in MLflow. This is the only file that imports MLflow, and it does so only when a run starts.

Every run has: resolved configuration, one tag per hook point, git commit with the uncommitted changes, seed, device,
package versions, time, peak memory, load of the machine, and whatever the experiment logs. The store is `mlflow.db`
with the artifacts in `mlruns/`, both in the working directory, unless `MLFLOW_TRACKING_URI` names another.

Everything is written to a journal first (spool.py), and a thread sends it to the store (uploader.py). A store that goes
away neither stops nor slows a run. `experiments.sync` uploads what is missing at the end.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig

from experiments.tracking.recording import TrackingUnavailable, record
from experiments.tracking.run import Run, is_alive, process_tags, scalars
from experiments.tracking.spool import Record
from experiments.tracking.uploader import Point, StoreAway, StoreRefuses

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

__all__ = ["Run", "TrackingUnavailable", "open_store", "read_metrics", "scalars", "store_uri", "track"]

DEFAULT_URI = "sqlite:///mlflow.db"
_FIRST_CALL_S = 5  # seconds after which a server that does not answer counts as unreachable
_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
"""By default MLflow retries for minutes; here the uploader retries. The timeout is long because of large files."""


@contextmanager
def track(
    config: DictConfig, device: torch.device | str = "cpu", run_id: str | None = None, parent: Run | str | None = None
) -> Iterator[Run]:
    """Runs the block as one MLflow run: FINISHED at its end, FAILED (or KILLED, when interrupted) on an exception.

    configs/tracking/default.yaml describes `config.tracking`; the whole of `config` is recorded. With `run_id` an
    earlier run is continued. With `parent` (a run or its identifier) the run is listed below another.

    Raises:
        TrackingUnavailable: the store cannot be reached or written, within seconds and before the block starts.
    """
    if not config.tracking.enabled:
        yield Run()
        return
    store = None if config.tracking.offline else open_store()
    parent_id = parent.run_id if isinstance(parent, Run) else parent
    with record(config, str(device), store, run_id, parent_id or None) as run:
        yield run


def store_uri() -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI`, or the database in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def open_store() -> "MlflowStore":
    """The store at `store_uri()`, after it has answered once.

    Raises:
        TrackingUnavailable: it does not answer within seconds, or cannot be used.
    """
    uri = store_uri()
    _import_mlflow()
    try:
        with _translated():
            return MlflowStore(_connect(uri), uri)
    except (ImportError, StoreAway, StoreRefuses) as error:
        raise TrackingUnavailable(
            f"the tracking store {uri} cannot be used ({_first_line(error)}). Start it, "
            f"or unset MLFLOW_TRACKING_URI to record into {DEFAULT_URI} here, or add tracking.offline=true to upload "
            "later, or tracking.enabled=false"
        ) from error


def read_metrics(run_id: str) -> list[Point] | None:
    """Every point (key, value, milliseconds, step) of every metric of a run, except those of the machine's load.

    None: the store has no such run.

    Raises:
        TrackingUnavailable: the store cannot be reached or read.
    """
    store = open_store()
    try:
        return store.histories(run_id)
    except (StoreAway, StoreRefuses) as error:
        raise TrackingUnavailable(f"run {run_id} cannot be read from {store.uri}: {error}") from error


@dataclass(frozen=True)
class Found:
    """A run in a store."""

    run_id: str
    status: str
    tags: dict[str, str]


class MlflowStore:
    """An MLflow store or server, with the interface `experiments.tracking.uploader.Store`."""

    def __init__(self, client: "MlflowClient", uri: str) -> None:
        self.uri, self._client = uri, client

    def create(self, start: Record, local_id: str | None = None) -> str:
        """Makes a run -> MLflow's identifier. A run that was begun offline gets the tag `spool.id`, to find it by."""
        with _translated():
            tags = self._tags(start) | ({"spool.id": local_id} if local_id else {})
            experiment = self._experiment(start["experiment"])
            created = self._client.create_run(experiment, start["time"], tags, start["run_name"])
            return created.info.run_id

    def find(self, run_id: str) -> str | None:
        with _translated():
            found = self._run(run_id)
            return found and found.info.run_id

    def begin(self, run_id: str, start: Record) -> str:
        from mlflow.entities import Param, RunTag

        with _translated():
            found = self._run(run_id)
            if found is None:
                if start["resumed"]:
                    log.warning("run %s is not in %s: a new run is made there", run_id, self.uri)
                found = self._client.get_run(self.create(start, run_id))
            store_id, known = found.info.run_id, found.data.params
            # A resumed run keeps its first parameters; its configuration has the current ones.
            params = [Param(key, value) for key, value in start["params"].items() if key not in known]
            self._client.log_batch(store_id, (), params, [RunTag(*tag) for tag in self._tags(start).items()])
            if found.info.status != "RUNNING":
                self._client.update_run(store_id, status="RUNNING")
            return store_id

    def log(self, store_id: str, points: list[Point], tags: dict[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        with _translated():
            metrics = [Metric(*point) for point in points]
            self._client.log_batch(store_id, metrics, (), [RunTag(*tag) for tag in tags.items()])

    def upload(self, store_id: str, file: Path, name: str) -> None:
        if not file.exists():
            raise StoreRefuses(f"{file} is gone")
        with _translated():
            self._client.log_artifact(store_id, str(file), name.rpartition("/")[0] or None)

    def end(self, store_id: str, end: Record) -> None:
        with _translated():
            if "process" in end:  # added for a dead process: another one may have resumed the run
                tags = self._client.get_run(store_id).data.tags
                if end["process"].items() - tags.items():
                    return
            self._client.set_terminated(store_id, end["status"], end["time"])

    def points(self, store_id: str, key: str) -> list[Point]:
        with _translated():
            history = self._client.get_metric_history(store_id, key)
            return [(point.key, point.value, point.timestamp, point.step) for point in history]

    def histories(self, run_id: str) -> list[Point] | None:
        with _translated():
            found = self._run(run_id)
            if found is None:
                return None
            keys = [key for key in found.data.metrics if not key.startswith("system/")]
            return [point for key in keys for point in self.points(found.info.run_id, key)]

    def found(self, run_id: str) -> Found | None:
        """A run by its identifier; None: there is no such run."""
        with _translated():
            run = self._run(run_id)
            return None if run is None else _found(run)

    def latest(self, experiment: str, tag: str) -> Found | None:
        """The latest run of an experiment that has the tag."""
        with _translated():
            known = self._client.get_experiment_by_name(experiment)
            if known is None:
                return None
            order = ["attributes.start_time DESC"]
            runs = self._client.search_runs([known.experiment_id], f"tags.`{tag}` != ''", order_by=order)
            return _found(runs[0]) if runs else None

    def children(self, run_id: str) -> list[Found]:
        """The runs below a run, oldest first."""
        with _translated():
            runs = self._search(f"tags.`mlflow.parentRunId` = '{run_id}'")
            return [_found(run) for run in sorted(runs, key=lambda run: run.info.start_time)]

    def artifact(self, run_id: str, name: str, folder: Path) -> Path:
        """Copies an artifact of a run into a folder -> its path there."""
        with _translated():
            return Path(self._client.download_artifacts(run_id, name, str(folder)))

    def sizes(self, store_id: str, folder: str) -> dict[str, int | None]:
        with _translated():
            return {file.path: file.file_size for file in self._client.list_artifacts(store_id, folder or None)}

    def end_orphans(self) -> None:
        """Marks runs as KILLED that dead processes of this user on this machine left RUNNING."""
        mine = process_tags()
        same = " and ".join(f"tags.`{key}` = '{mine[key]}'" for key in ("process.host", "process.user"))
        with _translated():
            for run in self._search(f"attributes.status = 'RUNNING' and {same}"):
                if not is_alive(run.data.tags):
                    log.warning("run %s was killed; it is no longer listed as running", run.info.run_id)
                    self._client.set_terminated(run.info.run_id, "KILLED")

    def _run(self, run_id: str) -> "mlflow.entities.Run | None":
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        found = self._search(f"tags.`spool.id` = '{run_id}'")
        return found[0] if found else None

    def _search(self, condition: str) -> "list[mlflow.entities.Run]":
        experiments = [found.experiment_id for found in self._client.search_experiments()]
        found, token = [], None
        while True:
            page = self._client.search_runs(experiments, condition, page_token=token)
            found += page
            if not (token := page.token):
                return found

    def _tags(self, start: Record) -> dict[str, str]:
        parent = start["parent"]
        if not parent:
            return start["tags"]
        found = self._run(parent)
        return start["tags"] | {"mlflow.parentRunId": found.info.run_id if found else parent}

    def _experiment(self, name: str) -> str:
        """The identifier of an experiment, which is made if missing; its artifacts lie beside a local database."""
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        folder = Path("mlruns").resolve().as_uri() if self.uri.startswith("sqlite:") else None
        try:
            return self._client.create_experiment(name, artifact_location=folder)
        except MlflowException as error:
            known = self._client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or known is None:
                raise
            return known.experiment_id  # another process made it just now


def _found(run: "mlflow.entities.Run") -> Found:
    return Found(run.info.run_id, run.info.status, dict(run.data.tags))


@contextmanager
def _translated() -> Iterator[None]:
    """Turns errors of the layers below into StoreAway (may pass) or StoreRefuses (will not)."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise StoreRefuses(_first_line(error)) from error
        raise StoreAway(_first_line(error)) from error
    except (OSError, SQLAlchemyError) as error:
        if isinstance(error, HTTPError) and error.response.status_code in (400, 413, 422):
            raise StoreRefuses(_first_line(error)) from error
        raise StoreAway(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _import_mlflow() -> None:
    """Imports MLflow without its usage reports, its messages about set-up and addresses, and the warning it causes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for key, value in _LIMITS.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _connect(uri: str) -> "MlflowClient":
    """A client that has had an answer within seconds."""
    from mlflow import MlflowClient

    if uri == DEFAULT_URI:  # MLflow caches a store by its address, which must not depend on the working directory
        uri = f"sqlite:///{Path('mlflow.db').resolve()}"
    if uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        _check_database(uri)
    timeout = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[timeout]
    if before == _LIMITS[timeout]:  # otherwise the user has set how long to wait
        os.environ[timeout] = str(_FIRST_CALL_S)
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    finally:
        os.environ[timeout] = before
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
