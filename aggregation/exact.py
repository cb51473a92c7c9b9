"""The exact outcome of a round, and the proof that a method reached it."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from corolla.aggregation.algebra import adapter_size, add, module_distance, norm, ranks, scale
from corolla.aggregation.delta import AdapterState, Delta, LowRankDelta, LowRankState, low_rank
from corolla.aggregation.state import Certificate, ClientUpdate

EXACT = 1e-6
"""Largest relative error that float32 rounding of factors may leave."""


def in_order(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """By client id: the order in which every sum runs."""
    return sorted(updates, key=lambda update: update.client_id)


def modules_of(updates: Sequence[ClientUpdate], start: AdapterState) -> list[str]:
    """Every module that a client or the start holds, sorted."""
    return sorted({module for update in updates for module in update.adapter} | set(start))


def exact_mean(updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState) -> dict[str, Delta]:
    """M = Σ_k p_k (L_k + T_k) in float64, in client-id order: `[p_k B_k …, B_S diag(q)] @ [A_k …; A_S]`.

    T_k, the components of the start S that client k does not hold, is put back with q_i = Σ p_k over the clients
    that lack component i, so M = S + Σ p_k (L_k − S_k): where nobody moves, M = S. With an empty start this is
    FLoRA's stack (arXiv:2409.05976), and a module that only some clients adapt is summed over those.
    """
    return dict(exact_means(updates, weights, start))


def exact_means(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> Iterator[tuple[str, Delta]]:
    """(module, M) one by one, so that one module is held in float64 at a time."""
    for module in modules_of(updates, start):
        yield module, module_mean(module, updates, weights, start)


def low_rank_means(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> Iterator[tuple[str, LowRankDelta]]:
    """As `exact_means`, known to be low-rank. Raises ValueError, naming the module, where it is not."""
    for module, mean in exact_means(updates, weights, start):
        yield module, low_rank({module: mean})[module]


def module_mean(
    module: str, updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> Delta:
    """M of one module, in float64."""
    return add([scale(part.double(), weight) for part, weight in mean_parts(module, updates, weights, start)])


def mean_parts(
    module: str, updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> list[tuple[Delta, float]]:
    """The changes that M of one module is the weighted sum of: (L_k, p_k) by client, and Σ p_k T_k."""
    parts: list[tuple[Delta, float]] = [
        (u.adapter[module], weights[u.client_id]) for u in in_order(updates) if module in u.adapter
    ]
    if module in start:
        parts.append((remainder(start[module], module, updates, weights), 1.0))
    return parts


def remainder(
    start: LowRankDelta, module: str, updates: Sequence[ClientUpdate], weights: Mapping[str, float]
) -> LowRankDelta:
    """Σ_k p_k T_k of one module: the start's components, each times the weight of the clients without it."""
    q = torch.zeros(start.rank, dtype=torch.float64)
    for update in in_order(updates):
        held = update.adapter[module].rank if module in update.adapter else 0
        q[held:] += weights[update.client_id]
    lacking = q > 0
    return LowRankDelta(start.A[lacking], (start.B[:, lacking].double() * q[lacking]).to(start.B.dtype))


def certify(
    outcome: AdapterState,
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    start: LowRankState,
    claim: str = "",
    reason: str = "",
) -> Certificate:
    """How far `outcome` (merge + start') is from M, by QR in float64, one module at a time.

    The error is relative to Σ p_k ‖L_k‖_F + ‖Σ p_k T_k‖_F, since M itself may cancel. A method that can be exact says
    why in `claim`, one that can be off says why in `reason`; the numbers decide. A method that knows no reason to be
    off, and is, is reported as one whose claim is false.
    """
    error, put_back = 0.0, 0.0
    for module in sorted({*modules_of(updates, start), *outcome}):
        target = {module: module_mean(module, updates, weights, start)} if _known(module, updates, start) else {}
        error += module_distance(module, outcome, target) ** 2
        if module in start:
            put_back += norm(remainder(start[module], module, updates, weights)) ** 2
    size = sum(weights[u.client_id] * adapter_size(u.adapter) for u in updates) + math.sqrt(put_back)
    relative = math.sqrt(error) / size if size else math.sqrt(error)
    exact = bool(claim) and relative <= EXACT
    if claim and not exact and not reason:
        reason = f"claimed exact ({claim}), but the error is {relative:.1e} of the sum"
    rank = max(ranks(outcome).values(), default=0)
    return Certificate(exact, math.sqrt(error), relative, rank, claim if exact else reason)


def _known(module: str, updates: Sequence[ClientUpdate], start: LowRankState) -> bool:
    return module in start or any(module in update.adapter for update in updates)
