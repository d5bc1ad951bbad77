"""AnyUp Lab under one name, for use from other projects: `import anyup_lab`, also beside another module called `core`.

The folders `core`, `extensions`, `experiments` and `configs` are `anyup_lab.core`, `anyup_lab.experiments`, and so on
(`anyup_lab/folders.py`). The names of `core` and of the notebooks' API are here too::

    model = anyup_lab.AnyUp.from_pretrained()
    backbone = anyup_lab.load_backbone("embedded")

Nothing is imported before it is used.
"""

import importlib

from anyup_lab import folders

NOTEBOOKS = ("ablate", "compare", "evaluate", "read_ablation", "train")
"""Names of `experiments.api`, the commands as functions."""
folders.install()


def __getattr__(name: str) -> object:
    """A folder, or a public name of `core`; with it extensions are registered, even if nothing is installed (hub)."""
    if name in folders.NAMES:
        return importlib.import_module(f"anyup_lab.{name}")
    if name in NOTEBOOKS:
        return getattr(importlib.import_module("anyup_lab.experiments.api"), name)
    core = importlib.import_module("anyup_lab.core")
    if name not in core.__all__:
        raise AttributeError(f"module anyup_lab has no attribute {name!r}; it has: {', '.join(core.__all__)}")
    importlib.import_module("anyup_lab.extensions")
    return getattr(core, name)


def __dir__() -> list[str]:
    return sorted({*importlib.import_module("anyup_lab.core").__all__, *folders.NAMES, *NOTEBOOKS})
