"""Kinds whose ΔW is linear in nothing that is small: averaged as parameters, which is not exact, or as whole ΔW."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from corolla.adapters.kinds.kind import Kind, on_cpu
from corolla.adapters.kinds.spectral import require_linear
from corolla.adapters.lora import LOCAL
from corolla.adapters.matrix import weight_shape
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, DenseDelta, FreshRows

_begun: "WeakKeyDictionary[nn.Module, Tensor]" = WeakKeyDictionary()
"""PEFT layer -> its parameters before any round, flat."""


class _AnyPeft(Kind):
    """Whatever PEFT makes ΔW of: its parameters begin at numbers of ours, in PEFT's distribution, where not at 0."""

    trains = frozenset({"W"})
    no_factors = "its change has no small factors"

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:
        """Raises ValueError for a module that is not linear, and for dropout, which these kinds know in other forms."""
        if spec.dropout:
            raise ValueError(
                f"adapter.kind = {self.name!r} has no dropout, got {spec.dropout}: set adapter.dropout = 0"
            )
        for module, layer in layers.items():
            require_linear(self.name, module, layer.get_base_layer())


class ParameterMean(_AnyPeft):
    """The server averages the parameters, and says that this is not exact.

    What travels is the difference from the parameters at the beginning, which all clients draw alike.
    """

    coordinates = "its parameters"
    rule = "parameters: mean, NOT exact"
    inexact = "parameters were averaged, and ΔW is not linear in them: the error here is that of the parameters alone"
    continues = True

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:
        """As above, and where training begins."""
        super().prepare(layers, spec)
        for module, layer in layers.items():
            draw(layer, module, FreshRows(spec.seed))
            if not layer.get_base_layer().weight.is_meta:  # else only the shapes are asked for
                _begun[layer] = _flat(layer)

    def shape(self, layer: Any) -> tuple[int, int]:
        """(p, 1), of p parameters."""
        return sum(parameter.numel() for _, parameter in parameters_of(layer)), 1

    def read(self, layer: Any) -> DenseDelta:
        """What training changed of the parameters."""
        return DenseDelta(_flat(layer) - _begun[layer])

    @torch.no_grad()
    def load(self, layer: Any, delta: Delta) -> None:
        """Sets the parameters."""
        self._set(layer, _begun[layer].double() + delta.double().dense())

    @torch.no_grad()
    def unfold(self, layer: Any, delta: Delta) -> DenseDelta:
        """ΔW (out, in) of these parameters. It is not linear in them."""
        now = _flat(layer)
        self.load(layer, delta)
        change = DenseDelta(on_cpu(layer.get_delta_weight(LOCAL)))
        self._set(layer, now)
        return change

    def _set(self, layer: Any, flat: Tensor) -> None:
        sizes = [parameter.numel() for _, parameter in parameters_of(layer)]
        for (_, parameter), part in zip(parameters_of(layer), flat.flatten().split(sizes), strict=True):
            parameter.copy_(part.reshape(parameter.shape))


class DenseMean(_AnyPeft):
    """Clients send ΔW whole, and begin at no change in every round: exact, as large as the weights themselves."""

    coordinates = "ΔW (out·in)"
    rule = "dense: mean of ΔW"

    @torch.no_grad()
    def begin(self, layer: Any, module: str, fresh: FreshRows) -> None:
        """Draws what is not zero."""
        draw(layer, module, fresh)

    def shape(self, layer: Any) -> tuple[int, int]:
        """(out, in)."""
        return weight_shape(layer.get_base_layer())

    @torch.no_grad()
    def read(self, layer: Any) -> DenseDelta:
        """ΔW."""
        return DenseDelta(on_cpu(layer.get_delta_weight(LOCAL)))

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """The coordinates are the change."""
        return delta

    def average(self, layer: Any, deltas: Sequence[Delta], weights: Sequence[float]) -> None:
        """None: the parameters do not travel."""


def parameters_of(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of what a PEFT layer trains, in the order of the names."""
    for name in sorted(layer.adapter_layer_names):
        if LOCAL in (held := getattr(layer, name)):
            yield name, held[LOCAL]


@torch.no_grad()
def draw(layer: Any, module: str, fresh: FreshRows) -> None:
    """Parameters that PEFT drew, drawn again: uniform in ±1/√columns, the same for all who share `fresh`."""
    for name, parameter in parameters_of(layer):
        if not parameter.is_meta and parameter.any():
            rows = parameter.flatten(1)
            parameter.copy_(fresh.rows(f"{module}/{name}", 0, *rows.shape).reshape(parameter.shape))


def _flat(layer: Any) -> Tensor:
    return torch.cat([on_cpu(parameter).reshape(-1, 1) for _, parameter in parameters_of(layer)])
