"""What an order makes of a model: the frozen part beside it, and L_k where local training begins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from corolla.adapters import (
    HOSTED,
    KINDS,
    LOCAL,
    PERSONAL,
    AdapterSpec,
    Hosted,
    Training,
    attached,
    carrying,
    dense_beside,
    is_lora,
    personal_beside,
    read_adapter,
    read_dense,
    train_kind,
    train_unfolded,
    without_zeros,
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
    `seed`, other for every client and round, is that of what training draws. A kind with coordinates of its own that
    `unfolds` receives and replies changes of the weights instead.
    """

    spec: AdapterSpec
    shapes: Shapes
    heads: Shapes
    client: str = ""
    rank: int | None = None
    personal: tuple[AdapterSpec, LowRankState] | None = None
    seed: int = 0
    unfolds: bool = False


class Attached:
    """A model with everything attached, and what is in it. `callbacks` must be told of the steps of its training."""

    def __init__(
        self, model: Any, base: nn.Module, adapter: Callable[[], Mapping[str, Delta]], callbacks: Sequence[Any] = ()
    ) -> None:
        self.model, self.base, self._adapter, self.callbacks = model, base, adapter, callbacks

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
    hosted, training = HOSTED.get(part.spec.kind, Hosted()), Training()
    with ExitStack() as stack:
        if not is_lora(part.spec.kind):
            stack.enter_context(carrying(base, heads))
            kind, fresh = KINDS[part.spec.kind], FreshRows(order.seed, order.fresh_round, part.client)
            found = (
                train_unfolded(base, kind, part.spec, body, fresh, order.rank)
                if part.unfolds
                else train_kind(base, kind, part.spec, body, fresh)
            )
            model, adapter = stack.enter_context(found)
        elif order.trains == WHOLE:
            whole = {**part.shapes, **part.heads}
            model = stack.enter_context(carrying(base, assignment.frozen))
        else:
            stack.enter_context(carrying(base, heads))
            start, untrained = _split(assignment, part)
            frozen = low_rank(add_adapters(body, _acting(untrained)))
            spec = _same_scaling(hosted.adjust(part.spec), part.rank or order.rank)
            model = stack.enter_context(attached(base, spec, start, frozen, order.trains))
            if part.personal:
                stack.enter_context(personal_beside(model, *part.personal))
            training = stack.enter_context(hosted.around(model, spec, part.seed, order.trains))
            drops = hosted.drops and may_drop(assignment)
            adapter = partial(_read_factors, model, untrained, training, drops)
        nothing = {module: DenseDelta(torch.zeros(shape)) for module, shape in whole.items()}
        stack.enter_context(dense_beside(base, nothing, LOCAL, trains=True))
        yield Attached(model, base, adapter, training.callbacks)


def may_drop(assignment: Assignment) -> bool:
    """Whether a reply may leave out components that are zero: those of a start are known by their position."""
    return not assignment.start and assignment.order.trains == "AB"


def _read_factors(model: Any, untrained: LowRankState, training: Training, drops: bool) -> Mapping[str, Delta]:
    found = add_adapters(training.fold(read_adapter(model)), untrained)
    return {m: without_zeros(delta) for m, delta in low_rank(found).items()} if drops else found


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
