"""FedSVD: FFA-LoRA whose fixed A is renewed each round by the SVD of the product."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify, low_rank_means
from corolla.aggregation.lowrank import split
from corolla.aggregation.method import Method
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

CLAIM = "A is common to all in the round, so the mean has no more rank than A, and its SVD is the same product"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    means = low_rank_means(updates, weights, model.start)
    start = {module: split(mean, model.start[module].rank)[0] for module, mean in means}
    return GlobalUpdate({}, start, certify(start, updates, weights, model.start, claim=CLAIM))


def fedsvd() -> Method:
    """FedSVD (arXiv:2505.12805): clients train B on a common A; B̄ A = U S Vᵀ, then A' = Vᵀ, B' = U S.

    Components come out ordered by size; one that is zero is drawn afresh by the clients, the same for all. Mixed ranks
    as in FFA-LoRA. Exact.
    """
    rule = ClientRule(trains=frozenset({"B"}), carries=True)
    why = "its clients train B alone, on an A that all share"
    return Method(
        "fedsvd", shared_start, lambda round: rule, _aggregate, common_start=True, foreign=why, by_product=True
    )
