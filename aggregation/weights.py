"""p_k: how much each client counts."""

from collections.abc import Callable, Mapping, Sequence

from corolla.aggregation.state import ClientUpdate

WEIGHTS: Mapping[str, Callable[[ClientUpdate], float]] = {
    "examples": lambda update: update.num_examples,
    "processed": lambda update: update.processed,
    "uniform": lambda update: 1,
}
"""`examples`: the size of the client's training set (FedAvg, arXiv:1602.05629); `processed`: the examples of this
round's steps; `uniform`: every client counts the same."""


def client_weights(updates: Sequence[ClientUpdate], by: str = "examples") -> dict[str, float]:
    """client id -> p_k with Σ p_k = 1 over the given updates, in client-id order.

    Raises ValueError for an unknown rule, a client id that comes twice, or counts that sum to zero.
    """
    if by not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(sorted(WEIGHTS))}, got {by!r}")
    counts = {update.client_id: WEIGHTS[by](update) for update in sorted(updates, key=lambda u: u.client_id)}
    if len(counts) != len(updates):
        raise ValueError(f"every client may reply once, got {sorted(u.client_id for u in updates)}")
    total = sum(counts.values())
    if total <= 0:
        raise ValueError(f"weights by {by!r} need a positive sum, got {counts}; use weights = 'uniform'")
    return {client_id: count / total for client_id, count in counts.items()}
