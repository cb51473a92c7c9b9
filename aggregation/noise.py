"""Aggregation noise: what every method would make of the same replies, against their exact mean.

Every rule of aggregation here commutes with a change of orthonormal basis on either side of ΔW. So one QR per module
turns the replies into small cores in one common basis, and each method, the very code that runs in a federation, is
applied to those: nothing of size (out, in) is formed, and no method is written twice.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corolla.aggregation.delta import AdapterState, LowRankDelta, LowRankState, low_rank
from corolla.aggregation.exact import exact_mean, in_order, modules_of
from corolla.aggregation.lowrank import Budget, add, triangular
from corolla.aggregation.method import Method
from corolla.aggregation.registry import AGGREGATORS, build_method
from corolla.aggregation.rounds import cut, share
from corolla.aggregation.state import ClientUpdate, GlobalModel, Shapes

TINY = 1e-12
"""A change below TINY times the model it belongs to is no change: nothing is relative to it."""


@dataclass(frozen=True)
class Spectrum:
    """One module's exact change: ‖·‖_F, σ_1, e^H(σ/Σσ), H(σ²/Σσ²) in nats, and Σ_{i≤r} σ_i² / Σ σ² by r."""

    norm: float
    spectral_norm: float
    effective_rank: float
    entropy: float
    energy: Mapping[str, float]


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


@dataclass(frozen=True)
class Federation:
    """A round's replies in coordinates: `updates` and `start` have (q, r) and (r, p) factors, q, p <= R.

    `exact` is the exact change C and `mean` M, module -> (q, p); `shapes` are the modules' real (out, in).
    """

    updates: tuple[ClientUpdate, ...]
    weights: Mapping[str, float]
    model: GlobalModel
    mean: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]
    shapes: Shapes

    @property
    def ranks(self) -> dict[str, int]:
        """Client id -> the largest rank of its modules."""
        return {u.client_id: max((d.rank for d in u.adapter.values()), default=0) for u in self.updates}


def in_coordinates(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> Federation:
    """The same round in the basis of each module's own factors: `[B_S B_1 …] = Q_B R_B`, `[A_S; A_1; …]ᵀ = Q_A R_A`.

    Raises ValueError for changes that are not low-rank.
    """
    adapters = {u.client_id: low_rank(u.adapter) for u in in_order(updates)}
    small: dict[str, dict[str, LowRankDelta]] = {client: {} for client in adapters}
    start: dict[str, LowRankDelta] = {}
    shapes = {}
    for module in modules_of(updates, model.start):
        parts = {client: adapter[module] for client, adapter in adapters.items() if module in adapter}
        begin = [model.start[module]] if module in model.start else []
        everything = add([*begin, *parts.values()])
        shapes[module] = everything.shape
        cores = iter(_split(everything, [delta.rank for delta in (*begin, *parts.values())]))
        if begin:
            start[module] = next(cores)
        for client, core in zip(parts, cores, strict=True):
            small[client][module] = core
    reduced = tuple(replace(u, adapter=small[u.client_id]) for u in in_order(updates))
    model = GlobalModel(start=start, round=model.round)
    mean = {module: delta.dense() for module, delta in exact_mean(reduced, weights, start).items()}
    exact = {m: matrix - start[m].dense() if m in start else matrix for m, matrix in mean.items()}
    return Federation(reduced, dict(weights), model, mean, exact, shapes)


def _split(stack: LowRankDelta, ranks: Sequence[int]) -> list[LowRankDelta]:
    """The parts of a stack of these ranks in the basis of the whole, in float64."""
    r_b, r_a = (triangular(factor)[1] for factor in (stack.B, stack.A.T))
    parts = zip(*(torch.split(r, list(ranks), dim=1) for r in (r_b, r_a)), strict=True)
    return [LowRankDelta(a.T.contiguous(), b.contiguous()) for b, a in parts]


def measure_noise(
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    model: GlobalModel,
    method: Method,
    init: str = "shared",
    download: Budget = Budget(max_error=1e-3),
) -> dict[str, Any]:
    """What each method would make of these replies, as plain values for a JSON line.

    `method` is the one whose clients made them; `init` says whether those shared their fresh rows of A, which moves
    FedIT's noise by an order of magnitude, so it stands beside every figure. A method that asks something else of its
    clients is `not_applicable` with the reason. `top-r` keeps the r largest components of each module's exact change.
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
    return {
        "init": init,
        "method": method.name,
        "norm": _norm(round_.exact),
        "share": shares(round_),
        "energy": pooled_energy(round_.exact),
        "modules": {module: asdict(spectrum(core)) for module, core in round_.exact.items()},
        "methods": found,
        "seconds": time.perf_counter() - began,
    }


def why_not(judged: Method, replied: Method, round_: Federation) -> str:
    """Why `judged` cannot be judged on replies that the clients of `replied` made; empty where it can."""
    if judged.name == replied.name:
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
        judged.require(round_.ranks, {u.client_id: u.adapter for u in round_.updates})
    except ValueError as error:
        return str(error)
    return ""


def judge(method: Method, round_: Federation, download: Budget) -> MethodNoise:
    """A method's noise on these replies."""
    outcome = method.aggregate(round_.updates, round_.weights, round_.model)
    after = GlobalModel(low_rank(outcome.merge), outcome.start, round_.model.round + 1)
    rule = method.constrain(after.round)
    reached = _cores(after.start, round_.mean, _cores(low_rank(after.merged), round_.mean))
    reduced, _ = cut(after, download)
    errors, bytes_down = {}, {}
    for update in round_.updates:
        rank = round_.ranks[update.client_id]
        part = share(reduced, rule, rank, update.adapter)
        bytes_down[update.client_id] = _bytes(part.frozen, round_.shapes) + _bytes(part.start, round_.shapes)
        held = reached
        if not rule.carries:
            kept = {m: delta.first(rank) for m, delta in after.start.items() if m in update.adapter}
            held = _cores(kept, round_.mean, _cores(low_rank(after.merged), round_.mean))
        errors[update.client_id] = _norm(_minus(held, round_.mean))
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
    error, size = _minus(reached, round_.mean), _norm(round_.exact)
    if size <= TINY * _norm(round_.mean):
        return MethodNoise(None, None, None, None, None, bytes_down, dict.fromkeys(round_.exact))
    change = {m: core + error[m] for m, core in round_.exact.items()}
    inner = sum(float((change[m] * core).sum()) for m, core in round_.exact.items())
    moved = _norm(change)
    largest = max(float(torch.linalg.matrix_norm(core, 2)) for core in round_.exact.values())
    by_client = sum(round_.weights[client] * value**2 for client, value in client_errors.items())
    return MethodNoise(
        relative_error=_norm(error) / size,
        cosine=inner / (size * moved) if moved else None,
        gain=inner / size**2,
        spectral_error=max(float(torch.linalg.matrix_norm(e, 2)) for e in error.values()) / largest,
        client_error=math.sqrt(by_client) / size,
        bytes_down=bytes_down,
        modules={m: _ratio(float(error[m].norm()), float(core.norm())) for m, core in round_.exact.items()},
    )


def shares(round_: Federation) -> dict[str, float]:
    """Client id -> ⟨p_k (L_k − S_k), C⟩ / ‖C‖²: signed, and they sum to 1; zeros where nothing changed."""
    total = _norm(round_.exact) ** 2
    found = {}
    for update in round_.updates:
        inner = 0.0
        for module, delta in low_rank(update.adapter).items():
            change = delta.dense()
            if module in round_.model.start:
                change = change - round_.model.start[module].first(delta.rank).dense()
            inner += float((change * round_.exact[module]).sum())
        found[update.client_id] = round_.weights[update.client_id] * inner / total if total else 0.0
    return found


def spectrum(core: Tensor) -> Spectrum:
    """The spectrum of one module's change, from its core or from the matrix itself."""
    sigma = torch.linalg.svdvals(core.double())
    size = float(sigma.norm())
    if not size:
        return Spectrum(0.0, 0.0, 0.0, 0.0, {})
    effective = math.exp(_entropy(sigma / sigma.sum()))
    energy = {str(r): float(sigma[:r].square().sum()) / size**2 for r in _powers(len(sigma))}
    return Spectrum(size, float(sigma[0]), effective, _entropy(sigma.square() / size**2), energy)


def pooled_energy(cores: Mapping[str, Tensor]) -> dict[str, float]:
    """Rank -> the energy of all modules that is left when each is cut to that rank."""
    sigmas = [torch.linalg.svdvals(core) for core in cores.values()]
    total = sum(float(sigma.square().sum()) for sigma in sigmas)
    ranks = _powers(max((len(sigma) for sigma in sigmas), default=0)) if total else []
    return {str(r): sum(float(sigma[:r].square().sum()) for sigma in sigmas) / total for r in ranks}


def _powers(limit: int) -> list[int]:
    """1, 2, 4, … and the limit itself."""
    return sorted({*(2**k for k in range(limit.bit_length()) if 2**k < limit), limit} - {0})


def _entropy(probabilities: Tensor) -> float:
    return float(-torch.special.xlogy(probabilities, probabilities).sum())


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
