"""The values that flow through Corolla: what clients reply, what a round makes of it, and the global model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from corolla.aggregation.delta import AdapterState, LowRankState

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

    `error` is ‖outcome − M‖_F over all modules; `relative_error` divides it by Σ p_k ‖L_k‖_F plus
    ‖Σ p_k T_k‖_F (the sum itself may cancel); `exact` needs both a method that claims it and a relative error of at
    most 1e-6; `rank` is the largest rank of any module's outcome.
    """

    exact: bool
    error: float
    relative_error: float
    rank: int
    reason: str


@dataclass(frozen=True)
class GlobalUpdate:
    """One round's outcome: what is added to `merged`, what replaces `start`, and the proof.

    `method_state` replaces that of the model, None keeps it.
    """

    merge: AdapterState
    start: LowRankState
    certificate: Certificate
    method_state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class GlobalModel:
    """base + merged + start, after `round` successful rounds.

    `method_state` holds a method's own named tensors (momentum and the like); it is checkpointed with the rest.
    """

    merged: AdapterState = field(default_factory=dict)
    start: LowRankState = field(default_factory=dict)
    round: int = 0
    base_hash: str = ""
    method_state: Mapping[str, Tensor] = field(default_factory=dict)

    def rank_of(self, client_id: str, declared: int) -> int:
        """The client's rank: what it declared, unless the method took some of it away."""
        pruned = self.method_state.get(RANK_OF + client_id)
        return declared if pruned is None else min(declared, int(pruned))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name: `merged/<module>/A`, `start/<module>/B`, `method/<name>`."""
        parts: dict[str, AdapterState] = {"merged": self.merged, "start": self.start}
        named = {
            f"{part}/{module}/{name}": tensor
            for part, adapter in parts.items()
            for module, delta in adapter.items()
            for name, tensor in delta.tensors().items()
        }
        return named | {f"method/{name}": tensor for name, tensor in self.method_state.items()}

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors().values())

    def digest(self) -> str:
        """SHA-256 over names, shapes and bytes of all tensors: the version that travels with every message."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            sha.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            sha.update(tensor.detach().numpy().tobytes())
        return sha.hexdigest()


RANK_OF = "rank/"
"""RANK_OF + client id in a `method_state`: a tensor (1,) with the rank that the client has now."""


@dataclass(frozen=True)
class ClientRule:
    """What a method asks of its clients in one round.

    `trains`: the tensors that take gradients, A and B or one of them; W is full fine-tuning. `carries`: whether the
    client computes with the remainder T_k of the start that its rank does not hold. `fresh_per_round`: whether fresh
    rows of A differ from round to round (methods with a fixed A draw them once). `penalty` times
    ‖B[:, c:]‖_F ‖A[c:]‖_F, c = ⌊keep · r⌋, is added to the loss, module by module.
    """

    trains: frozenset[str] = frozenset({"A", "B"})
    carries: bool = False
    fresh_per_round: bool = True
    penalty: float = 0.0
    keep: float = 1.0
