"""One round while it is open: what was asked of whom, and which replies are sound."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Message
from flwr.common.logger import log

from corolla.aggregation import ClientShare, FreshRows, LowRankState, Slots, fill_adapter, only, without
from corolla.client.protocol import Order, Reply, adapter_bytes
from corolla.server.fleet import Fleet
from corolla.server.validation import Rejected, check_reply


class OpenRound:
    """The orders of one round to clients of `fleet`, and what they replied.

    `orders` has them by client, `clients` each client's facts for the round's record; `slots`, if any, take the
    accepted factors in.
    """

    def __init__(self, number: int, fleet: Fleet, slots: Slots | None = None) -> None:
        self.number, self.fleet, self.slots = number, fleet, slots
        self.clients: dict[str, dict[str, Any]] = {}
        self.orders: dict[str, Order] = {}
        self._held: dict[str, LowRankState] = {}

    def ask(self, client: str, order: Order, part: ClientShare) -> None:
        """Notes that `client` was sent `order` with its `part` of the model."""
        self.orders[client] = order
        self._held[client] = self._fixed_factors(client, order, part)
        self.clients[client] = {"rank": order.rank, "bytes_down": part.nbytes, "dropped_start": part.dropped}

    def _fixed_factors(self, client: str, order: Order, part: ClientShare) -> LowRankState:
        """L_k before training, where one of its factors is fixed and need not come back; else nothing."""
        if order.trains not in ("A", "B"):
            return {}
        fresh = FreshRows(order.seed, order.fresh_round)
        return fill_adapter(part.start, self.fleet.clients[client].shapes, order.rank, fresh)

    def collect(self, replies: Iterable[Message], deadline: float) -> tuple[dict[str, Reply], dict[str, str]]:
        """The sound replies by client, sorted, and the reason for every client without one."""
        accepted: dict[str, Reply] = {}
        quarantined: dict[str, str] = {}
        for message in replies:
            client = message.metadata.group_id.partition(":")[2]
            if client in accepted:
                log(30, "round %d: a second reply of %s is left out: the first one counts", self.number, client)
                self.clients[client]["left_out"] = self.clients[client].get("left_out", 0) + 1
                continue
            try:
                reply = self._accept(message, client)
                accepted[client] = self._in_place(client, reply)
                self.clients[client] = {
                    **reply.metrics,
                    **self.clients[client],
                    "num_examples": reply.num_examples,
                    "processed": reply.processed,
                    "bytes_up": adapter_bytes(message.content.array_records["adapter"]),
                }
            except ValueError as error:
                quarantined[client or "unknown"] = str(error)
                log(30, "round %d: reply of %s is quarantined: %s", self.number, client or "?", error)
        for client in self.orders.keys() - accepted.keys() - quarantined.keys():
            quarantined[client] = f"no reply within {deadline:g} s"
        return {client: accepted[client] for client in sorted(accepted)}, dict(sorted(quarantined.items()))

    def _in_place(self, client: str, reply: Reply) -> Reply:
        """The reply with its factors in the round's stack, so that its message can go; whole weights stay."""
        if not self.slots:
            return reply
        heads = self.fleet.clients[client].heads
        placed = self.slots.put(client, without(reply.adapter, heads))
        return replace(reply, adapter={**placed, **only(reply.adapter, heads)})

    def _accept(self, message: Message, client: str) -> Reply:
        if client not in self.orders:
            raise Rejected(f"a reply must belong to an order of this round, got {message.metadata.group_id!r}")
        if message.has_error():
            raise Rejected(f"the client failed: {message.error.reason or message.error.code}")
        if message.metadata.src_node_id != self.fleet.node(client):
            raise Rejected(
                f"the order went to node {self.fleet.node(client)}, got {message.metadata.src_node_id}'s reply"
            )
        reply = Reply.unpack(message.content, self._held[client])
        check_reply(reply, self.fleet.clients[client], self.orders[client])
        return reply
