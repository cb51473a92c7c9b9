"""From round to round: what a client receives, and how the global model goes on."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from corolla.aggregation.algebra import (
    adapter_norm,
    add,
    add_adapters,
    after,
    compress,
    compress_adapter,
    norm,
    ranks,
    scale,
    without_empty,
)
from corolla.aggregation.delta import AdapterState, Delta, LowRankState
from corolla.aggregation.lowrank import Budget
from corolla.aggregation.state import Certificate, ClientRule, GlobalModel, GlobalUpdate


@dataclass(frozen=True)
class ClientShare:
    """What one client downloads: it computes base + frozen + L_k, where L_k begins with `start` (S_k).

    `dropped` is ‖T_k‖_F, the part of the start that this client neither trains nor carries.
    """

    frozen: AdapterState
    start: LowRankState
    dropped: float

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        parts: tuple[AdapterState, ...] = (self.frozen, self.start)
        return sum(delta.nbytes for part in parts for delta in part.values())


def share(model: GlobalModel, rule: ClientRule, rank: int, modules: Collection[str]) -> ClientShare:
    """The part of `model` for a client of `rank` that adapts `modules`.

    S_k is the first `rank` components of the start, none for other modules; T_k is the rest. Where the method
    carries, T_k is appended to the frozen part: base + G + T_k + S_k = base + G + S, whatever the rank.
    """
    held = {module: delta.first(rank) for module, delta in model.start.items() if module in modules}
    remainder = without_empty(
        {module: delta.after(rank) if module in modules else delta for module, delta in model.start.items()}
    )
    if rule.carries:
        return ClientShare(without_empty(add_adapters(model.merged, remainder)), held, 0.0)
    return ClientShare(without_empty(model.merged), held, adapter_norm(remainder))


def cut(model: GlobalModel, budget: Budget) -> tuple[GlobalModel, float]:
    """The model as clients download it, `merged` within `budget`, and ‖cut‖_F / ‖merged + start‖_F.

    The budget's error counts against merged + start, module by module: with FR-LoRA, merged alone is large and all
    but cancels against the start.
    """
    merged, total, lost = {}, 0.0, 0.0
    for module, delta in whole(model).items():
        size = norm(delta)
        total += size**2
        if module in model.merged:
            limit = budget.max_error * size / (norm(model.merged[module]) or 1.0)
            merged[module], error = compress(model.merged[module], Budget(budget.max_rank, min(limit, 0.999)))
            lost += error**2
    return replace(model, merged=without_empty(merged)), (lost / total) ** 0.5 if total else 0.0


def advance(
    model: GlobalModel,
    update: GlobalUpdate,
    budget: Budget = Budget(),
) -> tuple[GlobalModel, Certificate]:
    """The model after the round: merge on top of merged, re-factored; the start replaced, never added.

    Re-factoring drops what is numerically zero, so the rank stays at most min(out, in). A `budget` that cuts more
    than that makes the round not exact: the returned certificate has what was lost added to its error, an upper bound.
    """
    merged, lost = compress_adapter(after(model.merged, update.merge), budget)
    state = model.method_state if update.method_state is None else update.method_state
    moved = replace(model, merged=merged, start=update.start, round=model.round + 1, method_state=state)
    proof = replace(update.certificate, rank=max(ranks(merged).values(), default=0))
    limited = budget.max_rank is not None or budget.max_error > 0
    if limited and lost > 1e-6 * adapter_norm(merged):
        reason = f"merged was cut to rank {budget.max_rank}, error {budget.max_error}: ‖lost‖ = {lost:.2e}"
        size = proof.error / proof.relative_error if proof.relative_error else adapter_norm(update.merge)
        error = proof.error + lost
        proof = replace(proof, exact=False, error=error, relative_error=error / size if size else error, reason=reason)
    return moved, proof


def moved(before: GlobalModel, update: GlobalUpdate) -> float:
    """‖merge + start' − start‖_F, how far the update moves the model, over all modules; one is held at a time."""
    total = 0.0
    for module in sorted({*update.merge, *update.start, *before.start}):
        parts: list[Delta] = [adapter[module] for adapter in (update.merge, update.start) if module in adapter]
        if module in before.start:
            parts.append(scale(before.start[module], -1.0))
        total += norm(add(parts)) ** 2
    return math.sqrt(total)


def whole(model: GlobalModel) -> AdapterState:
    """merged + start as one adapter: everything that the global model adds to the base."""
    return without_empty(add_adapters(model.merged, model.start))
