"""What an experiment records. Every call writes to the run's journal and returns; none waits for a server."""

import logging
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from PIL import Image

from experiments.tracking.spool import Journal, SpoolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_KEY_LENGTH = 250  # what MLflow takes


class Run:
    """One run, or, with tracking switched off, a stand-in that records nothing.

    No call raises because of the store, the disk or an unusual name, so that recording never stops a training. What
    cannot be written is reported once.
    """

    def __init__(self, journal: Journal | None = None, run_id: str = "") -> None:
        self.journal = journal
        self.run_id = run_id
        """Names the run in `track(run_id=...)` and, unless it was begun offline, in MLflow; empty when not tracked."""
        self._failing = False

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs scalars of one step."""
        if self.journal is not None:
            named = {clean_key(key): float(value) for key, value in values.items()}
            with self._tolerant(self.journal) as journal:
                journal.append({"kind": "metrics", "time": now_ms(), "step": int(step), "values": named})

    def figure(self, figure: "Figure", name: str) -> None:
        """Keeps a matplotlib figure as the artifact `name`, such as `plots/time.png`."""
        if self.journal is not None:
            with self._tolerant(self.journal) as journal:
                journal.keep(clean_name(name), figure.savefig)

    def picture(self, image: Image.Image, name: str) -> None:
        """Keeps a picture as the artifact `name`, such as `pictures/coffee.png`."""
        if self.journal is not None:
            with self._tolerant(self.journal) as journal:
                journal.keep(clean_name(name), image.save)

    def text(self, content: str, name: str) -> None:
        """Keeps a text (YAML, JSON, a table) as the artifact `name`."""
        if self.journal is not None:
            content = clean_text(content).encode()
            with self._tolerant(self.journal) as journal:
                journal.keep(clean_name(name), lambda path: path.write_bytes(content))

    def file(self, path: Path, name: str | None = None) -> None:
        """Keeps a copy of a file (a checkpoint) as the artifact `name`, such as `pictures/a.png`; its own by default.

        `#`, `?` and `%` become `_`: MLflow would cut the name there on its way to a server.
        """
        if self.journal is not None:
            with self._tolerant(self.journal) as journal:
                journal.keep(clean_name(name or path.name), lambda copy: shutil.copyfile(path, copy))

    def tag(self, key: str, value: str) -> None:
        """Sets a tag, to find the run by."""
        if self.journal is not None:
            with self._tolerant(self.journal) as journal:
                journal.append({"kind": "tag", "key": clean_key(key), "value": clean_text(str(value))})

    def data(self, name: str, fingerprint: str) -> None:
        """Records the fingerprint of the run's data as the tag `data.<name>`, such as `data.train`."""
        self.tag(f"data.{name}", fingerprint)

    def end(self, status: str) -> None:
        """Records how the run ended; `track` calls it."""
        if self.journal is not None:
            with self._tolerant(self.journal) as journal:
                journal.append({"kind": "end", "time": now_ms(), "status": status})

    @contextmanager
    def _tolerant(self, journal: Journal) -> Iterator[Journal]:
        try:
            yield journal
        except SpoolError as error:
            if not self._failing:
                log.error("run %s goes on, but is not recorded completely: %s", self.run_id, error)
            self._failing = True
        else:
            if self._failing:
                log.warning("run %s is recorded again", self.run_id)
            self._failing = False


class SystemMetrics:
    """Load and memory of the machine and of this process, under the names MLflow shows as system metrics."""

    def __init__(self) -> None:
        self._process, self._started = psutil.Process(), time.monotonic()
        psutil.cpu_percent()  # counts from here
        self._process.cpu_percent()

    def sample(self) -> tuple[dict[str, float], int]:
        """(values since the previous sample, seconds since the start)."""
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_cpu_percentage": self._process.cpu_percent(),
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                values |= _gpu(index)
        return {f"system/{key}": value for key, value in values.items()}, int(time.monotonic() - self._started)


def _gpu(index: int) -> dict[str, float]:
    """Memory that this process holds, and the load if nvidia-ml-py is installed; creates no context on the GPU."""
    held = torch.cuda.memory_reserved(index)
    if not held:  # this process does not use it
        return {}
    values = {
        f"gpu_{index}_memory_usage_megabytes": held / 1e6,
        f"gpu_{index}_memory_usage_percentage": 100 * held / torch.cuda.get_device_properties(index).total_memory,
    }
    try:
        from pynvml import NVMLError
    except ModuleNotFoundError:
        return values
    with suppress(NVMLError, RuntimeError):  # not every GPU reports it
        values[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
    return values


def process_tags() -> dict[str, str]:
    """Tags that identify the process that records a run, so that a later process can tell whether it is alive."""
    process = psutil.Process()
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")  # Linux
    return {
        "process.host": f"{platform.node()} {uuid.getnode():012x}",
        "process.boot": boot.read_text().strip() if boot.exists() else "",
        "process.space": str(space.stat().st_ino) if space.exists() else "",
        "process.user": process.username(),
        "process.pid": str(process.pid),
        "process.started": f"{process.create_time():.2f}",
    }


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of `process_tags` still runs; true if that cannot be known, as in another container."""
    mine = process_tags()
    if tags["process.host"] != mine["process.host"]:
        return True
    if tags["process.boot"] != mine["process.boot"]:
        return False
    if tags["process.space"] != mine["process.space"]:
        return True
    try:
        process = psutil.Process(int(tags["process.pid"]))
        same = abs(process.create_time() - float(tags["process.started"])) < 2  # otherwise the number was reused
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def clean_key(key: str) -> str:
    """The name of a metric, tag or parameter, with `_` for characters that the store refuses."""
    return clean_name(key, r"[^\w.\- :/]")[:_KEY_LENGTH]


def clean_name(name: str, forbidden: str = "[#?%]") -> str:
    """`name` with `_` for what matches `forbidden`, and without empty, `.` or `..` steps.

    The default are the characters at which a server would cut off an artifact's name.
    """
    steps = re.sub(forbidden, "_", clean_text(name)).split("/")
    return "/".join(step for step in steps if step not in ("", ".", "..")) or "unnamed"


def clean_text(text: str) -> str:
    """`text` with `?` for what UTF-8 cannot hold, such as invalid bytes of a file name."""
    return text.encode("utf-8", "replace").decode()


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration -> its scalars under dotted keys, without lists, which are readable in the YAML."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | int | float | bool):
            flat[f"{prefix}{key}"] = value
    return flat
