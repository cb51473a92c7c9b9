"""What clients can learn, one file a task: how to encode a row, train on it and evaluate.

A new task is a file like the others and a line in `TASKS`.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from corolla.client.tasks.task import Example, Row, Task


@dataclass(frozen=True)
class Entry:
    """Where a task is (the module whose `TASK` it is), and what others must know without importing its trainer.

    `head` is its base's (`corolla.adapters.heads.HEADS`), `score` the metric between 0 and 1 that it reports first,
    `batchings` the values of train.batching that it can do.
    """

    module: str
    head: str
    score: str
    batchings: tuple[str, ...] = ("padded",)


TASKS: Mapping[str, Entry] = {
    "causal-lm": Entry(
        "corolla.client.tasks.causal_lm", "causal-lm", "exact_match", ("padded", "padding-free", "packed")
    ),
    "classification": Entry("corolla.client.tasks.classification", "classification", "accuracy"),
    "preference": Entry("corolla.client.tasks.preference", "causal-lm", "preference_accuracy"),
}
"""The tasks by name."""


def find_task(name: str) -> Task:
    """The task of that name. Raises ValueError, listing the right names, for any other."""
    if name not in TASKS:
        raise ValueError(f"train.task must be one of {', '.join(TASKS)}, got {name!r}")
    task: Task = importlib.import_module(TASKS[name].module).TASK
    return task


__all__ = ["TASKS", "Entry", "Example", "Row", "Task", "find_task"]
