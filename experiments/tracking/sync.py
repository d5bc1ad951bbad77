"""Uploads what runs have left in the spool, compares it with the journal, and deletes that.

Killed at any moment, it can be run again: nothing is uploaded twice.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.lock import Locked
from experiments.tracking.spool import Journal, Record, SpoolError, first_record, folders
from experiments.tracking.store import open_store
from experiments.tracking.uploader import Drain, Point, Store, StoreAway, StoreRefuses

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
    """Whether the last line was cut short, by a kill in the middle of it."""
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
    """Uploads one run, compares, and deletes it from the spool."""
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
            outcome.left = f"the store does not take {refused} records, which are in {journal.folder}/refused.jsonl"
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
    """Gives the journal of a killed run its end: KILLED, at the time of the last record."""
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
    """What the journal has and the store has not, in words."""
    points: dict[str, set[tuple[str, int, int]]] = {}
    files: dict[str, int] = {}
    for record, _ in journal.read(0):
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                points.setdefault(key, set()).add(_comparable((key, value, record["time"], record["step"])))
        elif record["kind"] == "file":
            files[record["name"]] = record["bytes"]
    if store_id is None:
        return ["the store does not know the run"] if points or files else []
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
