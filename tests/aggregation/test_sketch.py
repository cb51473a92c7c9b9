"""Two sums of sketches give the sum, and say what they miss; integers give the sums to half a step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import (
    AGGREGATORS,
    ClientUpdate,
    GlobalModel,
    LowRankDelta,
    build_method,
    client_weights,
    exact_mean,
    low_rank,
)
from corolla.aggregation.fixed_point import FixedPoint
from corolla.aggregation.sketch import (
    EXTRA,
    PROBES,
    basis,
    exact_widths,
    missing,
    projection,
    random_columns,
    range_sketch,
)
from tests.aggregation.federations import dense, difference, random_delta


def sums(deltas, width, seed=0):
    """Q, X and the probes of Σ ΔW_k."""
    inn = deltas[0].shape[1]
    omega = random_columns("m", inn, 0, width, seed, 1)
    q = basis(sum(range_sketch(d, omega) for d in deltas))
    probes = random_columns("m", inn, width, width + PROBES, seed, 1)
    return q, sum(projection(d, q) for d in deltas), sum(range_sketch(d, probes) for d in deltas)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 999)
)
def test_a_sketch_as_wide_as_the_ranks_gives_the_sum(out, inn, ranks, seed):
    deltas = [random_delta(out, inn, rank, seed + i) for i, rank in enumerate(ranks)]
    width = exact_widths({"m": (out, inn)}, {"m": sum(ranks)})["m"]
    assert width == min(sum(ranks) + EXTRA, out, inn)
    q, x, probes = sums(deltas, width, seed)
    exact = sum(d.double().dense() for d in deltas)
    size = torch.linalg.norm(exact) + 1e-12
    assert torch.linalg.norm(q @ x - exact) < 1e-9 * size
    assert missing(probes, q) < 1e-9 * size
    assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64), atol=1e-12)


def test_what_a_narrow_sketch_misses_is_estimated_without_bias():
    deltas = [random_delta(40, 30, 4, i) for i in range(6)]
    exact = sum(d.double().dense() for d in deltas)
    squares = []
    for seed in range(200):
        q, x, probes = sums(deltas, 6, seed)
        error = torch.linalg.norm(q @ x - exact)
        assert error > 0.1 * torch.linalg.norm(exact)
        squares.append((missing(probes, q) / error) ** 2)
    assert float(torch.stack(squares).mean()) == pytest.approx(1, abs=0.07)


def test_random_columns_have_mean_0_and_variance_1_nest_and_are_what_they_were():
    columns = random_columns("layer.q", 300, 0, 100, 7, 2)
    assert abs(float(columns.mean())) < 0.02
    assert float(columns.square().mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(columns[:, 40:60], random_columns("layer.q", 300, 40, 60, 7, 2))
    assert not torch.equal(columns, random_columns("layer.q", 300, 0, 100, 7, 3))
    assert columns[:3, 0].tolist() == PINNED  # all clients of a round must draw these, whatever their machine


PINNED = [-1.4309629797935486, -1.4804045855998993, 0.8480218984186649]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([32, 64]), st.integers(1, 200), st.floats(1e-3, 1e6), st.integers(0, 999))
def test_integers_sum_to_half_a_step_each_and_never_wrap(bits, terms, clip, seed):
    numbers = FixedPoint(bits, clip, terms)
    generator = torch.Generator().manual_seed(seed)
    values = [clip * (2 * torch.rand(20, generator=generator, dtype=torch.float64) - 1) for _ in range(terms - 1)]
    values.append(torch.full((20,), clip, dtype=torch.float64))
    total = torch.stack([numbers.encode(v) for v in values]).sum(0, dtype=numbers.dtype)
    error = torch.linalg.norm(numbers.decode(total) - sum(values))
    assert error <= numbers.error(20, terms) + 1e-15 * terms * clip * 20
    full = torch.full((1,), clip, dtype=torch.float64)
    assert int(numbers.encode(full)) * terms < 2 ** (bits - 1) <= int(numbers.encode(full)) * terms * 4 + 4 * terms


def test_a_number_that_does_not_fit_is_refused():
    numbers = FixedPoint(64, 10.0, 3)
    for value in (10.1, -11.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"at most secure\.clip = 10, got .*raise secure\.clip"):
            numbers.encode(torch.tensor([0.0, value]))
    assert numbers.encode(torch.zeros(0)).numel() == 0
    with pytest.raises(ValueError, match="32 or 64 bits, got 16"):
        FixedPoint(16, 1.0, 1)
    with pytest.raises(ValueError, match="a clip above 0"):
        FixedPoint(64, 0.0, 1)


@pytest.mark.parametrize("name", sorted(n for n in AGGREGATORS if build_method(n).of_the_sum))
def test_methods_of_the_sum_make_of_it_what_they_make_of_the_replies(name):
    """S + Σ p (L_k − S_k), as one client's reply with the weight of all."""
    method = build_method(name)
    shapes = {"q": (12, 9), "v": (5, 9)}
    model = method.initial(shapes, 4, 0, None)
    start = {m: LowRankDelta(d.A, torch.ones_like(d.B)) for m, d in model.start.items()}
    model = GlobalModel(model.merged, start, 1)
    modules = {"a": ("q",), "b": ("q", "v"), "c": ("v",)}
    updates = [
        ClientUpdate(c, 3 + i, {m: random_delta(*shapes[m], 2 + i, 10 * i + len(m)) for m in modules[c]})
        for i, c in enumerate(modules)
    ]
    weights = client_weights(updates)
    one = method.aggregate(updates, weights, model)
    mean = low_rank(exact_mean(updates, weights, model.start))
    other = method.aggregate([ClientUpdate("sum", 12, mean)], {"sum": 1.0}, model)
    for part in ("merge", "start"):
        assert difference(dense(getattr(one, part), shapes), dense(getattr(other, part), shapes)) < 1e-5


def test_other_methods_are_refused():
    for name in ("fedit", "ffa", "flexlora", "full"):
        with pytest.raises(ValueError, match=f"got method '{name}', which needs every client's factors"):
            build_method(name).require_of_the_sum()


@given(
    bits=st.sampled_from([32, 64]), terms=st.integers(1, 60), exponent=st.integers(-3, 24), below=st.integers(18, 52),
    sign=st.sampled_from([-1.0, 1.0]),
)  # fmt: skip
def test_a_sum_at_the_clip_does_not_wrap_where_the_clip_is_just_below_a_power_of_two(
    bits, terms, exponent, below, sign
):
    clip = 2.0**exponent / terms * (1 - 2.0**-below)
    numbers = FixedPoint(bits, clip, terms)
    encoded = numbers.encode(torch.full((1,), sign * clip, dtype=torch.float64))
    total = sum([encoded] * terms, torch.zeros_like(encoded))
    assert float(numbers.decode(total)) == pytest.approx(sign * terms * clip, rel=1e-6)
