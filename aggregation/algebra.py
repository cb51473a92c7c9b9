"""The algebra of whole adapters: module by module, each by the rule of its own kind of change."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from corolla.aggregation import dense, lowrank, rowscale
from corolla.aggregation.delta import AdapterState, Delta, DenseDelta, LowRankDelta, RowScaleDelta
from corolla.aggregation.lowrank import Budget

D = TypeVar("D", bound=Delta)


class Rule(Protocol):
    """What a kind of change must be able to do: a module with these functions."""

    @property
    def scale(self) -> Any:
        """(delta, factor) -> factor · ΔW."""

    @property
    def add(self) -> Any:
        """deltas -> Σ ΔW_i, exactly."""

    @property
    def after(self) -> Any:
        """(before, change) -> both as one change of the first weight: their sum, where a change knows no weight."""

    @property
    def norm(self) -> Any:
        """delta -> ‖ΔW‖_F."""

    @property
    def gram_norm(self) -> Any:
        """delta -> ‖ΔW‖_F, fast: what cancels may be off by 1e-8 of its parts."""

    @property
    def distance(self) -> Any:
        """(one, other) -> ‖one − other‖_F in float64."""

    @property
    def inner(self) -> Any:
        """(one, other) -> ⟨one, other⟩_F in float64."""

    @property
    def orthonormal(self) -> Any:
        """delta -> the same in float64, in a form where no component cancels another."""

    @property
    def singular_values(self) -> Any:
        """delta -> the singular values of ΔW, largest first."""

    @property
    def compress(self) -> Any:
        """(delta, budget) -> (ΔW within the budget in float32, the error ‖ΔW − ·‖_F)."""


RULES: Mapping[type, Rule] = {LowRankDelta: lowrank, DenseDelta: dense, RowScaleDelta: rowscale}
"""The rule of each kind. A new kind is a class in `delta`, a module like these two, and a line here."""


def scale(delta: D, factor: float) -> D:
    """factor · ΔW."""
    return RULES[type(delta)].scale(delta, factor)  # type: ignore[no-any-return]


def add(deltas: Sequence[Delta]) -> Delta:
    """Σ ΔW_i of one module. Raises ValueError for none, for different (out, in), or for kinds that do not mix."""
    return RULES[_one_kind(deltas)].add(deltas)  # type: ignore[no-any-return]


def _one_kind(deltas: Sequence[Delta]) -> type:
    kinds = {type(delta) for delta in deltas}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"changes of one module must be of one kind, got {names}")
    return kinds.pop() if kinds else LowRankDelta


def after(before: AdapterState, change: AdapterState) -> dict[str, Delta]:
    """`change`, made on top of `before`, and that itself, as one change of the base, module by module."""
    both = add_adapters(
        {m: before[m] for m in before.keys() - change.keys()}, {m: change[m] for m in change.keys() - before.keys()}
    )
    for module in before.keys() & change.keys():
        kind = _one_kind([before[module], change[module]])
        both[module] = RULES[kind].after(before[module], change[module])
    return dict(sorted(both.items()))


def norm(delta: Delta) -> float:
    """‖ΔW‖_F in float64."""
    return float(RULES[type(delta)].norm(delta))


def inner(one: Delta, other: Delta) -> float:
    """⟨one, other⟩_F in float64. Raises ValueError for kinds that do not mix."""
    return float(RULES[_one_kind([one, other])].inner(one, other))


def orthonormal(delta: D) -> D:
    """The same ΔW in float64, in a form where no component cancels another, as `inner` wants it."""
    return RULES[type(delta)].orthonormal(delta)  # type: ignore[no-any-return]


def singular_values(delta: Delta) -> Tensor:
    """The singular values of ΔW in float64, largest first."""
    return RULES[type(delta)].singular_values(delta)  # type: ignore[no-any-return]


def compress(delta: D, budget: Budget = Budget()) -> tuple[D, float]:
    """ΔW within `budget` in float32, and the error of that."""
    return RULES[type(delta)].compress(delta, budget)  # type: ignore[no-any-return]


def add_adapters(*adapters: AdapterState) -> dict[str, Delta]:
    """The module-wise sum; a module that only some hold is summed over those. Names come back sorted."""
    modules = sorted({module for adapter in adapters for module in adapter})
    return {module: add([a[module] for a in adapters if module in a]) for module in modules}


def scale_adapter(adapter: Mapping[str, D], factor: float) -> dict[str, D]:
    """factor · ΔW for every module."""
    return {module: scale(delta, factor) for module, delta in adapter.items()}


def adapter_norm(adapter: AdapterState) -> float:
    """The Frobenius norm over all modules together."""
    return math.sqrt(sum(norm(delta) ** 2 for delta in adapter.values()))


def adapter_size(adapter: AdapterState) -> float:
    """As `adapter_norm`, fast, for yardsticks: what cancels may be off by 1e-8 of its parts."""
    return math.sqrt(sum(float(RULES[type(delta)].gram_norm(delta)) ** 2 for delta in adapter.values()))


def distance(one: AdapterState, other: AdapterState) -> float:
    """‖one − other‖_F over all modules, in float64, one module at a time; one that is lacking counts as zero there."""
    return math.sqrt(sum(module_distance(m, one, other) ** 2 for m in sorted(one.keys() | other.keys())))


def module_distance(module: str, one: AdapterState, other: AdapterState) -> float:
    """‖one − other‖_F of one module; an adapter that lacks it counts as zero. Two kinds meet as matrices."""
    if module in one and module in other:
        if type(one[module]) is not type(other[module]):
            return dense.distance(*(DenseDelta(adapter[module].double().dense()) for adapter in (one, other)))
        return float(RULES[type(one[module])].distance(one[module], other[module]))
    return norm(one[module] if module in one else other[module])


def compress_adapter(adapter: Mapping[str, D], budget: Budget = Budget()) -> tuple[dict[str, D], float]:
    """Every module within `budget`; a module left with rank 0 is kept as such. Also ‖error‖_F over all modules."""
    results = {module: compress(delta, budget) for module, delta in adapter.items()}
    return {m: delta for m, (delta, _) in results.items()}, math.sqrt(sum(err**2 for _, err in results.values()))


def without_empty(adapter: Mapping[str, D]) -> dict[str, D]:
    """The modules of rank above 0."""
    return {module: delta for module, delta in adapter.items() if delta.rank}


def ranks(adapter: AdapterState) -> Mapping[str, int]:
    """Module name -> rank."""
    return {module: delta.rank for module, delta in adapter.items()}
