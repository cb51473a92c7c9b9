"""FedEx-LoRA: the mean factors are where clients go on from, and what they miss of the exact mean is merged."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.algebra import add_adapters
from corolla.aggregation.exact import certify, low_rank_means
from corolla.aggregation.lowrank import add, compress, scale
from corolla.aggregation.method import Method
from corolla.aggregation.positions import sum_positions
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

BOTH = frozenset({"A", "B"})
CLAIM = "what the mean factors miss of the mean is merged"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    sums = sum_positions(updates, weights, model.start)
    start = {module: found.of_changes(BOTH).single() for module, found in sums.items()}
    means = low_rank_means(updates, weights, model.start)
    merge = {module: compress(add([mean, scale(start[module].double(), -1.0)]))[0] for module, mean in means}
    proof = certify(add_adapters(merge, start), updates, weights, model.start, claim=CLAIM)
    return GlobalUpdate(merge, start, proof)


def fedex() -> Method:
    """FedEx-LoRA (arXiv:2410.09432): A' = A_S + Σ p_k pad(A_k − A_S[:r_k]), B' likewise; M − B' A' is merged.

    With one rank these are FedIT's means, and the residual is FedIT's noise. Mixed ranks, which the paper does not
    have, by averaging changes; clients carry what their rank cannot hold. Exact.
    """
    rule = ClientRule(carries=True)
    why = "its clients begin from the mean factors beside the merged residual"
    return Method(
        "fedex",
        shared_start,
        lambda round: rule,
        _aggregate,
        common_start=True,
        foreign=why,
        lasting=True,
        merges=True,
    )
