"""rsLoRA: LoRA scaled by alpha / √rank (arXiv:2312.03732)."""

from dataclasses import replace

from corolla.adapters.kinds.hosted import Hosted
from corolla.adapters.spec import AdapterSpec


class RsLora(Hosted):
    """LoRA with adapter.rslora, by the name of a kind: s = alpha / √r."""

    name = "rslora"
    title = "rsLoRA"
    change = "s = alpha / √r"

    def require(self, alpha: float | None, scaling: float | None, dropout: float) -> None:
        """Raises ValueError without an alpha: adapter.scaling is s itself, whatever it is divided by."""
        if alpha is None:
            raise ValueError(
                "adapter.kind = 'rslora' divides adapter.alpha by √rank, got adapter.alpha unset, with which s is "
                "adapter.scaling at every rank: set it, or use kind 'lora'"
            )

    def adjust(self, spec: AdapterSpec) -> AdapterSpec:
        """With rslora."""
        return replace(spec, rslora=True)
