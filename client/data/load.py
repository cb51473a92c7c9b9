"""A client's own examples: found, split into training and held-out, and encoded by its task."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from corolla.client.config import GENERATED, DataConfig
from corolla.client.data.generated import generate_tasks
from corolla.client.seeding import random_order
from corolla.client.tasks import Example, Row, Task


@dataclass(frozen=True)
class ClientData:
    """A client's training and held-out examples, and how many were left out as too long."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    too_long: int

    @property
    def left_out(self) -> dict[str, float]:
        """How many examples were left out, by reason."""
        return {"too_long": float(self.too_long)}


def load_client_data(
    config: DataConfig,
    task: Task,
    tokenizer: Any,
    client_id: str,
    partition: int,
    clients: int,
    seed: int,
    max_length: int,
) -> ClientData:
    """The examples of the client that holds `partition` of `clients`, tokenized.

    Raises FileNotFoundError for a file that is not there, ValueError for rows without the columns, a client
    without rows, or one whose examples are all longer than `max_length` tokens.
    """
    train, held_out = _load_rows(config, client_id, partition, clients, seed)
    encoded = encode_rows(config, task, tokenizer, train)
    kept = tuple(example for example in encoded if example.length <= max_length)
    if not kept:
        raise ValueError(
            f"client {client_id} needs an example of at most {max_length} tokens, got {len(encoded)} examples, "
            "none of them so short: raise train.max_length or look at data.train"
        )
    return ClientData(kept, tuple(encode_rows(config, task, tokenizer, held_out)), len(encoded) - len(kept))


def encode_rows(config: DataConfig, task: Task, tokenizer: Any, rows: Iterable[Row]) -> list[Any]:
    """The rows as examples of `task`, in their order."""
    return [task.encode(tokenizer, config, _canonical(config, row)) for row in rows]


def _canonical(config: DataConfig, row: Row) -> Row:
    if config.completion not in row:
        return row
    return {
        "prompt": row[config.prompt],
        "completion": row[config.completion],
        "group": str(row.get(config.group, "")),
    }


def _load_rows(config: DataConfig, client_id: str, partition: int, clients: int, seed: int) -> tuple[list[Row], ...]:
    if config.train == GENERATED:
        train, held_out = generate_tasks(config.tasks_seed, None, config.tasks_train, config.tasks_held_out)
        return tuple(
            list(_part(Dataset.from_list(rows), config, partition, clients, seed)) for rows in (train, held_out)
        )
    mine = _own_rows(config, config.train, client_id, partition, clients, seed)
    if config.held_out:
        return mine, _own_rows(config, config.held_out, client_id, partition, clients, seed)
    order = random_order(seed, client_id, "held-out", size=len(mine))
    count = round(config.held_out_fraction * len(mine))
    return [mine[i] for i in sorted(order[count:])], [mine[i] for i in sorted(order[:count])]


def _own_rows(config: DataConfig, path: str, client_id: str, partition: int, clients: int, seed: int) -> list[Row]:
    """This client's rows of a file: all of it where the name has {client}, its partition otherwise."""
    rows = read_rows(path.replace("{client}", client_id), config)
    return list(rows if "{client}" in path else _part(rows, config, partition, clients, seed))


def read_rows(path: str, config: DataConfig) -> Dataset:
    """The rows of a JSONL file. Raises what `load_client_data` raises for files and columns."""
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"data needs a JSONL file, got {path}: no such file")
    rows = load_dataset("json", data_files=str(Path(path).expanduser()), split="train", cache_dir=None)
    for column in (
        (config.prompt, config.completion)
        if config.completion in rows.column_names or "question" in rows.column_names
        else ()
    ):
        if column not in rows.column_names:
            raise ValueError(
                f"rows of {path} need columns {config.prompt!r} and {config.completion!r}, got {rows.column_names}: "
                "set data.prompt and data.completion"
            )
    return rows


def _part(rows: Dataset, config: DataConfig, partition: int, clients: int, seed: int) -> Dataset:
    """Partition number `partition` of `clients`: a random share, or whole values of a column."""
    if config.partition == "iid":
        shuffled = rows.select(random_order(seed, "iid", size=len(rows)))
        return shuffled.shard(num_shards=clients, index=partition, contiguous=True)
    column = config.partition_column
    if column not in rows.column_names:
        raise ValueError(
            f"data.partition = 'column' needs the column {column!r}, got {rows.column_names}: set "
            "data.partition_column, or data.partition = 'iid'"
        )
    values = rows.unique(column)
    if len(values) < clients:
        raise ValueError(
            f"{clients} clients need as many values of {column!r}, got {len(values)}: use fewer clients, "
            "or data.partition = 'iid'"
        )
    mine = set(np.array_split(np.array(values, dtype=object), clients)[partition])
    return rows.select([i for i, value in enumerate(rows[column]) if value in mine])
