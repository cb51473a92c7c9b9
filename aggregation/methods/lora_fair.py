"""LoRA-FAIR: FedIT whose mean B is corrected towards the exact mean."""

from collections.abc import Mapping, Sequence

import torch

from corolla.aggregation.delta import LowRankDelta
from corolla.aggregation.exact import certify, low_rank_means
from corolla.aggregation.method import Method, require_one_rank
from corolla.aggregation.positions import sum_positions
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate


def correct(average: LowRankDelta, mean: LowRankDelta, penalty: float) -> LowRankDelta:
    """(Ā, B̄ + ΔB), ΔB = (M − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹: the ridge solution of min ‖M − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖².

    In factors: M Āᵀ is B_M (A_M Āᵀ), so nothing of size (out, in) is formed. All in float64.
    """
    gram = average.A @ average.A.T
    missing = mean.B @ (mean.A @ average.A.T) - average.B @ gram
    ridge = gram + penalty * torch.eye(average.rank, dtype=gram.dtype)
    return LowRankDelta(average.A, average.B + torch.linalg.lstsq(ridge, missing.T, driver="gelsd").solution.T)


def lora_fair(penalty: float = 0.01) -> Method:
    """LoRA-FAIR (arXiv:2411.14961; its idea is known from its abstract, the ridge form is a derivation of ours).

    Clients of one rank go on from (B̄ + ΔB, Ā). Not exact: what lies outside the rows of Ā is lost, and the penalty
    `penalty` = λ holds B near B̄. Raises ValueError for a negative λ.
    """
    if penalty < 0:
        raise ValueError(f"lora-fair needs a penalty >= 0, got {penalty}")

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        require_one_rank("lora-fair", updates)
        sums = sum_positions(updates, weights, model.start)
        means = low_rank_means(updates, weights, model.start)
        start = {module: correct(sums[module].zero_padded(), mean, penalty).single() for module, mean in means}
        proof = certify(start, updates, weights, model.start, reason="what lies outside the rows of the mean A is lost")
        return GlobalUpdate({}, start, proof)

    return Method(
        "lora-fair",
        shared_start,
        lambda round: ClientRule(),
        aggregate,
        mixed_ranks=False,
        common_start=True,
        lasting=True,
    )
