"""`corolla evaluate`: a run's global model beside its base, on a file or on lm-eval's tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from corolla.terminal import RunPath, Verbose, console, exit_codes, quiet


def evaluate(
    run: RunPath,
    data: Annotated[
        Path | None,
        typer.Option(
            help="a JSONL file with the run's own columns, or of multiple choice: prompt, choices, answer (an index)"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES or FOLDER",
            help="lm-eval's tasks by name (a,b), or all in a folder of task files (pip install 'corolla[eval]')",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="with --tasks: so many examples of each task", min=1)] = None,
    round_number: Annotated[
        int | None, typer.Option("--round", help="the checkpoint of this round; default: the last")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="with --data: write every prompt, truth and answer to this JSONL file")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """A run's global model beside the base model: on a JSONL file, or on tasks of lm-eval.

    On a file: loss and the task's score, or for multiple choice choice_accuracy (lm-eval's acc: the likeliest choice)
    and choice_accuracy_norm (its acc_norm: log-likelihood divided by the choice's characters).
    """
    quiet(verbose)
    with exit_codes():
        if (data is None) == (tasks is None) or (limit and data) or (answers and tasks):
            raise ValueError("evaluate needs --data (with --answers) or --tasks (with --limit), got other options")
        if data:
            from corolla.simulations.evaluate import evaluate_checkpoint

            base, tuned = evaluate_checkpoint(run, data, round_number, answers)
        else:
            from corolla.simulations.harness import evaluate_tasks

            base, tuned = evaluate_tasks(run, str(tasks), limit, round_number)
        console.print(_table(base, tuned))


def _table(base: Mapping[str, float], tuned: Mapping[str, float]) -> Table:
    table = Table("", "base", "global")
    for name in (name for name in tuned if not name.startswith("examples")):
        table.add_row(name, f"{base[name]:.4f}", f"{tuned[name]:.4f}")
    return table
