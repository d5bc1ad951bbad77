"""The life of a run: what is recorded at its start and end, for any store."""

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig, OmegaConf

from core.hooks import HOOK_POINTS
from experiments.errors import Told
from experiments.tracking.provenance import environment, git_state, peak_memory_mb
from experiments.tracking.run import Run, clean_key, clean_text, now_ms, process_tags, scalars
from experiments.tracking.spool import Journal, Record, folders, is_open
from experiments.tracking.uploader import Store, StoreAway, StoreRefuses, Uploader

log = logging.getLogger(__name__)


class TrackingUnavailable(Told, RuntimeError):
    """The tracking store or the spool cannot be used; raised before anything is computed."""


class LiveStore(Store, Protocol):
    """A store in which runs can be begun."""

    def create(self, start: Record) -> str:
        """Makes a run -> its identifier."""

    def end_orphans(self) -> None:
        """Marks runs as KILLED that dead processes of this user on this machine left RUNNING."""


@contextmanager
def record(
    config: DictConfig, device: str, store: LiveStore | None, run_id: str | None, parent: str | None
) -> Iterator[Run]:
    """Records the block; see `experiments.tracking.store.track`. Without a store, everything stays in the spool.

    Raises:
        TrackingUnavailable: the store or the spool cannot be used; raised before the block starts.
    """
    started = time.perf_counter()
    run = _begin(config, device, store, run_id, parent)
    uploader = Uploader(run, store, config.tracking.system_metrics_s)
    uploader.start()
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
        used = {"time_s": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
        if torch.cuda.is_available():
            used["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
        run.metrics(used)
        run.end(status)
        uploader.finish(config.tracking.patience_s)
        if not uploader.complete:
            log.warning("run %s is kept in %s; upload it with: %s", run.run_id, run.journal.folder, _sync(config))


def _begin(config: DictConfig, device: str, store: LiveStore | None, run_id: str | None, parent: str | None) -> Run:
    commit, changes = git_state(Path(__file__))
    tags = {f"hook.{hook}": config[hook].name for hook in HOOK_POINTS if hook in config} | process_tags()
    tags |= {"device": device, "git.commit": commit or "none", "git.dirty": "yes" if changes else "no"}
    flat = scalars(OmegaConf.to_container(config, resolve=True))
    start = {
        "kind": "start",
        "time": now_ms(),
        "experiment": config.tracking.experiment,
        "run_name": config.tracking.run_name,
        "parent": parent,
        "resumed": run_id is not None,
        "tags": tags,
        "params": {clean_key(key): clean_text(str(value)) for key, value in flat.items()},
    }
    texts = {
        "config.yaml": OmegaConf.to_yaml(config, resolve=True),
        "environment.json": json.dumps(environment(), indent=1),
    }
    if changes:
        texts["uncommitted.diff"] = changes
    run = _open(config, start, store, run_id)
    folder = f"run/resumed_{time.strftime('%Y%m%d_%H%M%S', time.gmtime(start['time'] / 1000))}" if run_id else "run"
    for name, text in texts.items():
        run.text(text, f"{folder}/{name}")
    return run


def _open(config: DictConfig, start: Record, store: LiveStore | None, run_id: str | None) -> Run:
    """Makes the run in the store, if there is one, and opens its journal."""
    spool = Path(config.tracking.spool_dir)
    if store is not None:
        try:
            store.end_orphans()
            run_id = run_id or store.create(start)
        except (StoreAway, StoreRefuses) as error:
            raise TrackingUnavailable(
                f"no run can be started in the tracking store: {error}. Add tracking.offline=true to upload it "
                "later, or tracking.enabled=false"
            ) from error
        waiting = [folder for folder in folders(spool) if folder.name != run_id and not is_open(folder)]
        if waiting:
            log.warning("%d earlier runs wait in %s; upload them with: %s", len(waiting), spool, _sync(config))
    run_id = run_id or uuid.uuid4().hex
    try:
        journal = Journal.open(spool, run_id)
        journal.append(start)
    except OSError as error:
        if store is not None and not start["resumed"]:
            with suppress(StoreAway, StoreRefuses):
                store.end(run_id, {"status": "FAILED", "time": now_ms()})
        raise TrackingUnavailable(f"{error}. Change tracking.spool_dir, or add tracking.enabled=false") from error
    return Run(journal, run_id)


def _sync(config: DictConfig) -> str:
    spool = config.tracking.spool_dir
    return "python -m experiments.sync" + (f" spool_dir={spool}" if spool != "outputs/spool" else "")
