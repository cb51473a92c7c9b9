"""The kinds of adapter beyond plain LoRA, one file each: `KINDS` in coordinates of their own, `HOSTED` on LoRA's."""

from collections.abc import Mapping

from torch import nn

from corolla.adapters.kinds.allora import Allora
from corolla.adapters.kinds.begun import OLora, Pissa
from corolla.adapters.kinds.dora import Dora
from corolla.adapters.kinds.dylora import DyLora
from corolla.adapters.kinds.hosted import Hosted, Training, local_layers, without_zeros
from corolla.adapters.kinds.ia3 import Ia3
from corolla.adapters.kinds.kind import (
    BASES,
    Kind,
    attach,
    kind_shapes,
    require_factors,
    train_kind,
    train_unfolded,
    unfold_kind,
    unfolded_shapes,
)
from corolla.adapters.kinds.loldu import LoLdu
from corolla.adapters.kinds.lora_sb import LoraSb
from corolla.adapters.kinds.lycoris import LoHa, LoHaDense, LoKr, LoKrDense
from corolla.adapters.kinds.miss import Miss, MissBat, MissMini
from corolla.adapters.kinds.noise import measure_parameters
from corolla.adapters.kinds.randlora import RandLora
from corolla.adapters.kinds.rslora import RsLora
from corolla.adapters.kinds.sora import GATE, Sora
from corolla.adapters.kinds.svfit import SvFit
from corolla.adapters.kinds.vera import Vera
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import AdapterState

LORA = "lora"
"""Plain LoRA, which needs no kind: every method is made for it."""

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Dora(), Ia3(), LoHa(), LoHaDense(), LoKr(), LoKrDense(), LoLdu(), LoraSb(), Miss(), MissBat(), MissMini(),
        RandLora(), SvFit(), Vera(),
    )
}  # fmt: skip
"""Kinds that aggregate in coordinates of their own. A new kind is a file like these and a place in this line."""

HOSTED: Mapping[str, Hosted] = {kind.name: kind for kind in (RsLora(), Pissa(), OLora(), DyLora(), Sora(), Allora())}
"""Kinds that differ from LoRA in training alone: A and B are what travels, and every method is made for that."""


def kind_names() -> tuple[str, ...]:
    """The choices of `adapter.kind`."""
    return (LORA, *KINDS, *HOSTED)


def is_lora(kind: str) -> bool:
    """Whether a kind is LoRA on the wire: plain, or hosted on it."""
    return kind == LORA or kind in HOSTED


def require_mixable(name: str) -> None:
    """Raises ValueError for a kind that clients of other kinds cannot be beside."""
    if name not in kind_names():
        raise ValueError(f"a kind must be one of {', '.join(kind_names())}, got {name!r}")
    if name in KINDS:
        require_factors(KINDS[name])
    if name in HOSTED and HOSTED[name].begins:
        raise ValueError(
            f"clients of different kinds begin at the base as it is, got {name!r}, which begins at a part of it: use "
            "it as adapter.kind for all"
        )


def on_weights(base: nn.Module, spec: AdapterSpec, adapter: AdapterState) -> AdapterState:
    """What an adapter of this kind changes of the base's weights: LoRA is that itself, coordinates are unfolded."""
    return adapter if is_lora(spec.kind) else unfold_kind(base, KINDS[spec.kind], spec, adapter)


__all__ = [
    "BASES",
    "GATE",
    "HOSTED",
    "KINDS",
    "LORA",
    "Hosted",
    "Kind",
    "Training",
    "attach",
    "is_lora",
    "kind_names",
    "kind_shapes",
    "local_layers",
    "measure_parameters",
    "on_weights",
    "require_factors",
    "require_mixable",
    "train_kind",
    "train_unfolded",
    "unfold_kind",
    "unfolded_shapes",
    "without_zeros",
]
