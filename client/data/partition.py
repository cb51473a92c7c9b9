"""Who holds which rows of a file that simulated clients share. flwr-datasets partitions; every draw is seeded."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from corolla.client.config import DataConfig
from corolla.client.seeding import random_order, seed_of

ROW = "corolla_row"
"""The column that says where a row was."""


def partition(
    rows: Dataset, config: DataConfig, clients: int, seed: int, like: Dataset | None = None
) -> list[list[int]]:
    """The indices of each client's rows: every row belongs to exactly one.

    `like` are training rows, where `rows` are held out: a client holds values or labels out in the proportion in which
    it trains on them. Raises ValueError for a column that is not there, or too few rows or values.
    """
    if config.partition in ("column", "dirichlet", "pathological"):
        _require_column(rows, config)
    if config.partition == "column":
        return _whole_values(rows, config, clients)
    if len(rows) < clients:
        raise ValueError(f"{clients} clients need as many rows, got {len(rows)}: use fewer clients or more data")
    if like is not None and config.partition in ("dirichlet", "pathological"):
        return _in_proportion(rows, like, partition(like, config, clients, seed), config.partition_column, seed)
    found = _by_library(rows, config, clients, seed)
    if empty := [k for k, part in enumerate(found) if not part]:
        raise ValueError(
            f"every client needs rows, got none for client {empty[0]} of {clients} by data.partition = "
            f"{config.partition!r}: use fewer clients, more data or a larger data.partition_alpha"
        )
    return found


def _require_column(rows: Dataset, config: DataConfig) -> None:
    if config.partition_column not in rows.column_names:
        raise ValueError(
            f"data.partition = {config.partition!r} needs the column {config.partition_column!r}, got "
            f"{rows.column_names}: set data.partition_column, or data.partition = 'iid'"
        )


def _whole_values(rows: Dataset, config: DataConfig, clients: int) -> list[list[int]]:
    column = config.partition_column
    values = rows.unique(column)
    if len(values) < clients:
        raise ValueError(
            f"{clients} clients need as many values of {column!r}, got {len(values)}: use fewer clients, "
            "or data.partition = 'iid'"
        )
    owner = {v: k for k, part in enumerate(np.array_split(np.array(values, dtype=object), clients)) for v in part}
    return _by_owner([owner[value] for value in rows[column]], clients)


def _by_owner(owners: Sequence[int], clients: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(clients)]
    for index, owner in enumerate(owners):
        found[owner].append(index)
    return found


def _by_library(rows: Dataset, config: DataConfig, clients: int, seed: int) -> list[list[int]]:
    from flwr_datasets import partitioner as library  # it imports its plots: a second

    number = seed_of(seed, config.partition)
    labels = {"partition_by": config.partition_column, "seed": number}
    sizes: dict[str, Any] = {
        "iid": library.IidPartitioner,
        "linear": library.LinearPartitioner,
        "square": library.SquarePartitioner,
        "exponential": library.ExponentialPartitioner,
    }
    if config.partition == "dirichlet":
        maker: Any = library.DirichletPartitioner(clients, alpha=config.partition_alpha, min_partition_size=1, **labels)
    elif config.partition == "pathological":
        maker = library.PathologicalPartitioner(
            clients, num_classes_per_partition=config.partition_labels, class_assignment_mode="deterministic", **labels
        )
    else:
        maker = sizes[config.partition](clients)
    order = random_order(seed, "iid", size=len(rows))
    columns = {ROW: order.tolist()}
    if config.partition in ("dirichlet", "pathological"):
        values = rows[config.partition_column]
        columns[config.partition_column] = [str(values[i]) for i in order]
    maker.dataset = Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of small partitions, which are counted and shown
        try:
            found = [list(maker.load_partition(k)[ROW]) for k in range(clients)]
        except ValueError as error:
            raise ValueError(
                f"data.partition = {config.partition!r} cannot split {len(rows)} rows among {clients} clients: {error}"
            ) from error
    return found if config.partition == "iid" else [sorted(part) for part in found]


def _in_proportion(rows: Dataset, like: Dataset, parts: list[list[int]], column: str, seed: int) -> list[list[int]]:
    """Rows of each label in the proportion in which the clients have that label, by largest remainders."""
    trained, held_out = [str(v) for v in like[column]], [str(v) for v in rows[column]]
    owners = [0] * len(held_out)
    for label in sorted(set(held_out)):
        counts = np.array([sum(trained[i] == label for i in part) for part in parts], dtype=float)
        mine = [i for i, value in enumerate(held_out) if value == label]
        counts = counts if counts.any() else np.array([float(len(part)) for part in parts])
        edges = np.rint(np.cumsum(counts) / counts.sum() * len(mine)).astype(int)
        order = random_order(seed, "held-out", label, size=len(mine))
        for position, index in enumerate(order):
            owners[mine[index]] = int(np.searchsorted(edges, position, side="right"))
    return _by_owner(owners, len(parts))
