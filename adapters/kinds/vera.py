"""VeRA: two vectors on random factors that all modules share (arXiv:2310.11454)."""

from typing import Any

from peft import PeftConfig, VeraConfig
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor

from corolla.adapters.kinds.kind import Kind, on_cpu, targets_of
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, LowRankDelta, low_rank


class Vera(Kind):
    """ΔW = diag(b) B₀ diag(d) A₀ = (B₀ ∘ b dᵀ) A₀: linear in the matrix b dᵀ (out, r), of which clients send one
    component each."""

    name = "vera"
    title = "VeRA"
    coordinates = "b (out), d (r)"
    rule = "core: stack of the pairs (b, d)"
    trains = frozenset({"A", "B"})
    layer = VeraLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's, its factors drawn from the run's seed; b = 0 at the start."""
        return VeraConfig(
            r=spec.rank, projection_prng_key=spec.seed, vera_dropout=spec.dropout, bias="none", **targets_of(spec)
        )

    def shape(self, layer: Any) -> tuple[int, int]:
        """(out, r), of b dᵀ."""
        return layer.out_features, layer.r[LOCAL]

    def read(self, layer: Any) -> LowRankDelta:
        """b and d."""
        b, d = (on_cpu(part[LOCAL]) for part in (layer.vera_lambda_b, layer.vera_lambda_d))
        return LowRankDelta(d[None].contiguous(), b[:, None].contiguous())

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """(B₀ ∘ Σ b dᵀ) and A₀: no more rank than the random factors have."""
        a, b = (part.to(delta.double().dense().dtype) for part in self.basis(layer))
        pairs = low_rank({"": delta.double()})[""]
        unfolded = LowRankDelta(a, b * pairs.dense())
        return unfolded.single()

    def basis(self, layer: Any) -> list[Tensor]:
        """A₀ (r, in) and B₀ (out, r) of this module."""
        a, b = layer.vera_A[LOCAL][:, : layer.in_features], layer.vera_B[LOCAL][: layer.out_features]
        return [on_cpu(a), on_cpu(b)]

    def components(self, rank: int) -> int:
        """One pair."""
        return 1
