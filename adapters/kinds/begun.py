"""LoRA that begins at a part of the base's weights: PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775)."""

from torch import nn

from corolla.adapters.kinds.hosted import Hosted, Need
from corolla.adapters.principal import leading_factors, principal_components
from corolla.aggregation import LowRankState, Shapes

NEEDS: tuple[Need, ...] = (
    ("model.quantization", "none", "the server decomposes the base's weights"),
    ("adapter.init", "shared", "all begin at one part of the base's weights"),
    ("aggregation.max_rank", None, "a cut of the merged part would cut −S"),
    ("aggregation.download_rank", None, "a cut of the merged part would cut −S"),
)


class Pissa(Hosted):
    """S = U √Σ · √Σ Vᵀ, the top r components of W. The base stays as it is: −S is merged beside it.

    S is computed once, on the server (singular vectors differ from machine to machine), and smaller ranks hold its
    first components.
    """

    name = "pissa"
    title = "PiSSA"
    change = "begins at the principal components of the base's weights"
    begins = True
    needs = NEEDS

    def start(self, base: nn.Module, shapes: Shapes, rank: int) -> LowRankState:
        """By SVD."""
        return principal_components(base, shapes, rank)


class OLora(Hosted):
    """S = Q_r R_r, the first r columns of Q and rows of R of W = Q R, diag(R) ≥ 0; −S is merged beside the base."""

    name = "olora"
    title = "OLoRA"
    change = "begins at the first factors of the base's QR decomposition"
    begins = True
    needs = NEEDS

    def start(self, base: nn.Module, shapes: Shapes, rank: int) -> LowRankState:
        """By QR."""
        return leading_factors(base, shapes, rank)
