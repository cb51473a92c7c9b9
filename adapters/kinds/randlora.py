"""RandLoRA: a full-rank change from random bases that all modules share (arXiv:2502.00987)."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, RandLoraConfig
from peft.tuners.randlora.layer import RandLoraLayer
from torch import Tensor

from corolla.adapters.kinds.kind import Kind, on_cpu, targets_of
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, DenseDelta, LowRankDelta, low_rank


class RandLora(Kind):
    """ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j): linear in the pairs' products λ_j γ_jᵀ, of which clients send one each.

    PEFT draws the bases in the half precision that the machine has, which differs: here they are drawn in float32.
    """

    name = "randlora"
    title = "RandLoRA"
    coordinates = "λ (r·n), γ (n·min), n = ⌈min/r⌉"
    rule = "core: stack of the pairs (λ, γ)"
    trains = frozenset({"A", "B"})
    layer = RandLoraLayer
    no_factors = "its change has full rank"

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's, with the spec's scaling; λ = 0 at the start."""
        return RandLoraConfig(
            r=spec.rank, randlora_alpha=spec.scaling * spec.rank, randlora_dropout=spec.dropout,
            projection_prng_key=spec.seed, bias="none", **targets_of(spec),
        )  # fmt: skip

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:
        """Puts bases in place that are the same on every machine."""
        generator = torch.Generator().manual_seed(spec.seed)
        shared = next(iter(layers.values()))  # all layers hold the same two
        for part in (shared.randlora_A, shared.randlora_B):
            drawn = torch.empty(part[LOCAL].shape).uniform_(-1, 1, generator=generator)
            part[LOCAL] = (drawn / drawn.std()).to(part[LOCAL].device)

    def shape(self, layer: Any) -> tuple[int, int]:
        """(r·n, n·min), of λ γᵀ."""
        r, n = layer.randlora_lambda[LOCAL].shape
        return r * n, n * layer.randlora_gamma[LOCAL].shape[1]

    def read(self, layer: Any) -> LowRankDelta:
        """s λ and γ."""
        flat, gamma = (on_cpu(part[LOCAL]) for part in (layer.randlora_lambda, layer.randlora_gamma))
        return LowRankDelta(gamma.reshape(1, -1), layer.scaling[LOCAL] * flat.reshape(-1, 1))

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """ΔW, which has full rank."""
        pairs = low_rank({"": delta.double()})[""]
        (a, b), (r, n) = (part.double() for part in self.basis(layer)), layer.randlora_lambda[LOCAL].shape
        flat, gamma = pairs.B.reshape(r, n, -1), pairs.A.reshape(-1, n, a.shape[-1])
        scaled = torch.einsum("rnk,knm->rnm", flat, gamma) * a  # λ_j γ_jᵀ ∘ A
        change = b.flatten(1) @ scaled.flatten(0, 1)  # (max, min), in the order in which PEFT pairs them
        return DenseDelta((change if layer.out_features >= layer.in_features else change.T).float().contiguous())

    def basis(self, layer: Any) -> list[Tensor]:
        """A (r, 1, min) and B (max, n, r) of this module."""
        small, large = sorted((layer.in_features, layer.out_features))
        n = layer.randlora_lambda[LOCAL].shape[1]
        return [on_cpu(layer.randlora_A[LOCAL][:, :, :small]), on_cpu(layer.randlora_B[LOCAL][:large, :n])]

    def components(self, rank: int) -> int:
        """One pair."""
        return 1
