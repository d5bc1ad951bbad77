"""Journals and their way to a store: kills in mid-write, full disks, stores that fail at any call."""

import errno
import fcntl
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from experiments import lock
from experiments.lock import Locked, lock_folder, unlock_folder
from experiments.tracking import spool
from experiments.tracking.run import Run, SystemMetrics, is_alive, process_tags
from experiments.tracking.spool import Journal, SpoolError, first_record, folders, is_open
from experiments.tracking.uploader import Drain, StoreAway, StoreRefuses, Uploader

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["experiments.tracking.sync", "mlflow.store.tracking.sqlalchemy_store"]
)  # imported once, not by each

START = {"kind": "start", "time": 1, "experiment": "e", "run_name": None, "parent": None, "resumed": False}
START |= {"tags": process_tags(), "params": {"seed": "0"}}


class MemoryStore:
    """What a store has to do, done in memory; `fails` calls say whether the request, or its answer, gets lost."""

    def __init__(self, fails=lambda: None, refuses=()):
        self.fails, self.refuses = fails, refuses
        self.points, self.tags, self.files, self.begun, self.ends, self.requests = set(), {}, {}, [], [], []

    @contextmanager
    def request(self, what):
        lost = self.fails()
        if lost == "request":
            raise StoreAway("away")
        self.requests.append(what)
        yield
        if lost == "answer":
            raise StoreAway("no answer")

    def find(self, run_id):
        with self.request("find"):
            return run_id if self.begun else None

    def begin(self, run_id, start):
        if "begin" in self.refuses:
            raise StoreRefuses("it has been deleted")
        with self.request("begin"):
            self.begun.append(start)
        return f"at-store-{run_id}"

    def log(self, store_id, points, tags):
        if any(key in self.refuses for key, *_ in points):
            raise StoreRefuses("odd name")
        with self.request("log"):
            self.points |= set(points)
            self.tags |= tags

    def upload(self, store_id, file, name):
        if name in self.refuses:
            raise StoreRefuses("too large")
        assert file.name == name.rpartition("/")[2]
        with self.request("upload"):
            self.files[name] = file.read_bytes()

    def end(self, store_id, end):
        if "end" in self.refuses:
            raise StoreRefuses("it has been deleted")
        with self.request("end"):
            self.ends.append(end)


def open_run(folder, name="a"):
    journal = Journal.open(folder, name)
    return journal, Run(journal, name)


def kinds(journal):
    return [record["kind"] for record, _ in journal.read(0)]


def record_all(run, steps=30):
    """Everything a run can record -> what a store must have of it."""
    run.journal.append(START)
    for step in range(steps):
        run.metrics({"loss": 1 / (1 + step), "a/b": step}, step)
        if step % 7 == 0:
            run.text(f"text {step}", f"texts/{step}.txt")
            run.tag("at", str(step))
    run.picture(Image.new("RGB", (3, 2), "red"), "pictures/red.png")
    run.end("FINISHED")
    return {("loss", 1 / (1 + step), step) for step in range(steps)} | {
        ("a/b", float(step), step) for step in range(steps)
    }


def test_what_is_recorded_can_be_read_again(tmp_path):
    journal, run = open_run(tmp_path)
    (tmp_path / "w.bin").write_bytes(b"123")
    record_all(run, steps=1)
    run.metrics({"nan": math.nan, "inf": math.inf, "exact": 0.1 + 0.2}, step=5)
    run.file(tmp_path / "w.bin", "checkpoint/last.bin")
    run.data("train", "sha")
    records = [record for record, _ in journal.read(0)]
    assert kinds(journal) == ["start", "metrics", "file", "tag", "file", "end", "metrics", "file", "tag"]
    assert math.isnan(records[6]["values"]["nan"])
    assert records[6]["values"]["inf"] == math.inf
    assert records[6]["values"]["exact"] == 0.1 + 0.2
    assert records[6]["step"] == 5
    assert abs(records[6]["time"] / 1000 - time.time()) < 60
    assert records[7]["name"] == "checkpoint/last.bin"
    assert records[7]["bytes"] == 3
    assert (journal.folder / records[7]["copy"]).read_bytes() == b"123"
    assert records[8] == {"kind": "tag", "key": "data.train", "value": "sha"}
    offset = list(journal.read(0))[4][1]
    assert [record for record, _ in journal.read(offset)] == records[5:]
    journal.close()


@pytest.mark.parametrize("tail", [b'{"kind": "metr', b"\0" * 70_000, b'{"kind": "tag", "key": "a", "value": "b"}'])
def test_a_line_cut_short_is_cut_off_and_reported(tmp_path, tail, caplog):
    journal, run = open_run(tmp_path)
    record_all(run, steps=2)
    before = kinds(journal)
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + tail)
    again, run = open_run(tmp_path)
    assert again.cut == tail
    assert "incomplete line" in caplog.text
    assert journal.path.read_bytes() == whole
    run.tag("after", "1")
    assert kinds(again) == [*before, "tag"]
    again.close()


def test_a_journal_is_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal, _ = open_run(Path("spool"))
    with pytest.raises(Locked, match="this process"):
        open_run(tmp_path / "spool")
    assert is_open(Path("spool/a"))
    with spawned(try_to_lock, tmp_path / "spool" / "a") as child:
        child.join()
        assert child.exitcode == 7
    journal.close()
    assert not is_open(Path("spool/a"))
    open_run(Path("spool"))[0].remove()
    assert not list(Path("spool").iterdir())


def test_of_two_threads_that_ask_together_one_gets_the_lock(tmp_path, monkeypatch):
    """The second asks while the first is between asking and having it."""
    lockf, refused = fcntl.lockf, []

    def and_another_asks(*arguments):
        monkeypatch.setattr(lock.fcntl, "lockf", lockf)
        refused.append(in_a_thread(lock_folder, tmp_path))
        return lockf(*arguments)

    monkeypatch.setattr(lock.fcntl, "lockf", and_another_asks)
    held = lock_folder(tmp_path)
    assert isinstance(refused[0], Locked)
    unlock_folder(tmp_path, held)
    unlock_folder(tmp_path, lock_folder(tmp_path))


def test_a_lock_is_nobodys_before_the_former_holder_has_let_go(tmp_path, monkeypatch):
    """Closing any descriptor of the file gives up this process's lock: one that a thread had just got would be gone."""
    close, held, refused = os.close, lock_folder(tmp_path), []

    def and_another_asks(descriptor):
        monkeypatch.setattr(lock.os, "close", close)
        refused.append(in_a_thread(lock_folder, tmp_path))
        close(descriptor)

    monkeypatch.setattr(lock.os, "close", and_another_asks)
    unlock_folder(tmp_path, held)
    assert isinstance(refused[0], Locked)
    unlock_folder(tmp_path, lock_folder(tmp_path))


def in_a_thread(call, *arguments):
    """What it returns or raises."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call, *arguments)
        return answer.exception() or answer.result()


def test_a_folder_that_cannot_be_locked_can_be_later(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        lock_folder(tmp_path / "file" / "a")
    (tmp_path / "file").unlink()
    unlock_folder(tmp_path / "file" / "a", lock_folder(tmp_path / "file" / "a"))


def try_to_lock(folder):
    try:
        lock_folder(folder)
    except Locked:
        raise SystemExit(7) from None


@contextmanager
def spawned(work, *arguments):
    child = CHILDREN.Process(target=work, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()
        child.close()


def hold(folder, ready):
    lock_folder(folder)
    ready.set()
    signal.pause()


def test_a_killed_process_holds_no_lock(tmp_path):
    ready = CHILDREN.Event()
    with spawned(hold, tmp_path, ready) as child:
        assert ready.wait(60)
        with pytest.raises(Locked, match="another process"):
            lock_folder(tmp_path)
        child.kill()
        child.join()
        unlock_folder(tmp_path, lock_folder(tmp_path))


def record_until_killed(folder, said):
    journal, run = open_run(folder)
    journal.append(START)
    for step in range(10**9):
        run.metrics({"loss": step}, step)
        run.text("x" * 1000, f"{step}.txt")
        said.send(step)


def test_killed_at_any_moment_a_run_has_what_it_recorded(tmp_path):
    for trial in range(8):
        hear, said = CHILDREN.Pipe(duplex=False)
        with spawned(record_until_killed, tmp_path / str(trial), said) as child:
            said.close()
            assert hear.poll(60)
            time.sleep(random.random() * 0.1)
            child.kill()
            child.join()
        last = -1
        try:
            while True:
                last = hear.recv()
        except EOFError:
            hear.close()
        journal, _ = open_run(tmp_path / str(trial))
        records = [record for record, _ in journal.read(0)]
        steps = [record["step"] for record in records if record["kind"] == "metrics"]
        assert steps == list(range(len(steps)))
        assert len(steps) > last, "what has returned is kept"
        files = [record for record in records if record["kind"] == "file"]
        assert len(files) > last
        assert all((journal.folder / record["copy"]).stat().st_size == 1000 == record["bytes"] for record in files)
        journal.close()


@contextmanager
def files_no_larger_than(size):
    """The disk is full, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_once_and_nothing_small_is_lost(tmp_path, caplog):
    journal, run = open_run(tmp_path)
    journal.append(START)
    with files_no_larger_than(2000):
        for step in range(100):
            run.metrics({"loss": step}, step)
        run.text("x" * 5000, "large.txt")
        with pytest.raises(SpoolError, match=r"journal\.jsonl cannot be written"):
            journal.append({"kind": "tag", "key": "a", "value": "b"})
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "goes on, but is not recorded completely" in caplog.text
    assert journal.path.stat().st_size <= 2000
    assert journal.path.read_bytes().endswith(b"}\n"), "no half lines"
    run.metrics({"loss": 100}, 100)
    steps = [record["step"] for record, _ in journal.read(0) if record["kind"] == "metrics"]
    assert steps == list(range(101))
    assert "is recorded again" in caplog.text
    assert not list(journal.folder.glob("files/*")), "nothing half is kept"
    journal.close()


def test_a_disk_that_does_not_even_cut_off_half_a_line_stops_nothing(tmp_path, caplog, monkeypatch):
    """The half stays and is read as a broken line; what was recorded is whole behind it."""
    journal, run = open_run(tmp_path)
    journal.append(START)
    write = os.write

    def half(file, line):
        if len(line) < 20:
            raise OSError(errno.EIO, "Input/output error")
        return write(file, line[: len(line) // 2])

    def refuses(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(spool.os, "write", half)
        patch.setattr(spool.os, "ftruncate", refuses)
        run.metrics({"loss": 1.0}, 1)
        run.metrics({"loss": 2.0}, 2)
    assert "goes on, but is not recorded completely" in caplog.text
    run.metrics({"loss": 3.0}, 3)
    records = [record for record, _ in journal.read(0)]
    assert [record["step"] for record in records if record["kind"] == "metrics"] == [1, 2, 3]
    assert {record["kind"] for record in records} == {"start", "broken", "metrics"}
    journal.close()


@pytest.mark.parametrize("call", ["fstat", "write"])
def test_a_disk_that_is_gone_stops_nothing(tmp_path, caplog, monkeypatch, call):
    """A network's disk answers any call with an error."""
    journal, run = open_run(tmp_path)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(spool.os, call, stale)
        run.metrics({"loss": 1.0}, 1)
    assert "Stale file handle" in caplog.text
    run.metrics({"loss": 2.0}, 2)
    assert kinds(journal) == ["metrics", "metrics"]
    journal.close()


def test_a_journal_that_cannot_be_read_now_is_sent_later(tmp_path, monkeypatch):
    journal, run = open_run(tmp_path)
    journal.append(START)
    run.metrics({"loss": 1.0}, 1)
    store = MemoryStore()
    drain = Drain(journal, store)

    def refuses(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuses)
        with pytest.raises(SpoolError, match="cannot be read: Permission denied"):  # which the uploader expects
            drain()
    drain()
    assert len(store.points) == 1
    journal.close()


def test_what_a_full_disk_does_not_take_goes_to_the_store(tmp_path):
    lost = iter([None, None, "request"])  # the start, what the disk took, the first of what it did not
    store = MemoryStore(fails=lambda: next(lost, None))
    journal, run = open_run(tmp_path)
    journal.append(START)
    drain = Drain(journal, store)
    with files_no_larger_than(1000):
        for step in range(50):
            run.metrics({"loss": step}, step)
        run.end("FINISHED")
        with pytest.raises(StoreAway):
            drain()
        drain()
    assert {step for *_, step in store.points} == set(range(50))
    assert drain.ended
    journal.close()


def test_a_deleted_spool_stops_nothing(tmp_path, caplog):
    journal, run = open_run(tmp_path)
    journal.append(START)
    shutil.rmtree(journal.folder)
    run.metrics({"loss": 1.0})
    assert "has been deleted" in caplog.text
    store = MemoryStore()
    journal.put_back([START])
    Drain(journal, store)()
    assert len(store.points) == 1
    journal.remove()


@pytest.mark.parametrize("seed", range(5))
def test_a_store_that_fails_at_any_call_gets_everything_once(tmp_path, seed):
    dice = random.Random(seed)
    store = MemoryStore(fails=lambda: dice.choice(["request", "answer", None, None]))
    journal, run = open_run(tmp_path)
    expected = record_all(run)
    drain = Drain(journal, store, keep_copies=seed % 2 == 0)
    for _ in range(1000):
        if dice.random() < 0.3:  # and the uploading process is killed as well
            journal.close()
            journal, run = open_run(tmp_path)
            drain = Drain(journal, store, keep_copies=seed % 2 == 0)
        try:
            drain()
            break
        except StoreAway:
            pass
    assert {(key, value, step) for key, value, _, step in store.points} == expected
    assert len(store.points) == len(expected)
    assert store.tags == {"at": "28"}
    assert sorted(store.files) == ["pictures/red.png", *(f"texts/{step}.txt" for step in (0, 14, 21, 28, 7))]
    assert store.files["texts/7.txt"] == b"text 7"
    assert store.ends[-1]["status"] == "FINISHED"
    assert bool(list(journal.folder.glob("files/*"))) == (seed % 2 == 0)
    assert not journal.refused()
    journal.close()


def test_many_metrics_are_few_requests(tmp_path):
    journal, run = open_run(tmp_path)
    journal.append(START)
    for step in range(1000):
        run.metrics({"loss": step}, step)
    store = MemoryStore()
    drain = Drain(journal, store)
    drain()
    assert len(store.points) == 1000
    assert store.requests == ["begin", "log", "log", "log"]
    drain()
    assert len(store.requests) == 4, "nothing new, nothing to send"
    journal.close()


def test_another_store_gets_all_of_it(tmp_path):
    journal, run = open_run(tmp_path)
    expected = record_all(run)
    first, second = MemoryStore(), MemoryStore()
    Drain(journal, first, keep_copies=True)()
    run.metrics({"late": 1.0}, 5)
    Drain(journal, second, keep_copies=True)()
    assert {(key, value, step) for key, value, _, step in second.points} == expected | {("late", 1.0, 5)}
    assert second.files == first.files
    journal.close()


def test_what_the_store_refuses_is_put_aside_and_the_rest_goes_on(tmp_path, caplog):
    journal, run = open_run(tmp_path)
    journal.append(START)
    for step in range(4):
        run.metrics({"odd" if step == 2 else "loss": step}, step)
    run.text("large", "large.txt")
    run.text("small", "small.txt")
    with journal.path.open("ab") as file:
        file.write(b"no record\n")
    run.end("FINISHED")
    store = MemoryStore(refuses=("odd", "large.txt"))
    Drain(journal, store)()
    assert {step for *_, step in store.points} == {0, 1, 3}
    assert store.files == {"small.txt": b"small"}
    assert store.ends
    aside = [json.loads(line) for line in (journal.folder / "refused.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in aside] == ["odd name", "too large", "the line is broken"]
    assert aside[0]["record"]["values"] == {"odd": 2.0}
    assert (journal.folder / aside[1]["record"]["copy"]).read_text() == "large"
    assert aside[2]["record"]["line"] == "no record"
    assert caplog.text.count("cannot be uploaded") == 3
    journal.close()


@pytest.mark.parametrize("what", ["begin", "end"])
def test_a_run_deleted_in_the_store_goes_on(tmp_path, what, caplog):
    journal, run = open_run(tmp_path)
    journal.append(START)
    uploader = Uploader(run, MemoryStore(refuses=(what,)), None)
    uploader.start()
    record_all(run)
    while "it has been deleted" not in caplog.text:
        time.sleep(0.05)
    run.metrics({"late": 1.0})
    uploader.finish(patience_s=0.5)
    uploader.join()
    assert uploader.complete == (what == "end")
    assert "late" in journal.path.read_text()
    assert journal.refused() == (what == "end")


def test_odd_names_do_not_stop_a_training(tmp_path):
    journal, run = open_run(tmp_path)
    run.metrics({"α loss (%)": 1.0, "/a//../b": 2.0, "x" * 999: 3.0})
    run.tag("k=v", "\udcff odd byte")
    run.text("\udcff", "../../../out.txt")
    run.text("", "#?%")
    run.file(tmp_path / "missing.bin")
    records = [record for record, _ in journal.read(0)]
    assert list(records[0]["values"]) == ["α loss ___", "a/b", "x" * 250]
    assert records[1]["key"] == "k_v"
    assert records[1]["value"] == "? odd byte"
    assert [record["name"] for record in records[2:]] == ["out.txt", "___"]
    assert not list(tmp_path.rglob("missing.bin*"))
    journal.close()
    run.metrics({"late": 1.0})


def test_runs_are_listed_oldest_first(tmp_path):
    for name, at in (("b", 1), ("a", 2)):
        journal, _ = open_run(tmp_path, name)
        journal.append(START | {"time": at})
        journal.close()
    open_run(tmp_path, "empty")[0].close()
    (tmp_path / ".gone.1.done").mkdir()
    assert [folder.name for folder in folders(tmp_path)] == ["empty", "b", "a"]
    assert first_record(tmp_path / "empty") == {}
    with pytest.raises(SpoolError, match="is not a run's identifier"):
        open_run(tmp_path, "../escape")


@pytest.mark.parametrize("sampled", [True, False])
def test_the_uploader_never_holds_the_run_up(tmp_path, caplog, sampled):
    caplog.set_level(logging.WARNING)
    away = threading.Event()
    away.set()
    store = MemoryStore(fails=lambda: "request" if away.is_set() else None)
    journal, run = open_run(tmp_path)
    journal.append(START)
    uploader = Uploader(run, store, 0.1 if sampled else None)
    uploader.start()
    record_all(run)
    while "goes on without the tracking store" not in caplog.text:
        time.sleep(0.05)
    away.clear()
    uploader.finish(patience_s=60)
    assert uploader.complete
    assert len([point for point in store.points if not point[0].startswith("system/")]) == 60
    assert sampled == any(point[0] == "system/cpu_utilization_percentage" for point in store.points)
    assert not journal.folder.exists()
    assert caplog.text.count("goes on without the tracking store") == 1
    uploader.join()


def test_the_end_waits_only_so_long(tmp_path):
    _, run = open_run(tmp_path)
    uploader = Uploader(run, MemoryStore(fails=lambda: "request"), None)
    uploader.start()
    record_all(run)
    started = time.perf_counter()
    uploader.finish(patience_s=0.5)
    assert time.perf_counter() - started < 20
    uploader.join()
    assert not uploader.complete
    again, _ = open_run(tmp_path)
    assert kinds(again)[-1] == "end"
    again.close()


def test_whether_a_process_lives():
    mine = process_tags()
    assert is_alive(mine)
    assert not is_alive(mine | {"process.started": "1.00"}), "the number was given again"
    assert not is_alive(mine | {"process.pid": str(2**22 + 1)})
    assert not is_alive(mine | {"process.boot": "before"}), "the machine was started again"
    assert is_alive(mine | {"process.boot": "before", "process.host": "other", "process.pid": "1"})
    assert is_alive(mine | {"process.space": "another container", "process.pid": str(2**22 + 1)})


def test_samples_of_the_machine():
    values, seconds = SystemMetrics().sample()
    assert seconds >= 0
    assert values["system/process_memory_usage_megabytes"] > 50
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    assert values["system/cpu_utilization_percentage"] >= 0
