"""One client: what it answers to hello, train and evaluate. No Flower here, so a test or a notebook can call it."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from corolla.adapters import (
    LOCAL,
    AdapterSpec,
    Base,
    attached,
    carrying,
    dense_beside,
    head_shapes,
    read_adapter,
    read_dense,
    tail_penalty,
    target_shapes,
)
from corolla.aggregation import Delta, DenseDelta, FreshRows, Shapes, fill_adapter, low_rank, only, without
from corolla.client.config import ClientSettings, ModelConfig, client_name, parse_targets
from corolla.client.data import ClientData, load_client_data, round_order
from corolla.client.protocol import WHOLE, Assignment, Hello, Reply
from corolla.client.seeding import seed_of
from corolla.client.tasks import Task, find_task
from corolla.client.training import train_round


@dataclass(frozen=True)
class Client:
    """A client with its base open and its data loaded."""

    client_id: str
    rank: int
    targets: str | tuple[str, ...] | None
    base: Base
    data: ClientData
    settings: ClientSettings

    @property
    def task(self) -> Task:
        """What it learns."""
        return find_task(self.settings.train.task)

    def spec(self, rank: int) -> AdapterSpec:
        """The LoRA that it attaches at `rank`, on everything but its head."""
        return self.settings.adapter.spec(rank, self.targets, tuple(self._heads()))

    def _heads(self) -> Shapes:
        return head_shapes(self.base.model, self.base.head)

    def hello(self) -> Hello:
        """Who it is."""
        return Hello(self.client_id, self.rank, self.base.hash, len(self.data.train), self._shapes(), self._heads())

    def _shapes(self) -> Shapes:
        return _target_shapes(self.base, self.spec(1))

    def train(self, assignment: Assignment) -> Reply:
        """Trains its share of the global model on the next examples of its order, and replies L_k in absolute factors.

        The base is put back as it was. Raises ValueError for an order meant for another base, or a start that does
        not fit its modules; RuntimeError where the loss is not finite.
        """
        order, settings = assignment.order, self.settings
        self._require_base(assignment)
        examples = self._examples(order.round)
        with self._trainable(assignment) as model:
            metrics = {"too_long": float(self.data.too_long), "loss_before": self._probe_loss(model)}
            seed = seed_of(order.seed, self.client_id, order.round)
            penalty = (lambda model: order.penalty * tail_penalty(model, order.keep)) if order.penalty else None
            metrics |= train_round(
                model, self.base, settings.train, examples, order.round, settings.rounds, seed, penalty
            )
            metrics["loss_after"] = self._probe_loss(model)
            factors = {} if order.trains == WHOLE else read_adapter(model)
            adapter: dict[str, Delta] = {**factors, **read_dense(self.base.model, LOCAL)}
        return Reply(
            self.client_id,
            order.round,
            order.model,
            self.base.hash,
            len(self.data.train),
            len(examples),
            adapter,
            metrics,
            order.trains,
        )

    @contextmanager
    def _trainable(self, assignment: Assignment) -> Iterator[Any]:
        """The base with the frozen part beside it and L_k before training, attached: a LoRA, or whole weights.

        A classifier's head is trained whole in both cases, from no change at all.
        """
        order, shapes = assignment.order, self._shapes()
        whole = {**shapes, **self._heads()} if order.trains == WHOLE else self._heads()
        nothing = {module: DenseDelta(torch.zeros(shape)) for module, shape in whole.items()}
        with ExitStack() as stack:
            if order.trains == WHOLE:
                model = stack.enter_context(carrying(self.base.model, assignment.frozen))
            else:
                stack.enter_context(carrying(self.base.model, only(assignment.frozen, whole)))
                model = stack.enter_context(self._lora(assignment))
            stack.enter_context(dense_beside(self.base.model, nothing, LOCAL, trains=True))
            yield model

    def _lora(self, assignment: Assignment) -> AbstractContextManager[Any]:
        order, frozen = assignment.order, low_rank(without(assignment.frozen, self._heads()))
        independent = self.settings.adapter.init == "independent"
        fresh = FreshRows(order.seed, order.fresh_round, self.client_id if independent else "")
        start = fill_adapter(assignment.start, self._shapes(), order.rank, fresh)
        return attached(self.base.model, self.spec(order.rank), start, frozen, order.trains)

    def evaluate(self, assignment: Assignment) -> dict[str, float]:
        """The received model, all of it frozen, on this client's held-out examples: loss and exact match."""
        self._require_base(assignment)
        with carrying(self.base.model, assignment.frozen) as model:
            found = self.task.evaluate(model.eval(), self.base, self.data.held_out, self.settings.data)
            return found | {"probe_loss": self._probe_loss(model)}

    def _probe_loss(self, model: Any) -> float:
        return self.task.mean_loss(
            model.eval(), self.base, (self.data.held_out or self.data.train)[: self.settings.data.probe]
        )

    def _examples(self, round_number: int) -> list[Any]:
        """This round's examples: a pure function of seed, client and round, whoever took part before."""
        train, size = self.settings.train, len(self.data.train)
        count = train.steps(size) * train.batch_size * train.accumulation
        order = round_order(size, (round_number - 1) * count, count, self.settings.seed, self.client_id)
        return [self.data.train[i] for i in order]

    def _require_base(self, assignment: Assignment) -> None:
        if assignment.order.base_hash != self.base.hash:
            raise ValueError(
                f"the order is for the base {assignment.order.base_hash}, got {self.base.hash} from "
                f"{self.base.source.name}: use the same checkpoint as the server"
            )


@lru_cache(maxsize=16)
def _target_shapes(base: Base, spec: AdapterSpec) -> Shapes:
    return target_shapes(base.model, spec)


def open_client(settings: ClientSettings, node: Mapping[str, Any]) -> Client:
    """The client that a node is, from the server's settings and the node's own configuration.

    The node may give `name`, `rank`, `target-modules`, and its own `model`, `device`, `quantization`, `data` and
    `held-out`; `partition-id` says which part of the data it holds where several share one file. Raises ValueError
    where the ranks are left to the nodes and this one gives none.
    """
    partition = int(node.get("partition-id", 0))
    own = {"train": node.get("data"), "held_out": node.get("held-out")}
    data = settings.data.model_copy(update={k: str(v) for k, v in own.items() if v})
    here = {"name": node.get("model"), "device": node.get("device"), "quantization": node.get("quantization")}
    model = ModelConfig.model_validate(settings.model.model_dump() | {k: str(v) for k, v in here.items() if v})
    client_id = str(node.get("name", client_name(partition)))
    rank = node.get("rank", settings.clients.rank(partition))
    if rank is None:
        raise ValueError(
            f"clients.ranks = 'node' needs rank=… in the configuration of every node, got none at {client_id}"
        )
    base = model.open(settings.head)
    targets = parse_targets(node.get("target-modules", settings.clients.targets(partition)))
    examples = _load_data(base, client_id, partition, settings.model_copy(update={"data": data}))
    return Client(client_id, int(rank), targets, base, examples, settings.model_copy(update={"data": data}))


@lru_cache(maxsize=256)
def _load_data(base: Base, client_id: str, partition: int, settings: ClientSettings) -> ClientData:
    return load_client_data(
        settings.data,
        find_task(settings.train.task),
        base.tokenizer,
        client_id,
        partition,
        settings.clients.count,
        settings.seed,
        settings.train.max_length,
    )
