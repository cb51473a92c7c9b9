"""Aggregation noise: what every method would make of the same replies, against their exact mean.

Every rule of aggregation here commutes with a change of orthonormal basis on either side of ΔW. So one QR per module
turns the replies into small cores in one common basis, and each method, the very code that runs in a federation, is
applied to those: nothing of size (out, in) is formed, and no method is written twice.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from corolla.aggregation.coordinates import Federation, in_coordinates
from corolla.aggregation.delta import AdapterState, LowRankState, low_rank
from corolla.aggregation.lowrank import Budget
from corolla.aggregation.method import Method, require_one_rank
from corolla.aggregation.registry import AGGREGATORS, build_method
from corolla.aggregation.rounds import cut
from corolla.aggregation.spectrum import pooled_energy, spectrum
from corolla.aggregation.state import ClientUpdate, GlobalModel, Shapes

TINY = 1e-12
"""A change below TINY times the model it belongs to is no change: nothing is relative to it."""


@dataclass(frozen=True)
class MethodNoise:
    """One method's outcome R against the exact M, over all modules, relative to the exact change C = M − S.

    `relative_error` ‖R − M‖_F / ‖C‖_F; `cosine` and `gain` ⟨R − S, C⟩ / ‖C‖² of the change; `spectral_error`
    max_m ‖R − M‖_2 / max_m ‖C‖_2; `client_error` what clients of their own ranks go on from, as the root of
    Σ p_k error_k². `bytes_down` is the float32 factors of this round's outcome by client, without what was merged
    before; `modules` the relative error of each. None where the change is zero.
    """

    relative_error: float | None
    cosine: float | None
    gain: float | None
    spectral_error: float | None
    client_error: float | None
    bytes_down: Mapping[str, int]
    modules: Mapping[str, float | None]


def measure_noise(
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    model: GlobalModel,
    method: Method,
    init: str = "shared",
    download: Budget = Budget(max_error=1e-3),
) -> dict[str, Any]:
    """What each method would make of these replies, as plain values for a JSON line.

    `method` is the one whose clients made them, judged without its server optimizer; `init` says whether those shared
    their fresh rows of A, which moves FedIT's noise by an order of magnitude, so it stands beside every figure. A
    method that asks something else of its clients is `not_applicable` with the reason. `top-r` keeps the r largest
    components of each module's exact change.
    """
    began = time.perf_counter()
    round_ = in_coordinates(updates, weights, model)
    found: dict[str, Any] = {}
    for name in AGGREGATORS:
        judged = method if name == method.name else build_method(name)
        reason = why_not(judged, method, round_)
        found[name] = {"not_applicable": reason} if reason else asdict(judge(judged, round_, download))
    for rank in sorted(set(round_.ranks.values()) - {0}):
        found[f"top-{rank}"] = asdict(judge_cut(rank, round_))
    spectra = {module: spectrum(core) for module, core in round_.exact.items()}
    return {
        "init": init,
        "method": method.name,
        "norm": _norm(round_.exact),
        "share": shares(round_),
        "energy": pooled_energy(spectra),
        "modules": {module: asdict(found) for module, found in spectra.items()},
        "entropy": entropies(round_),
        "methods": found,
        "seconds": time.perf_counter() - began,
    }


def why_not(judged: Method, replied: Method, round_: Federation) -> str:
    """Why `judged` cannot be judged on replies that the clients of `replied` made; empty where it can."""
    if judged.name == _plain(replied):
        return ""
    if judged.foreign:
        return judged.foreign
    lacking = [
        u.client_id
        for u in round_.updates
        if any(m not in u.adapter or u.adapter[m].rank < s.rank for m, s in round_.model.start.items())
    ]
    if lacking and replied.constrain(round_.model.round + 1).carries:
        return f"{lacking[0]} carried what its rank does not hold, which {judged.name} would drop"
    try:
        if not judged.mixed_ranks:
            require_one_rank(judged.name, round_.updates)
    except ValueError as error:
        return str(error)
    return ""


def _plain(method: Method) -> str:
    """The method's name without its server optimizer."""
    return method.name.partition(" + ")[0]


def judge(method: Method, round_: Federation, download: Budget) -> MethodNoise:
    """A method's noise on these replies."""
    outcome = method.aggregate(round_.updates, round_.weights, round_.model)
    after = GlobalModel(low_rank(outcome.merge), outcome.start, round_.model.round + 1)
    rule = method.constrain(after.round)
    reached = _cores(after.start, round_.mean, _cores(low_rank(after.merged), round_.mean))
    merged = low_rank(cut(after, download)[0].merged)
    errors, bytes_down = {}, {}
    for update in round_.updates:
        held = after.start
        if not rule.carries:
            ranks = {module: delta.rank for module, delta in update.adapter.items()}
            held = {m: delta.first(ranks[m]) for m, delta in after.start.items() if m in ranks}
        bytes_down[update.client_id] = _bytes(merged, round_.shapes) + _bytes(held, round_.shapes)
        computes = _cores(held, round_.mean, _cores(low_rank(after.merged), round_.mean))
        errors[update.client_id] = _norm(_minus(computes, round_.mean))
    return _noise(reached, errors, bytes_down, round_)


def judge_cut(rank: int, round_: Federation) -> MethodNoise:
    """The noise of keeping the `rank` largest components of each module's exact change."""
    reached = {}
    for module, core in round_.exact.items():
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
        reached[module] = round_.mean[module] - core + (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    error = _norm(_minus(reached, round_.mean))
    size = sum(4 * min(rank, *core.shape) * sum(round_.shapes[m]) for m, core in round_.exact.items())
    clients = [update.client_id for update in round_.updates]
    return _noise(reached, dict.fromkeys(clients, error), dict.fromkeys(clients, size), round_)


def _noise(
    reached: Mapping[str, Tensor],
    client_errors: Mapping[str, float],
    bytes_down: Mapping[str, int],
    round_: Federation,
) -> MethodNoise:
    modules = {m: against(reached[m] - round_.mean[m], core) for m, core in round_.exact.items()}
    by_client = math.sqrt(sum(round_.weights[client] * value**2 for client, value in client_errors.items()))
    return pool(modules, by_client, bytes_down, TINY * _norm(round_.mean))


@dataclass(frozen=True)
class Against:
    """One module's outcome against its exact change C: ‖error‖_F and ‖·‖_2, ‖C‖_F and ‖C‖_2, ‖C + error‖_F, and
    ⟨C + error, C⟩."""

    error: float
    spectral_error: float
    size: float
    spectral_size: float
    moved: float
    inner: float


def against(error: Tensor, exact: Tensor) -> Against:
    """What `error` = R − M makes of a module's `exact` change, of one shape."""
    change = exact + error
    return Against(
        float(error.norm()),
        float(torch.linalg.matrix_norm(error, 2)),
        float(exact.norm()),
        float(torch.linalg.matrix_norm(exact, 2)),
        float(change.norm()),
        float((change * exact).sum()),
    )


def pool(
    modules: Mapping[str, Against], client_error: float, bytes_down: Mapping[str, int], tiny: float = 0.0
) -> MethodNoise:
    """A method's noise over all modules; `client_error` is ‖·‖_F, a change of no more than `tiny` is none."""
    found = modules.values()
    error, size, moved = (math.hypot(*(getattr(m, name) for m in found)) for name in ("error", "size", "moved"))
    if size <= tiny:
        return MethodNoise(None, None, None, None, None, bytes_down, dict.fromkeys(modules))
    inner = sum(module.inner for module in found)
    return MethodNoise(
        relative_error=error / size,
        cosine=inner / (size * moved) if moved else None,
        gain=inner / size**2,
        spectral_error=max(m.spectral_error for m in found) / max(m.spectral_size for m in found),
        client_error=client_error / size,
        bytes_down=bytes_down,
        modules={name: _ratio(module.error, module.size) for name, module in modules.items()},
    )


def entropies(round_: Federation) -> dict[str, Any]:
    """The entropies of the round's exact change and of its clients' changes."""
    merged = {module: spectrum(core).entropy for module, core in round_.exact.items()}
    own = dict.fromkeys(merged, 0.0)
    for update in round_.updates:
        for module, change in _changes(update, round_).items():
            own[module] += round_.weights[update.client_id] * spectrum(change).entropy
    return entropy_gap(merged, own)


def entropy_gap(merged: Mapping[str, float], own: Mapping[str, float]) -> dict[str, Any]:
    """Of the modules' spectra σ²/Σσ²: the mean entropy of the exact change (nats), Σ p_k that of the clients' changes,
    the gap between, and ⌈e^S⌉ of the widest module, the rank that such a spectrum suggests.

    The gap says how different the directions of the clients are: 0 where all moved along the same ones.
    """
    count = len(merged) or 1
    found = {"exact": sum(merged.values()) / count, "clients": sum(own.values()) / count}
    suggested = math.ceil(math.exp(max(merged.values(), default=0.0)) - 1e-9)
    return found | {"gap": found["exact"] - found["clients"], "suggested_rank": suggested}


def _changes(update: ClientUpdate, round_: Federation) -> dict[str, Tensor]:
    """L_k − S_k of each module, as cores."""
    found = {}
    for module, delta in low_rank(update.adapter).items():
        found[module] = delta.dense()
        if module in round_.model.start:
            found[module] = found[module] - round_.model.start[module].first(delta.rank).dense()
    return found


def shares(round_: Federation) -> dict[str, float]:
    """Client id -> ⟨p_k (L_k − S_k), C⟩ / ‖C‖²: signed, and they sum to 1; zeros where nothing changed."""
    total = _norm(round_.exact) ** 2
    found = {}
    for update in round_.updates:
        changes = _changes(update, round_)
        inner = sum(float((change * round_.exact[module]).sum()) for module, change in changes.items())
        found[update.client_id] = round_.weights[update.client_id] * inner / total if total else 0.0
    return found


def _cores(
    adapter: LowRankState, like: Mapping[str, Tensor], onto: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter as dense cores in float64, added to `onto`."""
    begin = onto or {module: torch.zeros_like(core) for module, core in like.items()}
    return {m: core + adapter[m].double().dense() if m in adapter else core for m, core in begin.items()}


def _minus(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {module: one[module] - other[module] for module in other}


def _norm(cores: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(core.square().sum()) for core in cores.values()))


def _ratio(error: float, size: float) -> float | None:
    return error / size if size else None


def _bytes(adapter: AdapterState, shapes: Shapes) -> int:
    return sum(4 * delta.rank * sum(shapes[module]) for module, delta in adapter.items())


NoiseOf = Callable[[Sequence[ClientUpdate], Mapping[str, float], GlobalModel], Mapping[str, Any]]
"""(updates, weights, model before the round) -> the round's noise."""
