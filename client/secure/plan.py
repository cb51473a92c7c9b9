"""What is summed in a round, and where each number of it stands: the same on the server and on every client."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor

from corolla.aggregation import AdapterState, LowRankDelta, Shapes
from corolla.aggregation.fixed_point import FixedPoint
from corolla.aggregation.sketch import PROBES, projection, random_columns, range_sketch


@dataclass(frozen=True)
class SumPlan:
    """The modules with their sketch widths, the heads, the number format, and the public seed of Ω.

    `terms` is the number of clients; `weights` says by what a client multiplies its change. The first pass has
    Y = n B (A Ω) of every module; the second X = n (Qᵀ B) A of every module, probes like Y, every head's n ΔW, and n
    itself. What a client does not have it sends as zeros, under its masks.
    """

    shapes: Shapes
    widths: Mapping[str, int]
    heads: Shapes
    seed: int
    round: int
    weights: str
    bits: int
    clip: float
    terms: int

    def to_json(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError for text that is no plan."""
        try:
            values = json.loads(text)
            for name in ("shapes", "heads"):
                values[name] = {module: (int(shape[0]), int(shape[1])) for module, shape in values[name].items()}
            return cls(**values)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"a plan of a secure sum must have {', '.join(cls.__annotations__)}, got {error}"
            ) from error

    @property
    def numbers(self) -> FixedPoint:
        """The format of every number."""
        return FixedPoint(self.bits, self.clip, self.terms)

    def columns(self, module: str) -> int:
        """Columns of Q: what the first pass can span."""
        return min(self.widths[module], self.shapes[module][0])

    def sizes(self) -> tuple[int, int]:
        """The entries of the first and of the second pass."""
        first = sum(self.shapes[m][0] * width for m, width in self.widths.items())
        second = sum(self.columns(m) * inn + PROBES * out for m, (out, inn) in self.shapes.items())
        return first, second + sum(out * inn for out, inn in self.heads.values()) + 1

    def first(self, change: AdapterState, weight: float) -> Tensor:
        """This client's first vector, float64."""
        return weight * _flat([self._sketch(change, m, 0, self.widths[m]) for m in sorted(self.shapes)])

    def sketches(self, total: Tensor) -> dict[str, Tensor]:
        """module -> Y from a first vector, or a sum of them."""
        return _cut(total, {m: (self.shapes[m][0], self.widths[m]) for m in sorted(self.shapes)})

    def second(self, change: AdapterState, bases: Mapping[str, Tensor], weight: float) -> Tensor:
        """This client's second vector, float64, with `bases` (module -> Q)."""
        parts = []
        for module, (_, inn) in sorted(self.shapes.items()):
            delta = change.get(module)
            still = torch.zeros(self.columns(module), inn)
            parts.append(projection(delta, bases[module]) if isinstance(delta, LowRankDelta) else still)
        parts += [self._sketch(change, m, self.widths[m], self.widths[m] + PROBES) for m in sorted(self.shapes)]
        parts += [change[m].dense() if m in change else torch.zeros(shape) for m, shape in sorted(self.heads.items())]
        return weight * _flat([*parts, torch.ones(1)])

    def products(self, total: Tensor) -> "Products":
        """The parts of a second vector, or of a sum of them."""
        modules = sorted(self.shapes)
        shapes = {f"x/{m}": (self.columns(m), self.shapes[m][1]) for m in modules}
        shapes |= {f"p/{m}": (self.shapes[m][0], PROBES) for m in modules}
        shapes |= {f"h/{m}": shape for m, shape in sorted(self.heads.items())}
        parts = _cut(total[:-1], shapes)
        x, probes, heads = ({m[2:]: part for m, part in parts.items() if m[0] == kind} for kind in "xph")
        return Products(x, probes, heads, float(total[-1]))

    def _sketch(self, change: AdapterState, module: str, first: int, last: int) -> Tensor:
        """B (A Ω) with columns first..last-1 of Ω, zero for a module that does not change."""
        delta, (out, inn) = change.get(module), self.shapes[module]
        if not isinstance(delta, LowRankDelta):
            return torch.zeros(out, last - first)
        return range_sketch(delta, random_columns(module, inn, first, last, self.seed, self.round))


@dataclass(frozen=True)
class Products:
    """The sums of the second pass, each of n times what clients have: module -> X (columns, in) and probes
    (out, PROBES), head -> ΔW, and Σ n itself."""

    x: Mapping[str, Tensor]
    probes: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    weight: float


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.double().flatten() for part in parts])


def _cut(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes.values()])
    return {module: part.reshape(shape) for (module, shape), part in zip(shapes.items(), parts, strict=True)}
