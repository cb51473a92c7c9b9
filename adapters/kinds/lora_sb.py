"""LoRA-SB: a small square core between the leading singular vectors of the first gradient (arXiv:2411.19557)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from corolla.adapters.kinds.kind import BASES, on_cpu
from corolla.adapters.kinds.spectral import Core, require_linear
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import AdapterState, Delta, LowRankDelta


class LoraSb(Core):
    """ΔW = L C R of orthonormal L (out, r) and R (r, in), all of C (r, r) trained: linear in C, the same L, R for all.

    The bases are the server's: it makes them, and the C that training begins with, from sketches of the clients' first
    gradients (`corolla.server.first_gradient`). They come with every download.
    """

    name = "lora-sb"
    title = "LoRA-SB"
    coordinates = "C (r·r)"
    rule = "linear: mean of C"
    no_factors = "its bases come from the server before round one"
    shipped = True

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:
        """Bases of zeros. Raises ValueError for a module that is not linear."""
        for module, layer in layers.items():
            require_linear(self.name, module, layer.get_base_layer())
            q = min(spec.rank, layer.out_features, layer.in_features)
            layer.place(torch.zeros(layer.out_features, q), torch.zeros(q, layer.in_features), (q, q))

    def place(self, layers: Mapping[str, Any], bases: AdapterState) -> None:
        """Puts L and R of every module in place."""
        if odd := sorted(bases.keys() ^ {module + side for module in layers for side in BASES}):
            raise ValueError(f"{self.name} needs L and R of every module and of no other, got a difference in {odd[0]}")
        for module, layer in layers.items():
            left, right = (bases[module + side].dense().float() for side in BASES)
            if (left.shape, right.shape) != (layer.left.shape, layer.right.shape):
                raise ValueError(
                    f"the bases of {module} must have shapes {tuple(layer.left.shape)} and "
                    f"{tuple(layer.right.shape)}, got {tuple(left.shape)} and {tuple(right.shape)}"
                )
            layer.place(left, right, (len(right), len(right)))

    def shape(self, layer: Any) -> tuple[int, int]:
        """(q, q): the rank, or the narrow side of a module that has less."""
        return len(layer.right), len(layer.right)

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """L C and R."""
        c = delta.dense()
        left, right = (on_cpu(part).to(c.dtype) for part in (layer.left, layer.right))
        return LowRankDelta(right, _product(left, c))


def _product(left: Tensor, c: Tensor) -> Tensor:
    return (left.double() @ c.double()).to(c.dtype)
