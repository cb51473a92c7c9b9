"""The aggregation methods by name. A new one is a file and a line here."""

from collections.abc import Callable, Mapping

from corolla.aggregation.averaging import fedit, zero_padding
from corolla.aggregation.flora import flora
from corolla.aggregation.method import Method
from corolla.aggregation.warm import warm

AGGREGATORS: Mapping[str, Callable[[], Method]] = {
    "flora": flora,
    "fedit": fedit,
    "zero-padding": zero_padding,
    "warm": warm,
}


def build_method(name: str) -> Method:
    """The method of that name. Raises ValueError, listing the right names, for any other."""
    if name not in AGGREGATORS:
        raise ValueError(f"aggregation method must be one of {', '.join(sorted(AGGREGATORS))}, got {name!r}")
    return AGGREGATORS[name]()
