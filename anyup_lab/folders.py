"""Loads the folders beside this package under its name: `core/anyup.py` is `anyup_lab.core.anyup`.

The files say `from core.anyup import AnyUp`. Loaded here, they mean `anyup_lab.core.anyup`: imports of our folders are
rewritten before a file is compiled, as pytest rewrites assertions. So nothing here looks for a module called `core`,
and another one can be there before or after.

If our own `core` is imported already, as `core`, then `anyup_lab.core` is that module, and so for all folders: a
process that begins with `import core` has one registry, and a package with further fillers can always import
`anyup_lab`.
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

PACKAGE = "anyup_lab"
NAMES = ("core", "extensions", "experiments", "configs")
_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "installed" if (_HERE / "installed").is_dir() else _HERE.parent
"""What contains the folders: of a wheel, inside this package; of a checkout, the checkout."""


def install() -> None:
    """Makes `anyup_lab.core`, ... importable; once."""
    if not any(isinstance(finder, Folders) for finder in sys.meta_path):
        sys.meta_path.insert(0, Folders(same=_is_ours(sys.modules.get("core"))))


def _is_ours(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().parent == ROOT / "core"


class Folders(MetaPathFinder):
    """Finds modules of the folders.

    Args:
        same: `anyup_lab.core` is the module `core`, ...; otherwise they are loaded anew.
    """

    def __init__(self, same: bool):
        self.same = same

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Contract: `importlib.abc.MetaPathFinder`."""
        package, _, plain = fullname.partition(".")
        if package != PACKAGE or plain.split(".")[0] not in NAMES:
            return None
        found = PathFinder.find_spec(fullname, [str(ROOT)] if plain in NAMES else path)
        if found is None:
            return None
        if self.same:
            return spec_from_loader(fullname, Same(plain))
        if isinstance(found.loader, SourceFileLoader):
            found.loader, found.cached = Renamed(fullname, found.origin), None
        return found


class Same(Loader):
    """The module that is imported under its own name."""

    def __init__(self, name: str):
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Contract: `importlib.abc.Loader`."""
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran already; the import system has given it another spec, which is taken back."""
        module.__spec__ = self.spec


class Renamed(SourceFileLoader):
    """Loads a file whose imports of our folders mean those of this package."""

    def path_stats(self, path: str) -> dict[str, float]:
        """Refuses, so that bytecode is neither read nor written: beside the file is that of the plain name."""
        raise OSError("not cached")

    def source_to_code(self, data: bytes | str, path: str, *, _optimize: int = -1) -> CodeType:
        """Contract: `importlib.abc.InspectLoader`."""
        return compile(renamed(data, path), path, "exec", dont_inherit=True, optimize=_optimize)


def renamed(source: bytes | str, path: str = "<source>") -> ast.Module:
    """The syntax tree of a file, with `anyup_lab.core` in the place of `core`, ... in all imports."""
    return ast.fix_missing_locations(_Rename().visit(ast.parse(source, path)))


class _Rename(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if not node.level and _is_ours_by_name(node.module):
            node.module = f"{PACKAGE}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        """`import core.x` binds `core`, and `import anyup_lab.core.x` would bind `anyup_lab`: two imports."""
        names = []
        for alias in node.names:
            if not _is_ours_by_name(alias.name):
                names.append(alias)
                continue
            top = alias.name.split(".")[0]
            if alias.asname or alias.name == top:
                names.append(ast.alias(f"{PACKAGE}.{alias.name}", alias.asname or top))
            else:
                names.append(ast.alias(f"{PACKAGE}.{alias.name}", f"_{PACKAGE}"))
                names.append(ast.alias(f"{PACKAGE}.{top}", top))
        return ast.copy_location(ast.Import(names), node)


def _is_ours_by_name(module: str) -> bool:
    return module.split(".")[0] in NAMES
