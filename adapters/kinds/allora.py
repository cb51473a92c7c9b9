"""ALLoRA: no scaling, no dropout, and gradients that are the larger the less a row has moved (arXiv:2410.09692)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corolla.adapters.kinds.hosted import Hosted, Training, local_layers
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec


@torch.no_grad()
def row_rates(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """1 / √(‖(B A)_i‖₂ + 1/η²) of every row i, (out,), for A (rank, in) and B (out, rank).

    ‖(B A)_i‖² = b_i (A Aᵀ) b_iᵀ, so no (out, in) matrix is formed.
    """
    a, b = a.float(), b.float()
    squares = ((b @ (a @ a.T)) * b).sum(dim=1)
    return (squares.clamp(min=0).sqrt() + eta**-2).rsqrt()


class RatedProduct(torch.autograd.Function):
    """x Aᵀ Bᵀ, (…, out) of x (…, in), whose gradients of A and B see row i of the output at rate d_i (out,).

    With G the gradient of the output and D = diag(d): gB = D Gᵀ x Aᵀ, gA = Bᵀ D Gᵀ x, and gx = G B A without D, so
    that what lies below learns as it would.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, rates: Tensor) -> Tensor:
        """Under autocast in its precision."""
        ctx.save_for_backward(x, a, b, rates)
        return nn.functional.linear(nn.functional.linear(x, a), b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """In the precision of the output's gradient."""
        x, a, b, rates = ctx.saved_tensors
        kind = gradients[0].dtype
        g, flat = gradients[0].reshape(-1, b.shape[0]), x.reshape(-1, a.shape[1]).to(kind)
        wide, tall = a.to(kind), b.to(kind)
        rated = g * rates.to(kind)
        of_x = ((g @ tall) @ wide).reshape(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_a = ((rated @ tall).T @ flat).to(a.dtype) if ctx.needs_input_grad[1] else None
        of_b = (rated.T @ (flat @ wide.T)).to(b.dtype) if ctx.needs_input_grad[2] else None
        return of_x, of_a, of_b, None


class Allora(Hosted):
    """f = W x + B A x; the gradients of A and B see row i at rate 1 / √(‖(B A)_i‖₂ + 1/η²), the input's does not.

    η (adapter.allora_eta) is the rate while B = 0. The rates are applied to gradients, as the paper says, before
    clipping (train.max_grad_norm) and before the optimizer. Adam divides by the size of gradients, so a rate that a
    row keeps cancels for its row of B, and what is left is that rows count differently in A, and changes of the rate;
    with plain SGD (train.optimizer = "sgd") the rates act in full.
    """

    name = "allora"
    title = "ALLoRA"
    change = "s = 1, no dropout; gradients by row, larger where little has moved"

    def require(self, alpha: float | None, scaling: float | None, dropout: float) -> None:
        """Raises ValueError for an alpha, a scaling other than 1, or dropout."""
        for key, found, wanted in (("alpha", alpha, None), ("scaling", scaling, 1.0), ("dropout", dropout or None, 0)):
            if found is not None and found != wanted:
                raise ValueError(
                    f"adapter.kind = 'allora' has no scaling (s = 1) and no dropout, got adapter.{key} = {found:g}: "
                    "leave it out"
                )

    def adjust(self, spec: AdapterSpec) -> AdapterSpec:
        """s = 1, no dropout."""
        return replace(spec, alpha=float(spec.rank), rslora=False, dropout=0.0)

    @contextmanager
    def around(self, model: nn.Module, spec: AdapterSpec, seed: int, trains: str) -> Iterator[Training]:
        """A passes its input on, and B computes the product of both."""
        changed = []
        try:
            for layer in local_layers(model).values():
                a, b = layer.lora_A[LOCAL], layer.lora_B[LOCAL]
                changed += [a, b]
                a.forward, b.forward = _passed_on, partial(_product, a, b, spec.allora_eta)
            yield Training()
        finally:
            for factor in changed:
                factor.__dict__.pop("forward", None)


def _passed_on(x: Tensor) -> Tensor:
    return x


def _product(a: Any, b: Any, eta: float, x: Tensor) -> Tensor:
    rates = row_rates(a.weight, b.weight, eta)
    return RatedProduct.apply(x, a.weight, b.weight, rates)  # type: ignore[no-any-return,no-untyped-call]
