"""Digests of source code (a file, or a module with its imports) that comments and docstrings do not change."""

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def encoder_version() -> str:
    """Digest of the code that encodes images, and of the packages it uses."""
    packages = ("torch", "torchvision", "timm", "scikit-image")
    known = [module_digest("core.backbones"), *(f"{name}={version(name)}" for name in packages)]
    return hashlib.sha256(" ".join(known).encode()).hexdigest()


_BEFORE = __name__.removesuffix("experiments.data.source_digest")
"""`anyup_lab.` where the folders are loaded under that name; a digest is the same under both."""


def own_name(module: str) -> str:
    """A module's name without `anyup_lab.` before it."""
    return module.removeprefix("anyup_lab.")


def is_counted(module: str) -> bool:
    """Whether a module is of this project's own rooms, which all keys count; `module`: its `own_name`."""
    return module.partition(".")[0] in ("core", "experiments")


def module_digest(name: str) -> str:
    """Digest of a module's file and of all files of its package that it imports, directly or indirectly."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        file = None if module in found else file_of(module)
        if file is not None:
            found[module] = file_digest(file)
            waiting += _imports(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    return " ".join(found[module] for module in sorted(found))


def file_digest(path: Path) -> str:
    return f"{path.name}:{hashlib.sha256(meaning(path.read_text(encoding='utf-8')).encode()).hexdigest()}"


def meaning(source: str) -> str:
    """The part of a source file that can change its behaviour: the syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_text(statement)]
    return ast.dump(tree)


def file_of(module: str) -> Path | None:
    """The file of a module; None: it has none, or is no module."""
    import importlib.util

    ours = module.partition(".")[0] in ("core", "extensions", "experiments")
    try:
        spec = importlib.util.find_spec(f"{_BEFORE}{module}" if ours else module)
    except ModuleNotFoundError:  # a name imported from a module need not be a module
        return None
    return None if spec is None or spec.origin is None or not spec.has_location else Path(spec.origin)


def _imports(source: str, module: str, is_package: bool) -> list[str]:
    """The modules of its own package that a source file imports; some of the names may not be modules."""
    inside, names = module.split("."), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.partition(".")[0] == inside[0]]


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
