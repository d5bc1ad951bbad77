"""Uploads what runs have left in the spool: `python -m experiments.sync [spool_dir=...]`.

Settings: configs/sync.yaml. Exit code: 0: everything is uploaded, or there was nothing; 1: something stays in the
spool; 2: the store cannot be reached. A journal is compared with the store, and deleted only if nothing is missing
there. Killed at any moment, the command can be run again: nothing is uploaded twice.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.lock import Locked
from experiments.settings import SettingError
from experiments.tracking.spool import Journal, Record, SpoolError, first_record, folders
from experiments.tracking.store import open_store, store_uri
from experiments.tracking.uploader import Drain, Point, Store, StoreAway, StoreRefuses

log = logging.getLogger(__name__)

DEFAULT_SPOOL = "outputs/spool"
"""The default in configs/sync.yaml. It may be missing: no run has been tracked yet."""
_LARGEST = sys.float_info.max  # stands for infinity in a database


@dataclass
class Outcome:
    """What became of one run of the spool."""

    run_id: str
    store_id: str | None = None
    status: str = ""
    """How the run ended."""
    records: int = 0
    broken: bool = False
    """Whether the last line was incomplete, because the process was killed while it wrote."""
    left: str = ""
    """Why the run stays in the spool; empty when it is uploaded and deleted there."""


def sync(spool_dir: Path) -> list[Outcome]:
    """Uploads all runs of a spool, oldest first.

    Raises:
        TrackingUnavailable: the store cannot be reached; nothing has happened.
    """
    waiting = folders(spool_dir)
    if not waiting:
        return []
    store, outcomes = open_store(), {}
    for folder in waiting:
        parent = outcomes.get(first_record(folder).get("parent"))
        if parent is not None and parent.store_id is None:
            outcome = Outcome(folder.name, left=f"its parent {parent.run_id} has to be uploaded first")
        else:
            outcome = sync_run(spool_dir, folder.name, store)
        outcomes[folder.name] = outcome
    return list(outcomes.values())


def sync_run(spool_dir: Path, run_id: str, store: Store) -> Outcome:
    """Uploads one run, compares it with the store, and deletes it from the spool."""
    outcome = Outcome(run_id)
    try:
        journal = Journal.open(spool_dir, run_id)
    except Locked:
        outcome.left = "it is still being recorded"
        return outcome
    except SpoolError as error:
        outcome.left = str(error)
        return outcome
    outcome.broken = bool(journal.cut)
    drain = Drain(journal, store, keep_copies=True)
    try:
        conclude(journal)
        drain()
        if refused := journal.refused():
            outcome.left = f"the store refuses {refused} records; they are in {journal.folder}/refused.jsonl"
        elif lacking := missing(journal, drain.store_id, store):
            outcome.left = "; ".join(lacking)
            journal.advance(0, "")  # the next time all of it is sent again
    except (StoreAway, StoreRefuses, SpoolError) as error:
        outcome.left = str(error)
    records = [record for record, _ in journal.read(0)]
    outcome.store_id, outcome.records = drain.store_id, len(records)
    outcome.status = next((record["status"] for record in reversed(records) if record["kind"] == "end"), "")
    if outcome.left:
        journal.close()
    else:
        journal.remove()
    return outcome


def conclude(journal: Journal) -> None:
    """Ends the journal of a killed run: KILLED, at the time of its last record."""
    start: Record = {}
    last, ended = 0, True
    for record, _ in journal.read(0):
        last = max(last, record.get("time", 0))
        if record["kind"] == "start":
            start, ended = record, False
        elif record["kind"] == "end":
            ended = True
    if not ended:
        process = {key: value for key, value in start["tags"].items() if key.startswith("process.")}
        journal.append({"kind": "end", "time": last, "status": "KILLED", "process": process})


def missing(journal: Journal, store_id: str | None, store: Store) -> list[str]:
    """What the journal has and the store lacks, in words."""
    points: dict[str, set[tuple[str, int, int]]] = {}
    files: dict[str, int] = {}
    for record, _ in journal.read(0):
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                points.setdefault(key, set()).add(_comparable((key, value, record["time"], record["step"])))
        elif record["kind"] == "file":
            files[record["name"]] = record["bytes"]
    if store_id is None:
        return ["the store does not have the run"] if points or files else []
    lacking = []
    for key, expected in points.items():
        absent = expected - {_comparable(point) for point in store.points(store_id, key)}
        if absent:
            lacking.append(f"{len(absent)} of {len(expected)} points of {key} are missing in the store")
    there: dict[str, int | None] = {}
    for folder in {name.rpartition("/")[0] for name in files}:
        there |= store.sizes(store_id, folder)
    return lacking + [f"{name} is missing in the store" for name, size in files.items() if there.get(name) != size]


def _comparable(point: Point) -> tuple[str, int, int]:
    _, value, at, step = point
    return repr(value if value != value else max(-_LARGEST, min(_LARGEST, float(value)))), at, step


def _report(outcomes: list[Outcome], console: Console) -> None:
    done = [outcome for outcome in outcomes if not outcome.left]
    for outcome in outcomes:
        name = f"{outcome.run_id} ({outcome.status or 'no end'}, {outcome.records} records)"
        console.print(f"{name}: {outcome.left or f'uploaded as {outcome.store_id}'}", soft_wrap=True, markup=False)
        if outcome.broken:
            console.print(
                "  the last line of its journal is incomplete, because it was killed, and is left out", soft_wrap=True
            )
    console.print(f"{len(done)} of {len(outcomes)} runs uploaded to {store_uri()}.", soft_wrap=True, markup=False)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `sync`."""
    folder = Path(config.spool_dir).expanduser()
    if not folder.is_dir() and config.spool_dir != DEFAULT_SPOOL:
        raise SettingError(f"spool_dir={folder}: there is no such folder, so no run has left anything there")
    outcomes = sync(folder)
    if outcomes:
        _report(outcomes, Console())
    else:
        Console().print(f"Nothing to upload in {config.spool_dir}.", highlight=False)
    return int(any(outcome.left for outcome in outcomes))


if __name__ == "__main__":
    main()
