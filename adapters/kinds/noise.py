"""What averaging the parameters of a kind would make of replies, against their exact mean, on the weights."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corolla.adapters.carry import added
from corolla.adapters.kinds.kind import Kind, attach, base_weight, split
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import (
    Against,
    ClientUpdate,
    Delta,
    GlobalModel,
    Spectrum,
    add,
    against,
    build_method,
    entropy_gap,
    in_order,
    pool,
    pooled_energy,
    spectrum,
)

RULE, PARAMETERS = "flora", "parameter-averaging"
"""What is compared: the kind's own rule, and the mean of PEFT's parameters."""


@dataclass(frozen=True)
class _Module:
    """One module of a round: its exact change, what each outcome made of it, and its clients' parts by name."""

    exact: Spectrum
    outcomes: Mapping[str, Against]
    inner: Mapping[str, float]
    entropy: float


def measure_parameters(
    base: nn.Module,
    kind: Kind,
    spec: AdapterSpec,
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    model: GlobalModel,
) -> dict[str, Any]:
    """The noise of a round of this kind, in the form of `corolla.aggregation.measure_noise`.

    Everything is a change of the weights themselves, in float64, on top of what `model` has merged: one module at a
    time, but as (out, in) matrices, so it takes the base and as long as their singular values do.
    """
    began = time.perf_counter()
    combined = build_method(RULE).aggregate(updates, weights, model).merge
    modules, bytes_down = {}, {RULE: 0, PARAMETERS: 0}
    merged, bases = split(kind, model.merged)
    with attach(base, kind, spec, bases) as (_, layers):
        for name, layer in sorted(layers.items()):
            replies = {u.client_id: u.adapter[name] for u in in_order(updates) if name in u.adapter}
            if not replies:
                continue
            outcomes = {RULE: combined[name]}
            if averaged := kind.average(layer, [*replies.values()], [weights[client] for client in replies]):
                outcomes[PARAMETERS] = averaged.single()
            for method, outcome in outcomes.items():
                bytes_down[method] += outcome.nbytes
            change = partial(_change, kind, layer, merged.get(name))
            modules[name] = _measure(change, replies, weights, outcomes)
    clients = [update.client_id for update in in_order(updates)]
    exact = {name: module.exact for name, module in modules.items()}
    size = sum(found.norm**2 for found in exact.values())
    methods = {}
    for method, nbytes in bytes_down.items():
        by_module = {name: module.outcomes[method] for name, module in modules.items() if method in module.outcomes}
        if not by_module:
            methods[method] = {"not_applicable": f"the parameters of {kind.name} do not travel"}
            continue
        error = sum(outcome.error**2 for outcome in by_module.values()) ** 0.5  # what every client goes on from
        methods[method] = asdict(pool(by_module, error, dict.fromkeys(clients, nbytes)))
    parts = {c: sum(module.inner.get(c, 0.0) for module in modules.values()) for c in clients}
    own = {name: module.entropy for name, module in modules.items()}
    return {
        "init": "shared",
        "method": RULE,
        "norm": size**0.5,
        "share": {client: part / size if size else 0.0 for client, part in parts.items()},
        "energy": pooled_energy(exact),
        "modules": {name: asdict(found) for name, found in exact.items()},
        "entropy": entropy_gap({name: found.entropy for name, found in exact.items()}, own),
        "methods": methods,
        "seconds": time.perf_counter() - began,
    }


def _change(kind: Kind, layer: Any, merged: Delta | None, delta: Delta) -> Tensor:
    """What coordinates change of a weight (out, in) that carries what is `merged`, in float64."""
    weight = base_weight(layer).double()
    if merged is None:
        return added(kind.unfold(layer, delta), weight)
    before = added(kind.unfold(layer, merged), weight)
    if not kind.continues:
        return added(kind.unfold(layer, delta), weight + before)
    both = add([merged.double(), delta.double()])
    return added(kind.unfold(layer, both), weight) - before


def _measure(
    change: Callable[[Delta], Tensor],
    replies: Mapping[str, Delta],
    weights: Mapping[str, float],
    outcomes: Mapping[str, Delta],
) -> _Module:
    """One module: `outcomes` and the weighted sum of `replies`, all as changes of its weight."""
    changes = {client: weights[client] * change(delta) for client, delta in replies.items()}
    exact = torch.stack([*changes.values()]).sum(0)
    return _Module(
        spectrum(exact),
        {name: against(change(outcome) - exact, exact) for name, outcome in outcomes.items()},
        {client: float((part * exact).sum()) for client, part in changes.items()},
        sum(weights[client] * spectrum(part).entropy for client, part in changes.items()),
    )
