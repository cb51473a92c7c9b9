"""The exact outcome of a round, and the proof that a method reached it."""

from collections.abc import Mapping, Sequence

import torch

from corolla.aggregation.lowrank import adapter_norm, add, distance, double, ranks, scale
from corolla.aggregation.state import AdapterState, Certificate, ClientUpdate, LowRankDelta

EXACT = 1e-6
"""Largest relative error that float32 rounding of factors may leave."""


def exact_mean(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: AdapterState
) -> dict[str, LowRankDelta]:
    """M = Σ_k p_k (L_k + T_k) in float64 factors, in client-id order: `[p_k B_k …, B_S diag(q)] @ [A_k …; A_S]`.

    T_k, the components of the start S that client k does not hold, is put back with q_i = Σ p_k over the clients
    that lack component i, so M = S + Σ p_k (L_k − S_k): where nobody moves, M = S. With an empty start this is
    FLoRA's stack (arXiv:2409.05976), and a module that only some clients adapt is summed over those.
    """
    ordered = sorted(updates, key=lambda update: update.client_id)
    modules = sorted({module for update in ordered for module in update.adapter} | set(start))
    mean = {}
    for module in modules:
        parts = [scale(u.adapter[module].double(), weights[u.client_id]) for u in ordered if module in u.adapter]
        if module in start:
            parts.append(_put_back(start[module].double(), module, ordered, weights))
        mean[module] = add(parts)
    return mean


def _put_back(
    start: LowRankDelta, module: str, updates: Sequence[ClientUpdate], weights: Mapping[str, float]
) -> LowRankDelta:
    """Σ_k p_k T_k of one module: the start's components, each times the weight of the clients without it."""
    q = torch.zeros(start.rank, dtype=torch.float64)
    for update in updates:
        held = update.adapter[module].rank if module in update.adapter else 0
        q[held:] += weights[update.client_id]
    lacking = q > 0
    return LowRankDelta(start.A[lacking], start.B[:, lacking] * q[lacking])


def certify(
    outcome: AdapterState,
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    start: AdapterState,
    claim: str = "",
    reason: str = "",
) -> Certificate:
    """How far `outcome` (merge + start') is from M, by QR in float64.

    The error is relative to Σ p_k ‖L_k‖_F + ‖Σ p_k T_k‖_F, since M itself may cancel. A method that claims
    exactness says why in `claim`; one that does not gives `reason`. A claim that the numbers contradict is reported
    as not exact.
    """
    target = exact_mean(updates, weights, start)
    error = distance(outcome, target)
    put_back = exact_mean([ClientUpdate(u.client_id, 0, _hollow(u.adapter)) for u in updates], weights, start)
    size = sum(weights[u.client_id] * adapter_norm(double(u.adapter)) for u in updates) + adapter_norm(put_back)
    relative = error / size if size else error
    exact = bool(claim) and relative <= EXACT
    if claim and not exact:
        reason = f"claimed exact ({claim}), but the error is {relative:.1e} of the sum"
    return Certificate(exact, error, relative, max(ranks(outcome).values(), default=0), claim if exact else reason)


def _hollow(adapter: AdapterState) -> AdapterState:
    """The same modules and ranks with B = 0: what is left of M is Σ p_k T_k."""
    return {module: LowRankDelta(delta.A, torch.zeros_like(delta.B)) for module, delta in adapter.items()}
