"""The code that a result depends on, as a digest that comments, docstrings, reports and new ideas do not change.

Files of backbones and checkpoints count with the settings that name them. Of the included weights, only those of the
embedded encoder are named by no setting, so they are part of the digest.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from core.registry import choices
from experiments.data.cell_digest import cell_digest, is_of_a_cell
from experiments.data.source_digest import file_digest, is_counted, module_digest, own_name

ROOT = Path(__file__).resolve().parent.parent.parent
_TRAINING = ("core", "experiments/data", "experiments/training")
"""Rooms that trained weights depend on."""
_WATCHING = ("experiments/training/validation.py", "experiments/training/curves.py")
"""Files in these rooms that only observe a training: a change there requires no new training."""
_BESIDE = (
    "experiments/training/benchmark.py",
    "experiments/training/distillation.py",
    "experiments/data/code_version.py",
    "experiments/data/identity.py",
    "experiments/measuring/kept.py",
)
"""Files in these rooms that no result depends on."""
_MEASURING = ("experiments/measuring", "experiments/peers", "experiments/statistics/scores.py")
"""Further rooms, and a file, that measured scores depend on."""
_PACKAGES = ("torch", "torchvision", "timm", "torchmetrics")


def code_version(fillers: Iterable[tuple[str, str]] = (), classes: Iterable[type] = ()) -> str:
    """Digest of the training code, and of the modules of the given fillers (hook point, name) and other classes.

    An extension, or a peer, counts only where it is used, together with what it imports from its own package. So
    a new idea in `extensions/` does not invalidate the results of others.
    """
    digest = hashlib.sha256(_own_code(training=True).encode())
    modules = {}
    for cls in (*(choices(hook)[name] for hook, name in fillers), *classes):
        module = own_name(cls.__module__)
        if is_of_a_cell(cls):
            digest.update(cell_digest(cls).encode())
        elif not is_counted(module) or module.startswith("experiments.peers."):
            modules[module] = _of_module(cls)
    for name in sorted(modules):
        digest.update(modules[name].encode())
    return digest.hexdigest()


def code_of_user(cls: type) -> str:
    """Digest of a class that is no code of this project: a task or a data set of a cell or another package; or empty.

    What is in the own rooms counts with `code_version` and `evaluation_version`.
    """
    if is_of_a_cell(cls):
        return cell_digest(cls)
    return "" if is_counted(own_name(cls.__module__)) else _of_module(cls)


@cache
def _of_module(cls: type) -> str:
    """Of the class's file and what it imports of its package, as it was when first asked for: a module that is loaded
    anew brings a new class, but a file that was only edited does not change what is computed here."""
    return module_digest(own_name(cls.__module__))


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
