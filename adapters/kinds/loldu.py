"""LoLDU: the diagonal between the two triangles of a weight is trained (arXiv:2410.13618)."""

import torch
from torch import Tensor

from corolla.adapters.kinds.spectral import FAINT, Spectral, without_faint

STEEP = 1e-3
"""A pivot below this part of its row's largest entry would make a row of R so much larger than the others."""


class LoLdu(Spectral):
    """ΔW = s (P L)_r diag(z − z₀) U_r of W = P L diag(z₀) U with ones on the diagonals of L and U; c = s (z − z₀)."""

    name = "loldu"
    title = "LoLDU"
    coordinates = "c (r)"
    scaled = True

    def bases(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The first columns of P L and rows of U, whose signs are the pivots'; zeros where a pivot is too small."""
        p, lower, upper = torch.linalg.lu(weight)
        rows = upper[:rank]
        pivots, widest = upper.diagonal().abs(), rows.abs().amax(1)
        faint = (pivots[:rank] <= FAINT * pivots.max()) | (pivots[:rank] < STEEP * widest)
        safe = torch.where(faint, torch.ones_like(widest), rows.diagonal())
        return without_faint((p @ lower)[:, :rank], rows / safe[:, None], faint)
