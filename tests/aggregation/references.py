"""Dense float64 references of the aggregation methods, one plain function each, to compare the real ones with.

Nothing here imports corolla, and hardly anything is shared between methods: a mistake should show up once.
p_k are weights over the replies (sum 1); a client's factors are A_k (r_k, in) and B_k (out, r_k), absolute, with the
scaling in B_k; S is the start (A_S, B_S) of a module and S_k its first r_k components. The model adds
merged + B_S A_S to the base.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
Dense = dict[str, Tensor]
Reply = tuple[str, float, dict[str, Factors]]


@dataclass
class DenseState:
    """The global model: merged (out, in) per module, start (A, B) per module, round = successful rounds done."""

    merged: Dense
    start: dict[str, Factors] = field(default_factory=dict)
    round: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def total(state: DenseState) -> Dense:
    """merged + B_S A_S."""
    return {name: merged + dense_start(state, name) for name, merged in state.merged.items()}


def dense_start(state: DenseState, name: str) -> Tensor:
    """S = B_S A_S, zero for a module without a start."""
    if name not in state.start:
        return torch.zeros_like(state.merged[name])
    A, B = state.start[name]
    return B @ A


def exact_target(state: DenseState, replies: list[Reply]) -> Dense:
    """M = S + sum_{k adapts} p_k (B_k A_k - S_k), without merged."""
    target = {name: dense_start(state, name) for name in state.merged}
    for _, p, adapter in replies:
        for name, (A, B) in adapter.items():
            change = B @ A
            if name in state.start:
                A_S, B_S = state.start[name]
                r = A.shape[0]
                change = change - B_S[:, :r] @ A_S[:r]
            target[name] = target[name] + p * change
    return target


def holders(replies: list[Reply], name: str) -> list[tuple[float, Tensor, Tensor]]:
    """(p_k, A_k, B_k) of the clients that adapt the module."""
    return [(p, *adapter[name]) for _, p, adapter in replies if name in adapter]


def after(state: DenseState, merged: Dense, start: dict[str, Factors]) -> DenseState:
    """The state after one more successful round."""
    return DenseState(merged, start, state.round + 1, dict(state.extra))


def flora(state: DenseState, replies: list[Reply]) -> DenseState:
    """merged += M, no start."""
    target = exact_target(state, replies)
    return after(state, {name: state.merged[name] + target[name] for name in state.merged}, {})


def fedit(state: DenseState, replies: list[Reply]) -> DenseState:
    """start' = (sum p_k A_k, sum p_k B_k), equal ranks; a module that nobody adapts stays."""
    start = dict(state.start)
    for name in state.merged:
        if held := holders(replies, name):
            start[name] = (sum(p * A for p, A, _ in held), sum(p * B for p, _, B in held))
    return after(state, dict(state.merged), start)


def zero_padding(state: DenseState, replies: list[Reply]) -> DenseState:
    """A'[i] = sum_{k: r_k > i} p_k A_k[i], the same for columns of B; a component nobody holds stays."""
    start = {}
    for name, (A_S, B_S) in state.start.items():
        A_new, B_new = A_S.clone(), B_S.clone()
        for i in range(A_S.shape[0]):
            held = [(p, A[i], B[:, i]) for p, A, B in holders(replies, name) if A.shape[0] > i]
            if held:
                A_new[i] = sum(p * a for p, a, _ in held)
                B_new[:, i] = sum(p * b for p, _, b in held)
        start[name] = (A_new, B_new)
    return after(state, dict(state.merged), start)


def rbla(state: DenseState, replies: list[Reply]) -> DenseState:
    """A'[i] = sum_{k: r_k > i} p_k A_k[i] / sum_{k: r_k > i} p_k, the same for columns of B; unheld stays."""
    start = {}
    for name, (A_S, B_S) in state.start.items():
        rows, columns = [], []
        for i in range(A_S.shape[0]):
            weight, row, column = 0.0, torch.zeros_like(A_S[i]), torch.zeros_like(B_S[:, i])
            for p, A, B in holders(replies, name):
                if A.shape[0] > i:
                    weight, row, column = weight + p, row + p * A[i], column + p * B[:, i]
            rows.append(row / weight if weight > 0 else A_S[i])
            columns.append(column / weight if weight > 0 else B_S[:, i])
        start[name] = (torch.stack(rows), torch.stack(columns, dim=1))
    return after(state, dict(state.merged), start)


def hetlora(state: DenseState, replies: list[Reply]) -> DenseState:
    """zero-padding with w_k = ||dW_k||_F / sum_j ||dW_j||_F over all modules together (p_k if all are zero)."""
    norms = [sum(float((B @ A).square().sum()) for A, B in adapter.values()) ** 0.5 for _, _, adapter in replies]
    if sum(norms) == 0:
        return zero_padding(state, replies)
    weights = [norm / sum(norms) for norm in norms]
    return zero_padding(state, [(client, w, adapter) for (client, _, adapter), w in zip(replies, weights, strict=True)])


def ffa(state: DenseState, replies: list[Reply]) -> DenseState:
    """start' = (A_S, B_S + sum p_k pad(B_k - B_S[:, :r_k]))."""
    start = {}
    for name, (A_S, B_S) in state.start.items():
        B_new = B_S.clone()
        for p, _, B in holders(replies, name):
            r = B.shape[1]
            B_new[:, :r] += p * (B - B_S[:, :r])
        start[name] = (A_S, B_new)
    return after(state, dict(state.merged), start)


def rolora(state: DenseState, replies: list[Reply]) -> DenseState:
    """Odd round (the first is 1): as ffa; even round: start' = (A_S + sum p_k pad(A_k - A_S[:r_k]), B_S)."""
    if (state.round + 1) % 2 == 1:
        return ffa(state, replies)
    start = {}
    for name, (A_S, B_S) in state.start.items():
        A_new = A_S.clone()
        for p, A, _ in holders(replies, name):
            r = A.shape[0]
            A_new[:r] += p * (A - A_S[:r])
        start[name] = (A_new, B_S)
    return after(state, dict(state.merged), start)


def flexlora(state: DenseState, replies: list[Reply]) -> DenseState:
    """start' = (V^T, U Sigma) of svd(sum p_k B_k A_k), every sigma_i > 1e-7 sigma_1 kept; no remainder."""
    start = {}
    for name, merged in state.merged.items():
        mean = torch.zeros_like(merged)
        for p, A, B in holders(replies, name):
            mean += p * (B @ A)
        U, sigma, Vh = torch.linalg.svd(mean, full_matrices=False)
        rank = int((sigma > 1e-7 * sigma[0]).sum())
        start[name] = (Vh[:rank], U[:, :rank] * sigma[:rank])
    return after(state, dict(state.merged), start)


def florist(state: DenseState, replies: list[Reply], energy: float = 0.99) -> DenseState:
    """merged += M cut to the smallest p with sum_{i<=p} sigma_i^2 >= energy sum sigma_i^2, no start."""
    merged = {}
    for name, M in exact_target(state, replies).items():
        U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
        squares = sigma.square().tolist()
        rank = 0
        while rank < len(squares) and sum(squares[:rank]) < energy * sum(squares):
            rank += 1
        merged[name] = state.merged[name] + U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
    return after(state, merged, {})


def fedex(state: DenseState, replies: list[Reply]) -> DenseState:
    """A' = A_S + sum p_k pad(A_k - A_S[:r_k]), B' likewise; merged += M - B'A'."""
    target = exact_target(state, replies)
    merged, start = dict(state.merged), {}
    for name, (A_S, B_S) in state.start.items():
        A_new, B_new = A_S.clone(), B_S.clone()
        for p, A, B in holders(replies, name):
            r = A.shape[0]
            A_new[:r] += p * (A - A_S[:r])
            B_new[:, :r] += p * (B - B_S[:, :r])
        merged[name] = state.merged[name] + target[name] - B_new @ A_new
        start[name] = (A_new, B_new)
    return after(state, merged, start)


def leading(M: Tensor, width: int) -> Factors:
    """(V^T, U Sigma) of the `width` largest components of M; rounding-level and missing ones are zero in both."""
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    rank = min(width, int((sigma > 1e-14 * sigma[0]).sum()))
    A, B = M.new_zeros(width, M.shape[1]), M.new_zeros(M.shape[0], width)
    A[:rank], B[:, :rank] = Vh[:rank], U[:, :rank] * sigma[:rank]
    return A, B


def fedsvd(state: DenseState, replies: list[Reply]) -> DenseState:
    """start' = top R components of M, whose rank is at most R because A is shared."""
    target = exact_target(state, replies)
    start = {name: leading(target[name], A_S.shape[0]) for name, (A_S, _) in state.start.items()}
    return after(state, dict(state.merged), start)


def warm(state: DenseState, replies: list[Reply]) -> DenseState:
    """start' = top R components of M, merged += M - top; R is the width of S (without S, the largest r_k)."""
    merged, start = dict(state.merged), {}
    for name, M in exact_target(state, replies).items():
        if name in state.start:
            width = state.start[name][0].shape[0]
        else:
            width = max((A.shape[0] for _, A, _ in holders(replies, name)), default=0)
        A_new, B_new = leading(M, width)
        merged[name] = state.merged[name] + M - B_new @ A_new
        start[name] = (A_new, B_new)
    return after(state, merged, start)


def lora_fair(state: DenseState, replies: list[Reply], penalty: float = 0.01) -> DenseState:
    """start' = (Abar, Bbar + (M - Bbar Abar) Abar^T (Abar Abar^T + penalty I)^-1), equal ranks; unadapted stays."""
    target = exact_target(state, replies)
    start = dict(state.start)
    for name in state.merged:
        if held := holders(replies, name):
            A_bar, B_bar = sum(p * A for p, A, _ in held), sum(p * B for p, _, B in held)
            ridge = A_bar @ A_bar.T + penalty * torch.eye(A_bar.shape[0], dtype=A_bar.dtype)
            correction = (target[name] - B_bar @ A_bar) @ A_bar.T @ torch.linalg.inv(ridge)
            start[name] = (A_bar, B_bar + correction)
    return after(state, dict(state.merged), start)


def fr_lora(state: DenseState, replies: list[Reply]) -> DenseState:
    """merged += Bbar Abar - B_S A_S, S constant, equal ranks; a client without the module counts as unmoved."""
    merged = dict(state.merged)
    for name, (A_S, B_S) in state.start.items():
        A_bar = A_S + sum(p * (A - A_S) for p, A, _ in holders(replies, name))
        B_bar = B_S + sum(p * (B - B_S) for p, _, B in holders(replies, name))
        merged[name] = state.merged[name] + B_bar @ A_bar - B_S @ A_S
    return after(state, merged, dict(state.start))


REFERENCES: dict[str, Callable[[DenseState, list[Reply]], DenseState]] = {
    "flora": flora,
    "fedit": fedit,
    "zero-padding": zero_padding,
    "rbla": rbla,
    "hetlora": hetlora,
    "ffa": ffa,
    "rolora": rolora,
    "flexlora": flexlora,
    "florist": florist,
    "fedex": fedex,
    "fedsvd": fedsvd,
    "warm": warm,
    "lora-fair": lora_fair,
    "fr-lora": fr_lora,
}


def momentum_step(change: Dense, velocity: Dense, beta: float, lr: float) -> tuple[Dense, Dense]:
    """v' = beta v + change; step = lr v' (an absent velocity is zero)."""
    new = {name: beta * velocity.get(name, torch.zeros_like(c)) + c for name, c in change.items()}
    return {name: lr * v for name, v in new.items()}, new


def module_adam_step(
    change: Dense, m: Dense, v: Dense, beta1: float, beta2: float, tau: float, lr: float
) -> tuple[Dense, Dense, Dense]:
    """m' = beta1 m + (1-beta1) c; v' = beta2 v + (1-beta2) mean(c^2), a scalar; step = lr m' / (sqrt(v') + tau)."""
    step, m_new, v_new = {}, {}, {}
    for name, c in change.items():
        m_new[name] = beta1 * m.get(name, torch.zeros_like(c)) + (1 - beta1) * c
        v_new[name] = beta2 * v.get(name, c.new_zeros(())) + (1 - beta2) * (c * c).mean()
        step[name] = lr * m_new[name] / (v_new[name].sqrt() + tau)
    return step, m_new, v_new


def elementwise_adam_step(
    change_B: Dense, m: Dense, v: Dense, beta1: float, beta2: float, tau: float, lr: float
) -> tuple[Dense, Dense, Dense]:
    """m' = beta1 m + (1-beta1) c; v' = beta2 v + (1-beta2) c^2, elementwise; step = lr m' / (sqrt(v') + tau)."""
    step, m_new, v_new = {}, {}, {}
    for name, c in change_B.items():
        m_new[name] = beta1 * m.get(name, torch.zeros_like(c)) + (1 - beta1) * c
        v_new[name] = beta2 * v.get(name, torch.zeros_like(c)) + (1 - beta2) * c**2
        step[name] = lr * m_new[name] / (torch.sqrt(v_new[name]) + tau)
    return step, m_new, v_new


def dense_noise(target: Dense, reached: Dense) -> dict[str, float]:
    """||E||/||M||, <R,M>/(||R|| ||M||), <R,M>/||M||^2 pooled; max_m ||E_m||_2 / max_m ||M_m||_2; E = R - M."""
    M = torch.cat([target[name].flatten() for name in target])
    R = torch.cat([reached[name].flatten() for name in target])
    worst = torch.stack([torch.linalg.matrix_norm(reached[name] - target[name], ord=2) for name in target]).max()
    largest = torch.stack([torch.linalg.matrix_norm(target[name], ord=2) for name in target]).max()
    return {
        "relative_error": float((R - M).norm() / M.norm()),
        "cosine": float(R @ M / (R.norm() * M.norm())),
        "gain": float(R @ M / (M @ M)),
        "spectral_error": float(worst / largest),
    }


def spectrum(target_m: Tensor) -> dict[str, Any]:
    """||M||_F, sigma_1, exp(H(sigma/sum sigma)), H(sigma^2/sum sigma^2) in nats, energy[r] = share of the first r."""
    sigma = torch.linalg.svdvals(target_m)
    q, w = sigma / sigma.sum(), sigma**2 / (sigma**2).sum()
    return {
        "norm": float(target_m.norm()),
        "spectral_norm": float(sigma[0]),
        "effective_rank": float(torch.exp(-torch.xlogy(q, q).sum())),
        "entropy": float(-torch.xlogy(w, w).sum()),
        "energy": [0.0, *torch.cumsum(w, 0).tolist()],
    }
