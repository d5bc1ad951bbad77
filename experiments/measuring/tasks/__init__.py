"""Tasks: what an evaluation measures about upsampled features. `task=NAME` chooses one (configs/evaluate.yaml).

One file is one family of tasks; `register_task` offers a class by name, with its `__init__` signature as typed
configuration, and dropping a file in is all it takes. What a task gets to see is a `Bench` (bench.py): images with
their low-resolution features, which all arms and seeds share.
"""

from experiments.measuring.bench import Ceiling, EvaluationError
from experiments.measuring.task import Picture, Task, make_task, register_task, tasks

__all__ = ["Ceiling", "EvaluationError", "Picture", "Task", "make_task", "register_task", "tasks"]
