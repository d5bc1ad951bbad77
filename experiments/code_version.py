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

    An extension counts only where it is used, with what it imports of its own package, so that a new idea in
    `extensions/` invalidates no result of others.
    """
    digest = hashlib.sha256(_own_code(training=True).encode())
    modules = set()
    for hook, name in fillers:
        filler = choices(hook)[name]
        package = filler.__module__.partition(".")[0]
        if package == "__main__":  # a notebook's cell: there is no file
            digest.update(repr(_meaning_of(filler, set())).encode())
        elif package not in ("core", "experiments"):
            modules.add(filler.__module__)
    for module in sorted(modules):
        digest.update(_module(module).encode())
    return digest.hexdigest()


def evaluation_version() -> str:
    """Digest of the code that measures, and of all that it measures with."""
    return hashlib.sha256(_own_code(training=False).encode()).hexdigest()


@cache
def encoder_version() -> str:
    """Digest of the code that encodes images, and of what it is made of."""
    packages = ("torch", "torchvision", "timm", "scikit-image")
    known = [_module("core.backbones"), *(f"{name}={version(name)}" for name in packages)]
    return hashlib.sha256(" ".join(known).encode()).hexdigest()


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
def _module(name: str) -> str:
    """Of a module's file, and of those of its package that it imports, directly or not."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        file = None if module in found else _file_of(module)
        if file is not None:
            found[module] = _digest_of(file)
            waiting += _imports(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    return " ".join(found[module] for module in sorted(found))


def _file_of(module: str) -> Path | None:
    import importlib.util

    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name that is imported from a module is not always a module
        return None
    return None if spec is None or spec.origin is None or not spec.has_location else Path(spec.origin)


def _imports(source: str, module: str, is_package: bool) -> list[str]:
    """The modules of its own package, or what may be such, that a source file imports."""
    inside, names = module.split("."), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.partition(".")[0] == inside[0]]


def _meaning_of(value: object, seen: set[str]) -> object:
    """What a function, class or constant does, as far as its compiled code says it; `seen`: globals already told."""
    if isinstance(value, FunctionType):
        used = [(name, value.__globals__[name]) for name in _names(value.__code__) if name in value.__globals__]
        own = [(name, one) for name, one in used if _is_of_a_notebook(one) and name not in seen]
        seen.update(name for name, _ in own)
        known = [(name, _meaning_of(one, seen)) for name, one in own]
        return _meaning_of(value.__code__, seen), value.__defaults__, value.__kwdefaults__, known
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_meaning_of(one, seen) for one in value.co_consts]
    if isinstance(value, type) and _is_of_a_notebook(value):
        own = [one for one in value.__mro__ if _is_of_a_notebook(one)]
        return [_meaning_of(inner, seen) for one in own for inner in vars(one).values()]
    return value if isinstance(value, str | int | float | tuple | bytes) else type(value).__name__


def _names(code: CodeType) -> list[str]:
    """All names that code, and code inside it, may look up."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _is_of_a_notebook(value: object) -> bool:
    """Constants, and functions and classes that were defined in a cell."""
    if isinstance(value, FunctionType | type):
        return value.__module__ == "__main__"
    return isinstance(value, str | int | float | tuple | bytes)


def _digest_of(path: Path) -> str:
    return f"{path.name}:{hashlib.sha256(meaning(path.read_text(encoding='utf-8')).encode()).hexdigest()}"


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
