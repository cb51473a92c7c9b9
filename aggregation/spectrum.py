"""What the singular values of a change say: its size, how many directions it has, how fast its energy falls."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """One module's exact change: ‖·‖_F, σ_1, e^H(σ/Σσ), H(σ²/Σσ²) in nats, and Σ_{i≤r} σ_i² / Σ σ² by r."""

    norm: float
    spectral_norm: float
    effective_rank: float
    entropy: float
    energy: Mapping[str, float]


def spectrum(core: Tensor) -> Spectrum:
    """The spectrum of one module's change, from its core or from the matrix itself."""
    sigma = torch.linalg.svdvals(core.double())
    size = float(sigma.norm())
    if not size:
        return Spectrum(0.0, 0.0, 0.0, 0.0, {})
    effective = math.exp(_entropy(sigma / sigma.sum()))
    energy = {str(r): float(sigma[:r].square().sum()) / size**2 for r in _powers(len(sigma))}
    return Spectrum(size, float(sigma[0]), effective, _entropy(sigma.square() / size**2), energy)


def pooled_energy(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """Rank -> the energy of all modules that is left when each is cut to that rank."""
    held = [(found.norm**2, {int(r): part for r, part in found.energy.items()}) for found in spectra.values()]
    total = sum(size for size, _ in held)
    if not total:
        return {}
    limit = max(max(energy) for _, energy in held if energy)
    left = {r: sum(size * energy.get(r, 1.0) for size, energy in held if energy) for r in _powers(limit)}
    return {str(r): part / total for r, part in left.items()}


def _powers(limit: int) -> list[int]:
    """1, 2, 4, … and the limit itself."""
    return sorted({*(2**k for k in range(limit.bit_length()) if 2**k < limit), limit} - {0})


def _entropy(probabilities: Tensor) -> float:
    return float(-torch.special.xlogy(probabilities, probabilities).sum())
