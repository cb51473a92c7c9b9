"""DoRA: a magnitude for every row, and LoRA for its direction (arXiv:2402.09353)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from corolla.adapters.kinds.kind import Kind, base_weight, on_cpu
from corolla.adapters.lora import LOCAL
from corolla.adapters.matrix import weight_shape
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, FreshRows, RowScaleDelta


class Dora(Kind):
    """W' = diag(m / ‖W + s B A‖_row) (W + s B A), so ΔW = diag(d) W + (1 + d) s B A with d = m / ‖·‖ − 1.

    The norms are those of the base's own weight in every round: the magnitudes are free, so that only says where they
    begin. What the rounds before changed acts beside the base, and d scales it along.
    """

    name = "dora"
    title = "DoRA"
    coordinates = "d (out), B (out·r), A (r·in)"
    rule = "row scales: mean of d, stack of B and A"
    trains = frozenset({"d", "A", "B"})
    layer = LoraLayer
    no_factors = "it scales the rows of W, which has full rank"

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """LoRA's, with use_dora. Raises ValueError for dropout: PEFT then leaves out what acts beside the base."""
        if spec.dropout:
            raise ValueError(f"adapter.kind = 'dora' has no dropout, got adapter.dropout = {spec.dropout}: set it to 0")
        config = replace(spec, kind="lora").to_peft()
        config.use_dora = True
        return config

    @torch.no_grad()
    def begin(self, layer: Any, module: str, fresh: FreshRows) -> None:
        """Draws A; B is zero, so the magnitudes are what they were."""
        a = layer.lora_A[LOCAL].weight
        a.copy_(fresh.rows(module, 0, *a.flatten(1).shape).reshape(a.shape))

    def shape(self, layer: Any) -> tuple[int, int]:
        """(out, in)."""
        return weight_shape(layer.get_base_layer())

    def read(self, layer: Any) -> RowScaleDelta:
        """d, and (1 + d) s B with A: in float64 from float32 parts."""
        a, b = (on_cpu(part[LOCAL].weight).flatten(1) for part in (layer.lora_A, layer.lora_B))
        low = layer.scaling[LOCAL] * b.double()
        scales = on_cpu(layer.lora_magnitude_vector[LOCAL].weight).double().reshape(-1, 1) / _norms(layer, low, a)
        return RowScaleDelta((scales - 1).float(), a, (scales * low).float())

    def average(self, layer: Any, deltas: Sequence[Delta], weights: Sequence[float]) -> RowScaleDelta:
        """Of the magnitudes m = (1 + d) ‖W + s B A‖_row, and of s B and A."""
        parts = [delta.double().tensors() for delta in deltas]
        a = _mean([part["A"] for part in parts], weights)
        lows = [part["B"] / (1 + part["d"]) for part in parts]
        own = [(1 + p["d"]) * _norms(layer, low, p["A"]) for p, low in zip(parts, lows, strict=True)]
        low = _mean(lows, weights)
        scales = _mean(own, weights) / _norms(layer, low, a)
        return RowScaleDelta(scales - 1, a, scales * low)

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """The coordinates are the change."""
        return delta


def _mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)


def _norms(layer: Any, low: Tensor, a: Tensor) -> Tensor:
    """‖W + s B A‖ of every row, (out, 1), in float64."""
    return torch.linalg.norm(base_weight(layer).double() + low.double() @ a.double(), dim=1, keepdim=True)
