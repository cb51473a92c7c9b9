"""One round while it is open: what was asked of whom, and which replies are sound."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.logger import log

from corolla.aggregation import ClientShare, FreshRows, LowRankState, Slots, fill_adapter, only, without
from corolla.client.attach import may_drop
from corolla.client.bundle import release
from corolla.client.protocol import Assignment, Order, Reply, adapter_bytes, arrays_of
from corolla.server.fleet import Fleet
from corolla.server.validation import Rejected, check_arrays, check_numbers, check_receipt, reason_of


class OpenRound:
    """The orders of one round to clients of `fleet`, and what they replied.

    `orders` has them by client, `clients` each client's facts for the round's record; `slots`, if any, take the
    accepted factors in. Where clients may drop components (`drops`), a reply of one that had no start may have fewer.
    """

    def __init__(self, number: int, fleet: Fleet, slots: Slots | None = None, drops: bool = False) -> None:
        self.number, self.fleet, self.slots, self.drops = number, fleet, slots, drops
        self.clients: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.orders: dict[str, Order] = {}
        self._held: dict[str, LowRankState] = {}
        self._least: dict[str, int] = {}

    def ask(self, client: str, order: Order, part: ClientShare) -> None:
        """Notes that `client` was sent `order` with its `part` of the model."""
        self.orders[client] = order
        self._held[client] = self._fixed_factors(client, order, part)
        free = self.drops and may_drop(Assignment(order, part.frozen, part.start))
        self._least[client] = 1 if free else order.rank
        self.clients[client] = {"rank": order.rank, "bytes_down": part.nbytes, "dropped_start": part.dropped}

    def leave_out(self, client: str, reason: str) -> None:
        """Notes that `client` is not asked this round."""
        self.left_out[client] = reason
        where = {"round": self.number, "client": client}
        log(30, "round %d: %s is left out: %s", self.number, client, reason, extra=where)

    def _fixed_factors(self, client: str, order: Order, part: ClientShare) -> LowRankState:
        """L_k before training, where one of its factors is fixed and need not come back; else nothing."""
        if order.trains not in ("A", "B"):
            return {}
        fresh = FreshRows(order.seed, order.fresh_round)
        return fill_adapter(part.start, self.fleet.clients[client].shapes, order.rank, fresh)

    def collect(self, replies: Iterable[Message], deadline: float) -> tuple[dict[str, Reply], dict[str, str]]:
        """The sound replies by client, sorted, and the reason for every client without one."""
        accepted: dict[str, Reply] = {}
        quarantined = dict(self.left_out)
        for message in replies:
            client = message.metadata.group_id.partition(":")[2]
            if client in accepted or client in quarantined:
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
                who, why = reason_of(client or "unknown"), reason_of(error)
                quarantined[who] = why
                log(
                    30, "round %d: reply of %s is quarantined: %s", self.number, who, why,
                    extra={"round": self.number, "client": who},
                )  # fmt: skip
            finally:
                if message.has_content():
                    release(message.content)
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
        try:
            return self._read(message.content, client)
        except ValueError:
            raise
        except Exception as error:  # whatever one client's bytes do to this code, the round is the others' too
            log(40, "the reply of %s cannot be read: a mistake of the server's", client, exc_info=True)
            raise Rejected(f"the reply cannot be read: {type(error).__name__}: {error}") from error

    def _read(self, content: RecordDict, client: str) -> Reply:
        """The reply, checked from what costs nothing to what costs most. Raises ValueError for what is not sound."""
        hello, order = self.fleet.clients[client], self.orders[client]
        check_receipt(Reply.unpack_receipt(content), hello, order)
        check_arrays(arrays_of(content), hello, order, self._least[client])
        reply = Reply.unpack(content, self._held[client])
        check_numbers(reply.adapter)
        return reply
