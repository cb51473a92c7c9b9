"""What each kind of adapter sends for a model, and how it is combined."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from corolla.adapters.kinds import HOSTED, KINDS, LORA
from corolla.adapters.kinds.kind import Kind, attach
from corolla.adapters.lora import target_shapes
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Shapes

FACTORS = "factors: stack of B and A"
"""The rule of LoRA, and of what is LoRA on the wire."""


@dataclass(frozen=True)
class Entry:
    """`bytes_up` is what a client sends in a round; None where the kind cannot adapt this model, with the `reason`."""

    name: str
    title: str
    coordinates: str
    rule: str
    bytes_up: int | None
    reason: str = ""


def catalogue(base: nn.Module, spec_of: Callable[[str], AdapterSpec]) -> Iterator[Entry]:
    """An entry a kind, LoRA first. `base` may be on torch's meta device; `spec_of(kind)` is what would be attached."""
    spec = spec_of(LORA)
    sides = sum(map(sum, target_shapes(base, spec).values()))
    factors = "B (out·r), A (r·in)", FACTORS, 4 * spec.rank * sides
    yield Entry(LORA, "LoRA", *factors)
    for hosted in HOSTED.values():
        yield Entry(hosted.name, hosted.title, *factors)
    for kind in KINDS.values():
        about = (kind.name, kind.title, kind.coordinates, kind.rule)
        try:
            with attach(base, kind, spec_of(kind.name)) as (_, layers):
                shapes = {module: kind.shape(layer) for module, layer in layers.items()}
        except (ValueError, TypeError) as error:  # what PEFT and the kinds raise for modules that they cannot adapt
            yield Entry(*about, None, str(error))
            continue
        yield Entry(*about, _bytes(kind, shapes, kind.components(spec.rank)))


def _bytes(kind: Kind, shapes: Shapes, components: int) -> int:
    sizes = {"W": lambda p, q: p * q, "A": lambda p, q: components * q, "B": lambda p, q: components * p}
    sizes["d"] = lambda p, q: p
    return 4 * sum(sizes[name](p, q) for p, q in shapes.values() for name in kind.trains)
