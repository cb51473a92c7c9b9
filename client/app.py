"""The ClientApp: Flower's messages to and from `corolla.client.local`. A thin shell."""

import os
from dataclasses import fields
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from corolla.client.afford import Limits
from corolla.client.config import ClientSettings, node_name
from corolla.client.local import Client, open_client
from corolla.client.protocol import Assignment, Reply
from corolla.client.secure import stages

app = ClientApp()

CLIENTS = "clients"
"""In the folder of a simulation, the folder of what each client keeps to itself."""

LIMITS = "corolla.limits"
"""The record of a node's state that holds what its memory allows."""

DECLARED = "declared"

NAMES = [field.name for field in fields(Limits)]


def use_threads(threads: int) -> int:
    """Sets torch's CPU threads (0: every core this process may use) and returns the number.

    Every engine sets its own otherwise, and results are bit-equal only with equal numbers.
    """
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return threads


def _open(settings: str, context: Context) -> Client:
    """The client that this node is, within the limits that it found before; what it finds now is remembered."""
    parsed = ClientSettings.model_validate_json(settings)
    use_threads(parsed.threads)
    node = dict(context.node_config)
    if folder := os.environ.get("COROLLA_RUN_FOLDER"):  # a simulation on Ray: nodes have no configuration of their own
        node.setdefault("state", str(Path(folder) / CLIENTS))
    if known := context.state.config_records.get(LIMITS):
        limits = Limits(**{name: int(known[name]) for name in NAMES})  # type: ignore[arg-type]
        return open_client(parsed, {"rank": known[DECLARED], **node}, limits)
    client = open_client(parsed, node)
    if client.limits:
        _remember(context, client, client.limits)
    return client


def _remember(context: Context, client: Client, limits: Limits) -> None:
    """Notes what the client can afford, and the rank that it has in the federation whatever it can train of it."""
    numbers = {name: getattr(limits, name) for name in NAMES}
    context.state.config_records[LIMITS] = ConfigRecord({**numbers, DECLARED: client.rank})


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Says who this node is."""
    settings = str(message.content.config_records["settings"]["json"])
    return Message(_open(settings, context).hello().pack(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains its share and replies the adapter; what memory allowed is remembered for the rounds to come.

    Raises ValueError at a node that was told `secure=true`: it takes part in secure sums alone.
    """
    if context.node_config.get("secure"):
        raise ValueError("this node takes part in secure sums alone, got an order for an adapter in the clear")
    return Message(_train(Assignment.unpack(message.content), context).pack(), reply_to=message)


def _train(assignment: Assignment, context: Context) -> Reply:
    client = _open(assignment.order.settings, context)
    reply = client.train(assignment)
    if reply.metrics["out_of_memory"]:
        found = (reply.metrics[name] for name in ("micro_batch", "accumulation", "trained_rank"))
        _remember(context, client, Limits(*map(int, found)))
    return reply


@app.train("secure")
def train_secure(message: Message, context: Context) -> Message:
    """Trains its share and replies a masked sketch of the change."""
    content = stages.train_masked(message.content, context.state, lambda assignment: _train(assignment, context))
    return Message(content, reply_to=message)


@app.query("secure_keys")
def secure_keys(message: Message, context: Context) -> Message:
    """Begins a round of secure sums."""
    name = node_name(context.node_config)
    return Message(stages.publish_keys(message.content, context.state, name), reply_to=message)


@app.query("secure_shares")
def secure_shares(message: Message, context: Context) -> Message:
    """Shares its secrets out among the round's clients."""
    return Message(stages.share_secrets(message.content, context.state), reply_to=message)


@app.query("secure_project")
def secure_project(message: Message, context: Context) -> Message:
    """Replies the second masked vector."""
    return Message(stages.project_masked(message.content, context.state), reply_to=message)


@app.query("secure_reveal")
def secure_reveal(message: Message, context: Context) -> Message:
    """Replies its shares of what takes the masks off the sum."""
    return Message(stages.reveal_shares(message.content, context.state), reply_to=message)


@app.query("secure_end")
def secure_end(message: Message, context: Context) -> Message:
    """Forgets what is left of a round that failed."""
    stages.forget(context.state)
    return Message(RecordDict(), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the global model and replies numbers."""
    assignment = Assignment.unpack(message.content)
    client = _open(assignment.order.settings, context)
    content = RecordDict(
        {
            "receipt": ConfigRecord({"client_id": client.client_id, "model": assignment.order.model}),
            "metrics": MetricRecord({**client.evaluate(assignment)}),
        }
    )
    return Message(content, reply_to=message)
