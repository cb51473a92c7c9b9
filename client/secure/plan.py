"""What is summed in a round, and where each number of it stands: the same on the server and on every client."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor

from corolla.aggregation import AdapterState, LowRankDelta, Shapes
from corolla.aggregation.fixed_point import FixedPoint
from corolla.aggregation.sketch import PROBES, projection, random_columns, range_sketch

MAX_CLIENTS = 2**16


@dataclass(frozen=True)
class SumPlan:
    """The modules with their sketch widths, the heads, the number format, and the public seed of Ω.

    `terms` is the number of clients; `weights` says by what a client multiplies its change. The first pass has
    Y = n B (A Ω) of every module, the second X = n (Qᵀ B) A, then every head's n ΔW, then n itself: what a client does
    not have it sends as zeros, under its masks.
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
        first = sum(self.shapes[m][0] * (width + PROBES) for m, width in self.widths.items())
        second = sum(self.columns(m) * shape[1] for m, shape in self.shapes.items())
        return first, second + sum(out * inn for out, inn in self.heads.values()) + 1

    def first(self, change: AdapterState, weight: float) -> Tensor:
        """This client's first vector, float64."""
        parts = []
        for module, (out, inn) in sorted(self.shapes.items()):
            width = self.widths[module] + PROBES
            if isinstance(delta := change.get(module), LowRankDelta):
                omega = random_columns(module, inn, width, self.seed, self.round)
                parts.append(weight * range_sketch(delta, omega).flatten())
            else:
                parts.append(torch.zeros(out * width, dtype=torch.float64))
        return torch.cat(parts)

    def sketches(self, total: Tensor) -> dict[str, Tensor]:
        """module -> Y from a first vector, or a sum of them."""
        shapes = {m: (self.shapes[m][0], self.widths[m] + PROBES) for m in sorted(self.shapes)}
        return _cut(total, shapes)

    def second(self, change: AdapterState, bases: Mapping[str, Tensor], weight: float) -> Tensor:
        """This client's second vector, float64, with `bases` (module -> Q)."""
        parts = []
        for module, (_, inn) in sorted(self.shapes.items()):
            delta = change.get(module)
            part = projection(delta, bases[module]) if isinstance(delta, LowRankDelta) else None
            parts.append(torch.zeros(self.columns(module) * inn).double() if part is None else part.flatten())
        for module, shape in sorted(self.heads.items()):
            parts.append(
                change[module].dense().double().flatten() if module in change else torch.zeros(*shape).flatten()
            )
        return weight * torch.cat([*parts, torch.ones(1, dtype=torch.float64)])

    def products(self, total: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """module -> X, head -> Σ n ΔW, and Σ n from a second vector, or a sum of them."""
        shapes = {m: (self.columns(m), self.shapes[m][1]) for m in sorted(self.shapes)}
        split = sum(rows * columns for rows, columns in shapes.values())
        return _cut(total[:split], shapes), _cut(total[split:-1], dict(sorted(self.heads.items()))), float(total[-1])


def _cut(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes.values()])
    return {module: part.reshape(shape) for (module, shape), part in zip(shapes.items(), parts, strict=True)}
