"""Slices of a module: scattered and averaged over those that hold each row or column, against dense recomputation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.aggregation import LowRankDelta
from corolla.aggregation.scatter import Slice, combine_slices, coverage, scatter
from tests.aggregation.federations import random_delta

SIDES = st.integers(1, 7)


@st.composite
def federations(draw):
    """Some clients, each with its weight, rank and indices of one side (columns if `flip`), in any order."""
    shape, flip = (draw(SIDES), draw(SIDES)), draw(st.booleans())
    size = shape[1] if flip else shape[0]
    slices, weights = {}, {}
    for k in range(draw(st.integers(1, 4))):
        all_of_it = draw(st.booleans()) and draw(st.booleans())
        held = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=0, max_size=size))
        held = None if all_of_it else held
        count = size if held is None else len(held)
        part = (shape[0], count) if flip else (count, shape[1])
        delta = random_delta(*part, draw(st.integers(0, 3)), draw(st.integers(0, 999)))
        slices[f"c{k}"] = Slice(delta, None if flip else held, held if flip else None)
        weights[f"c{k}"] = draw(st.floats(0.01, 10.0))
    return shape, flip, slices, weights


def dense(part: Slice, shape):
    """The scattered change, entry by entry."""
    rows = range(shape[0]) if part.rows is None else part.rows
    columns = range(shape[1]) if part.columns is None else part.columns
    change, whole = part.delta.double().dense(), torch.zeros(shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            whole[row, column] = change[i, j]
    return whole


def mean_over_holders(shape, flip, slices, weights):
    """Every row's (or column's) mean over those that hold it, by loops."""
    side = 1 if flip else 0
    total, result = torch.zeros(shape[side], dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for client, part in slices.items():
        held = part.columns if flip else part.rows
        for i in range(shape[side]) if held is None else held:
            total[i] += weights[client]
        result += weights[client] * dense(part, shape)
    held = total > 0
    factor = torch.zeros_like(total)
    factor[held] = 1 / total[held]
    return result * (factor if flip else factor[:, None])


@given(federations(), st.data())
def test_scatter_places_rows_and_columns_and_nothing_else(federation, data):
    shape = federation[0]
    rows = data.draw(st.permutations(range(shape[0])))[: data.draw(st.integers(0, shape[0]))]
    columns = data.draw(st.permutations(range(shape[1])))[: data.draw(st.integers(0, shape[1]))]
    delta = random_delta(len(rows), len(columns), 2, 5)
    whole = scatter(delta, torch.tensor(rows, dtype=torch.int64), columns, shape)
    assert (whole.shape, whole.rank, whole.A.dtype) == (shape, 2, torch.float32)
    assert torch.equal(scatter(delta.double(), rows, columns, shape).dense(), dense(Slice(delta, rows, columns), shape))


@given(federations())
def test_the_combination_is_the_mean_over_those_that_hold_each(federation):
    shape, flip, slices, weights = federation
    before = {client: (part.delta.A.clone(), part.delta.B.clone()) for client, part in slices.items()}
    found, wanted = combine_slices(slices, weights, shape), mean_over_holders(shape, flip, slices, weights)
    assert found.A.dtype == torch.float64
    assert found.rank == sum(part.delta.rank for part in slices.values())
    assert torch.allclose(found.dense(), wanted, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(a, slices[k].delta.A) and torch.equal(b, slices[k].delta.B) for k, (a, b) in before.items())


@given(federations(), st.floats(0.1, 9.0))
def test_neither_the_order_of_clients_nor_the_scale_of_weights_counts(federation, factor):
    shape, _, slices, weights = federation
    found = combine_slices(slices, weights, shape)
    turned = combine_slices(dict(reversed(slices.items())), {k: factor * w for k, w in weights.items()}, shape)
    assert torch.allclose(turned.dense(), found.dense(), rtol=1e-12, atol=1e-13)


@given(federations())
def test_clients_that_agree_on_what_they_hold_are_left_alone(federation):
    """Slices of one change give that change, on all that anybody holds."""
    shape, flip, slices, weights = federation
    one = random_delta(*shape, 3, 7)
    parts = {}
    for client, part in slices.items():
        held = part.columns if flip else part.rows
        at = list(range(shape[1 if flip else 0])) if held is None else list(held)
        delta = LowRankDelta(one.A[:, at], one.B) if flip else LowRankDelta(one.A, one.B[at])
        parts[client] = Slice(delta, part.rows, part.columns)
    found = combine_slices(parts, weights, shape).dense()
    shares = coverage({k: p.columns if flip else p.rows for k, p in parts.items()}, weights, shape[1 if flip else 0])
    held = shares > 0 if flip else (shares > 0)[:, None]
    assert torch.allclose(found, torch.where(held, one.double().dense(), 0.0), rtol=1e-12, atol=1e-13)


def test_a_case_that_can_be_checked_by_eye():
    ones = [
        LowRankDelta(torch.ones(1, 2), torch.tensor([[4.0], [8.0]])),
        LowRankDelta(torch.ones(1, 2), torch.full((1, 1), 1.0)),
    ]
    slices = {"a": Slice(ones[0], rows=[2, 0]), "b": Slice(ones[1], rows=[2])}
    found = combine_slices(slices, {"a": 1.0, "b": 3.0}, (4, 2))
    assert found.dense().tolist() == [[8.0, 8.0], [0.0, 0.0], [(4 + 3 * 1) / 4] * 2, [0.0, 0.0]]
    assert coverage({"a": [2, 0], "b": [2]}, {"a": 1.0, "b": 3.0}, 4).tolist() == [1.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0, 4], None, "rows must be from 0 to 3, got 4"),
        ([-1, 0], None, "rows must be from 0 to 3, got -1"),
        ([1, 1], None, "rows must differ from each other, got 1 more than once"),
        ([1], None, "rows must be 2, as the change has, got 1"),
        (None, None, "rows must be 2, as the change has, got 4"),
        ([0, 1], [0, 1], "columns must be 3, as the change has, got 2"),
        ([0, 1], [2, 0, 2], "columns must differ from each other, got 2 more than once"),
        ([0.0, 1.0], None, r"rows must be a list of whole numbers, got torch\.float32 of shape \(2,\)"),
        ([True, False], None, r"rows must be a list of whole numbers, got torch\.bool"),
        ([[0], [1]], None, r"rows must be a list of whole numbers, got torch\.int64 of shape \(2, 1\)"),
    ],
)
def test_indices_that_cannot_be_are_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        scatter(random_delta(2, 3, 1, 0), rows, columns, (4, 3))


def test_what_is_no_diagonal_scaling_and_weights_that_are_none_are_refused():
    rows, columns = Slice(random_delta(2, 3, 1, 0), rows=[0, 1]), Slice(random_delta(4, 2, 1, 0), columns=[0, 2])
    both = Slice(random_delta(2, 2, 1, 0), [0, 1], [0, 1])
    for slices in ({"a": rows, "b": columns}, {"a": both}):
        with pytest.raises(ValueError, match=r"got a part of the rows at a and of the columns at [ab]: the coverage"):
            combine_slices(slices, dict.fromkeys(slices, 1.0), (4, 3))
    for weights, message in [
        ({}, "got a difference in a"),
        ({"a": 1.0, "b": 1.0}, "got a difference in b"),
        ({"a": 0.0}, "the weight of a must be a positive number, got 0.0"),
        ({"a": float("nan")}, "the weight of a must be a positive number, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            combine_slices({"a": rows}, weights, (4, 3))
    with pytest.raises(ValueError, match="at least one slice"):
        combine_slices({}, {}, (4, 3))
