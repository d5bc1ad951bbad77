"""Which code a result depends on: a digest that comments, docstrings, reports and new ideas do not change.

What a backbone or a checkpoint is read from counts with the settings that name it; of the weights that come along only
the embedded encoder's have no such name.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType

from core.registry import choices

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("core/**/*.py", "experiments/**/*.py")
_MEASURE_NOTHING = (
    "ablate",
    "arms",
    "arm_cost",
    "benchmark",
    "benchmark_cases",
    "benchmark_report",
    "benchmark_training",
    "checkpoints",
    "code_version",
    "curves",
    "distill",
    "evaluation_report",
    "fidelity",
    "fidelity_pictures",
    "fidelity_report",
    "lock",
    "members",
    "pictures",
    "power",
    "provenance",
    "recording",
    "report",
    "report_figures",
    "report_tables",
    "run",
    "simulation",
    "simulation_report",
    "spool",
    "statistics",
    "sweep_results",
    "sync",
    "tracking",
    "uploader",
    "upsample",
    "verdicts",
)
"""Files of `experiments/` that neither train nor measure: they record, compare, draw, or are other commands."""
_ONLY_MEASURE = ("evaluate", "metrics", "scores", "validation", "peers", "tasks")
"""Files and folders of `experiments/` that trainings do without: a change there asks for no training."""
_PACKAGES = ("torch", "torchvision", "timm", "torchmetrics")


def code_version(fillers: Iterable[tuple[str, str]] = ()) -> str:
    """Digest of the code that trains, with the packages of the given fillers (hook point, name).

    An extension counts only where one of its package's fillers is used, so that a new idea in `extensions/` invalidates
    no result of others.
    """
    digest = hashlib.sha256(_own_code(training=True).encode())
    folders = set()
    for hook, name in fillers:
        filler = choices(hook)[name]
        package = filler.__module__.partition(".")[0]
        if package == "__main__":  # a notebook's cell: there is no file
            digest.update(repr([_meaning_of(value) for value in vars(filler).values()]).encode())
        elif package not in ("core", "experiments"):
            folders.add(package)
    for package in sorted(folders):
        digest.update(_package(package).encode())
    return digest.hexdigest()


def evaluation_version() -> str:
    """Digest of the code that measures, and of all that it measures with."""
    return hashlib.sha256(_own_code(training=False).encode()).hexdigest()


def meaning(source: str) -> str:
    """What of a source file can change what it does: its syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_text(statement)]
    return ast.dump(tree)


@cache
def _own_code(training: bool) -> str:
    left_out = {*_MEASURE_NOTHING, "__init__", *(_ONLY_MEASURE if training else ())}
    known = []
    for path in sorted({path for pattern in _SOURCES for path in ROOT.glob(pattern)}):
        folder, *inside = path.relative_to(ROOT).with_suffix("").parts
        if folder != "experiments" or inside[0] not in left_out:
            known.append(_digest_of(path))
    known += [hashlib.sha256(path.read_bytes()).hexdigest() for path in ROOT.glob("core/weights/embedded.*")]
    return " ".join([*known, *(f"{name}={version(name)}" for name in _PACKAGES)])


@cache
def _package(name: str) -> str:
    """Of all Python files of an installed package, or of the one file it is."""
    import importlib.util

    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return name
    origin = Path(found.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return " ".join(map(_digest_of, files))


def _meaning_of(value: object) -> object:
    """What a function or constant of a class does, as far as its compiled code says it."""
    if isinstance(value, FunctionType):
        return _meaning_of(value.__code__), value.__defaults__, value.__kwdefaults__
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_meaning_of(one) for one in value.co_consts]
    return value if isinstance(value, str | int | float | tuple | bytes) else type(value).__name__


def _digest_of(path: Path) -> str:
    return f"{path.name}:{hashlib.sha256(meaning(path.read_text(encoding='utf-8')).encode()).hexdigest()}"


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
