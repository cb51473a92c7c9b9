"""A layer as the matrix (out, in) that it is: linear ones, transformers' Conv1D, and convolutions.

A kernel (out, in, k…) is the matrix (out, in · k…): a low-rank change of it is a convolution with A in the kernel's
place, and one of size 1 with B after it.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
"""Class -> its function."""


def is_convolution(layer: nn.Module) -> bool:
    """Whether it is one of torch's, or made from one."""
    return isinstance(layer, tuple(CONVOLUTIONS))


def unadaptable(layer: Any) -> str:
    """Why PEFT's adapters do not compute what they say on a convolution; empty where they do, or it is none.

    Their A sees every group's inputs, has no dilation, pads with zeros, and is of the layer's own class.
    """
    if not is_convolution(layer):
        return ""
    if type(layer) not in CONVOLUTIONS:
        return f"a {type(layer).__name__}, which computes in its own way"
    for name, wanted in (("groups", 1), ("dilation", (1,) * len(layer.kernel_size)), ("padding_mode", "zeros")):
        if (found := getattr(layer, name)) != wanted:
            return f"a {type(layer).__name__} with {name} = {found!r}"
    return ""


def require_adaptable(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError, naming it, for a convolution that PEFT cannot adapt right."""
    for name, layer in layers:
        if reason := unadaptable(layer):
            raise ValueError(
                "only convolutions with groups = 1, dilation = 1 and padding_mode = 'zeros' can be federated, got "
                f"{reason} at {name}: leave it out of target_modules"
            )


def weight_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix, also of one on the meta device, or quantised."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.weight.shape[0], layer.weight[0].numel()


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in) of a tensor in the form in which `layer` stores its weight: a view."""
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def as_stored(layer: Any, matrix: Tensor) -> Tensor:
    """The reverse of `as_matrix`."""
    if isinstance(layer, Conv1D):
        return matrix.T
    return matrix.reshape(matrix.shape[0], *layer.weight.shape[1:]) if is_convolution(layer) else matrix


def apply_matrix(layer: Any, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `layer` computes of `x` with `matrix` (rows, in) as its weight: stride, padding and groups are its own."""
    if not is_convolution(layer):
        return F.linear(x, matrix, bias)
    return layer._conv_forward(x, as_stored(layer, matrix), bias)  # type: ignore[no-any-return]


def apply_factors(layer: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same with B @ A, which is not formed. Every group of a convolution has all rows of A, and its own of B."""
    if not is_convolution(layer):
        return F.linear(F.linear(x, a), b)
    inner = apply_matrix(layer, x, a.repeat(layer.groups, 1))
    pointwise = next(function for kind, function in CONVOLUTIONS.items() if isinstance(layer, kind))
    return pointwise(inner, b.reshape(*b.shape, *(1,) * len(layer.kernel_size)), groups=layer.groups)


def along_outputs(layer: Any, vector: Tensor) -> Tensor:
    """`vector` (out) in the shape in which it multiplies what `layer` puts out."""
    return vector.reshape(-1, *(1,) * len(layer.kernel_size)) if is_convolution(layer) else vector
