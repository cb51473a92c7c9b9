"""What a kind of LoRA is that differs in how it is trained alone: on the wire it is A and B, like any LoRA."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback

from corolla.adapters.lora import LOCAL, PREFIX
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import LowRankDelta, LowRankState, Shapes

Need = tuple[str, Any, str]
"""(key of the configuration, the value that it must have, why)."""


def as_it_is(adapter: LowRankState) -> LowRankState:
    """The adapter itself."""
    return adapter


@dataclass(frozen=True)
class Training:
    """One local training: what is told of its steps, and `fold`, which makes plain factors of those that were read."""

    callbacks: Sequence[TrainerCallback] = ()
    fold: Callable[[LowRankState], LowRankState] = as_it_is


class Hosted:
    """A kind of adapter that is LoRA but in training. One file each, and a line in `HOSTED`.

    It is attached, sent, checked and aggregated as LoRA is: by every method, in secure sums, under privacy, at
    different ranks. `change` says what is different. Where `begins`, the first global model has `start` trained and
    minus that merged (`corolla.aggregation.with_offset`). Where `drops`, components that are zero at the end are not
    sent, so that a reply may have fewer than were ordered. Where `stepwise`, it must be told of every optimizer step.
    `needs` are settings that it cannot be without, `not_with` methods that it cannot be with and why.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    change: ClassVar[str]
    coordinates: ClassVar[str] = "B (out·r), A (r·in)"
    begins: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False
    needs: ClassVar[Sequence[Need]] = ()
    not_with: ClassVar[Mapping[str, str]] = {}

    def require(self, alpha: float | None, scaling: float | None, dropout: float) -> None:
        """Raises ValueError for one of adapter.alpha, .scaling and .dropout that the kind cannot have.

        None where it is not set.
        """

    def adjust(self, spec: AdapterSpec) -> AdapterSpec:
        """`spec` with the scaling and dropout that the kind has; idempotent."""
        return spec

    def start(self, base: nn.Module, shapes: Shapes, rank: int) -> LowRankState:
        """S, the part of the base's weights where training begins, at most `rank` components a module, nested by rank.

        Raises ValueError for a kind that begins like LoRA, or for a quantised weight.
        """
        raise ValueError(f"{self.name} begins at no part of the base")

    @contextmanager
    def around(self, model: nn.Module, spec: AdapterSpec, seed: int, trains: str) -> Iterator[Training]:
        """Makes adapter `local` of a PEFT model train as the kind does, in place; at the end all is taken off again.

        `seed` is that of everything drawn, other for every client and round; `trains` are the factors that take
        gradients.
        """
        yield Training()


def local_layers(model: nn.Module) -> dict[str, Any]:
    """Module -> the live PEFT layer that holds adapter `local`."""
    layers = ((n.removeprefix(PREFIX), m) for n, m in model.named_modules() if isinstance(m, LoraLayer))
    return {name: layer for name, layer in layers if LOCAL in layer.lora_A}


def without_zeros(delta: LowRankDelta) -> LowRankDelta:
    """The components that are not zero; at least one, so that the module is still there."""
    lives = (delta.A != 0).any(dim=1) & (delta.B != 0).any(dim=0)
    if delta.rank and not lives.any():
        lives = torch.arange(delta.rank) == 0
    return LowRankDelta(delta.A[lives], delta.B[:, lives])
