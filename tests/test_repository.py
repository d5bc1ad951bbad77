"""Files about the project: citation, container, hooks before a commit, type information, the gallery."""

import json
import re
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT
from PIL import Image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("anyup_lab", "core", "extensions", "experiments")


def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def schema() -> jsonschema.Draft7Validator:
    """Of the Citation File Format 1.2.0 (Druskat et al., CC-BY-4.0). Its reader cffconvert needs an old jsonschema."""
    return jsonschema.Draft7Validator(json.loads((ROOT / "tests/citation_schema.json").read_text()))


def test_the_citation_is_valid():
    assert not [error.message for error in schema().iter_errors(citation())]


@pytest.mark.parametrize("lost", ["title", "authors", "cff-version", "message"])
def test_a_citation_without_a_required_key_is_not(lost):
    kept = {key: value for key, value in citation().items() if key != lost}
    assert [error for error in schema().iter_errors(kept) if lost in error.message]


def test_the_citation_names_this_version_licence_and_paper():
    ours = citation()
    assert (ours["version"], ours["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    assert "arXiv.2510.12764" in json.dumps(ours["references"])


def test_changes_are_listed_newest_first():
    days = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(days) >= 5
    assert days == sorted(days, key=date.fromisoformat, reverse=True)


def test_the_container_copies_files_that_exist_and_uses_the_same_uv():
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {*PACKAGES, "configs", "pyproject.toml"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert not set(copied) & set((ROOT / ".dockerignore").read_text().split())
    assert (
        re.search(r"UV_VERSION=(\S+)", text)[1] == re.search(r"UV_VERSION := (\S+)", (ROOT / "Makefile").read_text())[1]
    )
    (extras,) = re.findall(r'"\.\[(.*)\]"', text)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert "://" not in text


def test_packages_say_that_they_have_types():
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").read_text() == ""


# Hooks before a commit


def hooks() -> dict[str, dict]:
    found = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return {hook["id"]: hook for repository in found for hook in repository["hooks"]}


def run(hook: str, *files: Path) -> subprocess.CompletedProcess:
    program, *arguments = hooks()[hook]["entry"].removeprefix(".venv/bin/").split()
    command = [str(Path(sys.executable).with_name(program)), *arguments, *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_no_notebook_of_the_repository_has_outputs():
    done = run("notebooks-without-outputs", *sorted((ROOT / "notebooks").glob("*.ipynb")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_notebook_with_outputs_is_refused(tmp_path):
    from nbformat import v4, write

    cell = v4.new_code_cell("1 + 1", outputs=[v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1)])
    write(v4.new_notebook(cells=[cell]), tmp_path / "shown.ipynb")
    assert run("notebooks-without-outputs", tmp_path / "shown.ipynb").returncode == 1


@pytest.mark.parametrize("hook", ["ruff-check", "ruff-format"])
def test_code_is_put_in_order(tmp_path, hook):
    file = tmp_path / "unsorted.py"
    file.write_text("import sys\nimport os\nprint( os, sys )\n")
    assert run(hook, file).returncode == 0
    assert file.read_text() != "import sys\nimport os\nprint( os, sys )\n"


# The gallery


def pictures() -> list[Path]:
    return sorted((ROOT / "docs/gallery").rglob("*"))


def test_the_gallery_is_small_and_shown_and_made_by_a_command():
    files = [path for path in pictures() if path.is_file()]
    shown = (ROOT / "README.md").read_text() + (ROOT / "docs/index.md").read_text()
    recipe = re.search(r"^gallery: setup.*?\n\n", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert sum(path.stat().st_size for path in files) < 1.5 * 2**20
    for path in files:
        assert path.relative_to(ROOT / "docs").as_posix() in shown
        assert f"out_dir={path.parent.relative_to(ROOT).as_posix()}" in recipe
        assert path.stem in recipe
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 700 <= picture.width <= 1400  # legible where a page is 900 pixels wide
