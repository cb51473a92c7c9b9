"""RoLoRA: B in one round, A in the next, so that each round has one factor in common."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify
from corolla.aggregation.method import Method
from corolla.aggregation.positions import sum_positions
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate


def trained(round_number: int) -> frozenset[str]:
    """The factor of a round: B in odd ones (B = 0 at first, so A would get no gradient), A in even ones."""
    return frozenset("B" if round_number % 2 else "A")


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    factor = trained(model.round + 1)
    sums = sum_positions(updates, weights, model.start)
    start = {module: found.of_changes(factor).single() for module, found in sums.items()}
    claim = f"only {min(factor)} moved, and the other factor is common to all"
    return GlobalUpdate({}, start, certify(start, updates, weights, model.start, claim=claim))


def rolora() -> Method:
    """RoLoRA (arXiv:2409.02346, arXiv:2502.01755): FFA-LoRA's rule for the factor of the round, the other one fixed.

    Rounds are counted where they succeeded. Mixed ranks by nested factors, as in FFA-LoRA. Exact.
    """
    why = "its clients train one factor a round, the other being common to all"
    return Method(
        "rolora",
        shared_start,
        lambda round: ClientRule(trains=trained(round), carries=True, fresh_per_round=False),
        _aggregate,
        common_start=True,
        foreign=why,
        lasting=True,
        by_product=True,
    )
