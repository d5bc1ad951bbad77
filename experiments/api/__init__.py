"""The commands as functions, for notebooks: `from experiments.api import train, evaluate, ablate, compare`.

Each function turns Python values into the overrides that a command line would have (`overrides`), and calls the engine
of the command of the same name. So both give the same results under the same keys, and share them. What they return
displays itself in a notebook (`display`), with tables as pandas. Nothing heavy is imported before a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.api.ablation import Ablation, ablate, read_ablation
    from experiments.api.comparison import compare
    from experiments.api.evaluation import Evaluation, evaluate
    from experiments.api.training import Training, train

_WHERE = {
    "Ablation": "ablation",
    "Evaluation": "evaluation",
    "Training": "training",
    "ablate": "ablation",
    "compare": "comparison",
    "evaluate": "evaluation",
    "read_ablation": "ablation",
    "train": "training",
}
"""Name -> the module of this room that it is in."""

__all__ = ["Ablation", "Evaluation", "Training", "ablate", "compare", "evaluate", "read_ablation", "train"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
