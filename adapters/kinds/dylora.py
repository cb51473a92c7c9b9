"""DyLoRA: every prefix of the components is trained to stand by itself (arXiv:2210.07558)."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from corolla.adapters.kinds.hosted import Hosted, Training, local_layers
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec


def drawn_rank(seed: int, step: int, rank: int) -> int:
    """b ~ Uniform{1..rank} of an optimizer step, a function of its arguments alone."""
    digest = hashlib.sha256(f"dylora/{seed}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return int(torch.randint(1, rank + 1, (1,), generator=generator))


class DyLora(Hosted):
    """ΔW_b = s Σ_{j ≤ b} b_j a_jᵀ in a step with its own b, the same in all modules; all components in evaluation.

    s does not depend on b (the paper's code has alpha / b), so that ΔW_b is a prefix of ΔW. Components beyond b get
    no gradient in that step; what an optimizer with momentum remembers of them still moves them. With method `warm`
    the server keeps components ordered by size, and each client trains, and is served, the prefix of its rank.
    """

    name = "dylora"
    title = "DyLoRA"
    change = "each step trains the first b components, b drawn anew"
    stepwise = True

    @contextmanager
    def around(self, model: nn.Module, spec: AdapterSpec, seed: int, trains: str) -> Iterator[Training]:
        """Masks over the components, behind every A, in train mode alone."""
        masks, hooks = [], []
        try:
            for layer in local_layers(model).values():
                weight = layer.lora_A[LOCAL].weight
                masks.append(torch.ones(weight.shape[0], device=weight.device))
                hooks.append(layer.lora_A[LOCAL].register_forward_hook(_masking(masks[-1])))
            yield Training((DrawsRank(masks, seed),))
        finally:
            for hook in hooks:
                hook.remove()


class DrawsRank(TrainerCallback):  # type: ignore[misc]
    """Draws b before every optimizer step, and sets the masks (rank,) to b ones and then zeros, in place."""

    def __init__(self, masks: Sequence[Tensor], seed: int) -> None:
        self.masks, self.seed = masks, seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch of a step."""
        for mask in self.masks:
            mask.fill_(0.0)
            mask[: drawn_rank(self.seed, state.global_step, len(mask))] = 1.0


def _masking(mask: Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * mask.to(output.dtype) if layer.training else output

    return hook
