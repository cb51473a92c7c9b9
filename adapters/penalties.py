"""Terms that are added to the loss of local training: scalars with gradients, in the weight space of ΔW."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corolla.adapters.dense import dense_parameters
from corolla.adapters.lora import LOCAL, lora_factors

Penalty = Callable[[Any], Tensor]
"""model -> a scalar with gradients."""


def tail_penalty(model: nn.Module, keep: float, name: str = LOCAL) -> Tensor:
    """Σ over modules of s ‖B[:, c:]‖_F ‖A[c:]‖_F, c = max(1, ⌊keep · r⌋)."""
    total = torch.zeros(())
    for a, b, scaling in lora_factors(model, name).values():
        first = max(1, math.floor(keep * a.shape[0]))
        if first < a.shape[0]:
            size = scaling * torch.linalg.matrix_norm(b[:, first:]) * torch.linalg.matrix_norm(a[first:])
            total = total.to(size.device) + size
    return total


def proximal_penalty(model: nn.Module, strength: float, name: str = LOCAL) -> Penalty:
    """μ/2 ‖ΔW − ΔW₀‖²_F over all modules, ΔW₀ what `model` has now (FedProx, arXiv:1812.06127, equation 2).

    In weight space, so it does not depend on how ΔW is factored. With D_B = B − B₀ and D_A = A − A₀ the difference is
    [D_B B₀] @ [A; D_A]: no small difference of large products, and no (out, in) matrix. Heads and whole weights, which
    begin the round at no change, count as they are.
    """
    before = {m: (a.detach().clone(), b.detach().clone()) for m, (a, b, _) in lora_factors(model, name).items()}

    def penalty(model: Any) -> Tensor:
        total = torch.zeros(())
        for module, (a, b, scaling) in lora_factors(model, name).items():
            a0, b0 = before[module]
            left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
            size = scaling**2 * ((left.T @ left) * (right @ right.T)).sum()
            total = total.to(size.device) + size
        for weight in dense_parameters(model, name).values():
            size = weight.square().sum()
            total = total.to(size.device) + size
        return strength / 2 * total

    return penalty
