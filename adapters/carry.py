"""A base that carries a frozen change of any kind beside it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from corolla.adapters.dense import dense_beside
from corolla.adapters.lora import MERGED, attached
from corolla.adapters.matrix import along_outputs, apply_factors, apply_matrix
from corolla.aggregation import AdapterState, Delta, DenseDelta, LowRankDelta, RowScaleDelta, low_rank


@contextmanager
def carrying(base: nn.Module, frozen: AdapterState) -> Iterator[nn.Module]:
    """`base` with `frozen` acting beside it, or the base itself where there is nothing to carry."""
    dense = {module: delta for module, delta in frozen.items() if isinstance(delta, DenseDelta)}
    scaled = {module: delta for module, delta in frozen.items() if isinstance(delta, RowScaleDelta)}
    factors = low_rank({m: delta for m, delta in frozen.items() if m not in dense and m not in scaled})
    with ExitStack() as stack:
        if dense:
            stack.enter_context(dense_beside(base, dense, MERGED, trains=False))
        if scaled:
            stack.enter_context(beside({base.get_submodule(m): delta for m, delta in scaled.items()}))
        yield stack.enter_context(attached(base, None, frozen=factors)) if factors else base


@contextmanager
def beside(deltas: Mapping[nn.Module, Delta]) -> Iterator[None]:
    """Layers that compute with W + ΔW, ΔW in float32: by a hook on each, and no PEFT, so that any can be on top.

    Linear ones, Conv1D and convolutions of any groups, dilation and padding. A bias is neither scaled nor changed. A
    PEFT layer is taken for the layer inside it.
    """
    hooks = []
    try:
        layers: Mapping[Any, Delta] = deltas
        for outer, delta in layers.items():
            layer = outer.get_base_layer() if hasattr(outer, "get_base_layer") else outer
            parts = {name: tensor.to(layer.weight.device) for name, tensor in delta.single().tensors().items()}
            hooks.append(layer.register_forward_hook(_HOOKS[type(delta)](parts)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _factors(parts: Mapping[str, Tensor]) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not len(parts["A"]):
            return output  # torch has no convolution with no outputs
        return output + apply_factors(layer, inputs[0].float(), parts["A"], parts["B"]).to(output.dtype)

    return hook


def _whole(parts: Mapping[str, Tensor]) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + apply_matrix(layer, inputs[0].float(), parts["W"]).to(output.dtype)

    return hook


def _rows(parts: Mapping[str, Tensor]) -> Any:
    low = _factors(parts)

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        plain = output if layer.bias is None else output - along_outputs(layer, layer.bias)
        scaled = output + (along_outputs(layer, parts["d"][:, 0]) * plain.float()).to(output.dtype)
        return low(layer, inputs, scaled)  # type: ignore[no-any-return]

    return hook


_HOOKS: Mapping[type, Any] = {LowRankDelta: _factors, DenseDelta: _whole, RowScaleDelta: _rows}


def added(delta: Delta, weight: Tensor) -> Tensor:
    """ΔW on a `weight` (out, in) of the base, in float64."""
    wide = delta.double()
    return wide.on(weight.double()) if isinstance(wide, RowScaleDelta) else wide.dense()
