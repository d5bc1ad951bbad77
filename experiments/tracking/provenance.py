"""What a result was made with: commit, uncommitted changes, packages, machine, memory."""

import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig


@dataclass(frozen=True)
class Origin:
    """What a table was made with. It is stored with the results, so a table that is made again says the same."""

    command: str
    date: str
    commit: str
    """Empty: not known."""
    changed: bool
    """Whether there were uncommitted changes."""
    packages: str
    machine: str = ""
    """As `machine` gives it; empty: not known, or irrelevant."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Name of the data -> fingerprint."""
    notes: tuple[str, ...] = ()
    """Remarks on how it was made that a reader must know."""

    @classmethod
    def of_this_process(
        cls,
        module: str,
        otherwise: str,
        machine: str = "",
        data: Mapping[str, str] | None = None,
        notes: Iterable[str] = (),
    ) -> "Origin":
        """The origin of results made now, by `module` on a command line; `otherwise` names it without one."""
        command = otherwise
        if HydraConfig.initialized():
            called = HydraConfig.get().job.config_name  # one command may call another (fidelity, evaluate)
            module = f"experiments.{called}" if called else module
            command = shlex.join(["python", "-m", module, *HydraConfig.get().overrides.task])
        commit, changes = git_state(Path(__file__))
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "scipy"))
        packages = f"Python {platform.python_version()}, {packages}"
        date = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
        return cls(command, date, commit, bool(changes), packages, machine, dict(data or {}), tuple(notes))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Origin":
        values = json.loads(text)
        return cls(**values | {"notes": tuple(values.get("notes", ()))})

    def header(self, title: str, facts: Iterable[str] = (), level: int = 1) -> str:
        """The beginning of a report in Markdown: title, command, and a list.

        Args:
            facts: the settings (sizes, seeds, confidence), one per line. level: of the heading.
        """
        fingerprints = ", ".join(f"{name} {digest[:12]}" for name, digest in self.data.items())
        lines = [str(self), self.machine, *facts, fingerprints and f"fingerprints: {fingerprints}", self.packages]
        told = "\n".join(f"- {line}" for line in (*lines, *self.notes) if line)
        return f"{'#' * level} {title}\n\n    {self.command}\n\n{told}"

    def __str__(self) -> str:
        changes = " with uncommitted changes" if self.changed else ""
        return f"{self.date}, commit {self.commit[:12] or 'unknown'}{changes}"


def machine(device: torch.device, num_threads: int, arithmetic: str, tf32: bool = False) -> str:
    """Processor or GPU, system, threads, and the arithmetic of the computation (such as float32)."""
    known = [device_name(device), platform.system(), f"{num_threads} CPU thread{'s' * (num_threads > 1)}", arithmetic]
    if device.type == "cuda":
        known += [f"CUDA {torch.version.cuda}", f"TF32 {'on' if tf32 else 'off'}"]
    return ", ".join(known)


def device_name(device: torch.device) -> str:
    """The name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Python, platform, threads, GPU and the version of every installed package."""
    packages = {found.metadata["Name"]: found.version for found in distributions()}
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": dict(sorted(packages.items())),
    }


def git_state(source: Path) -> tuple[str, str]:
    """(commit, uncommitted changes) of the checkout that contains `source`; both empty if there is none.

    New source files count as changes, because an idea often is a new file.
    """
    if not _git(source.parent, "ls-files", "--", source.name):
        return "", ""
    top = Path(_git(source.parent, "rev-parse", "--show-toplevel"))
    new = _git(top, "ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml").splitlines()
    added = [_git(top, "diff", "--no-index", "--", os.devnull, name) for name in new]
    return _git(top, "rev-parse", "HEAD"), "\n".join(filter(None, [_git(top, "diff", "HEAD"), *added]))


def _git(folder: Path, *arguments: str) -> str:
    """The output of git; empty if git is not installed, refuses, or takes too long."""
    try:
        command = ["git", "-C", str(folder), "-c", "core.quotepath=off", *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def peak_memory_mb() -> float:
    """The peak memory of this process so far, in 1e6 bytes. (Linux counts in KiB, macOS in bytes.)"""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 2**10) / 1e6
