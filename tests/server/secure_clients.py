"""A federation of fakes that take part in secure sums by the real stages, with faults by request and a record of all
that the server sees."""

from collections.abc import Callable, Mapping

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from corolla.aggregation import ClientUpdate, DenseDelta, FreshRows, LowRankDelta, fill_adapter
from corolla.client.protocol import HELLO, Assignment, Hello, Reply
from corolla.client.secure import stages
from corolla.client.secure.protocol import END, KEYS, PROJECT, REVEAL, SHARES, TRAIN
from corolla.simulations.grid import InProcessGrid

SHAPES = {"layer.q": (24, 16), "layer.v": (8, 16)}
BASE = "the-base"
RANKS = {"ann": 1, "bob": 2, "cleo": 3, "dan": 4, "eve": 2}
MODULES = {"bob": {"layer.q": (24, 16)}, "eve": {"layer.v": (8, 16)}}
"""Those of clients that do not adapt all."""

Fault = Callable[[Message, Context], None]
"""Called before a client answers; it may raise, or change what the client gets."""


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    return dict(MODULES.get(name, SHAPES))


def trained(name: str, assignment: Assignment, ranks: Mapping[str, int], heads: Mapping[str, tuple[int, int]]) -> Reply:
    """An adapter that depends on the client's name and the round alone."""
    order = assignment.order
    generator = torch.Generator().manual_seed(1000 * order.round + sorted(ranks).index(name))
    fresh = FreshRows(order.seed, order.fresh_round)
    adapter: dict = {}
    for module, delta in fill_adapter(assignment.start, shapes_of(name), order.rank, fresh).items():
        step = LowRankDelta(
            0.1 * torch.randn(delta.A.shape, generator=generator), torch.randn(delta.B.shape, generator=generator)
        )
        adapter[module] = LowRankDelta(delta.A + step.A, delta.B + step.B)
    for head, shape in heads.items():
        adapter[head] = DenseDelta(torch.randn(shape, generator=generator))
    metrics = {"loss_before": 1.0, "train_loss": 2.0}
    return Reply(name, order.round, order.model, BASE, 10 * ranks[name], 4, adapter, metrics, order.trains)


class SecureFederation:
    """`grid` over clients of `ranks`; `replies` has what each trained in the clear, by round and client: what the server
    must not learn. `seen` are all messages to and from it. `faults` are by (client, kind of message)."""

    def __init__(
        self,
        ranks: Mapping[str, int] = RANKS,
        faults: Mapping[tuple[str, str], Fault] | None = None,
        heads: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.ranks, self.faults, self.heads = dict(ranks), dict(faults or {}), dict(heads or {})
        self.replies: dict[tuple[int, str], Reply] = {}
        self.starts: dict[tuple[int, str], Assignment] = {}
        self.seen: list[tuple[str, str, RecordDict]] = []
        self.states: dict[str, RecordDict] = {}
        self.grid = InProcessGrid(self._app(), [{"name": name} for name in self.ranks], {})

    def _app(self) -> ClientApp:
        app = ClientApp()
        for kind, answer in (
            (HELLO, self._hello),
            (KEYS, lambda c, s, name: stages.publish_keys(c, s, name)),
            (SHARES, lambda c, s, name: stages.share_secrets(c, s)),
            (PROJECT, lambda c, s, name: stages.project_masked(c, s)),
            (REVEAL, lambda c, s, name: stages.reveal_shares(c, s)),
            (END, lambda c, s, name: stages.forget(s) or RecordDict()),
            (TRAIN, lambda c, s, name: stages.train_masked(c, s, lambda a: self._train(name, a))),
        ):
            category, _, action = kind.partition(".")
            getattr(app, category)(action)(self._handler(kind, answer))
        return app

    def _handler(self, kind: str, answer: Callable[[RecordDict, RecordDict, str], RecordDict]):
        def handle(message: Message, context: Context) -> Message:
            name = str(context.node_config["name"])
            self.states[name] = context.state
            self.faults.get((name, kind), lambda m, c: None)(message, context)
            self.seen.append((f"to {kind}", name, message.content))
            content = answer(message.content, context.state, name)
            self.faults.get((name, f"after {kind}"), lambda c, s: None)(content, context)
            self.seen.append((f"from {kind}", name, content))
            return Message(content, reply_to=message)

        return handle

    def _hello(self, content: RecordDict, state: RecordDict, name: str) -> RecordDict:
        hello = Hello(name, self.ranks[name], BASE, 10 * self.ranks[name], shapes_of(name), self.heads)
        return hello.pack()

    def _train(self, name: str, assignment: Assignment) -> Reply:
        reply = trained(name, assignment, self.ranks, self.heads)
        self.replies[assignment.order.round, name] = reply
        self.starts[assignment.order.round, name] = assignment
        return reply

    def change(self, round_number: int, name: str, module: str) -> torch.Tensor:
        """What a client's module moved by, dense, float64."""
        delta = self.replies[round_number, name].adapter[module].double()
        start = self.starts[round_number, name].start
        return delta.dense() - (start[module].double().dense() if module in start else 0)

    def updates(self, round_number: int, clients: tuple[str, ...] | None = None) -> list[ClientUpdate]:
        """The clients' replies, for a plain aggregation."""
        return [
            r.update() for (n, c), r in sorted(self.replies.items()) if n == round_number and c in (clients or RANKS)
        ]


def crash(message: Message, context: Context) -> None:
    """A client that is gone, and its memory with it."""
    context.state.clear()
    raise ConnectionError("the node is gone")
