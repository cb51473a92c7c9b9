"""A base that carries a frozen change of any kind beside it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from corolla.adapters.dense import dense_beside
from corolla.adapters.lora import MERGED, attached
from corolla.aggregation import AdapterState, DenseDelta, low_rank


@contextmanager
def carrying(base: nn.Module, frozen: AdapterState) -> Iterator[nn.Module]:
    """`base` with `frozen` acting beside it, or the base itself where there is nothing to carry."""
    dense = {module: delta for module, delta in frozen.items() if isinstance(delta, DenseDelta)}
    factors = low_rank({module: delta for module, delta in frozen.items() if module not in dense})
    with ExitStack() as stack:
        if dense:
            stack.enter_context(dense_beside(base, dense, MERGED, trains=False))
        yield stack.enter_context(attached(base, None, frozen=factors)) if factors else base
