"""The algebra against dense linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import (
    Budget,
    DenseDelta,
    LowRankDelta,
    Squeeze,
    add,
    add_adapters,
    compress,
    distance,
    norm,
    parse_halved,
    scale,
    singular_values,
    zeros,
)
from tests.aggregation.federations import random_delta

sizes = st.integers(1, 30)


def test_one_alone_is_not_copied_and_comes_contiguous():
    delta = random_delta(6, 5, 3, 0)
    alone = add([delta])
    assert (alone.A.data_ptr(), alone.B.data_ptr()) == (delta.A.data_ptr(), delta.B.data_ptr())
    cut = add([delta.first(2)])  # whose B is a view of every other number
    assert cut.B.is_contiguous()
    assert torch.equal(cut.dense(), delta.first(2).dense())


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**20))
def test_compress_is_the_best_approximation_and_knows_its_error(out, inn, rank, keep, seed):
    delta = random_delta(out, inn, rank, seed)
    dense = delta.B.double() @ delta.A.double()
    small, error = compress(delta, Budget(max_rank=keep))
    sigma = torch.linalg.svdvals(dense)
    size = dense.norm().item()
    assert small.rank == min(keep, out, inn, rank)
    assert error == pytest.approx(sigma[small.rank :].norm().item(), abs=2e-6 * size)
    assert (small.B.double() @ small.A.double() - dense).norm().item() == pytest.approx(error, abs=2e-6 * size)
    assert torch.allclose(small.A @ small.A.T, torch.eye(small.rank), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 20), st.floats(1e-3, 0.9), st.integers(0, 2**20))
def test_an_error_budget_is_kept_and_not_wasted(out, inn, rank, limit, seed):
    delta = random_delta(out, inn, rank, seed)
    small, error = compress(delta, Budget(max_error=limit))
    size = norm(delta)
    assert error <= limit * size
    if small.rank:
        assert compress(delta, Budget(max_rank=max(small.rank - 1, 1)))[1] > limit * size or small.rank == 1


def test_components_that_are_rounding_are_dropped():
    twice = random_delta(12, 10, 3, seed=1)
    cancelled = add([twice, scale(twice, -1.0), random_delta(12, 10, 2, seed=2)])
    assert compress(cancelled)[0].rank == 2
    assert compress(add([twice, scale(twice, -1.0)]))[0].rank == 0


def test_norm_and_spectrum_equal_the_dense_ones():
    delta = random_delta(9, 14, 20, seed=3)
    dense = delta.B.double() @ delta.A.double()
    assert norm(delta) == pytest.approx(dense.norm().item(), rel=1e-12)
    assert torch.allclose(singular_values(delta), torch.linalg.svdvals(dense), rtol=1e-10)
    assert norm(zeros(3, 4)) == 0.0


def test_add_refuses_different_modules():
    with pytest.raises(ValueError, match="share"):
        add([zeros(3, 4), zeros(4, 3)])
    with pytest.raises(ValueError, match="at least one"):
        add([])


def test_a_budget_refuses_nonsense():
    with pytest.raises(ValueError, match="max_rank must be at least 1, got 0"):
        Budget(max_rank=0)
    with pytest.raises(ValueError, match="max_error"):
        Budget(max_error=1.5)


def test_signs_do_not_depend_on_the_factors_given():
    delta = random_delta(8, 6, 3, seed=5)
    mixed = LowRankDelta(-delta.A, -delta.B)
    assert torch.allclose(compress(delta)[0].A, compress(mixed)[0].A, atol=1e-5)


def test_a_dense_change_and_a_low_rank_one_can_be_compared_but_not_added():
    low, whole = random_delta(6, 4, 2, 1), DenseDelta(random_delta(6, 4, 4, 2).dense())
    expected = (low.double().dense() - whole.W.double()).norm().item()
    assert distance({"q": low}, {"q": whole}) == pytest.approx(expected)
    assert distance({"q": whole}, {"q": low}) == pytest.approx(expected)
    with pytest.raises(ValueError, match="of one kind, got DenseDelta, LowRankDelta"):
        add_adapters({"q": low}, {"q": whole})


def test_a_sum_of_dense_changes_is_the_sum():
    parts = [DenseDelta(random_delta(6, 4, 4, seed).dense()) for seed in range(3)]
    total = add_adapters(*({"q": part} for part in parts))["q"]
    assert torch.allclose(total.dense(), sum(part.W for part in parts), atol=1e-6)
    kept, error = compress(total, Budget(max_rank=2, max_error=0.5))
    assert error == 0.0
    assert torch.equal(kept.W, total.single().W)


def test_a_squeeze_halves_its_rank_in_equal_stages():
    squeeze = Squeeze(parse_halved("64..8"), rounds=10)
    assert [squeeze.at(r).max_rank for r in range(1, 13)] == [64, 64, 64, 32, 32, 16, 16, 16, 8, 8, 8, 8]
    assert Budget(5).at(7) == Budget(5)
    for text in ("8..64", "64", "a..b", "8..0", "64...8"):
        with pytest.raises(ValueError, match=r"halved"):
            parse_halved(text)
