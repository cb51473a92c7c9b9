"""RBLA: every component is averaged over the clients that hold it."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify
from corolla.aggregation.method import Method
from corolla.aggregation.positions import sum_positions
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

REASON = "a component of few clients counts as if all had it, and the product of means is not the mean of products"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    sums = sum_positions(updates, weights, model.start)
    start = {module: found.over_holders().single() for module, found in sums.items()}
    return GlobalUpdate({}, start, certify(start, updates, weights, model.start, reason=REASON))


def rbla() -> Method:
    """RBLA (arXiv:2408.08699), also FediLoRA's dimension-wise reweighting: row i of A is Σ p_k A_k[i] / π_i over the
    clients with r_k > i, π_i = Σ p_k over them; columns of B likewise.

    Not exact: component i reaches the model as E_i[b] E_i[a], too large by 1/π_i.
    """
    return Method("rbla", shared_start, lambda round: ClientRule(), _aggregate, common_start=True, lasting=True)
