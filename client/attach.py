"""What an order makes of a model: the frozen part beside it, and L_k where local training begins."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from corolla.adapters import (
    KINDS,
    LOCAL,
    LORA,
    PERSONAL,
    AdapterSpec,
    attached,
    carrying,
    dense_beside,
    personal_beside,
    read_adapter,
    read_dense,
    train_kind,
)
from corolla.aggregation import (
    Delta,
    DenseDelta,
    FreshRows,
    LowRankDelta,
    LowRankState,
    Shapes,
    add_adapters,
    fill_adapter,
    low_rank,
    only,
    without,
)
from corolla.client.protocol import WHOLE, Assignment


@dataclass(frozen=True)
class Part:
    """What a client attaches: a LoRA of `spec`, at the order's rank, on modules of `shapes`; `heads` are trained whole.

    `client` (empty: shared) draws fresh rows of A of its own. `rank` below the order's trains the first components
    alone: the others act as they came and go back as they came. `personal`, with its own spec, stays on the client.
    """

    spec: AdapterSpec
    shapes: Shapes
    heads: Shapes
    client: str = ""
    rank: int | None = None
    personal: tuple[AdapterSpec, LowRankState] | None = None


class Attached:
    """A model with everything attached, and what is in it."""

    def __init__(self, model: Any, base: nn.Module, adapter: Callable[[], Mapping[str, Delta]]) -> None:
        self.model, self.base, self._adapter = model, base, adapter

    def read(self) -> dict[str, Delta]:
        """L_k as it is now, in absolute factors or in what was added to coordinates, and the change of each head."""
        return {**self._adapter(), **read_dense(self.base, LOCAL)}

    def read_personal(self) -> dict[str, LowRankDelta]:
        """The part that stays here."""
        return read_adapter(self.model, PERSONAL)


@contextmanager
def trainable(base: nn.Module, assignment: Assignment, part: Part) -> Iterator[Attached]:
    """`base` with the frozen part beside it and L_k before training, attached: an adapter, or whole weights.

    A classifier's head is trained whole in both cases, from no change at all. The base is put back as it was. Raises
    ValueError for a start that does not fit.
    """
    order = assignment.order
    heads, body = only(assignment.frozen, part.heads), without(assignment.frozen, part.heads)
    whole = part.heads
    adapter: Callable[[], Mapping[str, Delta]] = dict
    with ExitStack() as stack:
        if part.spec.kind != LORA:
            stack.enter_context(carrying(base, heads))
            kind, fresh = KINDS[part.spec.kind], FreshRows(order.seed, order.fresh_round, part.client)
            model, adapter = stack.enter_context(train_kind(base, kind, part.spec, body, fresh))
        elif order.trains == WHOLE:
            whole = {**part.shapes, **part.heads}
            model = stack.enter_context(carrying(base, assignment.frozen))
        else:
            stack.enter_context(carrying(base, heads))
            start, untrained = _split(assignment, part)
            frozen = low_rank(add_adapters(body, _acting(untrained)))
            spec = _same_scaling(part.spec, part.rank or order.rank)
            model = stack.enter_context(attached(base, spec, start, frozen, order.trains))
            adapter = partial(_read_factors, model, untrained)
            if part.personal:
                stack.enter_context(personal_beside(model, *part.personal))
        nothing = {module: DenseDelta(torch.zeros(shape)) for module, shape in whole.items()}
        stack.enter_context(dense_beside(base, nothing, LOCAL, trains=True))
        yield Attached(model, base, adapter)


def _read_factors(model: Any, untrained: LowRankState) -> dict[str, Delta]:
    return add_adapters(read_adapter(model), untrained)


def _split(assignment: Assignment, part: Part) -> tuple[LowRankState, LowRankState]:
    """L_k before training as the components that are trained, and those that are not."""
    order = assignment.order
    fresh = FreshRows(order.seed, order.fresh_round, part.client)
    start = fill_adapter(assignment.start, part.shapes, order.rank, fresh)
    rank = part.rank or order.rank
    if rank == order.rank:
        return start, {}
    return {m: d.first(rank) for m, d in start.items()}, {m: d.after(rank) for m, d in start.items()}


def _acting(untrained: LowRankState) -> LowRankState:
    """Those that change the output: fresh components (B = 0) do not."""
    return {module: delta for module, delta in untrained.items() if delta.B.any()}


def _same_scaling(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """`spec` at another rank with the scaling that it has, so that the learning rate means the same."""
    if rank == spec.rank:
        return spec
    return replace(spec, rank=rank, alpha=spec.scaling * (rank**0.5 if spec.rslora else rank))
