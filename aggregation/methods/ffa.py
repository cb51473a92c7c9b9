"""FFA-LoRA: A is common and fixed, B is averaged, and nothing is lost."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify
from corolla.aggregation.method import Method
from corolla.aggregation.positions import sum_positions
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

TRAINS = frozenset({"B"})
CLAIM = "A is common to all, so the mean of the products is the product of A and the mean of B"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    sums = sum_positions(updates, weights, model.start)
    start = {module: found.of_changes(TRAINS).single() for module, found in sums.items()}
    return GlobalUpdate({}, start, certify(start, updates, weights, model.start, claim=CLAIM))


def ffa() -> Method:
    """FFA-LoRA (arXiv:2403.12313): A_S stays, B' = B_S + Σ p_k pad(B_k − B_S[:, :r_k]).

    Mixed ranks by nested A: client k trains on the first r_k rows of A_S and carries the rest. Exact.
    """
    rule = ClientRule(trains=TRAINS, carries=True, fresh_per_round=False)
    why = "its clients train B alone, on an A that all share"
    return Method(
        "ffa",
        shared_start,
        lambda round: rule,
        _aggregate,
        common_start=True,
        foreign=why,
        linear=TRAINS,
        lasting=True,
        by_product=True,
    )
