"""SVFit: the largest singular values of a weight are trained, between their own vectors (arXiv:2409.05926)."""

import torch
from torch import Tensor

from corolla.adapters.kinds.spectral import FAINT, Spectral, without_faint


class SvFit(Spectral):
    """ΔW = U_r diag(c) V_rᵀ of W = U Σ Vᵀ: c is what is added to the r largest singular values.

    The paper trains the values themselves beside the rest of W: the same function, and the same gradient.
    """

    name = "svfit"
    title = "SVFit"
    coordinates = "c (r)"

    def bases(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U_r and V_rᵀ, the largest entry of each u_j positive; zeros beyond the rank that the weight has."""
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        u, vh = canonical(u[:, :rank], vh[:rank])
        return without_faint(u, vh, sigma[:rank] <= FAINT * sigma[0])


def canonical(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """The same pairs u_j (out, r), v_j (r, in) with signs such that the largest entry of each u_j is positive."""
    signs = torch.gather(u, 0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, vh * signs.T
