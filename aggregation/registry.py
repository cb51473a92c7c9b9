"""The aggregation methods by name. A new one is a file in `methods` and a line here."""

import inspect
from collections.abc import Callable, Mapping

from corolla.aggregation.method import Method
from corolla.aggregation.methods.fedex import fedex
from corolla.aggregation.methods.fedit import fedit
from corolla.aggregation.methods.fedsvd import fedsvd
from corolla.aggregation.methods.ffa import ffa
from corolla.aggregation.methods.flexlora import flexlora
from corolla.aggregation.methods.flora import flora
from corolla.aggregation.methods.florist import florist
from corolla.aggregation.methods.fr_lora import fr_lora
from corolla.aggregation.methods.full import full
from corolla.aggregation.methods.hetlora import hetlora
from corolla.aggregation.methods.lora_fair import lora_fair
from corolla.aggregation.methods.rbla import rbla
from corolla.aggregation.methods.rolora import rolora
from corolla.aggregation.methods.warm import warm
from corolla.aggregation.methods.zero_padding import zero_padding

AGGREGATORS: Mapping[str, Callable[..., Method]] = {
    "flora": flora,
    "florist": florist,
    "warm": warm,
    "fedex": fedex,
    "fedit": fedit,
    "lora-fair": lora_fair,
    "fr-lora": fr_lora,
    "zero-padding": zero_padding,
    "hetlora": hetlora,
    "rbla": rbla,
    "flexlora": flexlora,
    "ffa": ffa,
    "rolora": rolora,
    "fedsvd": fedsvd,
    "full": full,
}


def build_method(name: str, **options: float) -> Method:
    """The method of that name with its own options.

    Raises ValueError, listing the right names, for any other name, and for an option that the method does not have.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"aggregation method must be one of {', '.join(sorted(AGGREGATORS))}, got {name!r}")
    factory = AGGREGATORS[name]
    known = inspect.signature(factory).parameters
    if odd := sorted(options.keys() - known.keys()):
        has = f"has {', '.join(known)}" if known else "has no options"
        raise ValueError(f"{name} {has}, got {odd[0]} = {options[odd[0]]}: leave it out")
    return factory(**options)
