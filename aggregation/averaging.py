"""FedIT and zero-padding: the factors are averaged by position, which is not the average of the updates."""

from collections.abc import Mapping, Sequence

import torch

from corolla.aggregation.exact import certify
from corolla.aggregation.method import Method
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import AdapterState, ClientRule, ClientUpdate, GlobalModel, GlobalUpdate, LowRankDelta


def average_by_position(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: AdapterState
) -> dict[str, LowRankDelta]:
    """(Σ p_k pad(B_k), Σ p_k pad(A_k)) per module, as wide as `start`: component i of all clients is one component.

    A component that no client of this round holds keeps its value of `start`. Raises ValueError for a client that
    has more components than the start.
    """
    ordered = sorted(updates, key=lambda update: update.client_id)
    return {module: _average(module, delta, ordered, weights) for module, delta in sorted(start.items())}


def _average(
    module: str, start: LowRankDelta, updates: Sequence[ClientUpdate], weights: Mapping[str, float]
) -> LowRankDelta:
    a, b = torch.zeros_like(start.A, dtype=torch.float64), torch.zeros_like(start.B, dtype=torch.float64)
    widest = 0
    for update in updates:
        delta = update.adapter.get(module)
        if delta is None:
            continue
        if delta.rank > start.rank:
            raise ValueError(
                f"{module} of client {update.client_id} must have at most {start.rank} components, got {delta.rank}"
            )
        a[: delta.rank] += weights[update.client_id] * delta.A.double()
        b[:, : delta.rank] += weights[update.client_id] * delta.B.double()
        widest = max(widest, delta.rank)
    a[widest:], b[:, widest:] = start.A[widest:].double(), start.B[:, widest:].double()
    return LowRankDelta(a, b).single()


def _require_one_rank(updates: Sequence[ClientUpdate]) -> None:
    """Raises ValueError naming the first client whose modules or ranks differ from the others'."""
    first = updates[0]
    expected = {module: delta.rank for module, delta in first.adapter.items()}
    for update in updates[1:]:
        got = {module: delta.rank for module, delta in update.adapter.items()}
        if got != expected:
            differing = sorted(m for m in expected.keys() | got.keys() if expected.get(m) != got.get(m))[0]
            raise ValueError(
                f"fedit averages clients of one rank, got rank {expected.get(differing, 'none')} from "
                f"{first.client_id} and {got.get(differing, 'none')} from {update.client_id} for {differing}; "
                "use flora or zero-padding for mixed ranks or modules"
            )


def _average_factors(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    start = average_by_position(updates, weights, model.start)
    proof = certify(start, updates, weights, model.start, reason="the product of means is not the mean of products")
    return GlobalUpdate({}, start, proof)


def _fedit(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    _require_one_rank(updates)
    return _average_factors(updates, weights, model)


def fedit() -> Method:
    """FedIT (arXiv:2305.05644): FedAvg of A and of B, for clients of one rank. Not exact: the error is the weighted
    cross-covariance Σ p_k (B_k − B̄)(A_k − Ā)."""
    return Method("fedit", shared_start, lambda round: ClientRule(), _fedit, mixed_ranks=False, common_start=True)


def zero_padding() -> Method:
    """Zero-padding (as in HETLoRA, arXiv:2401.06432, without its weights): smaller ranks are padded with zeros, then
    averaged. Not exact: component i comes out too small by the weight of the clients that hold it."""
    return Method("zero-padding", shared_start, lambda round: ClientRule(), _average_factors, common_start=True)
