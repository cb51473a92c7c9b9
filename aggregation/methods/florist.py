"""FLoRIST: FLoRA's stack, cut to the components that hold most of its energy."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify, low_rank_means
from corolla.aggregation.lowrank import Budget, add, compress, scale
from corolla.aggregation.method import Method
from corolla.aggregation.start import empty_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate


def florist(energy: float = 0.99) -> Method:
    """FLoRIST (arXiv:2506.09199): of Σ p_k B_k A_k = U S Vᵀ the fewest components with Σ σ_i² ≥ τ Σ σ² are merged.

    `energy` is τ, per module; the same, smaller adapter goes to every client. Exact up to τ: the relative error is at
    most √(1 − τ), 10 % at 0.99. Raises ValueError for a τ outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"florist needs an energy in (0, 1], got {energy}")
    budget = Budget(max_error=(1 - energy) ** 0.5)

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        merge = {}
        for module, mean in low_rank_means(updates, weights, model.start):
            start = [model.start[module].double()] if module in model.start else []
            change = add([mean, *(scale(part, -1.0) for part in start)])  # its clients have no start; others' may
            kept, _ = compress(change, budget)
            merge[module] = add([kept.double(), *start]).single()
        reason = f"components beyond {energy:.0%} of the energy are dropped"
        claim = "all of the energy is kept" if energy == 1 else ""
        proof = certify(merge, updates, weights, model.start, claim=claim, reason=reason)
        return GlobalUpdate(merge, {}, proof)

    return Method(
        "florist", empty_start, lambda round: ClientRule(), aggregate, merges=True, by_product=True, of_the_sum=True
    )
