"""Tasks: what an evaluation measures about upsampled features. `task=NAME` chooses one (configs/evaluate.yaml).

One file is one family of tasks; `register_task` offers a class by name, with its `__init__` signature as typed
configuration, and dropping a file in is all it takes. What a task gets to see is a `Bench` (bench.py): images with
their low-resolution features, which all arms and seeds share.
"""

import importlib
import pkgutil

from experiments.measuring.task import Ceiling, EvaluationError, Picture, Task, make_task, register_task, tasks

__all__ = ["Ceiling", "EvaluationError", "Picture", "Task", "make_task", "register_task", "tasks"]

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
