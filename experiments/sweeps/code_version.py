"""The code that a result depends on, as a digest that comments, docstrings, reports and new ideas do not change.

Files of backbones and checkpoints count with the settings that name them. Of the included weights, only those of the
embedded encoder are named by no setting, so they are part of the digest.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType

from core.registry import choices
from experiments.data.source_digest import file_digest, module_digest

ROOT = Path(__file__).resolve().parent.parent.parent
_TRAINING = ("core", "experiments/data", "experiments/training")
"""Rooms that trained weights depend on."""
_WATCHING = ("experiments/training/validation.py", "experiments/training/curves.py")
"""Files in these rooms that only observe a training: a change there requires no new training."""
_BESIDE = ("experiments/training/benchmark.py", "experiments/training/distillation.py")
"""Files in these rooms that no result of a sweep depends on."""
_MEASURING = ("experiments/measuring", "experiments/peers", "experiments/statistics/scores.py")
"""Further rooms, and a file, that measured scores depend on."""
_PACKAGES = ("torch", "torchvision", "timm", "torchmetrics")


def code_version(fillers: Iterable[tuple[str, str]] = (), classes: Iterable[type] = ()) -> str:
    """Digest of the training code, and of the modules of the given fillers (hook point, name) and other classes.

    An extension, or a peer, counts only where it is used, together with what it imports from its own package. So
    a new idea in `extensions/` does not invalidate the results of others.
    """
    digest = hashlib.sha256(_own_code(training=True).encode())
    modules = set()
    for cls in (*(choices(hook)[name] for hook, name in fillers), *classes):
        module = cls.__module__.removeprefix("anyup_lab.")
        package = module.partition(".")[0]
        if package == "__main__":  # a notebook's cell, which has no file
            digest.update(repr(_meaning_of(cls, set())).encode())
        elif package not in ("core", "experiments") or module.startswith("experiments.peers."):
            modules.add(module)
    for name in sorted(modules):
        digest.update(module_digest(name).encode())
    return digest.hexdigest()


def evaluation_version() -> str:
    """Digest of the measuring code and of all code that it uses."""
    return hashlib.sha256(_own_code(training=False).encode()).hexdigest()


@cache
def _own_code(training: bool) -> str:
    rooms = _TRAINING if training else (*_TRAINING, *_MEASURING)
    files = {path for room in rooms for path in (ROOT / room).rglob("*.py")}
    files |= {ROOT / name for name in rooms if (ROOT / name).is_file()}
    files -= {ROOT / name for name in (*_BESIDE, *(_WATCHING if training else ()))}
    known = [file_digest(path) for path in sorted(files)]
    known += [hashlib.sha256(path.read_bytes()).hexdigest() for path in ROOT.glob("core/weights/embedded.*")]
    return " ".join([*known, *(f"{name}={version(name)}" for name in _PACKAGES)])


def _meaning_of(value: object, seen: set[str]) -> object:
    """What a function, class or constant does, as far as its compiled code shows; `seen`: globals already included."""
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
    """All names that code, or code nested in it, may look up."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _is_of_a_notebook(value: object) -> bool:
    """Whether it is a constant, or a function or class defined in a cell."""
    if isinstance(value, FunctionType | type):
        return value.__module__ == "__main__"
    return isinstance(value, str | int | float | tuple | bytes)
