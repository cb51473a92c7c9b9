"""MiSS (arXiv:2409.15371, first called Bone): one block, shared by all blocks of a weight, in three modes."""

from typing import Any, ClassVar

import torch
from peft import MissConfig, PeftConfig
from peft.tuners.miss.layer import MissLayer
from torch import Tensor

from corolla.adapters.kinds.kind import Kind, base_weight, on_cpu, targets_of
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, DenseDelta, LowRankDelta


class Miss(Kind):
    """ΔW = bᵀ [I_r I_r … I_r], b (r, out): the inputs are summed over blocks of r, and b maps them."""

    name = "miss"
    title = "MiSS"
    coordinates = "b (r·out)"
    rule = "linear: mean of b"
    trains = frozenset({"W"})
    continues = True
    layer = MissLayer
    mode: ClassVar[bool | str] = True

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's, in this mode; zero at the start."""
        return MissConfig(
            r=spec.rank, miss_dropout=spec.dropout, bias="none", init_weights=self.mode, mini_r=spec.rank,
            **targets_of(spec),
        )  # fmt: skip

    def shape(self, layer: Any) -> tuple[int, int]:
        """(r, out)."""
        block = layer.miss_block[LOCAL]
        return int(block.shape[:-1].numel()), int(block.shape[-1])

    def read(self, layer: Any) -> DenseDelta:
        """b."""
        return DenseDelta(on_cpu(layer.miss_block[LOCAL]).reshape(self.shape(layer)))

    @torch.no_grad()
    def load(self, layer: Any, delta: Delta) -> None:
        """Sets b."""
        block = layer.miss_block[LOCAL]
        block.copy_(delta.dense().reshape(block.shape))

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """bᵀ with the blocks' sum as its A."""
        b = self._rows(layer, delta.dense())
        blocks = -(-layer.in_features // len(b))
        tiled = torch.eye(len(b), dtype=b.dtype).repeat(1, blocks)[:, : layer.in_features]
        return LowRankDelta(tiled.contiguous(), b.T.contiguous())

    def _rows(self, layer: Any, b: Tensor) -> Tensor:
        """b as (r, out)."""
        return b


class MissMini(Miss):
    """MiSS with b (r, r), repeated over the outputs."""

    name = "miss-mini"
    title = "MiSS, mini"
    coordinates = "b (r·r)"
    mode = "mini"

    def _rows(self, layer: Any, b: Tensor) -> Tensor:
        return b.repeat(1, layer.out_features // b.shape[1])


class MissBat(Miss):
    """Bone-bat: every block (p, q) of r by r changes by W_pq b_p + b_p, so ΔW is linear in b for one W."""

    name = "miss-bat"
    title = "MiSS, bat (Bone)"
    coordinates = "b (out·r)"
    mode = "bat"
    no_factors = "its change is that of W block by block, which has full rank"

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """ΔW on the base's weight."""
        weight, b = base_weight(layer).to(delta.dense().dtype), delta.dense()
        r = b.shape[1]
        blocks = weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r).permute(2, 0, 1, 3)
        each = b.reshape(-1, r, r)
        change = blocks @ each + each
        return DenseDelta(change.permute(1, 2, 0, 3).reshape(weight.shape).contiguous())
