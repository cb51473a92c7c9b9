"""FR-LoRA: every round begins at the base's own principal components, and the change of their mean is merged."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.algebra import add_adapters, scale_adapter
from corolla.aggregation.exact import certify
from corolla.aggregation.lowrank import add, scale
from corolla.aggregation.method import Method, require_one_rank
from corolla.aggregation.positions import zero_padded_mean
from corolla.aggregation.start import Principal
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate, Shapes

REASON = "the product of means is not the mean of products"


def _initial(shapes: Shapes, max_rank: int, seed: int, principal: Principal) -> GlobalModel:
    start = principal(shapes, max_rank)
    return GlobalModel(merged=scale_adapter(start, -1.0), start=start)


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    require_one_rank("fr-lora", updates)
    mean = zero_padded_mean(updates, weights, model.start)
    merge = {module: add([mean[module], scale(model.start[module], -1.0)]) for module in mean}
    proof = certify(add_adapters(merge, model.start), updates, weights, model.start, reason=REASON)
    return GlobalUpdate(merge, model.start, proof)


def fr_lora() -> Method:
    """FR-LoRA (ICLR 2025; equation from memory, its text was not at hand): W' = W + B̄ Ā − B_S A_S, and every round
    begins again at S, the principal components of the pre-trained weight (B_S = U √Σ, A_S = √Σ Vᵀ, as PiSSA).

    The base stays as it is: `merged` begins at −S, so that base + merged + S is the base. Clients of one rank. Not
    exact: FedIT's noise, each round.
    """
    why = "its clients begin every round at the base's principal components"
    return Method(
        "fr-lora",
        _initial,
        lambda round: ClientRule(fresh_per_round=False),
        _aggregate,
        mixed_ranks=False,
        common_start=True,
        foreign=why,
        merges=True,
    )
