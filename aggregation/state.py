"""The values that flow through Corolla: frozen, float32, with the scaling already folded into B."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


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


AdapterState = Mapping[str, LowRankDelta]
"""Module name -> its change. The order of the names never matters."""

Shapes = Mapping[str, tuple[int, int]]
"""Module name -> (out, in)."""


@dataclass(frozen=True)
class ClientUpdate:
    """What one client replies: its adapter in absolute factors, counted from its start S_k.

    `num_examples` is the size of its training set, `processed` the number of examples of this round's steps.
    Raises ValueError for a negative count.
    """

    client_id: str
    num_examples: int
    adapter: AdapterState
    metrics: Mapping[str, float] = field(default_factory=dict)
    processed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_examples", "processed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of client {self.client_id} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Certificate:
    """How far one round's outcome is from the exact mean, measured in factors.

    `error` is ‖outcome − M‖_F over all modules; `relative_error` divides it by Σ p_k ‖L_k‖_F plus ‖S‖_F (the sum
    itself may cancel); `exact` needs both a method that claims it and a relative error of at most 1e-6;
    `rank` is the largest rank of any module's outcome.
    """

    exact: bool
    error: float
    relative_error: float
    rank: int
    reason: str


@dataclass(frozen=True)
class GlobalUpdate:
    """One round's outcome: what is added to `merged`, what replaces `start`, and the proof."""

    merge: AdapterState
    start: AdapterState
    certificate: Certificate


@dataclass(frozen=True)
class GlobalModel:
    """base + merged + start, after `round` successful rounds.

    `method_state` holds a method's own named tensors (momentum and the like); it is checkpointed with the rest.
    """

    merged: AdapterState = field(default_factory=dict)
    start: AdapterState = field(default_factory=dict)
    round: int = 0
    base_hash: str = ""
    method_state: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name: `merged/<module>/A`, `start/<module>/B`, `method/<name>`."""
        named = {
            f"{part}/{module}/{factor}": getattr(delta, factor)
            for part, adapter in (("merged", self.merged), ("start", self.start))
            for module, delta in adapter.items()
            for factor in ("A", "B")
        }
        return named | {f"method/{name}": tensor for name, tensor in self.method_state.items()}

    def digest(self) -> str:
        """SHA-256 over names, shapes and bytes of all tensors: the version that travels with every message."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            sha.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return sha.hexdigest()


@dataclass(frozen=True)
class ClientRule:
    """What a method asks of its clients in one round.

    `trains`: the factors that take gradients. `carries`: whether the client computes with the remainder T_k of the
    start that its rank does not hold. `fresh_per_round`: whether fresh rows of A differ from round to round
    (methods with a fixed A draw them once).
    """

    trains: frozenset[str] = frozenset({"A", "B"})
    carries: bool = False
    fresh_per_round: bool = True
