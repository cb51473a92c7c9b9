"""Opens the client that a node is: the server's settings, the node's own configuration, its base and its data."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from corolla.adapters import find_base, is_lora, open_tokenizer, require_mixable
from corolla.client.afford import Limits
from corolla.client.config import AUTO, AdapterConfig, ClientSettings, ModelConfig, node_name, parse_targets
from corolla.client.data import ClientData, DataError, State, load_client_data, state_of
from corolla.client.estimate import Work
from corolla.client.local import Client
from corolla.client.plan import make_plan
from corolla.client.process import keep_freed_memory_low
from corolla.client.tasks import find_task


def open_client(settings: ClientSettings, node: Mapping[str, Any], known: Limits | None = None) -> Client:
    """The client that a node is, from the server's settings and the node's own configuration.

    The node may give `name`, `rank`, `memory` (GiB), `target-modules`, `kind`, and its own `model`, `device`,
    `quantization`, `data`, `held-out` and `state`; `partition-id` says which part of the data it holds where several
    share one file. `known` are limits found before. Where the rank is left to the node's memory and it has none by
    name, it is planned. Raises ValueError where the ranks are left to the nodes and this one gives none, for a memory
    that is no number of GiB above 0, one that is enough for no rank, or a kind or rank that cannot be in this run;
    DataError for data that cannot be used.
    """
    partition = int(node.get("partition-id", 0))
    own = {"train": node.get("data"), "held_out": node.get("held-out")}
    data = settings.data.model_copy(update={k: str(v) for k, v in own.items() if v})
    here = {"name": node.get("model"), "device": node.get("device"), "quantization": node.get("quantization")}
    model = ModelConfig.model_validate(settings.model.model_dump() | {k: str(v) for k, v in here.items() if v})
    client_id = node_name(node)
    targets = parse_targets(node.get("target-modules", settings.clients.targets(partition)))
    own_kind = {"kind": _own_kind(settings, node, client_id, partition)}
    adapter = AdapterConfig.model_validate(settings.adapter.model_dump() | own_kind)
    settings = settings.model_copy(update={"data": data, "model": model, "adapter": adapter})
    share = (0, 1) if node.get("data") else (partition, settings.clients.count)  # a node's own data is all its own
    tokenizer = open_tokenizer(find_base(model.name))
    try:
        examples, rows = _load_data(tokenizer, client_id, *share, settings, state_of(data, client_id))
    except (ValueError, TypeError) as error:
        raise DataError(str(error)) from error
    rank = node.get("rank", settings.clients.rank(partition))
    if settings.clients.ranks == AUTO:
        keep_freed_memory_low()
        if rank is None:
            budget = _memory(node, client_id) or settings.clients.budget(partition)
            length = max(example.length for example in (*rows, *examples.held_out))
            work = Work(length, len(examples.held_out or examples.train), targets)
            known = make_plan(settings, budget, work).choice.limits
            rank = known.rank
    if rank is None:
        raise ValueError(
            f"clients.ranks = 'node' needs rank=… in the configuration of every node, got none at {client_id}"
        )
    wanted = settings.clients.rank(partition)
    if not is_lora(adapter.kind) and not settings.clients.kinds and int(rank) != wanted:
        raise ValueError(
            f"rank of {client_id} must be that of all, {wanted}, for adapter.kind = {adapter.kind!r}, got {rank}: "
            "leave rank out of the node's configuration"
        )
    base = model.open(settings.head)
    keeps = Path(str(node["state"])).expanduser() if node.get("state") else None
    return Client(client_id, int(rank), targets, base, examples, rows, settings, keeps, known)


def _own_kind(settings: ClientSettings, node: Mapping[str, Any], client_id: str, partition: int) -> str:
    """What this client attaches. Raises ValueError for a kind of its own that this run cannot have."""
    if "kind" not in node:
        return settings.clients.kind(partition) or settings.adapter.kind
    own = str(node["kind"])
    if not settings.clients.kinds and own != settings.adapter.kind:
        raise ValueError(
            f"kind of {client_id} must be that of all, {settings.adapter.kind!r}, got {own!r}: the run has no "
            "clients.kinds"
        )
    if settings.clients.kinds:
        require_mixable(own)
    return own


def _memory(node: Mapping[str, Any], client_id: str) -> float | None:
    """Bytes that the node's configuration allows, None where it says nothing."""
    if "memory" not in node:
        return None
    try:
        if (memory := float(node["memory"])) > 0:
            return memory * 2**30
    except ValueError:
        pass
    raise ValueError(
        f"memory of {client_id} must be GiB above 0, got {node['memory']!r}: mend the node's configuration"
    )


@lru_cache(maxsize=256)
def _load_data(
    tokenizer: Any, client_id: str, partition: int, clients: int, settings: ClientSettings, state: State
) -> tuple[ClientData, tuple[Any, ...]]:
    """The client's data, whose files are in this `state`, and its training examples as rows."""
    task, train = find_task(settings.train.task), settings.train
    data = load_client_data(
        settings.data,
        task,
        tokenizer,
        client_id,
        partition,
        clients,
        settings.seed,
        train.max_length,
    )
    return data, task.pack(data.train, train.max_length) if train.batching == "packed" and task.pack else data.train
