"""Server optimizers: the round's change is a gradient, and the server takes a step with it (arXiv:2003.00295)."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from corolla.aggregation.algebra import (
    add_adapters,
    compress_adapter,
    norm,
    scale_adapter,
    without_empty,
)
from corolla.aggregation.delta import AdapterState, Delta, LowRankDelta, delta_of
from corolla.aggregation.exact import certify
from corolla.aggregation.lowrank import Budget
from corolla.aggregation.method import Aggregate, Method
from corolla.aggregation.state import ClientUpdate, GlobalModel, GlobalUpdate

VELOCITY, SQUARE = "velocity/", "square/"
"""Where a model's method_state keeps the moments: `velocity/<module>/<tensor>`, `square/<module>`."""


def change_of(update: GlobalUpdate, model: GlobalModel) -> dict[str, Delta]:
    """Δ = merge + start' − S, what a round adds to the global model, in float64."""
    return _double(add_adapters(update.merge, update.start, scale_adapter(model.start, -1.0)))


def fedavgm(method: Method, learning_rate: float = 1.0, momentum: float = 0.9, max_rank: int | None = None) -> Method:
    """FedAvgM (arXiv:1909.06335) on the change: V' = β V + Δ, the model moves by η V', in factors.

    V is re-factored each round, losslessly or to `max_rank`; what that loses is in the certificate. `learning_rate`
    is η, `momentum` is β. What the step adds beyond Δ is merged; the start is the method's own.
    """

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        inner = method.aggregate(updates, weights, model)
        velocity, lost = _moment(inner, model, momentum, 1.0, Budget(max_rank))
        reason = f"FedAvgM: η = {learning_rate:g}, β = {momentum:g}; re-factoring V lost {lost:.1e}"
        step = scale_adapter(_double(velocity), learning_rate)
        return _moved(inner, step, updates, weights, model, reason, _named(VELOCITY, velocity))

    return _wrapped(method, "fedavgm", aggregate)


def module_adam(
    method: Method,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    max_rank: int | None = None,
) -> Method:
    """FedAdam with one scalar a module, which keeps the step low-rank: m' = β₁ m + (1 − β₁) Δ,
    v' = β₂ v + (1 − β₂) mean(Δ²), step η m' / (√v' + τ). No bias correction, as in arXiv:2003.00295.

    `mean` runs over the out · in entries of ΔW, by ‖Δ‖_F² in factors. m is re-factored as FedAvgM's V is.
    """

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        inner = method.aggregate(updates, weights, model)
        moment, lost = _moment(inner, model, momentum, 1 - momentum, Budget(max_rank))
        squares, change = {}, change_of(inner, model)
        for module, delta in moment.items():
            before = float(model.method_state.get(SQUARE + module, torch.zeros(1)))
            moved = norm(change[module]) if module in change else 0.0
            squares[module] = beta2 * before + (1 - beta2) * moved**2 / math.prod(delta.shape)
        rates = {module: learning_rate / (math.sqrt(squares[module]) + tau) for module in squares}
        step = {m: scale_adapter({m: d.double()}, rates[m])[m] for m, d in moment.items()}
        reason = f"FedAdam by module: η = {learning_rate:g}; re-factoring the moment lost {lost:.1e}"
        state = {SQUARE + module: torch.tensor([value], dtype=torch.float64) for module, value in squares.items()}
        return _moved(inner, step, updates, weights, model, reason, _named(VELOCITY, moment) | state)

    return _wrapped(method, "module-adam", aggregate)


def fedadam(
    method: Method, learning_rate: float = 1e-2, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Method:
    """FedAdam (arXiv:2003.00295), entry by entry, on B of a method with a fixed A: m' = β₁ m + (1 − β₁) ΔB,
    v' = β₂ v + (1 − β₂) ΔB², B' = B_S + η m' / (√v' + τ). No bias correction.

    An elementwise step has no low-rank form on ΔW. Raises ValueError for a method whose B is no lasting coordinate.
    """
    if "B" not in method.linear:
        raise ValueError(
            f"fedadam steps entry by entry, which needs a B whose meaning lasts over rounds, got {method.name}: "
            "use ffa, or the server optimizer module-adam or fedavgm"
        )

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        inner = method.aggregate(updates, weights, model)
        start: dict[str, LowRankDelta] = {}
        state: dict[str, Tensor] = {}
        for module, delta in inner.start.items():
            begin = model.start[module].B.double()
            change = delta.B.double() - begin
            m = momentum * _tensor(model, VELOCITY + module, begin) + (1 - momentum) * change
            v = beta2 * _tensor(model, SQUARE + module, begin) + (1 - beta2) * change.square()
            start[module] = LowRankDelta(delta.A.double(), begin + learning_rate * m / (v.sqrt() + tau)).single()
            state |= {VELOCITY + module: m.float(), SQUARE + module: v.float()}
        proof = certify(start, updates, weights, model.start, reason=f"FedAdam on B: η = {learning_rate:g}")
        return GlobalUpdate(inner.merge, start, proof, {**model.method_state, **(inner.method_state or {}), **state})

    return _wrapped(method, "fedadam", aggregate)


OPTIMIZERS: Mapping[str, Callable[..., Method]] = {"fedavgm": fedavgm, "module-adam": module_adam, "fedadam": fedadam}
"""The server optimizers by name: each takes a method and returns one."""


def with_optimizer(method: Method, name: str, **options: float) -> Method:
    """`method` with a server optimizer ("none": itself).

    Raises ValueError for an unknown name, an option that the optimizer does not have, or a method that it cannot drive.
    """
    if name == "none":
        if options:
            raise ValueError(f"{min(options)} needs a server optimizer, got none: set aggregation.server_optimizer")
        return method
    if name not in OPTIMIZERS:
        raise ValueError(f"server optimizer must be one of none, {', '.join(sorted(OPTIMIZERS))}, got {name!r}")
    known = list(inspect.signature(OPTIMIZERS[name]).parameters)[1:]
    if odd := sorted(options.keys() - set(known)):
        raise ValueError(f"{name} has the options {', '.join(known)}, got {odd[0]} = {options[odd[0]]}: leave it out")
    return OPTIMIZERS[name](method, **options)


def _wrapped(method: Method, name: str, aggregate: Aggregate) -> Method:
    why = method.foreign or "its server takes steps with a memory of earlier rounds"
    merges = method.merges or name != "fedadam"
    return replace(method, name=f"{method.name} + {name}", aggregate=aggregate, foreign=why, merges=merges)


def _moment(
    inner: GlobalUpdate, model: GlobalModel, decay: float, share: float, budget: Budget
) -> tuple[dict[str, Delta], float]:
    """decay · V + share · Δ within the budget, and ‖what that lost‖_F."""
    before = scale_adapter(_double(_stored(VELOCITY, model)), decay)
    return compress_adapter(add_adapters(before, scale_adapter(change_of(inner, model), share)), budget)


def _moved(
    inner: GlobalUpdate,
    step: AdapterState,
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    model: GlobalModel,
    reason: str,
    state: Mapping[str, Tensor],
) -> GlobalUpdate:
    """The method's outcome with its change replaced by `step`: merge' = S + step − start'."""
    rest = add_adapters(_double(model.start), step, scale_adapter(_double(inner.start), -1.0))
    merge = without_empty(compress_adapter(rest)[0])
    proof = certify(add_adapters(merge, inner.start), updates, weights, model.start, reason=reason)
    return GlobalUpdate(merge, inner.start, proof, {**model.method_state, **(inner.method_state or {}), **state})


def _double(adapter: AdapterState) -> dict[str, Delta]:
    return {module: delta.double() for module, delta in adapter.items()}


def _named(prefix: str, adapter: AdapterState) -> dict[str, Tensor]:
    return {f"{prefix}{m}/{name}": tensor for m, d in adapter.items() for name, tensor in d.tensors().items()}


def _stored(prefix: str, model: GlobalModel) -> AdapterState:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in model.method_state.items():
        if key.startswith(prefix):
            module, _, name = key.removeprefix(prefix).rpartition("/")
            found.setdefault(module, {})[name] = tensor
    return {module: delta_of(module, tensors) for module, tensors in found.items()}


def _tensor(model: GlobalModel, key: str, like: Tensor) -> Tensor:
    return model.method_state.get(key, torch.zeros_like(like)).double()
