"""A client's own examples: loaded, split, tokenized with the prompt masked, and dealt out round by round."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from corolla.client.config import TASKS, DataConfig
from corolla.client.seeding import random_order
from corolla.client.tasks import generate_tasks

Row = dict[str, Any]
"""A line of data: a prompt, a completion, and whatever else it has."""

IGNORED = -100
"""The label that the loss leaves out."""


@dataclass(frozen=True)
class Example:
    """One tokenized example: `labels` is IGNORED on the prompt, and `input_ids` on the answer and its end token."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt: str
    completion: str
    group: str

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        return self.input_ids[: sum(label == IGNORED for label in self.labels)]


@dataclass(frozen=True)
class ClientData:
    """A client's training and held-out examples, and how many were left out as too long."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    too_long: int


def load_client_data(
    config: DataConfig, tokenizer: Any, client_id: str, partition: int, clients: int, seed: int, max_length: int
) -> ClientData:
    """The examples of the client that holds `partition` of `clients`, tokenized.

    Raises FileNotFoundError for a file that is not there, ValueError for rows without the columns, a client
    without rows, or one whose examples are all longer than `max_length` tokens.
    """
    train, held_out = _load_rows(config, client_id, partition, clients, seed)
    encoded = [encode(tokenizer, config, row) for row in train]
    kept = tuple(example for example in encoded if len(example.input_ids) <= max_length)
    if not kept:
        raise ValueError(
            f"client {client_id} needs an example of at most {max_length} tokens, got {len(encoded)} examples, "
            "none of them so short: raise train.max_length or look at data.train"
        )
    return ClientData(kept, tuple(encode(tokenizer, config, row) for row in held_out), len(encoded) - len(kept))


def _load_rows(config: DataConfig, client_id: str, partition: int, clients: int, seed: int) -> tuple[list[Row], ...]:
    if config.train == TASKS:
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
    for column in (config.prompt, config.completion):
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


def encode(tokenizer: Any, config: DataConfig, row: Row) -> Example:
    """Prompt and answer as one sequence that ends with the end-of-turn token; the prompt's labels are IGNORED."""
    prompt, completion = str(row[config.prompt]), str(row[config.completion])
    prompt_ids, answer_ids = _encode_chat(tokenizer, config, prompt, completion) or (
        tuple(tokenizer(prompt + "\n")["input_ids"]),
        (*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id),
    )
    labels = (IGNORED,) * len(prompt_ids) + answer_ids
    return Example(prompt_ids + answer_ids, labels, prompt, completion, str(row.get(config.group, "")))


def _encode_chat(
    tokenizer: Any, config: DataConfig, prompt: str, completion: str
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The same by the tokenizer's chat template, None where the plain template is used instead.

    What the template writes after the answer is kept up to its end-of-turn token; a template that rewrites the
    answer gets the end-of-sequence token instead.
    """
    if config.template == "plain" or (config.template == "auto" and not tokenizer.chat_template):
        return None
    if not tokenizer.chat_template:
        raise ValueError("data.template = 'chat' needs a tokenizer with a chat template, got one without: use 'plain'")
    asked = [{"role": "system", "content": config.system}] if config.system else []
    asked.append({"role": "user", "content": prompt})
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    answered = [*asked, {"role": "assistant", "content": completion}]
    after = tokenizer.apply_chat_template(answered, tokenize=False)
    tail = after[len(before) :] if after.startswith(before + completion) else completion
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    ends = [i for i, token in enumerate(ids) if token in special]
    answer = tuple(ids[: ends[0] + 1]) if ends else (*ids, tokenizer.eos_token_id)
    return tuple(tokenizer(before, add_special_tokens=False)["input_ids"]), answer


def round_order(size: int, first: int, count: int, *key: object) -> list[int]:
    """Positions first..first+count-1 of an endless sequence of examples: one seeded permutation after another.

    A round goes on where the last one stopped, and every example comes once before any comes twice.
    """
    order = []
    for position in range(first, first + count):
        epoch, index = divmod(position, size)
        order.append(int(_epoch(size, epoch, key)[index]))
    return order


@lru_cache(maxsize=64)
def _epoch(size: int, epoch: int, key: tuple[object, ...]) -> np.ndarray:
    return random_order(*key, "epoch", epoch, size=size)


def as_dataset(examples: Sequence[Example]) -> Dataset:
    """What SFTTrainer takes as it is: `input_ids` and `labels`."""
    return Dataset.from_dict(
        {"input_ids": [list(e.input_ids) for e in examples], "labels": [list(e.labels) for e in examples]}
    )
