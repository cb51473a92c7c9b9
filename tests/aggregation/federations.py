"""Random federations for the laws, and a dense float64 reference that imports nothing of the algebra it checks."""

import torch
from hypothesis import strategies as st

from corolla.aggregation import ClientUpdate, LowRankDelta


def random_delta(out: int, inn: int, rank: int, seed: int, size: float = 1.0) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inn, generator=generator)
    return LowRankDelta(a, size * torch.randn(out, rank, generator=generator))


@st.composite
def federations(draw, max_clients: int = 20, max_rank: int = 64, partial: bool = True):
    """[(update with the scaling folded in, raw A, raw B, s) …]: mixed ranks, alphas, rsLoRA, module sets, counts."""
    shapes = {f"m{i}": (draw(st.integers(1, 40)), draw(st.integers(1, 40))) for i in range(draw(st.integers(1, 3)))}
    clients = []
    for k in range(draw(st.integers(2, max_clients))):
        rank = draw(st.integers(1, max_rank))
        alpha, rslora = draw(st.sampled_from([1.0, 8.0, 16.0, 32.0])), draw(st.booleans())
        s = alpha / rank**0.5 if rslora else alpha / rank
        chosen = [m for m in shapes if not partial or draw(st.booleans())] or [next(iter(shapes))]
        raw = {m: random_delta(*shapes[m], rank, draw(st.integers(0, 2**20))) for m in chosen}
        folded = {m: LowRankDelta(d.A, s * d.B) for m, d in raw.items()}
        update = ClientUpdate(f"client-{k:02}", draw(st.integers(1, 1000)), folded)
        clients.append((update, raw, s))
    return shapes, clients


def dense_mean(shapes, clients) -> dict[str, torch.Tensor]:
    """Σ_k p_k s_k B_k A_k from raw factors and the counts, on dense float64 matrices."""
    total = sum(update.num_examples for update, _, _ in clients)
    mean = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in shapes.items()}
    for update, raw, s in clients:
        for m, delta in raw.items():
            mean[m] += update.num_examples / total * s * (delta.B.double() @ delta.A.double())
    return mean


def dense_size(clients) -> float:
    """Σ_k p_k ‖s_k B_k A_k‖_F over all modules, the yardstick of exactness."""
    total = sum(update.num_examples for update, _, _ in clients)
    return sum(
        update.num_examples / total * sum((s * d.B.double() @ d.A.double()).square().sum() for d in raw.values()) ** 0.5
        for update, raw, s in clients
    ).item()


def dense(adapter, shapes) -> dict[str, torch.Tensor]:
    """An adapter as dense float64 matrices, zero for the modules it lacks."""
    return {
        m: adapter[m].B.double() @ adapter[m].A.double() if m in adapter else torch.zeros(s, dtype=torch.float64)
        for m, s in shapes.items()
    }


def difference(one, other) -> float:
    """‖one − other‖_F over all modules of two dense adapters."""
    return sum((one[m] - other[m]).square().sum().item() for m in one) ** 0.5
