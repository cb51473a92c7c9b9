"""(IA)³: one factor for every output of a module (arXiv:2205.05638)."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import IA3Config, PeftConfig
from peft.tuners.ia3.layer import IA3Layer

from corolla.adapters.kinds.kind import Kind, on_cpu, targets_of
from corolla.adapters.lora import LOCAL
from corolla.adapters.matrix import weight_shape
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, DenseDelta, RowScaleDelta


class Ia3(Kind):
    """y = l ∘ (W x), so ΔW = diag(l − 1) W."""

    name = "ia3"
    title = "(IA)³"
    coordinates = "l − 1 (out)"
    rule = "linear: mean of l"
    trains = frozenset({"W"})
    continues = True
    layer = IA3Layer
    no_factors = "it scales the rows of W, which has full rank"

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's, with every module scaled at its outputs; all ones at the start."""
        return IA3Config(feedforward_modules=[], **targets_of(spec))

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:
        """Raises ValueError for a module with a bias, which PEFT scales too: that is no change of the weight."""
        if odd := sorted(module for module, layer in layers.items() if layer.get_base_layer().bias is not None):
            raise ValueError(f"adapter.kind = 'ia3' needs modules without a bias, got {odd[0]} with one: leave it out")

    def shape(self, layer: Any) -> tuple[int, int]:
        """(out, 1)."""
        return layer.out_features, 1

    def read(self, layer: Any) -> DenseDelta:
        """l − 1."""
        return DenseDelta(on_cpu(layer.ia3_l[LOCAL]).reshape(-1, 1) - 1)

    @torch.no_grad()
    def load(self, layer: Any, delta: Delta) -> None:
        """Sets l."""
        layer.ia3_l[LOCAL].copy_((delta.dense() + 1).reshape(layer.ia3_l[LOCAL].shape))

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """Scaled rows, without factors."""
        d = delta.dense()
        outputs, inputs = weight_shape(layer.get_base_layer())
        return RowScaleDelta(d, d.new_zeros(0, inputs), d.new_zeros(outputs, 0))

    def components(self, rank: int) -> int:
        """It has no rank."""
        return 1
