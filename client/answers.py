"""What a node answers to Flower's messages: records in, records out. The ClientApp and the worker both call it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.logger import log

from corolla.client.afford import Limits
from corolla.client.bundle import release
from corolla.client.config import ClientSettings, node_name
from corolla.client.data import DataError
from corolla.client.local import Client
from corolla.client.open import open_client
from corolla.client.process import use_threads
from corolla.client.protocol import Assignment, Reply
from corolla.client.secure import stages

CLIENTS = "clients"
"""In the folder of a simulation, the folder of what each client keeps to itself."""

LIMITS = "corolla.limits"
"""The record of a node's state that holds what its memory allows."""

DECLARED = "declared"

SIMULATED = "num-partitions"
"""In the configuration that a simulation's engine gives its nodes: their data are those of whoever simulates."""

NAMES = [field.name for field in fields(Limits)]


@dataclass(frozen=True)
class Node:
    """A node as Flower knows it: its configuration, and the state that it keeps from message to message (written)."""

    config: Mapping[str, Any]
    state: RecordDict


def _open(settings: str, node: Node) -> Client:
    """The client that this node is, within the limits that it found before; what it finds now is remembered.

    What is wrong with the data goes to the node's own log: an error's text goes to the server.
    """
    parsed = ClientSettings.model_validate_json(settings)
    use_threads(parsed.threads)
    config = dict(node.config)
    if folder := os.environ.get("COROLLA_RUN_FOLDER"):  # a simulation on Ray: nodes have no configuration of their own
        config.setdefault("state", str(Path(folder) / CLIENTS))
    known = node.state.config_records.get(LIMITS)
    limits = Limits(**{name: int(known[name]) for name in NAMES}) if known else None  # type: ignore[arg-type]
    try:
        client = open_client(parsed, {"rank": known[DECLARED], **config} if known else config, limits)
    except DataError as error:
        if SIMULATED in config:
            raise
        log(40, "%s: %s", node_name(config), error)
        raise ValueError(
            f"{node_name(config)} needs data that can be used, got some that cannot: the log of its worker says which "
            "row, and why; a row is not shown to others"
        ) from None
    if client.limits and not known:
        _remember(node, client, client.limits)
    return client


def _remember(node: Node, client: Client, limits: Limits) -> None:
    """Notes what the client can afford, and the rank that it has in the federation whatever it can train of it."""
    numbers = {name: getattr(limits, name) for name in NAMES}
    node.state.config_records[LIMITS] = ConfigRecord({**numbers, DECLARED: client.rank})


def hello(content: RecordDict, node: Node) -> RecordDict:
    """Who this node is."""
    settings = str(content.config_records["settings"]["json"])
    return _open(settings, node).hello().pack()


def train(content: RecordDict, node: Node) -> RecordDict:
    """The adapter trained on the node's share; what memory allowed is remembered for the rounds to come.

    `content` is empty then. Raises ValueError at a node that was told `secure=true`: it takes part in sums alone.
    """
    if node.config.get("secure"):
        raise ValueError("this node takes part in secure sums alone, got an order for an adapter in the clear")
    reply = _train(Assignment.unpack(content), node)
    release(content)  # the reply is as large
    return reply.pack()


def _train(assignment: Assignment, node: Node) -> Reply:
    client = _open(assignment.order.settings, node)
    reply = client.train(assignment)
    if reply.metrics.get("out_of_memory"):
        found = (reply.metrics[name] for name in ("micro_batch", "accumulation", "trained_rank"))
        _remember(node, client, Limits(*map(int, found)))
    return reply


def secure_keys(content: RecordDict, node: Node) -> RecordDict:
    """The public keys that begin a round of secure sums."""
    return stages.publish_keys(content, node.state, node_name(node.config))


def secure_shares(content: RecordDict, node: Node) -> RecordDict:
    """The node's secrets, shared out among the round's clients."""
    return stages.share_secrets(content, node.state)


def secure_train(content: RecordDict, node: Node) -> RecordDict:
    """The masked sketch of the change that training made."""
    return stages.train_masked(content, node.state, lambda assignment: _train(assignment, node))


def secure_project(content: RecordDict, node: Node) -> RecordDict:
    """The second masked vector."""
    return stages.project_masked(content, node.state)


def secure_reveal(content: RecordDict, node: Node) -> RecordDict:
    """The node's shares of what takes the masks off the sum."""
    return stages.reveal_shares(content, node.state)


def secure_end(content: RecordDict, node: Node) -> RecordDict:
    """Nothing; what is left of a round that failed is forgotten."""
    stages.forget(node.state)
    return RecordDict()


def evaluate(content: RecordDict, node: Node) -> RecordDict:
    """Numbers of the global model on the node's held-out examples."""
    assignment = Assignment.unpack(content)
    client = _open(assignment.order.settings, node)
    return RecordDict(
        {
            "receipt": ConfigRecord({"client_id": client.client_id, "model": assignment.order.model}),
            "metrics": MetricRecord({**client.evaluate(assignment)}),
        }
    )


ANSWERS: Mapping[str, Callable[[RecordDict, Node], RecordDict]] = {
    answer.__name__: answer
    for answer in (
        hello, train, evaluate, secure_keys, secure_shares, secure_train, secure_project, secure_reveal, secure_end,
    )
}  # fmt: skip
"""By the name that the worker is asked with."""
