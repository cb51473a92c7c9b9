"""Sketches of gradients: sums of them are sketches of the sum, and the leading pairs come out of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation.first_gradient import (
    GradientSketch,
    leading_pairs,
    random_matrices,
    sketch_gradient,
    sum_sketches,
    widths,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: torch.Tensor) -> torch.Tensor:
    n = len(values)
    left, right = (torch.linalg.qr(random(n, n, seed=seed))[0] for seed in (1, 2))
    return left * values @ right.T


def found(gradient, rank, seed, oversampling=32):
    omega, psi = random_matrices("m", tuple(gradient.shape), rank, seed, oversampling)
    return leading_pairs(sketch_gradient(gradient, omega, psi), psi, rank)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_the_sum_of_sketches_gives_the_pairs_of_the_sum(out, inn, clients, rank, seed):
    rank = min(rank, out, inn)
    gradients = {f"c{k}": random(out, rank, seed=seed + k) @ random(rank, inn, seed=seed) for k in range(clients)}
    weights = {client: (k + 1) / 10 for k, client in enumerate(gradients)}
    omega, psi = random_matrices("m", (out, inn), rank, seed)
    total = sum_sketches({c: sketch_gradient(g, omega, psi) for c, g in gradients.items()}, weights)
    pairs = leading_pairs(total, psi, rank)
    exact = sum(weights[c] * g for c, g in gradients.items())  # of this rank at most: all rows come from one space
    assert torch.linalg.norm(pairs.U * pairs.S @ pairs.V - exact) < 1e-8 * torch.linalg.norm(exact)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(pairs.U.T @ pairs.U, eye, atol=1e-10)
    assert torch.allclose(pairs.V @ pairs.V.T, eye, atol=1e-10)
    assert torch.allclose(pairs.S, torch.linalg.svdvals(exact)[:rank], rtol=1e-6)


@pytest.mark.parametrize(
    ("law", "oversampling", "wanted", "share"),
    [
        ("square", 16, 1.36, 0.17),
        ("square", 32, 1.08, 0.26),
        ("exponential", 16, 1.38, 0.17),
        ("exponential", 32, 1.10, 0.26),
        ("slow", 16, 1.52, 0.17),
        ("slow", 32, 1.42, 0.26),
    ],
)
def test_the_error_is_what_the_documentation_says(law, oversampling, wanted, share):
    j, n, rank = torch.arange(1, 577, dtype=torch.float64), 576, 16
    values = {"square": j**-2, "exponential": torch.exp(-j / 20), "slow": j**-0.5}[law]
    gradient, least = with_spectrum(values), torch.linalg.norm(values[rank:])
    errors = []
    for seed in range(20, 24):  # others than those that were measured
        pairs = found(gradient, rank, seed, oversampling)
        errors.append(float(torch.linalg.norm(pairs.U * pairs.S @ pairs.V - gradient) / least))
    assert min(errors) >= 1
    assert abs(sum(errors) / 4 - wanted) < 0.1  # three standard deviations of the mean, and more
    assert sum(widths((n, n), rank, oversampling)) / n < share


def test_matrices_depend_on_seed_and_module_alone():
    omega, psi = random_matrices("m", (40, 30), 4, 7, 6)
    assert (omega.shape, psi.shape) == ((30, 10), (21, 40))
    torch.manual_seed(1)
    again = random_matrices("m", (40, 30), 4, 7, 6)
    assert torch.equal(omega, again[0])
    assert torch.equal(psi, again[1])
    for other in (random_matrices("n", (40, 30), 4, 7, 6), random_matrices("m", (40, 30), 4, 8, 6)):
        assert not torch.equal(omega, other[0])
        assert not torch.equal(psi, other[1])
    square = random_matrices("m", (30, 30), 4, 7, 6)
    assert abs(float((square[0][:, :10] * square[1][:10].T).mean())) < 0.2  # Ω and Ψ are no copies of each other


def test_signs_are_fixed_by_the_left_vectors():
    gradient = random(20, 3) @ random(3, 12)
    for pairs in (found(gradient, 3, 0), found(gradient, 3, 5)):
        assert (torch.gather(pairs.U, 0, pairs.U.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.allclose(found(gradient, 3, 0).U, found(gradient, 3, 5).U, atol=1e-9)


def test_what_cannot_be_solved_is_refused():
    omega, psi = random_matrices("m", (8, 6), 2, 0)
    sketch = sketch_gradient(random(8, 6), omega, psi)
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        leading_pairs(GradientSketch(sketch.Y * torch.nan, sketch.Z), psi, 2)
    with pytest.raises(ValueError, match="at least as wide as the rank 7, got 6"):
        leading_pairs(sketch, psi, 7)
    with pytest.raises(ValueError, match="must not be zero everywhere"):
        leading_pairs(GradientSketch(sketch.Y * 0, sketch.Z * 0), psi, 2)
    with pytest.raises(ValueError, match=r"with l' of at least l, got \(8, 6\) and \(5, 6\)"):
        GradientSketch(sketch.Y, sketch.Z[:5])
    narrow = GradientSketch(sketch.Y[:, :3], sketch.Z)
    with pytest.raises(ValueError, match=r"got \(8, 3\) and \(8, 6\) from b"):
        sum_sketches({"a": sketch, "b": narrow}, {"a": 0.5, "b": 0.5})
