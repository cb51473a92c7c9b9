"""Sound and hostile clients behind Flower's grid, and what has to come of a round with both."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from corolla.aggregation import DenseDelta, FreshRows, LowRankDelta, fill_adapter
from corolla.client.bundle import unbundle
from corolla.client.protocol import Assignment, Hello, Reply
from tests.aggregation.federations import move
from tests.server.clients import BASE, SHAPES
from tests.server.hostile.damage import damaged
from tests.server.hostile.mutations import EVALUATE, HELLO, MARKUP, TRAIN, Mutation, bind, loosen
from tests.server.hostile.wire import Parcel, parcel_of

REASONS = ["", "x" * 2**20, MARKUP, "\0\n" * 1000, "[/]" * 100, "</script><img src=x onerror=alert(1)>"]

METADATA = {
    "group": (None, {"_group_id": "1:sound-0"}),
    "no group": (None, {"_group_id": ""}),
    "long group": (None, {"_group_id": "1:" + "x" * 10**6}),
    "source": (True, {"_src_node_id": 1000}),
    "nothing answered": (True, {"_reply_to_message_id": "f" * 64}),
    "another type": (None, {"_message_type": "query.hello"}),
    "no type": (True, {"_message_type": "rm -rf"}),
    "other run": (None, {"_run_id": 77}),
    "no time": (None, {"_ttl": -1.0, "_created_at": float("nan")}),
}
"""Of the message's own metadata, which the SuperLink does not read: whether the server has to refuse it (None: what it
says of itself makes no difference), and what is written."""

WHOLE_REPLY = {
    **{f"error: {i}": True for i in range(len(REASONS))},
    **{f"metadata: {name}": bool(harmful) for name, (harmful, _) in METADATA.items()},
    "replay: own": True,
    "replay: another's": True,
    "replay: the order": True,
    "replay: the hello": True,
}
"""What is done to a reply as a whole, and whether the server has to refuse it."""


@dataclass(frozen=True)
class Plan:
    """What a hostile client does: one name for each of its messages ("": nothing), and the bytes that it damages."""

    hello: str = ""
    rounds: Sequence[tuple[str, ...]] = ((), ())
    evaluate: str = ""
    damage: Sequence[str] = ("", "")
    seed: int = 0


@dataclass
class Client:
    """One client. It knows what it sent, and what has to become of it: True refused, False accepted, None either."""

    name: str
    rank: int
    plan: Plan
    crew: "Crew"
    verdicts: dict[str, bool | None] = field(default_factory=dict)
    sent: dict[int, Mapping[str, object]] = field(default_factory=dict)
    parcels: list[Parcel] = field(default_factory=list)

    @property
    def rng(self) -> random.Random:
        return random.Random(f"{self.plan.seed} {len(self.parcels)}")

    def __call__(self, message: Message) -> Parcel:
        kind = message.metadata.message_type
        parcel = {"query.hello": self.hello, "train": self.train, "evaluate": self.evaluate}[kind](message)
        self.parcels.append(parcel)
        return parcel

    def hello(self, message: Message) -> Parcel:
        content = Hello(self.name, self.rank, BASE, 10 * self.rank, SHAPES).pack()
        self.verdicts["hello"] = self._mutate(content, [HELLO[self.plan.hello]] if self.plan.hello else [])
        return parcel_of(Message(content, reply_to=message))

    def evaluate(self, message: Message) -> Parcel:
        content = RecordDict({"metrics": MetricRecord({"held_out_loss": 1.0, "examples": 4.0})})
        name = self.plan.evaluate
        when = f"evaluate {sum(key.startswith('evaluate') for key in self.verdicts)}"
        self.verdicts[when] = self._mutate(content, [EVALUATE[name]] if name in EVALUATE else [])
        if name in WHOLE_REPLY:
            self.verdicts[when] = WHOLE_REPLY[name]
            return parcel_of(self._whole(name, Message(content, reply_to=message), message))
        return parcel_of(Message(content, reply_to=message))

    def _mutate(self, content: RecordDict, mutations: Sequence[Mutation]) -> bool:
        arrays = "adapter" in content and bool(mutations)
        if arrays:
            loosen(content)
        for mutation in mutations:
            mutation.change(content, self.rng)
        if arrays:
            bind(content)
        self.crew.cases += bool(mutations)
        return any(mutation.harmful for mutation in mutations)

    def train(self, message: Message) -> Parcel:
        assignment = Assignment.unpack(message.content)
        order, number = assignment.order, len(self.sent)
        begin = {m: DenseDelta(torch.zeros(shape)) for m, shape in SHAPES.items()}
        if order.trains != "W":
            begin = fill_adapter(assignment.start, SHAPES, order.rank, FreshRows(order.seed, order.fresh_round))
        moved = {
            m: move(d, order.trains, 0.1, order.round * 100 + self.rank + i) for i, (m, d) in enumerate(begin.items())
        }
        metrics = {"loss_before": 1.0, "train_loss": 2.0}
        receipt = (self.name, order.round, order.model, BASE, 10 * self.rank, 4)
        content = Reply(*receipt, moved, metrics, order.trains).pack()
        names = self.plan.rounds[number]
        harmful = self._mutate(content, [TRAIN[name] for name in names if name in TRAIN])
        self.sent[number] = moved if harmful else _as_sent(content, moved)
        reply = Message(content, reply_to=message)
        for name in names:
            if name in WHOLE_REPLY:
                harmful |= WHOLE_REPLY[name]
                if name.startswith("replay"):
                    self.crew.cases += 1
                    self.verdicts[f"train {number}"] = True
                    return self._replayed(name, message)
                reply = self._whole(name, reply, message)
        return self._sent(number, reply, harmful)

    def _sent(self, number: int, reply: Message, harmful: bool) -> Parcel:
        parcel, self.verdicts[f"train {number}"] = parcel_of(reply), harmful
        if kind := self.plan.damage[number]:
            self.crew.cases += 1
            try:
                changed = damaged(parcel, kind, self.rng)
            except ValueError:
                return parcel
            if changed.objects != parcel.objects:
                self.verdicts[f"train {number}"] = None
            return changed
        return parcel

    def _whole(self, name: str, reply: Message, message: Message) -> Message:
        self.crew.cases += 1
        kind, _, what = name.partition(": ")
        if kind == "error":
            return Message(Error(3, REASONS[int(what)]), reply_to=message)
        reply.metadata.__dict__.update(METADATA[what][1])
        return reply

    def _replayed(self, name: str, message: Message) -> Parcel:
        """What was said before, as it was said or as an answer to this message."""
        other = {"replay: own": self, "replay: another's": self.crew.clients[0]}.get(name)
        if name == "replay: the order":
            return parcel_of(Message(message.content, reply_to=message))
        found = other.parcels[-1] if other else self.parcels[0]
        if self.rng.random() < 0.5:
            return found
        content = inflate_object_from_contents(found.root, dict(found.objects))
        if content.has_error():
            return found
        return parcel_of(Message(content.content, reply_to=message))


@dataclass
class Crew:
    """The clients of one run; the first three are sound."""

    clients: list[Client] = field(default_factory=list)
    cases: int = 0


def crew_of(plans: Sequence[Plan]) -> Crew:
    crew = Crew()
    sound = [Plan(), Plan(), Plan()]
    for i, plan in enumerate([*sound, *plans]):
        name = f"sound-{i}" if i < len(sound) else f"h{i:02}"
        crew.clients.append(Client(name, (2, 3, 5, 1)[i % 4], plan, crew))
    return crew


def _as_sent(content: RecordDict, moved):
    """The adapter that the content says, by numpy alone; what did not travel is as it was."""
    tensors = {m: dict(d.tensors()) for m, d in moved.items()}
    for key, array in unbundle(content.array_records["adapter"]).items():
        module, _, name = key.rpartition("/")
        tensors[module][name] = torch.from_numpy(np.frombuffer(array.data, "<f4").reshape(array.shape).copy())
    return {m: DenseDelta(**t) if "W" in t else LowRankDelta(**t) for m, t in tensors.items()}
