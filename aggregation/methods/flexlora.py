"""FlexLoRA: the mean of the products, re-factored by SVD; every client goes on from what its rank holds of it."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify, low_rank_means
from corolla.aggregation.lowrank import compress
from corolla.aggregation.method import Method
from corolla.aggregation.start import empty_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

CLAIM = "the mean of the products, re-factored whole"
REASON = "what a client's rank cut off at the start of the round, Σ p_k T_k, is missing from its reply"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    start = {module: compress(mean)[0] for module, mean in low_rank_means(updates, weights, {})}
    start = {**model.start, **start}  # a module that nobody adapted stays
    return GlobalUpdate({}, start, certify(start, updates, weights, model.start, CLAIM, REASON))


def flexlora() -> Method:
    """FlexLoRA (arXiv:2402.11505): Σ p_k B_k A_k = U S Vᵀ; client k starts from V[:, :r_k]ᵀ, U[:, :r_k] S[:r_k].

    The server keeps it whole, in factors; the client cuts and does not carry the rest, which is its initialisation
    noise. Exact where nobody had to cut (round one, or ranks as large as the mean's).
    """
    return Method("flexlora", empty_start, lambda round: ClientRule(), _aggregate, by_product=True)
