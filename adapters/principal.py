"""The principal components of a base's weights: where FR-LoRA starts."""

from typing import Any

import torch
from torch import nn

from corolla.adapters.matrix import as_matrix
from corolla.aggregation import LowRankDelta, Shapes


@torch.no_grad()
def principal_components(base: nn.Module, shapes: Shapes, rank: int) -> dict[str, LowRankDelta]:
    """Module -> (B = U √Σ, A = √Σ Vᵀ), the top `rank` components of its weight, by a full SVD in float32.

    Signs are fixed as in `compress`. They are computed once, on the server: an SVD is not the same on every machine.
    Raises ValueError for a quantised weight.
    """
    return {module: _top(base.get_submodule(module), rank) for module in sorted(shapes)}


def _top(layer: Any, rank: int) -> LowRankDelta:
    if not layer.weight.is_floating_point():
        raise ValueError(f"principal components need a base in floating point, got {layer.weight.dtype}: quantise none")
    weight = as_matrix(layer, layer.weight.detach().float())
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = sigma[:rank].sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    signs = torch.gather(a, 1, a.abs().argmax(1, keepdim=True)).sign()
    return LowRankDelta((a * signs).cpu().contiguous(), (b * signs.T).cpu().contiguous())
