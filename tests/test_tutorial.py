"""docs/tutorial.md, executed as it stands in a copy of the repository: files are written, commands and Python run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

PAGE = ROOT / "docs/tutorial.md"
COPIED = ("anyup_lab", "configs", "core", "experiments", "extensions", "pyproject.toml", "tests")


class Block(NamedTuple):
    language: str
    file: str
    """Where the block belongs; empty: it is run."""
    text: str


def blocks() -> list[Block]:
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def follow(block: Block, folder: Path) -> str:
    """Does what a reader does with the block, and returns what it prints."""
    if block.file:
        (folder / block.file).write_text(block.text)
        return ""
    shell = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [*shell, block.text], cwd=folder, env=env | {"PATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_an_idea_in_30_minutes(folder):
    printed = [follow(block, folder) for block in blocks()]
    assert (folder / "outputs/upsample/coffee.png").read_bytes().startswith(b"\x89PNG")
    contract, _, sweep, table, power = printed[-5:]
    assert re.search(r"[1-9]\d* passed", contract)
    assert "not shown" in sweep or "helps" in sweep or "hurts" in sweep
    assert "fidelity/2x" in table
    assert "images" in power


def test_the_page_leaves_nothing_out():
    """Every block is one that the test follows: none has another language, and none is indented."""
    assert len(blocks()) * 2 == len(re.findall(r"^ *```", PAGE.read_text(), re.MULTILINE))
    assert {block.language for block in blocks() if not block.file} == {"bash", "python"}
    assert len(blocks()) >= 8
