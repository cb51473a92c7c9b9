"""FedAvg of full fine-tuning: no adapter, the target modules' weights themselves move."""

from collections.abc import Mapping, Sequence

from corolla.aggregation.exact import certify, exact_means
from corolla.aggregation.method import Method
from corolla.aggregation.start import empty_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

CLAIM = "weights average as they are"


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    merge = {module: delta.single() for module, delta in exact_means(updates, weights, {})}
    return GlobalUpdate(merge, {}, certify(merge, updates, weights, {}, claim=CLAIM))


def full() -> Method:
    """FedAvg (arXiv:1602.05629) of the target modules' whole weights: Σ p_k ΔW_k, dense. Exact; the reference point.

    The base stays as it is; each client trains a dense ΔW beside it, out · in numbers a module.
    """
    why = "its clients train whole weights"
    return Method(
        "full",
        empty_start,
        lambda round: ClientRule(trains=frozenset({"W"})),
        _aggregate,
        foreign=why,
        lasting=True,
        by_product=True,
    )
