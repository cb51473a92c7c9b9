"""Clients that begin at a part of the base's own weights: S = B_S A_S is trained, and −S is merged beside the base."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from corolla.aggregation.algebra import add_adapters, compress_adapter, scale_adapter, without_empty
from corolla.aggregation.delta import LowRankDelta, low_rank
from corolla.aggregation.lowrank import add, zeros
from corolla.aggregation.method import Method
from corolla.aggregation.start import Principal
from corolla.aggregation.state import ClientUpdate, GlobalModel, GlobalUpdate, Shapes

REFUSED: Mapping[str, str] = {
    "full": "it has no adapters",
    "flexlora": "its clients drop what their rank does not hold of the mean, which is a part of the base here",
    "hetlora": "it takes components away for good, which are a part of the base here",
}
"""The methods that cannot begin there, and why."""


def with_offset(method: Method, name: str) -> Method:
    """`method` whose first model is merged = −S, start = S, so that base + merged + start is the base.

    `name` is that of the kind of adapter, and S what the server's `principal` finds in the base. A method with a start
    of its own goes on from S as it goes on from any. One that begins afresh each round (flora, florist) begins each
    round at S again: merge' = M − S, start' = S, and its clients carry what their rank does not hold of S. Where a
    method does not carry, all clients must have one rank: T_k would be missing from the base. FR-LoRA is itself the
    method that begins so each round, and stays as it is. Raises ValueError for a method that has no use for S.
    """
    if why := REFUSED.get(plain := method.name.partition(" + ")[0]):
        raise ValueError(
            f"adapter.kind = {name!r} begins at a part of the base's weights, got aggregation.method = {plain!r}: "
            f"{why}; use flora or warm"
        )
    if plain == "fr-lora":
        return method
    begun = replace(method, name=f"{method.name} + {name}", initial=offset_start, merges=True, common_start=True)
    if not method.common_start:
        return replace(
            begun,
            constrain=lambda round: replace(method.constrain(round), carries=True),
            aggregate=lambda updates, weights, model: _begun_again(method, updates, weights, model),
            foreign=method.foreign or "its clients begin every round at a part of the base's weights",
        )
    return begun if method.constrain(1).carries else replace(begun, mixed_ranks=False)


def offset_start(shapes: Shapes, max_rank: int, seed: int, principal: Principal) -> GlobalModel:
    """merged = −S, start = S of `max_rank` components; those that a small module lacks are zero, and drawn by clients.

    Raises ValueError where the server has no base to find S in.
    """
    found = principal(shapes, max_rank)
    start = {module: _widened(delta, max_rank) for module, delta in found.items()}
    return GlobalModel(merged=scale_adapter(found, -1.0), start=start)


def _widened(delta: LowRankDelta, rank: int) -> LowRankDelta:
    return add([delta, zeros(*delta.shape, rank - delta.rank)]) if delta.rank < rank else delta


def _begun_again(
    method: Method, updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel
) -> GlobalUpdate:
    """The method's outcome as (merge − S) beside the same S: their sum is what it was, and so is its certificate."""
    outcome = method.aggregate(updates, weights, model)
    reached = low_rank(add_adapters(outcome.merge, outcome.start))
    moved = {m: d.double() for m, d in add_adapters(reached, scale_adapter(model.start, -1.0)).items()}
    return replace(outcome, merge=without_empty(compress_adapter(moved)[0]), start=model.start)
