"""What docs/ says of the files, and the form of the tables that commands wrote there."""

import inspect
import re

import pytest
from conftest import ROOT

from experiments.measuring.task import tasks
from experiments.reports.markdown import Table

GENERATED = sorted(
    path.name for path in (ROOT / "docs").glob("*.md") if "\n\n    python -m experiments." in path.read_text()[:300]
)
"""Their first paragraph is the command that wrote them."""


def split(line):
    """Cells of a line of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def tables(text):
    return [found.group() for found in re.finditer(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)]


def test_to_change_something_three_files_are_enough_and_they_exist():
    (table,) = tables((ROOT / "docs/architecture.md").read_text())
    head, _, *rows = map(split, table.splitlines())
    assert head == ["to change", "read these files"]
    assert len(rows) >= 9
    for what, files in rows:
        named = re.findall(r"`([^`]+)`", files)
        assert 1 <= len(named) <= 3, what
        for name in named:
            assert (ROOT / name).is_file(), f"{what}: {name}"


def test_every_file_that_the_architecture_names_exists():
    text = (ROOT / "docs/architecture.md").read_text()
    for name in re.findall(r"`((?:core|extensions|experiments|configs|docs|tests)/[^` ]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", GENERATED)
def test_tables_that_commands_wrote_are_written_the_same_today(name):
    found = tables((ROOT / "docs" / name).read_text())
    assert found
    for text in found:
        columns, rule, *rows = map(split, text.splitlines())
        left = [column for column, side in zip(columns, rule, strict=True) if side == "---"]
        rows = [[cell.replace("\\|", "|") for cell in row] for row in rows]
        assert Table(columns, rows, left=left).markdown() == text.rstrip("\n")


def test_there_are_tables_that_commands_wrote():
    assert {"num_basis.md", "benchmark_cpu.md", "benchmark_training.md", "power.md"} <= set(GENERATED)


def test_the_protocols_name_the_defaults_of_the_tasks():
    first, *_ = tables((ROOT / "docs/protocols.md").read_text())
    rows = [split(line) for line in first.splitlines()[2:]]
    assert {name.strip("`") for name, *_ in rows} <= set(tasks())
    for name, _, defaults in rows:
        known = inspect.signature(tasks()[name.strip("`")]).parameters
        for setting in defaults.strip("`").split():
            key, _, value = setting.partition("=")
            assert str(known[key].default) == str(type(known[key].default)(value)), f"{name}: {setting}"
