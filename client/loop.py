"""Clients whose model, data and training loop are their own: Corolla attaches the adapter, and does the rest.

    app = own_loop(open_site)    # a Flower ClientApp; open_site(context) is an OwnLoop

`examples/time_series.py` runs one on models that are no language models.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from corolla.adapters import HOSTED, LORA, AdapterSpec, carrying, target_shapes
from corolla.aggregation import Shapes
from corolla.client.attach import Part, trainable
from corolla.client.protocol import Assignment, Hello, Reply

Train = Callable[[Any, Any, int], Mapping[str, float]]
"""(model, data, round) -> metrics. Trains, in place, the parameters of `model` that require gradients: the adapter."""

Evaluate = Callable[[Any, Any], Mapping[str, float]]
"""(model, data) -> metrics, among them `examples`, by which means are weighted."""


@dataclass(frozen=True)
class OwnLoop:
    """One client. `model` is any torch module with linear layers or convolutions; nothing is ever written to it.

    `num_examples` is its weight in the mean. `base` names the model that all clients must have alike: by default the
    hash of its parameters. Without `evaluate`, the strategy must not ask (evaluate = "never"). Of the metrics, the
    server knows train_loss, loss_before and loss_after; any others are recorded as they are. Raises ValueError for a
    kind of adapter that needs more than its parameters trained.
    """

    client_id: str
    model: nn.Module
    data: Any
    spec: AdapterSpec
    num_examples: int
    train: Train
    evaluate: Evaluate | None = None
    base: str = ""

    def __post_init__(self) -> None:
        known = [LORA, *(name for name, kind in HOSTED.items() if not (kind.begins or kind.stepwise))]
        if self.spec.kind not in known:
            raise ValueError(
                f"a loop of one's own trains an adapter of kind {', '.join(known)}, got {self.spec.kind!r}: others "
                "need Corolla's own training, or a server that begins elsewhere"
            )

    @cached_property
    def _base(self) -> str:
        return self.base or weights_hash(self.model)

    @cached_property
    def _shapes(self) -> Shapes:
        return target_shapes(self.model, self.spec)

    def hello(self) -> Hello:
        """Who it is."""
        return Hello(self.client_id, self.spec.rank, self._base, self.num_examples, self._shapes)

    def reply(self, assignment: Assignment) -> Reply:
        """What `train` made of the order's model. Raises ValueError for an order meant for another base."""
        self._require_base(assignment)
        order = assignment.order
        with trainable(self.model, assignment, Part(self.spec, self._shapes, {})) as work:
            metrics = self.train(work.model, self.data, order.round)
            adapter = work.read()
        numbers = {name: float(value) for name, value in metrics.items()}
        n = self.num_examples
        return Reply(self.client_id, order.round, order.model, self._base, n, n, adapter, numbers, order.trains)

    def metrics(self, assignment: Assignment) -> dict[str, float]:
        """What `evaluate` finds of the model, all of it frozen. Raises ValueError without `evaluate`."""
        self._require_base(assignment)
        if self.evaluate is None:
            raise ValueError(f"evaluation needs a function, got none at {self.client_id}: give OwnLoop(evaluate=…)")
        with carrying(self.model, assignment.frozen) as model:
            found = self.evaluate(model.eval(), self.data)
        return {"examples": float(self.num_examples), **{name: float(value) for name, value in found.items()}}

    def _require_base(self, assignment: Assignment) -> None:
        if assignment.order.base_hash != self._base:
            raise ValueError(
                f"the order is for the base {assignment.order.base_hash}, got {self._base} at {self.client_id}: "
                "use the same weights everywhere"
            )


def weights_hash(model: nn.Module) -> str:
    """The SHA-256 of a model's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def own_loop(open_site: Callable[[Context], OwnLoop]) -> ClientApp:
    """A ClientApp that answers hello, train and evaluate with the OwnLoop that `open_site` gives for a node.

    It is called for every message: keep what is costly (`functools.lru_cache`).
    """
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return Message(open_site(context).hello().pack(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(open_site(context).reply(Assignment.unpack(message.content)).pack(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site, assignment = open_site(context), Assignment.unpack(message.content)
        receipt = ConfigRecord({"client_id": site.client_id, "model": assignment.order.model})
        metrics = MetricRecord({**site.metrics(assignment)})
        return Message(RecordDict({"receipt": receipt, "metrics": metrics}), reply_to=message)

    return app
