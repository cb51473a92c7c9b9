"""Aggregation against what it cannot do without: a copy of the bytes, a QR of each module, a dense SVD."""

import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from benchmarks.memory import peak_bytes
from corolla.aggregation import (
    Budget,
    ClientUpdate,
    GlobalModel,
    LowRankDelta,
    Slots,
    build_method,
    client_weights,
    compress,
    low_rank,
    measure_noise,
    stack,
)
from corolla.aggregation.lowrank import add, triangular

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
"""FLoRA's ten clients."""

SIZE, MODULES = 4096, 64
"""Llama-7B's query and value projections."""

Ratio = tuple[str, float, float]
"""(what, first, second): seconds, or MiB where it says so."""


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def random_delta(rank: int) -> LowRankDelta:
    """A delta of SIZE × SIZE."""
    return LowRankDelta(torch.randn(rank, SIZE), torch.randn(SIZE, rank))


@cache
def llama_round() -> tuple[ClientUpdate, ...]:
    """One round's replies, MODULES modules of ten clients: 320 MiB."""
    adapters = ({f"m{i}": random_delta(rank) for i in range(MODULES)} for rank in RANKS)
    return tuple(ClientUpdate(f"c{k}", k + 1, adapter) for k, adapter in enumerate(adapters))


def factors(updates: tuple[ClientUpdate, ...]) -> Iterator[torch.Tensor]:
    """Every factor of every reply."""
    return (tensor for u in updates for delta in u.adapter.values() for tensor in delta.tensors().values())


def in_slots(updates: tuple[ClientUpdate, ...]) -> list[ClientUpdate]:
    """The replies in the places that a server has for them."""
    shapes = {u.client_id: {m: d.shape for m, d in u.adapter.items()} for u in updates}
    slots = Slots(shapes, dict(zip(shapes, RANKS, strict=True)))
    return [ClientUpdate(u.client_id, u.num_examples, slots.put(u.client_id, u.adapter)) for u in updates]


def stack_over_copy() -> Ratio:
    """Stacking Llama-7B's round against a plain copy of its bytes."""
    updates = llama_round()
    weights = client_weights(updates)
    what = f"stack, {MODULES} modules of {SIZE}², ranks {'+'.join(map(str, RANKS))} / copy of the same bytes, s"
    return (
        what,
        best_of(8, lambda: stack(updates, weights)),
        best_of(8, lambda: [factor.clone() for factor in factors(updates)]),
    )


def slots_over_copy() -> Ratio:
    """Stacking the same round where every reply is in its slot, as the server has it, against the same copy."""
    updates = llama_round()
    weights = client_weights(updates)
    placed = in_slots(updates)
    what = "stack of replies that are in their slots / copy of the same bytes, s"
    return (
        what,
        best_of(8, lambda: stack(placed, weights)),
        best_of(8, lambda: [factor.clone() for factor in factors(updates)]),
    )


def stack_memory() -> Ratio:
    """The memory that stacking takes beside the replies, against their bytes."""
    updates = llama_round()
    weights = client_weights(updates)
    size = sum(factor.nbytes for factor in factors(updates))
    return "stack, peak memory beside the replies / their bytes, MiB", peak_bytes(lambda: stack(updates, weights)), size


def streamed_memory() -> Ratio:
    """The memory of a whole round that comes reply by reply: slots and stack, against the replies' bytes."""
    updates = llama_round()
    weights = client_weights(updates)
    size = sum(factor.nbytes for factor in factors(updates))
    what = "replies put in their slots one by one, and stacked: peak memory / the replies' bytes, MiB"
    return what, peak_bytes(lambda: stack(in_slots(updates), weights)), size


def certified_over_qr() -> Ratio:
    """FLoRA's round with its certificate against one QR of each module's stacks."""
    updates = llama_round()
    weights, method = client_weights(updates), build_method("flora")
    work = best_of(1, lambda: method.aggregate(updates, weights, GlobalModel()))
    return f"stack with its certificate, {MODULES} modules / one QR of both stacks of each, s", work, _qr(updates)


def noise_over_qr() -> Ratio:
    """The noise of every method against one QR of each module's stacks."""
    updates = llama_round()
    weights, method = client_weights(updates), build_method("flora")
    work = best_of(1, lambda: measure_noise(updates, weights, GlobalModel(), method))
    return f"noise of every method, {MODULES} modules / one QR of both stacks of each, s", work, _qr(updates)


def _qr(updates: tuple[ClientUpdate, ...]) -> float:
    def work() -> None:
        for module in updates[0].adapter:
            whole = add([low_rank(u.adapter)[module] for u in updates])
            triangular(whole.B), triangular(whole.A.T)

    return best_of(1, work)


def dense_svd_over_compress() -> Ratio:
    """A dense SVD against `compress`, at 4096 × 4096 and R = 160."""
    delta = add([random_delta(rank) for rank in RANKS])
    fast = best_of(3, lambda: compress(delta, Budget(max_rank=32)))
    dense = delta.dense()
    return f"dense SVD / compress to rank 32, {SIZE}², R = {delta.rank}, s", best_of(1, lambda: _svd(dense)), fast


def _svd(matrix: torch.Tensor) -> object:
    return torch.linalg.svd(matrix)
