"""Every method against a dense float64 reference written from its equation, over rounds that build on each other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import AGGREGATORS, ClientUpdate, GlobalModel, LowRankDelta, build_method, whole
from tests.aggregation import references
from tests.aggregation.federations import SHAPES, dense, difference, modules_for, play, ranks_for

OPTIONS = {"hetlora": {"keep": 1.0}}
"""The reference does not prune; pruning has a test of its own."""

SETS = [("q",), ("v",), ("q", "v")]


def test_every_method_has_a_reference():
    assert set(references.REFERENCES) == set(AGGREGATORS) - {"full"}  # FedAvg of matrices is its own reference


def doubled(adapter):
    return {m: (d.A.double(), d.B.double()) for m, d in adapter.items()}


def dense_state(model: GlobalModel) -> references.DenseState:
    return references.DenseState(dense(model.merged, SHAPES), doubled(model.start), model.round)


def worst_error(method, ranks, sets, counts, rounds, seed, fault=lambda update, weight: update) -> float:
    """The largest relative distance between the method's model and the reference's own, over all rounds."""
    state, worst = None, 0.0
    for found in play(method, ranks, sets, counts, rounds, 0.3, seed):
        state = state or dense_state(found.before)
        given = [(found.weights[u.client_id], u) for u in found.updates]
        replies = [(u.client_id, weight, doubled(fault(u, weight).adapter)) for weight, u in given]
        state = references.REFERENCES[method.name](state, replies)
        expected = references.total(state)
        size = sum(matrix.square().sum() for matrix in expected.values()) ** 0.5
        worst = max(worst, difference(dense(whole(found.after), SHAPES), expected) / float(size))
        worst = max(worst, *(start_error(found.after.start, state, rank) / float(size) for rank in ranks))
    return worst


def start_error(start, state, rank: int) -> float:
    """How far the first `rank` components of both starts are apart: what a client of that rank goes on from."""
    ours = dense({m: d.first(rank) for m, d in start.items()}, SHAPES)
    theirs = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    theirs |= {m: b[:, :rank] @ a[:rank] for m, (a, b) in state.start.items()}
    return difference(ours, theirs)


@pytest.mark.parametrize("name", sorted(references.REFERENCES))
@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.integers(0, 2**16), st.data())
def test_it_is_what_its_equation_says(name, ranks, seed, data):
    ranks = ranks_for(name, tuple(ranks))
    sets = modules_for(name, [data.draw(st.sampled_from(SETS)) for _ in ranks])
    sets[0] = tuple(SHAPES)  # the reference of FlexLoRA forgets a module that nobody adapts
    counts = [data.draw(st.integers(1, 9)) for _ in ranks]
    method = build_method(name, **OPTIONS.get(name, {}))
    assert worst_error(method, ranks, sets, counts, 3, seed) < 2e-5


@pytest.mark.parametrize("name", sorted(references.REFERENCES))
def test_a_weight_on_both_factors_is_found_out(name):
    def fault(update, weight):
        return replace(update, adapter={m: LowRankDelta(weight * d.A, d.B) for m, d in update.adapter.items()})

    ranks, sets = ranks_for(name, (5, 3, 2)), [("q", "v")] * 3
    method = build_method(name, **OPTIONS.get(name, {}))
    assert worst_error(method, ranks, sets, (3, 2, 1), 2, 0) < 2e-5
    if name not in ("ffa",):  # its rule never reads the clients' A
        assert worst_error(method, ranks, sets, (3, 2, 1), 2, 0, fault) > 1e-3


@pytest.mark.parametrize("name", ["warm", "fedex", "ffa", "rolora", "fedsvd"])
def test_a_dropped_remainder_is_found_out(name):
    """The planted fault: T_k is forgotten, as if the start had nothing beyond the client's rank."""
    method = build_method(name)
    found = list(play(method, (6, 2), [("q", "v")] * 2, (1, 1), 2, 0.3))[-1]
    state = references.REFERENCES[name](
        dense_state(found.before),
        [(u.client_id, found.weights[u.client_id], doubled(u.adapter)) for u in found.updates],
    )
    padded = [
        ClientUpdate(u.client_id, u.num_examples, {m: pad(d, 6) for m, d in u.adapter.items()}) for u in found.updates
    ]
    forgetful = method.aggregate(padded, found.weights, found.before)
    reached = {m: dense(forgetful.merge, SHAPES)[m] + dense(forgetful.start, SHAPES)[m] for m in SHAPES}
    expected = {m: v - dense(found.before.merged, SHAPES)[m] for m, v in references.total(state).items()}
    assert difference(reached, expected) > 1e-2 * sum(v.norm() for v in expected.values())


def pad(delta: LowRankDelta, rank: int) -> LowRankDelta:
    """Zeros where the client holds nothing: the absolute factors' padding that the exact methods must not do."""
    missing = rank - delta.rank
    a = torch.cat([delta.A, torch.zeros(missing, delta.shape[1])])
    return LowRankDelta(a, torch.cat([delta.B, torch.zeros(delta.shape[0], missing)], dim=1))
