"""Parts of a base's weights where training can begin: principal components, and factors of its QR decomposition."""

from typing import Any

import torch
from torch import Tensor, nn

from corolla.adapters.matrix import as_matrix
from corolla.aggregation import LowRankDelta, Shapes


@torch.no_grad()
def principal_components(base: nn.Module, shapes: Shapes, rank: int) -> dict[str, LowRankDelta]:
    """Module -> (B = U √Σ, A = √Σ Vᵀ), the top `rank` components of its weight, by a full SVD in float32.

    Signs are fixed as in `compress`. They are computed once, on the server: an SVD is not the same on every machine.
    Raises ValueError for a quantised weight.
    """
    return {module: _top(base.get_submodule(module), rank) for module in sorted(shapes)}


@torch.no_grad()
def leading_factors(base: nn.Module, shapes: Shapes, rank: int) -> dict[str, LowRankDelta]:
    """Module -> (B = Q[:, :rank], A = R[:rank]) of its weight W = Q R, diag(R) ≥ 0, in float32.

    Once, on the server, as `principal_components`. Raises ValueError for a quantised weight.
    """
    found = {}
    for module in sorted(shapes):
        q, r = torch.linalg.qr(_weight(base.get_submodule(module)))
        signs = torch.where(r.diagonal()[:rank] < 0, -1.0, 1.0)
        a, b = r[:rank] * signs[:, None], q[:, :rank] * signs
        found[module] = LowRankDelta(a.cpu().contiguous(), b.cpu().contiguous())
    return found


def _weight(layer: Any) -> Tensor:
    """(out, in), in float32."""
    if not layer.weight.is_floating_point():
        raise ValueError(f"a base in floating point is needed to decompose, got {layer.weight.dtype}: quantise none")
    return as_matrix(layer, layer.weight.detach().float())


def _top(layer: Any, rank: int) -> LowRankDelta:
    weight = _weight(layer)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = sigma[:rank].sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    signs = torch.gather(a, 1, a.abs().argmax(1, keepdim=True)).sign()
    return LowRankDelta((a * signs).cpu().contiguous(), (b * signs.T).cpu().contiguous())
