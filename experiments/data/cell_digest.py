"""Digest of a class that was defined in a notebook's cell, which has no file: of what its compiled code does.

It changes with the code of the class, and with what that uses: functions, classes, constants, lists, tensors and
instances of other cells, also behind decorators, properties and closures; and the files of modules that are neither
installed nor part of this project's own rooms. Comments, docstrings and what is not used leave it as it is. Objects of
an installed package's class that keep a state of their own, such as a random generator, count by their class alone.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch

from experiments.data.source_digest import file_of, is_counted, module_digest, own_name

_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_NO_CODE = {"__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__", "_abc_impl"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


def is_of_a_cell(cls: type) -> bool:
    """Whether a class was defined in a notebook, or in the script that runs."""
    return cls.__module__ == "__main__"


def cell_digest(value: object) -> str:
    """Hexadecimal digest of a class or function of a cell; the same in every process with this version of Python."""
    return hashlib.sha256(repr(_Reader().meaning(value)).encode()).hexdigest()


class _Reader:
    """Reads what a value does, each object once."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def meaning(self, value: object) -> object:
        if isinstance(value, _PLAIN):
            return type(value).__name__, repr(value)
        if isinstance(value, Enum):
            return type(value).__qualname__, value.name
        if id(value) in self.seen:
            return "seen", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        return type(value).__name__, self._inside(value)

    def _inside(self, value: object) -> object:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, CodeType):
            return self._code(value, None)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, ModuleType):
            return _module(value.__name__)
        if isinstance(value, torch.Tensor | np.ndarray):
            array = value.detach().cpu().contiguous().flatten() if isinstance(value, torch.Tensor) else value.ravel()
            raw = array.view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else np.ascontiguousarray(array)
            return str(value.dtype), tuple(value.shape), hashlib.sha256(raw.tobytes()).hexdigest()
        if isinstance(value, Mapping):
            return [(self.meaning(key), self.meaning(inner)) for key, inner in value.items()]
        if isinstance(value, Set):
            return sorted(repr(_Reader().meaning(inner)) for inner in value)
        if isinstance(value, Sequence):
            return [self.meaning(inner) for inner in value]
        return self._object(value)

    def _object(self, value: object) -> object:
        if isinstance(value, staticmethod | classmethod | MethodType):
            return self.meaning(value.__func__), self.meaning(getattr(value, "__self__", None))
        if isinstance(value, property):
            return [self.meaning(part) for part in (value.fget, value.fset, value.fdel)]
        if isinstance(value, cached_property):
            return self.meaning(value.func)
        if isinstance(value, partial):
            return [self.meaning(part) for part in (value.func, value.args, value.keywords)]
        cls = type(value)
        if isinstance(value, torch.nn.Module) or is_of_a_cell(cls):
            return self.meaning(cls), self.meaning(vars(value)) if hasattr(value, "__dict__") else None
        return own_name(cls.__module__), getattr(value, "__qualname__", cls.__qualname__)

    def _function(self, value: FunctionType) -> object:
        """Its globals say where it was written: a decorator gives its function the name of another."""
        home = value.__globals__.get("__name__", "")
        inside = [self.meaning(_content(cell)) for cell in value.__closure__ or ()]
        if home != "__main__":
            return _module(home), value.__qualname__, inside
        used = [(name, value.__globals__[name]) for name in _names(value.__code__) if name in value.__globals__]
        known = [(name, self.meaning(one)) for name, one in used]
        asked = [self.meaning(part) for part in (value.__defaults__, value.__kwdefaults__, value.__annotations__)]
        return self._code(value.__code__, value.__doc__), asked, known, inside

    def _code(self, code: CodeType, docstring: str | None) -> object:
        constants = code.co_consts[1:] if docstring and code.co_consts[:1] == (docstring,) else code.co_consts
        names = code.co_names, code.co_varnames, code.co_freevars
        return code.co_code, code.co_exceptiontable, names, [self.meaning(one) for one in constants]

    def _class(self, value: type) -> object:
        if not is_of_a_cell(value):
            return _module(value.__module__), value.__qualname__
        own = [(name, self.meaning(inner)) for name, inner in vars(value).items() if name not in _NO_CODE]
        return own, [self.meaning(base) for base in value.__bases__]


def _content(cell: object) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a class that is not complete yet
        return None


def _names(code: CodeType) -> list[str]:
    """All names that code, or code nested in it, may look up."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _module(name: str) -> tuple[str, str]:
    """A module's name; with the digest of its file if it is a file of the user's own."""
    name = own_name(name)
    package = name.partition(".")[0]
    if not package or is_counted(name) or package in sys.stdlib_module_names or name == "__main__":
        return name, ""
    file = file_of(name)
    if file is None or any(file.resolve().is_relative_to(folder) for folder in _INSTALLED):
        return name, ""
    return name, module_digest(name)
