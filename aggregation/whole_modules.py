"""Modules that are trained whole beside the adapter (a classifier's head): averaged, whatever the method."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from corolla.aggregation.delta import AdapterState
from corolla.aggregation.exact import certify, exact_mean
from corolla.aggregation.method import Method
from corolla.aggregation.state import Certificate, ClientUpdate, GlobalModel, GlobalUpdate


def aggregate_round(
    method: Method,
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    model: GlobalModel,
    heads: Collection[str] = (),
) -> GlobalUpdate:
    """One round's outcome: the method's for the adapter, and Σ p_k ΔW_k for the modules in `heads`.

    The changes of a head are dense and counted from the global model, so their plain average is exact: it is merged,
    and named in the certificate, whose errors are those of both together and whose relative error is the larger one.
    """
    if not heads:
        return method.aggregate(updates, weights, model)
    bodies = [replace(update, adapter=without(update.adapter, heads)) for update in updates]
    body = method.aggregate(bodies, weights, replace(model, merged=without(model.merged, heads)))
    tops = [replace(update, adapter=only(update.adapter, heads)) for update in updates]
    means = {module: delta.single() for module, delta in exact_mean(tops, weights, {}).items()}
    proof = certify(means, tops, weights, {}, claim=f"{', '.join(sorted(heads))} averaged as whole weights")
    return replace(body, merge={**body.merge, **means}, certificate=_both(body.certificate, proof))


def without(adapter: AdapterState, modules: Collection[str]) -> AdapterState:
    """The adapter but for these modules."""
    return {module: delta for module, delta in adapter.items() if module not in modules}


def only(adapter: AdapterState, modules: Collection[str]) -> AdapterState:
    """These modules of the adapter."""
    return {module: delta for module, delta in adapter.items() if module in modules}


def _both(body: Certificate, head: Certificate) -> Certificate:
    return Certificate(
        exact=body.exact and head.exact,
        error=math.hypot(body.error, head.error),
        relative_error=max(body.relative_error, head.relative_error),
        rank=body.rank,
        reason=f"{body.reason}; {head.reason}",
    )
