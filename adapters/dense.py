"""Dense changes beside a base that stays as it is: what full fine-tuning trains."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from corolla.adapters.matrix import apply_matrix, weight_shape
from corolla.aggregation import DenseDelta

PARAMETER = "corolla_delta_"
"""PARAMETER + name is the parameter of a module that holds its change."""


@contextmanager
def dense_beside(base: nn.Module, deltas: Mapping[str, DenseDelta], name: str, trains: bool) -> Iterator[nn.Module]:
    """`base` computing with W₀ + ΔW in these modules: ΔW is a float32 parameter of its own, with gradients or without.

    A change with one column more than its module has inputs is [ΔW | Δb], that of weight and bias together. Works in
    place, by a hook on each module, and takes everything off again at the end. Raises ValueError, naming it,
    for a module that the base lacks or whose shape differs.
    """
    hooks, layers = [], {module: _layer(base, module, delta) for module, delta in deltas.items()}
    try:
        for module, layer in layers.items():
            weight = deltas[module].W.to(layer.weight.device, torch.float32, copy=True)
            layer.register_parameter(PARAMETER + name, nn.Parameter(weight, requires_grad=trains))
            hooks.append(layer.register_forward_hook(_adding(name)))
        yield base
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer._parameters.pop(PARAMETER + name, None)


def dense_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Module -> the live parameter of the change that `dense_beside` put there under `name`."""
    found = ((module, layer._parameters.get(PARAMETER + name)) for module, layer in model.named_modules())
    return {module: weight for module, weight in found if weight is not None}


def read_dense(model: nn.Module, name: str) -> dict[str, DenseDelta]:
    """The changes that `dense_beside` put there under `name`, as float32 copies on the CPU."""
    return {
        module: DenseDelta(weight.detach().to("cpu", torch.float32).clone())
        for module, weight in dense_parameters(model, name).items()
    }


def _layer(base: nn.Module, module: str, delta: DenseDelta) -> Any:
    try:
        layer: Any = base.get_submodule(module)
    except AttributeError as error:
        raise ValueError(f"a dense change needs its module in the base, got none named {module}") from error
    expected = weight_shape(layer)
    with_bias = (expected[0], expected[1] + 1) if getattr(layer, "bias", None) is not None else expected
    if delta.shape not in (expected, with_bias):
        raise ValueError(f"the change of {module} must have shape {expected}, got {delta.shape}")
    return layer


def _adding(name: str) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = layer._parameters[PARAMETER + name]
        inside = weight_shape(layer)[1]
        bias = weight[:, inside] if weight.shape[1] > inside else None
        return output + apply_matrix(layer, inputs[0].to(weight.dtype), weight[:, :inside], bias).to(output.dtype)

    return hook
