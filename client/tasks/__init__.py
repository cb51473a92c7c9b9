"""What clients can learn, one file a task: how to encode a row, train on it and evaluate.

A new task is a file like the others and a line in `TASKS`.
"""

import importlib
from collections.abc import Mapping

from corolla.client.tasks.task import Example, Row, Task

TASKS: Mapping[str, str] = {
    "causal-lm": "corolla.client.tasks.causal_lm",
}
"""Task name -> the module whose `TASK` it is; imported when it is used, since trainers take seconds to import."""


def find_task(name: str) -> Task:
    """The task of that name. Raises ValueError, listing the right names, for any other."""
    if name not in TASKS:
        raise ValueError(f"train.task must be one of {', '.join(TASKS)}, got {name!r}")
    task: Task = importlib.import_module(TASKS[name]).TASK
    return task


__all__ = ["TASKS", "Example", "Row", "Task", "find_task"]
