"""FedIT: the factors are averaged, which is not the average of the updates."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify
from corolla.aggregation.method import Method, require_one_rank
from corolla.aggregation.positions import zero_padded_mean
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    require_one_rank("fedit", updates)
    start = zero_padded_mean(updates, weights, model.start)
    proof = certify(start, updates, weights, model.start, reason="the product of means is not the mean of products")
    return GlobalUpdate({}, start, proof)


def fedit() -> Method:
    """FedIT (arXiv:2305.05644): Ā = Σ p_k A_k, B̄ = Σ p_k B_k, for clients of one rank.

    Not exact: Σ p_k B_k A_k − B̄ Ā = Σ p_k (B_k − B̄)(A_k − Ā), the weighted cross-covariance of the factors.
    """
    return Method(
        "fedit",
        shared_start,
        lambda round: ClientRule(),
        _aggregate,
        mixed_ranks=False,
        common_start=True,
        lasting=True,
    )
