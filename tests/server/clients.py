"""A federation of fakes that behave: real messages, real adapters, and faults by request. No model."""

from collections.abc import Callable, Mapping

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from corolla.aggregation import DenseDelta, FreshRows, LowRankDelta, fill_adapter
from corolla.client.protocol import Assignment, Hello, Reply
from corolla.simulations.grid import InProcessGrid
from tests.aggregation.federations import move

SHAPES = {"layer.q": (6, 8), "layer.v": (4, 8)}
BASE = "the-base"

Fault = Callable[[Reply], Reply]


def fake_grid(
    ranks: Mapping[str, int],
    reply_faults: Mapping[str, Fault] | None = None,
    hello_faults: Mapping[str, Callable[[Hello], Hello]] | None = None,
) -> InProcessGrid:
    """A grid of the clients `ranks`; each moves its adapter by a step drawn from its name and the round."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        answer = Hello(name, ranks[name], BASE, 10 * ranks[name], SHAPES)
        return Message((hello_faults or {}).get(name, lambda h: h)(answer).pack(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name, assignment = str(context.node_config["name"]), Assignment.unpack(message.content)
        order = assignment.order
        begin = {m: DenseDelta(torch.zeros(shape)) for m, shape in SHAPES.items()}
        if order.trains != "W":
            begin = fill_adapter(assignment.start, SHAPES, order.rank, FreshRows(order.seed, order.fresh_round))
        key = order.round * 100 + len(name) + order.rank
        moved = {m: move(d, order.trains, 0.1, key + i) for i, (m, d) in enumerate(begin.items())}
        reply = Reply(
            name,
            order.round,
            order.model,
            BASE,
            10 * ranks[name],
            4,
            moved,
            {"loss_before": 1.0, "train_loss": 2.0},
            order.trains,
        )
        return Message((reply_faults or {}).get(name, lambda r: r)(reply).pack(), reply_to=message)

    return InProcessGrid(app, [{"name": name} for name in ranks], {})


def with_factor(reply: Reply, module: str, change: Callable[[LowRankDelta], LowRankDelta]) -> Reply:
    """The reply with one module's factors changed."""
    from dataclasses import replace

    return replace(reply, adapter={**reply.adapter, module: change(reply.adapter[module])})


def nan(delta: LowRankDelta) -> LowRankDelta:
    """The same with one NaN in B."""
    b = delta.B.clone()
    b[0, 0] = torch.nan
    return LowRankDelta(delta.A, b)
