"""SoRA: a gate on every component, and a proximal step that closes those that are not worth their size
(arXiv:2311.11696)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from corolla.adapters.kinds.hosted import Hosted, Training, local_layers
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import LowRankDelta, LowRankState

GATE = "sora_gate"
"""The parameter (rank,) of a PEFT layer that holds its gates; it has no weight decay."""


def soft_threshold(x: Tensor, by: float | Tensor) -> Tensor:
    """sign(x) · max(|x| − by, 0): the proximal operator of by · |x|."""
    return x.sign() * (x.abs() - by).clamp(min=0)


@torch.no_grad()
def close_gates(gate: Tensor, a: Tensor, b: Tensor, by: float) -> None:
    """The proximal step on g (rank,), in place, for A (rank, in) and B (out, rank).

    With rows of A and columns of B normalised and their norms in g, that is on the size t = g ‖b‖ ‖a‖ of every
    component: t' = soft_threshold(t, by). The norms then go back to where they were (g' = t' / ‖b‖ ‖a‖), since
    optimizers remember gradients on the scale that A and B have. So a component cannot escape by growing B or A
    instead of g. One whose b or a is zero stays as it is.
    """
    size = torch.linalg.vector_norm(b, dim=0) * torch.linalg.vector_norm(a, dim=1)
    closed = soft_threshold(gate * size, by) / torch.where(size > 0, size, 1.0)
    gate.copy_(torch.where(size > 0, closed, gate))


class Sora(Hosted):
    """ΔW = s B diag(g) A; after each optimizer step g ← prox of η ξ ‖·‖₁, η the step's learning rate, ξ the threshold.

    g begins at 1 and has no weight decay; so the threshold follows the schedule of the learning rate. (The published
    code zeroes what is below twice its threshold; this is the soft threshold of the paper.) At the end g is folded
    into B. Where a client began afresh (flora, florist), components that are zero are not sent: the upload follows the
    client's data. Under methods with a start they stay in their places, as zeros, since position is identity there.
    In rounds that train A alone (rolora) the gates are fixed as B is.
    """

    name = "sora"
    title = "SoRA"
    change = "gates on components, closed by a proximal step; what is zero is not sent"
    drops = True
    stepwise = True
    needs = (
        ("train.proximal", 0.0, "it measures B A without the gates"),
        ("train.keep_optimizer", False, "the gates go into B at the end of every round"),
    )
    not_with: ClassVar[Mapping[str, str]] = {
        "hetlora": "that has a penalty of its own on components, by their position"
    }

    @contextmanager
    def around(self, model: nn.Module, spec: AdapterSpec, seed: int, trains: str) -> Iterator[Training]:
        """A parameter beside every pair of factors, and a hook behind A that multiplies by it."""
        hooks, layers = [], local_layers(model) if "B" in trains else {}
        try:
            for layer in layers.values():
                weight = layer.lora_A[LOCAL].weight
                layer.register_parameter(GATE, nn.Parameter(torch.ones(weight.shape[0], device=weight.device)))
                hooks.append(layer.lora_A[LOCAL].register_forward_hook(_gating(layer._parameters[GATE])))
            yield Training((ClosesGates(layers, spec.sora_threshold),), lambda adapter: fold(layers, adapter))
        finally:
            for hook in hooks:
                hook.remove()
            for layer in layers.values():
                layer._parameters.pop(GATE, None)


class ClosesGates(TrainerCallback):  # type: ignore[misc]
    """`close_gates` by η ξ after every optimizer step, in all layers."""

    def __init__(self, layers: Mapping[str, Any], threshold: float) -> None:
        self.layers, self.threshold = layers, threshold

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the step, before the scheduler sets the next learning rate."""
        by = self.threshold * kwargs["optimizer"].param_groups[0]["lr"]
        for layer in self.layers.values():
            close_gates(layer._parameters[GATE], layer.lora_A[LOCAL].weight, layer.lora_B[LOCAL].weight, by)


def fold(layers: Mapping[str, Any], adapter: LowRankState) -> dict[str, LowRankDelta]:
    """B diag(g) and A of every module."""
    folded = dict(adapter)
    for module, layer in layers.items():
        gate = layer._parameters[GATE].detach().to("cpu", torch.float32)
        folded[module] = LowRankDelta(adapter[module].A, adapter[module].B * gate)
    return folded


def _gating(gate: Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * gate.to(output.dtype)

    return hook
