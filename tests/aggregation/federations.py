"""Random federations for the laws, and a dense float64 reference that imports nothing of the algebra it checks."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from corolla.aggregation import (
    ClientShare,
    ClientUpdate,
    DenseDelta,
    FreshRows,
    GlobalModel,
    GlobalUpdate,
    LowRankDelta,
    Method,
    advance,
    build_method,
    client_weights,
    fill_adapter,
    share,
)

SHAPES = {"q": (12, 9), "v": (5, 9)}


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
        m: adapter[m].double().dense() if m in adapter else torch.zeros(s, dtype=torch.float64)
        for m, s in shapes.items()
    }


def difference(one, other) -> float:
    """‖one − other‖_F over all modules of two dense adapters."""
    return sum((one[m] - other[m]).square().sum().item() for m in one) ** 0.5


def ranks_for(name: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks themselves, or the largest for all where the method needs one rank."""
    return ranks if build_method(name).mixed_ranks else (max(ranks),) * len(ranks)


def modules_for(name: str, sets):
    """The module sets themselves, or all modules where the method needs the same ones."""
    return sets if build_method(name).mixed_ranks else [tuple(SHAPES)] * len(sets)


def principal(shapes, rank):
    """Stands in for the principal components of a base."""
    return {m: random_delta(*shape, rank, 1234 + i) for i, (m, shape) in enumerate(sorted(shapes.items()))}


def local_start(model: GlobalModel, rule, rank: int, modules, seed: int):
    """(share, adapter before training), exactly as a client builds it."""
    part = share(model, rule, rank, modules)
    if "W" in rule.trains:
        return part, {m: DenseDelta(torch.zeros(SHAPES[m])) for m in modules}
    fresh = FreshRows(seed, model.round + 1 if rule.fresh_per_round else 0)
    return part, fill_adapter(part.start, {m: SHAPES[m] for m in modules}, rank, fresh)


def move(delta, trains, size: float, seed: int):
    """`delta` after a random step of `size` in the factors that train."""
    if isinstance(delta, DenseDelta):
        return DenseDelta(delta.W + size * random_delta(*delta.shape, 3, seed).dense())
    step = random_delta(*delta.shape, delta.rank, seed)
    return LowRankDelta(delta.A + size * step.A * ("A" in trains), delta.B + size * step.B * ("B" in trains))


class Round(NamedTuple):
    """One round: the model before it, what came back, and what became of it."""

    before: GlobalModel
    updates: list[ClientUpdate]
    shares: list[ClientShare]
    weights: dict[str, float]
    outcome: GlobalUpdate
    after: GlobalModel


def play(method: Method | str, ranks, sets, counts, rounds: int, moves: float, seed: int = 0) -> Iterator[Round]:
    """Rounds of a federation whose clients move by random steps of sizes around `moves`, as their scalings would."""
    method = build_method(method) if isinstance(method, str) else method
    model = method.initial(SHAPES, max(ranks), seed, principal)
    for number in range(1, rounds + 1):
        rule = method.constrain(number)
        updates, shares = [], []
        for k, (rank, modules, count) in enumerate(zip(ranks, sets, counts, strict=True)):
            part, begin = local_start(model, rule, model.rank_of(f"c{k}", rank), modules, seed)
            moved = {
                m: move(d, rule.trains, moves * 2.0 ** (k % 3 - 1), seed + 97 * number + 7 * k + i)
                for i, (m, d) in enumerate(begin.items())
            }
            updates.append(ClientUpdate(f"c{k}", count, moved))
            shares.append(part)
        weights = client_weights(updates)
        outcome = method.aggregate(updates, weights, model)
        after, _ = advance(model, outcome)
        yield Round(model, updates, shares, weights, outcome, after)
        model = after
