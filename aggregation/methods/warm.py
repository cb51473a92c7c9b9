"""Warm stacking: exact like FLoRA, and clients go on from the strongest directions instead of from B = 0."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.algebra import add_adapters, without_empty
from corolla.aggregation.exact import certify, low_rank_means
from corolla.aggregation.lowrank import split
from corolla.aggregation.method import Method
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    means = low_rank_means(updates, weights, model.start)
    parts = {module: split(mean, model.start[module].rank) for module, mean in means}
    start = {module: top for module, (top, _) in parts.items()}
    merge = without_empty({module: rest for module, (_, rest) in parts.items()})
    proof = certify(add_adapters(merge, start), updates, weights, model.start, claim="the mean, split by its SVD")
    return GlobalUpdate(merge, start, proof)


def warm() -> Method:
    """Of the exact mean M, the top r (the largest rank of the population) becomes the next start and the rest is
    merged, as FedMomentum does (arXiv:2603.08014; known from its abstract). Clients carry what their rank cannot
    hold. Exact."""
    why = "its clients begin from the top components of the mean and carry the rest"
    rule = ClientRule(carries=True)
    return Method(
        "warm",
        shared_start,
        lambda round: rule,
        _aggregate,
        common_start=True,
        foreign=why,
        merges=True,
        by_product=True,
        of_the_sum=True,
    )
