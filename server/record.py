"""What a strategy tells of each round and evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corolla.aggregation import AdapterState, GlobalModel


@dataclass(frozen=True)
class RoundRecord:
    """One round as it went; every line of metrics.jsonl is one of these or an evaluation."""

    round: int
    successful: bool
    seconds: float
    clients: Mapping[str, Mapping[str, Any]]
    quarantined: Mapping[str, str]
    update: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)

    @property
    def received_loss(self) -> float | None:
        """Mean probe loss, by training examples, of the model that the clients received: the last round's outcome."""
        return weighted_mean(self.clients, "loss_before", "num_examples")


OnRound = Callable[[RoundRecord, GlobalModel, Mapping[str, AdapterState]], None]
OnEvaluation = Callable[[int, Mapping[str, Mapping[str, float]], Mapping[str, str]], None]


def weighted_mean(clients: Mapping[str, Mapping[str, Any]], name: str, weight: str) -> float | None:
    """Σ weight·value / Σ weight over the clients that report both, None where none does."""
    pairs = [(c[weight], c[name]) for c in clients.values() if name in c and weight in c]
    total = sum(w for w, _ in pairs)
    return sum(w * v for w, v in pairs) / total if total else None
