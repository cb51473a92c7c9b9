"""LoHa and LoKr: a Hadamard and a Kronecker product of small factors (arXiv:2108.06098, arXiv:2309.14859)."""

from peft import LoHaConfig, LoKrConfig, PeftConfig
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer

from corolla.adapters.kinds.kind import targets_of
from corolla.adapters.kinds.parameters import DenseMean, ParameterMean
from corolla.adapters.spec import AdapterSpec


def _loha(spec: AdapterSpec) -> PeftConfig:
    return LoHaConfig(r=spec.rank, alpha=spec.scaling * spec.rank, **targets_of(spec))


def _lokr(spec: AdapterSpec) -> PeftConfig:
    return LoKrConfig(r=spec.rank, alpha=spec.scaling * spec.rank, **targets_of(spec))


class LoHa(ParameterMean):
    """ΔW = s (B₁ A₁) ∘ (B₂ A₂)."""

    name, title, layer = "loha", "LoHa", LoHaLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's."""
        return _loha(spec)


class LoHaDense(DenseMean):
    """As LoHa, sent as ΔW."""

    name, title, layer = "loha-dense", "LoHa, sent whole", LoHaLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's."""
        return _loha(spec)


class LoKr(ParameterMean):
    """ΔW = s C ⊗ (B A), or C ⊗ D where D is no larger than its factors."""

    name, title, layer = "lokr", "LoKr", LoKrLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's."""
        return _lokr(spec)


class LoKrDense(DenseMean):
    """As LoKr, sent as ΔW."""

    name, title, layer = "lokr-dense", "LoKr, sent whole", LoKrLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's."""
        return _lokr(spec)
