"""A run's checkpoint beside its base, on tasks of lm-eval (EleutherAI's evaluation harness)."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corolla.adapters import carrying
from corolla.client.config import DataConfig
from corolla.client.evaluation import BATCH
from corolla.simulations.export import open_checkpoint

Metrics = dict[str, float]


def evaluate_tasks(
    run: Path, tasks: str, limit: int | None = None, round_number: int | None = None
) -> tuple[Metrics, Metrics]:
    """`<task>/<metric>` of the base and of the run's global model, as the run holds it: nothing is merged.

    `tasks` are lm-eval's names with commas between them, or a folder, of whose task files all are run and whose paths
    to data are relative to it. Prompts go through the chat template where the run's do. Raises ImportError without
    lm-eval, ValueError for tasks that are not there or a model that is no language model.
    """
    _require_harness()
    config, base, adapter = open_checkpoint(run, round_number)
    if not base.model.can_generate():
        raise ValueError(
            f"--tasks needs a language model, got a run with train.task = {config.train.task!r}: use --data"
        )
    found = []
    with _tasks(tasks) as (manager, names):
        for part in ({}, adapter):
            with carrying(base.model, part) as model:
                found.append(_evaluate(model.eval(), base.tokenizer, config.data, manager, names, limit))
    return found[0], found[1]


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401  (an extra)
    except ImportError as error:
        raise ImportError("--tasks needs lm-eval, got none installed: pip install 'corolla[eval]'") from error


@contextlib.contextmanager
def _tasks(tasks: str) -> Iterator[tuple[Any, list[str]]]:
    """The harness's task manager, and the names of the tasks; inside, paths are relative to the folder of tasks."""
    from lm_eval.tasks import TaskManager

    folder = Path(tasks)
    with contextlib.ExitStack() as stack:
        if folder.is_dir():
            manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
            names, cure = manager.all_subtasks, "write task files (.yaml) into it"
            stack.enter_context(contextlib.chdir(folder))
        else:
            manager = TaskManager()
            names, cure = [name.strip() for name in tasks.split(",")], "lm-eval ls tasks lists them"
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown or not names:
            raise ValueError(f"--tasks must be a folder or names of lm-eval's tasks, got {unknown or tasks}: {cure}")
        yield manager, names


def _evaluate(
    model: Any, tokenizer: Any, config: DataConfig, manager: Any, names: list[str], limit: int | None
) -> Metrics:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    chat = config.template != "plain" and bool(tokenizer.chat_template)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
        tasks=names,
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        system_instruction=config.system if chat else None,
        bootstrap_iters=0,
        log_samples=False,
    )
    return _numbers(results["results"])


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """Every metric that is a number and not an error bar; the harness names a metric `<name>,<filter>`."""
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, found in results.items()
        for name, value in found.items()
        if "," in name and "stderr" not in name and isinstance(value, int | float)
    }
