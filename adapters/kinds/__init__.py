"""The kinds of adapter beyond plain LoRA, one file each."""

from collections.abc import Mapping

from torch import nn

from corolla.adapters.kinds.dora import Dora
from corolla.adapters.kinds.ia3 import Ia3
from corolla.adapters.kinds.kind import Kind, attach, kind_shapes, train_kind, unfold_kind
from corolla.adapters.kinds.loldu import LoLdu
from corolla.adapters.kinds.miss import Miss, MissBat, MissMini
from corolla.adapters.kinds.randlora import RandLora
from corolla.adapters.kinds.svfit import SvFit
from corolla.adapters.kinds.vera import Vera
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import AdapterState

LORA = "lora"
"""Plain LoRA, which needs no kind: every method is made for it."""

KINDS: Mapping[str, Kind] = {
    kind.name: kind for kind in (Dora(), Ia3(), LoLdu(), Miss(), MissBat(), MissMini(), RandLora(), SvFit(), Vera())
}
"""The choices of `adapter.kind` besides `lora`. A new kind is a file like these and a place in this line."""


def on_weights(base: nn.Module, spec: AdapterSpec, adapter: AdapterState) -> AdapterState:
    """What an adapter of this kind changes of the base's weights: LoRA is that itself, coordinates are unfolded."""
    return adapter if spec.kind == LORA else unfold_kind(base, KINDS[spec.kind], spec, adapter)


__all__ = ["KINDS", "LORA", "Kind", "attach", "kind_shapes", "on_weights", "train_kind", "unfold_kind"]
