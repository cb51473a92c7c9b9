"""The start of LoRA-SB: bases from the sum of the clients' first gradients, of which the server sees sketches alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message
from flwr.common.logger import log

from corolla.adapters import BASES
from corolla.aggregation import (
    SIDES,
    ClientRule,
    ClientShare,
    Delta,
    DenseDelta,
    GradientSketch,
    Shapes,
    client_weights,
    leading_pairs,
    random_matrices,
    sum_sketches,
    widths,
)
from corolla.client.protocol import WHOLE, Assignment, Order
from corolla.server.fleet import Fleet
from corolla.server.round import OpenRound
from corolla.server.size import reply_too_large

Ask = Callable[[Iterable[Message]], Iterable[Message]]


class SketchFleet(Fleet):
    """The clients of `fleet` as those who send sketches, of widths by `shapes`, (out, in), and the rank."""

    def __init__(self, fleet: Fleet, shapes: Shapes) -> None:
        super().__init__(fleet.settings, fleet.base_hash, fleet.deadline)
        self._fleet = fleet
        for client, hello in fleet.clients.items():
            own: dict[str, tuple[int, int]] = {}
            for module in hello.shapes:
                (out, inner), (width, height) = shapes[module], widths(shapes[module], hello.rank)
                own |= dict(zip((f"{module}/{side}" for side in SIDES), ((out, width), (height, inner)), strict=True))
            self.clients[client] = replace(hello, shapes=own, heads={})

    def node(self, client_id: str) -> int:
        """The node id of a client."""
        return self._fleet.node(client_id)


def first_adapter(
    fleet: Fleet,
    shapes: Shapes,
    orders: Mapping[str, Order],
    message: Callable[[Assignment, str], Message],
    ask: Ask,
    weights: str,
    least: int,
    largest: float,
    step: float,
) -> tuple[dict[str, Delta], dict[str, Any]]:
    """C (r, r), L (out, r) and R (r, in) of every module: what the global model of LoRA-SB begins with.

    And what the run's record says of it: the bytes that each client sent, and who was left out and why.

    Every client is asked, by its order of round 0, for sketches of the mean gradient over the examples of its first
    round; what is not sound is left out and named, as in any round. `shapes` are the (out, in) of the modules,
    `weights` the rule for p_k, `largest` a message's GiB. G ≈ Σ p_k G_k gives L, S and R; C = −η √(out·in) diag(S) /
    ‖S‖, as long as a step −η sign(G) of every weight, which the paper takes; a sign is not to be had from a sketch.
    Raises RuntimeError for fewer than `least` sound replies, ValueError for a gradient that no bases can be made from.
    """
    sketching = SketchFleet(fleet, shapes)
    opened = OpenRound(0, sketching)
    messages = []
    for client, order in orders.items():
        if reason := reply_too_large(sketching.clients[client], 0, [ClientRule(frozenset({WHOLE}))], largest):
            opened.leave_out(client, reason)
            continue
        opened.ask(client, order, ClientShare({}, {}, 0.0))
        messages.append(message(Assignment(order, {}, {}), client))
    accepted, quarantined = opened.collect(ask(messages), fleet.deadline)
    if len(accepted) < max(1, least):
        reasons = "; ".join(f"{client}: {why}" for client, why in quarantined.items())
        raise RuntimeError(
            f"bases need the first gradients of {max(1, least)} clients, got {len(accepted)} sound ones ({reasons})"
        )
    shares = client_weights([reply.update() for reply in accepted.values()], weights)
    found: dict[str, Delta] = {}
    first = next(iter(accepted))
    for module in sorted(fleet.clients[first].shapes):
        sketches = {
            client: GradientSketch(*(reply.adapter[f"{module}/{side}"].dense() for side in SIDES))
            for client, reply in accepted.items()
        }
        found |= _begin(module, shapes[module], orders[first], sum_sketches(sketches, shares), step)
    sent = {client: opened.clients[client]["bytes_up"] for client in accepted}
    size = sum(sent.values()) / 2**20
    log(20, "bases are made from the first gradients of %s: %.1f MiB of sketches", ", ".join(accepted), size)
    return found, {"bytes_up": sent, "quarantined": quarantined}


def _begin(module: str, shape: tuple[int, int], order: Order, sketch: GradientSketch, step: float) -> dict[str, Delta]:
    rank = min(order.rank, *shape)
    try:
        pairs = leading_pairs(sketch, random_matrices(module, shape, order.rank, order.seed)[1], rank)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error
    length = step * math.sqrt(shape[0] * shape[1]) / float(pairs.S.norm())
    parts = {"": torch.diag(-length * pairs.S), BASES[0]: pairs.U, BASES[1]: pairs.V}
    return {module + name: DenseDelta(part).single() for name, part in parts.items()}
