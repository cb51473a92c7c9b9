"""A client's own examples: found, split into training and held-out, and encoded by its task."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from corolla.client.config import GENERATED, DataConfig
from corolla.client.data.formats import CHOICE, read_row, recognise
from corolla.client.data.generated import generate_tasks
from corolla.client.data.partition import partition
from corolla.client.data.sources import Source, read_source
from corolla.client.seeding import random_order
from corolla.client.tasks import Example, Row, Task

log = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used. The message may quote a row of them: it is for whoever they belong to."""


EMPTY, MASKED, TOO_LONG = "empty", "nothing_to_learn", "too_long"
"""Why an example is left out: it has no answer or no text; the loss would see none of it; it has too many tokens."""


@dataclass(frozen=True)
class ClientData:
    """A client's training and held-out examples, and how many were left out, by reason.

    The reasons are empty, nothing_to_learn and too_long, and the same with held_out_ before.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    left_out: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """Rows of `source` as examples of a task, in their order, without those left out."""

    source: Source
    format: str
    examples: tuple[Any, ...]
    left_out: Mapping[str, int]


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

    Raises FileNotFoundError for a file that is not there, ValueError for rows that are not of their format (with the
    line), a client without rows, or one whose examples are all left out.
    """
    train, held_out = client_sources(config, client_id, partition, clients, seed)
    kept = encode_source(train, config, task, tokenizer, max_length)
    if not kept.examples:
        raise ValueError(
            f"client {client_id} needs an example of at most {max_length} tokens, got {len(train)} rows, of which "
            f"{_words(kept.left_out)}: raise train.max_length or look at data.train"
        )
    other = encode_source(held_out, config, task, tokenizer, max_length) if held_out else None
    left_out = dict(kept.left_out) | {f"held_out_{k}": n for k, n in (other.left_out if other else {}).items()}
    if any(left_out.values()):
        log.warning("%s: of %d rows, %s", client_id, len(train) + len(held_out or ()), _words(left_out))
    return ClientData(kept.examples, other.examples if other else (), {k: float(n) for k, n in left_out.items()})


def _words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in left_out.items() if n) or "none was left out"


def encode_source(
    source: Source, config: DataConfig, task: Task, tokenizer: Any, max_length: int | None = None
) -> Encoded:
    """The rows as examples of `task`; those without anything to learn, or over `max_length` tokens, are counted.

    Raises ValueError, with the row's place, for one that is not what its format says.
    """
    name = recognise(source.name, source.rows.column_names, config, task.formats)
    examples, left_out = [], Counter({TOO_LONG: 0, EMPTY: 0, MASKED: 0})
    for index, raw in enumerate(source.rows):
        try:
            row = read_row(name, config, raw)
            example = task.encode(tokenizer, config, row) if row else None
        except ValueError as error:
            raise ValueError(f"{source.place(index)}, {error}") from error
        if example is None:
            left_out[EMPTY] += 1
        elif not example.learned:
            left_out[MASKED] += 1
        elif max_length and example.length > max_length:
            left_out[TOO_LONG] += 1
        else:
            examples.append(example)
    return Encoded(source, name, tuple(examples), dict(left_out))


def read_questions(source: Source, config: DataConfig) -> list[Row] | None:
    """The rows of format multiple-choice; None where they are of another. Raises ValueError with a row's place."""
    try:
        recognise(source.name, source.rows.column_names, config, (CHOICE,))
    except ValueError:
        return None
    rows = []
    for index, raw in enumerate(source.rows):
        try:
            rows.append(read_row(CHOICE, config, raw))
        except ValueError as error:
            raise ValueError(f"{source.place(index)}, {error}") from error
    return [row for row in rows if row]


def client_sources(
    config: DataConfig, client_id: str, partition: int, clients: int, seed: int
) -> tuple[Source, Source | None]:
    """The client's training rows and its held-out ones, None without any."""
    reader = client_id if "{client}" in f"{config.train} {config.held_out}" else ""
    state = state_of(config, reader)
    train, held_out = _shared(config, reader, state)
    if "{client}" not in config.train and clients > 1:
        train = train.select(_parts(config, reader, state, clients, seed, False)[partition])
    if held_out is not None:
        whole = "{client}" in str(config.held_out) or clients == 1
        return train, held_out if whole else held_out.select(
            _parts(config, reader, state, clients, seed, True)[partition]
        )
    order = random_order(seed, client_id, "held-out", size=len(train))
    count = round(config.held_out_fraction * len(train))
    return train.select(sorted(order[count:].tolist())), train.select(sorted(order[:count].tolist())) if count else None


State = tuple[tuple[str, int, int], ...]
"""The files of some data, each with its time of change and its bytes."""


def state_of(config: DataConfig, client_id: str) -> State:
    """What the client's files are by now. A worker lasts from run to run: what it remembers of files is for as long as
    they stay as they are."""
    named = [name.replace("{client}", client_id) for name in (config.train, config.held_out) if name]
    roots = [Path(name).expanduser() for name in named]
    paths = [path for root in roots for path in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    found = ((str(path), path.stat()) for path in paths if path.is_file())
    return tuple((name, facts.st_mtime_ns, facts.st_size) for name, facts in found)


@lru_cache(maxsize=8)
def _shared(config: DataConfig, client_id: str, state: State) -> tuple[Source, Source | None]:
    """All rows of the files that this client reads, which are in this `state`."""
    if config.train == GENERATED:
        rows: Sequence[Any] = generate_tasks(config.tasks_seed, None, config.tasks_train, config.tasks_held_out)
        train, held_out = (Source(GENERATED, Dataset.from_list(list(part))) for part in rows)
        return train, held_out if len(held_out) else None
    named = (name.replace("{client}", client_id) if name else None for name in (config.train, config.held_out))
    found = [read_source(name, config) if name else None for name in named]
    return found[0], found[1]  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _parts(
    config: DataConfig, client_id: str, state: State, clients: int, seed: int, of_held_out: bool
) -> list[list[int]]:
    train, held_out = _shared(config, client_id, state)
    if of_held_out and held_out is not None:
        like = train.rows if config.train == GENERATED or "{client}" not in config.train else None
        return partition(held_out.rows, config, clients, seed, like)
    return partition(train.rows, config, clients, seed)
