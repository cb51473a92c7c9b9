"""A kind as an outsider would add it: this file, and a place in `KINDS`. FourierFT (arXiv:2405.03003)."""

from typing import Any

import torch
from peft import FourierFTConfig, PeftConfig
from peft.tuners.fourierft.layer import FourierFTLayer
from torch import Tensor

from corolla.adapters.kinds.kind import Kind, on_cpu, targets_of
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, DenseDelta


class FourierFt(Kind):
    """ΔW = s · Re IFFT2 of r² coefficients at random places that all clients share: linear in the coefficients."""

    name = "fourierft"
    title = "FourierFT"
    coordinates = "c (r²)"
    rule = "linear: mean of c"
    trains = frozenset({"W"})
    continues = True
    layer = FourierFTLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's, c = 0 at the start."""
        return FourierFTConfig(
            n_frequency=spec.rank**2, scaling=100.0 * spec.scaling, random_loc_seed=spec.seed, init_weights=True,
            **targets_of(spec),
        )  # fmt: skip

    def shape(self, layer: Any) -> tuple[int, int]:
        """(r², 1)."""
        return layer.fourierft_n_frequency[LOCAL], 1

    def read(self, layer: Any) -> DenseDelta:
        """c."""
        return DenseDelta(on_cpu(layer.fourierft_spectrum[LOCAL]).reshape(-1, 1))

    @torch.no_grad()
    def load(self, layer: Any, delta: Delta) -> None:
        """Sets c."""
        layer.fourierft_spectrum[LOCAL].copy_(delta.dense().flatten())

    @torch.no_grad()
    def unfold(self, layer: Any, delta: Delta) -> DenseDelta:
        """ΔW."""
        now = self.read(layer)
        self.load(layer, delta)
        change = DenseDelta(on_cpu(layer.get_delta_weight(LOCAL)))
        self.load(layer, now)
        return change

    def basis(self, layer: Any) -> list[Tensor]:
        """The places."""
        return [layer.indices[LOCAL]]
