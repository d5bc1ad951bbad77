"""The documentation: it builds without warnings, its links lead somewhere, and what it names exists."""

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES]
NAMES = [path.relative_to(ROOT).as_posix() for path in TEXTS]
SOURCES = ("anyup_lab", "core", "extensions", "experiments", "hubconf.py")


def build(folder):
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages, and what the build said."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("docs", "core", "extensions"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    done = build(folder)
    return folder / "site", done.returncode, done.stdout + done.stderr


def test_the_documentation_builds_without_a_warning(site):
    _, code, said = site
    assert code == 0, said
    assert "No issues found" in said
    assert not re.search("warning|griffe", said, re.IGNORECASE), said


def test_every_page_is_built_and_can_be_searched(site):
    folder, _, _ = site
    assert {path.stem for path in PAGES} <= {path.stem for path in folder.glob("*.html")}
    found = json.loads((folder / "search.json").read_text())["items"]
    assert any("PyramidWindowAttention" in item["location"] for item in found)


def test_the_reference_shows_every_hook_point_and_every_filler(site):
    from core import hooks, registry

    folder, _, _ = site
    contract, fillers = ((folder / name).read_text() for name in ("hooks.html", "fillers.html"))
    shown = 0
    for hook in ("Unifier", "Attention", "Decoder", "Refiner", "Temporal", "Objective", "Learner"):
        assert f'id="core.hooks.{hook}.forward"' in contract
        group = next(group for group in registry._groups if group.base is getattr(hooks, hook))
        for filler in group.known.values():
            if filler.__module__.startswith(("core.", "extensions.")):  # and not a test's
                assert f'id="{filler.__module__}.{filler.__qualname__}"' in fillers, filler
                shown += 1
    assert shown >= 20


def test_nothing_is_loaded_from_other_hosts(site):
    folder, _, _ = site
    for page in folder.glob("*.html"):
        loaded = re.findall(r'<(?:script[^>]*\ssrc|img[^>]*\ssrc|link[^>]*\shref)="?([^">\s]+)', page.read_text())
        assert loaded
        assert not [address for address in loaded if address.startswith(("http", "//"))], page.name


@pytest.mark.parametrize("link", ["nowhere.md", "#nowhere", "../README.md"])
def test_a_dead_link_breaks_the_build(tmp_path, link):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Start\n\n[lost]({link})\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: a test\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "does not exist" in done.stdout + done.stderr


def test_every_page_can_be_reached_from_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    seen, waiting = set(), re.findall(r"[\w-]+\.md", json.dumps(nav))
    assert len(waiting) == len(set(waiting)), "a page is in the navigation twice"
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / name).read_text())
    assert {page.name for page in PAGES} == seen


def prose(text):
    """Text without blocks of code."""
    return re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_a_file_and_a_heading(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_text_names_exist(name):
    text = (ROOT / name).read_text()
    inside = "anyup_lab|core|extensions|experiments|configs|docs|tests|notebooks"
    for file in re.findall(rf"`((?:{inside})/[\w./-]*)`", text):
        assert (ROOT / file).exists(), f"{name} names {file}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_recipes_that_a_text_names_exist(name):
    text = (ROOT / name).read_text()
    for command in re.findall(r"python -m experiments\.([a-z_]+)", text):
        assert (ROOT / "experiments" / f"{command}.py").is_file(), f"{name}: experiments.{command}"
    made = set(re.findall(r'title="configs/experiment/(\w+)\.yaml"', text))  # by the reader of the page
    for recipe in set(re.findall(r"experiment=([a-z_]+(?:/[a-z_]+)?)", text)) - made:
        assert (ROOT / "configs/experiment" / f"{recipe}.yaml").is_file(), f"{name}: experiment={recipe}"
    for target in re.findall(r"\bmake ([a-z-]+)`|^make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{''.join(target)}: " in (ROOT / "Makefile").read_text(), f"{name}: make {''.join(target)}"


# Troubleshooting


@cache
def messages() -> str:
    """All strings of the code, one after the other; what an f-string inserts is written `...`."""
    trees = [ast.parse(path.read_text()) for name in SOURCES for path in files(ROOT / name)]
    return "\n".join(text for tree in trees for node in ast.walk(tree) if (text := literal(node)))


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def literal(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def quoted():
    return re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", quoted())
def test_the_code_still_gives_the_messages_that_are_explained(message):
    parts = [re.escape(part) for part in message.split("...")]
    assert max(map(len, parts)) > 12, "too little of the message is quoted to find it again"
    assert re.search("[^\n]*?".join(parts), messages()), message


def test_many_messages_are_explained():
    assert len(quoted()) >= 30
