"""Stacking against a plain copy, and re-factoring by QR against a dense SVD."""

import time
from collections.abc import Callable

import torch

from corolla.aggregation import Budget, ClientUpdate, LowRankDelta, add, client_weights, compress, stack

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SIZE = 4096


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


def stack_over_copy(modules: int = 8) -> tuple[str, float, float]:
    """(what, seconds of `stack`, seconds of a copy of the same bytes): FLoRA's ten ranks, some 4096 × 4096 modules."""
    adapters = [{f"m{i}": random_delta(rank) for i in range(modules)} for rank in RANKS]
    updates = [ClientUpdate(f"c{k}", k + 1, adapter) for k, adapter in enumerate(adapters)]
    weights = client_weights(updates)
    factors = [f for u in updates for d in u.adapter.values() for f in (d.A, d.B)]
    return (
        f"stack, {modules} modules of {SIZE}², ranks {'+'.join(map(str, RANKS))} / copy of the same bytes",
        best_of(5, lambda: stack(updates, weights)),
        best_of(5, lambda: [factor.clone() for factor in factors]),
    )


def dense_svd_over_compress() -> tuple[str, float, float]:
    """(what, seconds of a dense SVD, seconds of `compress`) at 4096 × 4096 and R = 160."""
    delta = add([random_delta(rank) for rank in RANKS])
    fast = best_of(3, lambda: compress(delta, Budget(max_rank=32)))
    dense = delta.dense()
    return f"dense SVD / compress, {SIZE}², R = {delta.rank}", best_of(1, lambda: torch.linalg.svd(dense)), fast
