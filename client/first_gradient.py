"""A client's part of LoRA-SB's start: two sketches of its first gradient, without ever forming it.

With a LoRA whose A is [Ωᵀ; 0] and whose B is [0, Ψᵀ], ΔW = B A = 0, and of its gradient G one backward pass leaves
G Ω in the first columns of B's gradient, and Ψ G in the last rows of A's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import TrainerCallback

from corolla.adapters import LOCAL, LORA, AdapterSpec, Base, attached, local_layers
from corolla.aggregation import SIDES, DenseDelta, LowRankDelta, Shapes, random_matrices
from corolla.client.config import TrainConfig
from corolla.client.training import train_round


class _Gradients(TrainerCallback):
    """Sums up, in float64, the gradients that every step of a trainer finds."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.steps, self._layers = 0, layers

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Called by the trainer once the gradient of a whole batch is there, unclipped."""
        self.steps += 1
        for module, layer in self._layers.items():
            a, b = (part[LOCAL].weight.grad for part in (layer.lora_A, layer.lora_B))
            if a is None or b is None:
                raise ValueError(f"the first gradient must reach {module}, got none there: leave it out")
            found = a.detach().double().cpu(), b.detach().double().cpu()
            before = self.sums.get(module, (0.0, 0.0))
            self.sums[module] = before[0] + found[0], before[1] + found[1]


def sketch_first_gradient(
    base: Base, spec: AdapterSpec, shapes: Shapes, rank: int, seed: int, config: TrainConfig, examples: Sequence[Any]
) -> dict[str, DenseDelta]:
    """`<module>/range` Y = G Ω (out, l) and `<module>/corange` Z = Ψ G (l', in) of the base's mean gradient G.

    The mean is over the optimizer steps that `config` makes of `examples`, none of which moves anything; `shapes` are
    the modules' (out, in). Raises what `train_round` raises, and ValueError where no gradient reaches a module.
    """
    random = {module: random_matrices(module, shape, rank, seed) for module, shape in shapes.items()}
    width = max(omega.shape[1] + psi.shape[0] for omega, psi in random.values())
    spec = replace(spec, rank=width, alpha=float(width), kind=LORA, rslora=False, dropout=0.0)
    start = {}
    for module, (omega, psi) in random.items():
        broad, height = omega.shape[1], psi.shape[0]
        start[module] = LowRankDelta(
            pad(omega.T, (0, 0, 0, width - broad)).float(), pad(psi.T, (broad, width - broad - height)).float()
        )
    config = config.model_copy(
        update={"optimizer": "sgd", "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "proximal": 0.0}
    )
    with attached(base.model, spec, start) as model:
        gradients = _Gradients(local_layers(model))
        train_round(model, base, config, examples, 1, 1, seed, callbacks=[gradients])
    found = {}
    for module, (of_a, of_b) in gradients.sums.items():
        broad, height = random[module][0].shape[1], random[module][1].shape[0]
        for side, part in zip(SIDES, (of_b[:, :broad], of_a[broad : broad + height]), strict=True):
            found[f"{module}/{side}"] = DenseDelta((part / gradients.steps).float().contiguous())
    return found
