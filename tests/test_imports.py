"""Which module imports which: no circles, and one way through the rooms. Read from the source, nothing is imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

TO_BE_CUT: dict[tuple[str, str], str] = {}
"""Imports that are still there and against the rules below: to be cut. Add none; take out each that is gone."""

FOR_ALL = ("settings", "atomic", "lock", "errors", "progress", "schedule", "help")
"""Files of experiments/ that every room may import."""
MAY_IMPORT = {
    "data": set(),
    "tracking": {"data"},
    "statistics": {"data"},
    "cost": {"peers", "data"},
    "peers": {"data"},
    "measuring": {"peers", "cost", "statistics", "tracking", "data", "reports"},
    "adaptation": {"measuring", "statistics", "tracking", "data", "reports"},
    "training": {"measuring", "peers", "cost", "statistics", "tracking", "data", "reports"},
    "upsampling": {"measuring", "tracking", "data", "reports"},
    "api": {"sweeps", "training", "measuring", "peers", "statistics", "tracking", "data", "reports"},
    "page": {"upsampling", "data", "reports"},
    "sweeps": {"training", "measuring", "peers", "cost", "statistics", "tracking", "data", "reports"},
    "reports": {"measuring", "cost", "statistics", "tracking", "data"},
}
"""Room -> rooms that it may import. A file in none, a command, may import them all, and no room may import it."""


@dataclass(frozen=True)
class Import:
    """One name that one module imports."""

    module: str
    target: str
    """A module of ours, or what is imported from elsewhere."""
    late: bool
    """Inside a function: not when the module is imported."""


@cache
def sources() -> dict[str, str]:
    """Module -> its source."""
    found = {}
    for package in ("core", "extensions", "experiments"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = file.read_text(encoding="utf-8")
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module, source in sources().items() for found in read(module, source))


def read(module: str, source: str) -> Iterator[Import]:
    """What a module imports, anywhere in it; a loop over the files of its package imports them all."""
    tree = ast.parse(source)
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write the whole name in place of a relative import"
            targets = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in sources() else node.module
                for alias in node.names
            ]
        elif isinstance(node, ast.Attribute) and node.attr == "iter_modules":
            targets = [name for name in sources() if name.rpartition(".")[0] == module]
        else:
            continue
        yield from (Import(module, target, node in late) for target in targets if target != module)


def ours() -> list[Import]:
    return [found for found in imports() if found.target in sources()]


def is_kept(found: Import) -> bool:
    return (found.module, found.target) not in TO_BE_CUT


def circle(edges: list[Import]) -> list[str]:
    """Modules that import each other in a round; none: empty."""
    graph: dict[str, set[str]] = {}
    for found in edges:
        graph.setdefault(found.module, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room(module: str) -> str:
    """Of a module of experiments/: `data`, ...; a file in none: its own name."""
    return module.split(".")[1]


def idea(module: str) -> str | None:
    """Of a module of extensions/: the file or folder of its idea."""
    return module.split(".")[1] if module.startswith("extensions.") else None


def listed(found: list[Import]) -> list[str]:
    return sorted({f"{one.module} imports {one.target}" for one in found})


def test_no_circles():
    assert circle([found for found in ours() if is_kept(found)]) == []


def test_a_circle_is_seen():
    assert circle([Import("a", "b", False), Import("b", "c", True), Import("c", "a", False)])
    assert not circle([Import("a", "b", False), Import("b", "c", True), Import("a", "c", False)])
    inside = "def f():\n    from core.anyup import AnyUp\nif TYPE_CHECKING:\n    import core.compose\n"
    assert set(read("core.x", inside)) == {
        Import("core.x", "core.anyup", late=True),
        Import("core.x", "core.compose", late=False),
    }
    loop = read("extensions", "for m in pkgutil.iter_modules(__path__): importlib.import_module(m)")
    assert "extensions.inr" in {found.target for found in loop}


def test_core_imports_nothing_of_the_others_and_extensions_only_core():
    wrong = [
        found
        for found in imports()
        if (found.module.startswith("core") and found.target.split(".")[0] in ("extensions", "experiments"))
        or (found.module.startswith("extensions.") and found.target.split(".")[0] in ("extensions", "experiments"))
    ]
    wrong = [found for found in wrong if idea(found.module) is None or idea(found.module) != idea(found.target)]
    assert listed(wrong) == []


@pytest.mark.parametrize("package", ["core", "extensions"])
def test_heavy_packages_are_imported_where_they_are_used(package):
    """Hydra too, but for the one file that registers choices with it."""
    wrong = [
        found
        for found in imports()
        if found.module.split(".")[0] == package
        and not found.late
        and found.target.split(".")[0] in ("diffusers", "learn2learn", "mlflow", "hydra")
        and (found.module, found.target) != ("core.registry", "hydra.core.config_store")
    ]
    assert listed(wrong) == []


def test_rooms_import_one_way():
    wrong = []
    for found in ours():
        if not (found.module.startswith("experiments.") and found.target.startswith("experiments.")):
            continue
        source, target = room(found.module), room(found.target)
        if source in FOR_ALL:
            allowed = target in FOR_ALL
        else:
            allowed = source == target or target in FOR_ALL or target in MAY_IMPORT.get(source, MAY_IMPORT)
            allowed = allowed or (source not in MAY_IMPORT and target not in MAY_IMPORT)  # commands share a shell
        if not allowed and is_kept(found):
            wrong.append(found)
    assert listed(wrong) == []


def test_every_room_has_its_place():
    rooms = {name.split(".")[1] for name in sources() if name.startswith("experiments.") and name.count(".") > 1}
    assert rooms == set(MAY_IMPORT)


def test_only_tracking_imports_mlflow():
    users = {found.module for found in imports() if found.target.split(".")[0] == "mlflow"}
    assert users
    assert all(user.startswith("experiments.tracking.") for user in users), sorted(users)


def test_what_is_to_be_cut_is_still_there():
    there = {(found.module, found.target) for found in ours()}
    gone = [" -> ".join(pair) for pair in TO_BE_CUT if pair not in there]
    assert gone == [], "these are cut: take them out of TO_BE_CUT"
