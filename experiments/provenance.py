"""What a result came from: commit, uncommitted changes, packages, machine, memory."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch


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
    """(commit, what differs from it) of the checkout that `source` belongs to; both empty when it is in none.

    New source files count as differences: an idea often is one.
    """
    if not _git(source.parent, "ls-files", "--", source.name):
        return "", ""
    top = Path(_git(source.parent, "rev-parse", "--show-toplevel"))
    new = _git(top, "ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml").splitlines()
    added = [_git(top, "diff", "--no-index", "--", os.devnull, name) for name in new]
    return _git(top, "rev-parse", "HEAD"), "\n".join(filter(None, [_git(top, "diff", "HEAD"), *added]))


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; nothing where it is not installed, refuses, or takes too long."""
    try:
        command = ["git", "-C", str(folder), "-c", "core.quotepath=off", *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def peak_memory_mb() -> float:
    """The most this process has held so far; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
