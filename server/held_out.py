"""The server's own held-out examples: the global model is evaluated on them wherever clients evaluate it."""

from collections.abc import Callable

from corolla.adapters import Base, carrying, on_weights
from corolla.aggregation import GlobalModel, whole, without_empty
from corolla.client.data import encode_source, read_source
from corolla.client.tasks import find_task
from corolla.server.config import Config

Judge = Callable[[GlobalModel], dict[str, float]]
"""Global model -> its metrics."""


def open_judge(config: Config, open_base: Callable[[], Base]) -> Judge | None:
    """Evaluates on data.server_held_out, None where that is not set. Base and data are opened at once.

    The model is the server's own: base + merged + start, without the cut that downloads have. Raises
    FileNotFoundError where this machine has no base or no such file, ValueError for rows that are not the task's.
    """
    path = config.data.server_held_out
    if not path:
        return None
    try:
        source = read_source(path, config.data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.server_held_out must be on the server, got {path}: {error}") from error
    try:
        base = open_base()
    except (FileNotFoundError, ImportError) as error:
        raise FileNotFoundError(
            f"data.server_held_out needs the base on the server, got none ({error}): fetch it there, or leave "
            "data.server_held_out out"
        ) from error
    task = find_task(config.train.task)
    examples = encode_source(source, config.data, task, base.tokenizer).examples

    def judge(model: GlobalModel) -> dict[str, float]:
        adapter = on_weights(base.model, config.spec(), without_empty(whole(model)))
        with carrying(base.model, adapter) as carried:
            return task.evaluate(carried.eval(), base, examples, config.data)

    return judge
