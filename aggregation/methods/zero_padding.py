"""Zero-padding: factors of smaller rank are padded with zeros, then averaged."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify
from corolla.aggregation.method import Method
from corolla.aggregation.positions import zero_padded_mean
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

REASON = "padding with zeros shrinks what only some clients hold, and the product of means is not the mean of products"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    start = zero_padded_mean(updates, weights, model.start)
    return GlobalUpdate({}, start, certify(start, updates, weights, model.start, reason=REASON))


def zero_padding() -> Method:
    """Zero-padding (the baseline of arXiv:2409.05976; HETLoRA without its weights): Σ p_k pad(A_k), Σ p_k pad(B_k).

    Not exact: with π_i the weight of the clients that hold component i, it reaches the model as π_i² E_i[b] E_i[a]
    instead of π_i E_i[b a].
    """
    return Method("zero-padding", shared_start, lambda round: ClientRule(), _aggregate, common_start=True, lasting=True)
