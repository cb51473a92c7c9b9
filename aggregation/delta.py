"""ΔW of one module, in one of several algebras: frozen, float32, with the scaling already folded in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Delta(Protocol):
    """One module's change of weight, ΔW, in some algebra.

    A new algebra is a class like this one, its rules registered with `scale`, `add`, `norm`, `compress` and
    `singular_values` of `corolla.aggregation.algebra`, and a line in `DELTAS`.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of ΔW."""

    @property
    def rank(self) -> int:
        """The number of components; 0 means "no change"."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that they travel under."""

    def double(self) -> Self:
        """The same in float64."""

    def single(self) -> Self:
        """The same in float32, contiguous: each entry rounded once."""

    def dense(self) -> Tensor:
        """ΔW itself, (out, in)."""


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """ΔW = B @ A, one module's change of weight.

    A is (rank, in), B is (out, rank), on the CPU: float32 wherever it is stored or sent, float64 inside a
    computation. The LoRA scaling is part of B. Rank 0 is allowed and means "no change". Raises ValueError where
    the two do not fit together.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("B", self.B)):
            if factor.ndim != 2:
                raise ValueError(f"{name} must be a matrix, got shape {tuple(factor.shape)}")
            if factor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} must be float32 or float64, got {factor.dtype}: cast it first")
        if self.A.dtype != self.B.dtype:
            raise ValueError(f"A and B must share a dtype, got {self.A.dtype} and {self.B.dtype}")
        if self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"A (rank, in) and B (out, rank) must share the rank, got {[*self.A.shape]} and {[*self.B.shape]}"
            )

    @property
    def rank(self) -> int:
        """The number of components (columns of B, rows of A); the rank of B @ A may be smaller."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"A": self.A, "B": self.B}

    def first(self, rank: int) -> "LowRankDelta":
        """The first min(rank, self.rank) components, as views."""
        return LowRankDelta(self.A[:rank], self.B[:, :rank])

    def after(self, rank: int) -> "LowRankDelta":
        """The components from `rank` on, as views; `first(r)` plus `after(r)` is the whole."""
        return LowRankDelta(self.A[rank:], self.B[:, rank:])

    def double(self) -> "LowRankDelta":
        """The same factors in float64."""
        return LowRankDelta(self.A.double(), self.B.double())

    def single(self) -> "LowRankDelta":
        """The same factors in float32, contiguous: each entry rounded once."""
        return LowRankDelta(self.A.float().contiguous(), self.B.float().contiguous())

    def dense(self) -> Tensor:
        """B @ A, (out, in). For export and tests: nothing on the way of a round forms it."""
        return self.B @ self.A


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """ΔW = W, (out, in): the change that full fine-tuning makes, or coordinates in a basis that all clients share.

    Float32 where it is stored, float64 in between.

    Raises ValueError for anything but a matrix of one of these types.
    """

    W: Tensor

    def __post_init__(self) -> None:
        if self.W.ndim != 2 or self.W.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"W must be a float32 or float64 matrix, got {self.W.dtype} {tuple(self.W.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.W.shape[0], self.W.shape[1]

    @property
    def rank(self) -> int:
        """min(out, in): what it may have."""
        return min(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of W."""
        return self.W.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """The matrix."""
        return {"W": self.W}

    def double(self) -> "DenseDelta":
        """The same in float64."""
        return DenseDelta(self.W.double())

    def single(self) -> "DenseDelta":
        """The same in float32, contiguous."""
        return DenseDelta(self.W.float().contiguous())

    def dense(self) -> Tensor:
        """W."""
        return self.W


@dataclass(frozen=True, eq=False)
class RowScaleDelta:
    """ΔW = diag(d) W + B @ A, where W is the weight that it changes: DoRA, and whatever else scales rows.

    d is (out, 1), one relative change a row; `factors` are A and B as in `LowRankDelta`. What it is by itself needs W
    (`on`); all else is done in the coordinates (d, B A), in which ΔW is linear as long as W is the same for all. The
    scales count as one component. Raises ValueError where the parts do not fit together.
    """

    d: Tensor
    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.d.shape != (self.factors.shape[0], 1) or self.d.dtype != self.A.dtype:
            raise ValueError(
                f"d must be {self.A.dtype} of shape {(self.factors.shape[0], 1)}, got {self.d.dtype} of shape "
                f"{tuple(self.d.shape)}"
            )

    @property
    def factors(self) -> LowRankDelta:
        """B @ A."""
        return LowRankDelta(self.A, self.B)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.factors.shape

    @property
    def rank(self) -> int:
        """The components of B @ A, and one for the scales."""
        return self.A.shape[0] + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.d.nbytes + self.A.nbytes + self.B.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Scales and factors."""
        return {"d": self.d, "A": self.A, "B": self.B}

    def double(self) -> "RowScaleDelta":
        """The same in float64."""
        return RowScaleDelta(self.d.double(), self.A.double(), self.B.double())

    def single(self) -> "RowScaleDelta":
        """The same in float32, contiguous."""
        return RowScaleDelta(*(part.float().contiguous() for part in (self.d, self.A, self.B)))

    def on(self, weight: Tensor) -> Tensor:
        """ΔW on `weight` (out, in)."""
        return self.d * weight + self.B @ self.A

    def dense(self) -> Tensor:
        """Raises ValueError: ΔW depends on the weight, see `on`."""
        raise ValueError("a change that scales rows needs the weight that it changes: use on(weight)")


AnyDelta = type[LowRankDelta] | type[DenseDelta] | type[RowScaleDelta]

DELTAS: Mapping[frozenset[str], AnyDelta] = {
    frozenset("AB"): LowRankDelta,
    frozenset("W"): DenseDelta,
    frozenset("dAB"): RowScaleDelta,
}
"""The algebras by the names of their tensors."""


def delta_of(module: str, tensors: Mapping[str, Tensor]) -> Delta:
    """The change of `module` from its tensors by name. Raises ValueError where they are no delta's, or do not fit."""
    kind = DELTAS.get(frozenset(tensors))
    if kind is None:
        known = " or ".join("+".join(sorted(names)) for names in DELTAS)
        raise ValueError(f"{module} needs the tensors {known}, got {'+'.join(sorted(tensors)) or 'none'}")
    try:
        return kind(**tensors)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


AdapterState = Mapping[str, Delta]
"""Module name -> its change. The order of the names never matters."""

LowRankState = Mapping[str, LowRankDelta]
"""An adapter that is low-rank throughout."""


def is_low_rank(adapter: AdapterState) -> bool:
    """Whether it is low-rank throughout."""
    return all(isinstance(delta, LowRankDelta) for delta in adapter.values())


def low_rank(adapter: AdapterState) -> LowRankState:
    """The same adapter, known to be low-rank. Raises ValueError, naming the module, where it is not."""
    factors = {module: delta for module, delta in adapter.items() if isinstance(delta, LowRankDelta)}
    if odd := sorted(adapter.keys() - factors.keys()):
        raise ValueError(f"{odd[0]} must be low-rank here, got {type(adapter[odd[0]]).__name__}: use another method")
    return factors
