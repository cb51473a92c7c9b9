"""The noise laboratory against dense float64 matrices, and cases whose answer is known."""

import json
import math

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
    measure_noise,
    with_optimizer,
)
from tests.aggregation import references
from tests.aggregation.federations import SHAPES, dense, play, random_delta, ranks_for
from tests.aggregation.test_methods import dense_target

JUDGED = ("flora", "florist", "fedit", "lora-fair", "zero-padding", "rbla", "flexlora")
"""The methods that change the server alone."""

FLORA_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def change(found):
    """(C, S): the exact change of a round and its start, dense."""
    start = dense(found.before.start, SHAPES)
    target = dense_target(found.updates, found.weights, found.before.start)
    return {m: target[m] - start[m] for m in SHAPES}, start


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["flora", "zero-padding", "rbla", "fedit", "lora-fair", "flexlora"]),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.integers(0, 2**16),
    st.data(),
)
def test_every_figure_is_the_dense_one(run, ranks, seed, data):
    ranks = ranks_for(run, tuple(ranks))
    sets = [data.draw(st.sampled_from([("q",), ("v",), ("q", "v")])) for _ in ranks]
    if run in ("fedit", "lora-fair"):
        sets = [("q", "v")] * len(ranks)
    found = list(play(run, ranks, sets, [data.draw(st.integers(1, 9)) for _ in ranks], 2, 0.3, seed))[-1]
    noise = measure_noise(found.updates, found.weights, found.before, build_method(run))
    exact, start = change(found)
    assert noise["norm"] == pytest.approx(math.sqrt(sum(c.square().sum() for c in exact.values())), rel=1e-6)
    for name in JUDGED:
        figures = noise["methods"][name]
        if "not_applicable" in figures:
            assert "averages clients" in figures["not_applicable"]
            continue
        outcome = build_method(name).aggregate(found.updates, found.weights, found.before)
        merge, begin = dense(outcome.merge, SHAPES), dense(outcome.start, SHAPES)
        expected = references.dense_noise(exact, {m: merge[m] + begin[m] - start[m] for m in SHAPES})
        for key, value in expected.items():
            assert figures[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)


def test_spectra_shares_and_truncations_are_the_dense_ones():
    found = list(play("zero-padding", (6, 4, 2), [("q", "v")] * 3, (3, 2, 1), 2, 0.3))[-1]
    noise = measure_noise(found.updates, found.weights, found.before, build_method("zero-padding"))
    exact, _ = change(found)
    for module, figures in noise["modules"].items():
        expected = references.spectrum(exact[module])
        for key in ("norm", "spectral_norm", "effective_rank", "entropy"):
            assert figures[key] == pytest.approx(expected[key], rel=1e-6)
        for rank, energy in figures["energy"].items():
            assert energy == pytest.approx(expected["energy"][min(int(rank), len(expected["energy"]) - 1)], rel=1e-6)
    assert sum(noise["share"].values()) == pytest.approx(1)
    total = sum(c.square().sum() for c in exact.values())
    for update in found.updates:
        start = {m: found.before.start[m].first(d.rank) for m, d in update.adapter.items()}
        moved, begin = dense(update.adapter, SHAPES), dense(start, SHAPES)
        inner = sum(((moved[m] - begin[m]) * exact[m]).sum() for m in SHAPES) * found.weights[update.client_id]
        assert noise["share"][update.client_id] == pytest.approx(float(inner / total), rel=1e-6)
    for rank in (6, 4, 2):
        cut = {}
        for module, matrix in exact.items():
            u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
            cut[module] = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        figures = noise["methods"][f"top-{rank}"]
        for key, value in references.dense_noise(exact, cut).items():
            assert figures[key] == pytest.approx(value, rel=1e-6)
        assert figures["bytes_down"]["c0"] == 4 * sum(min(rank, *s) * sum(s) for s in SHAPES.values())
    assert json.loads(json.dumps(noise)) == noise
    merged = sum(references.spectrum(exact[m])["entropy"] for m in SHAPES) / len(SHAPES)
    own = 0.0
    for update in found.updates:
        start = dense({m: found.before.start[m].first(d.rank) for m, d in update.adapter.items()}, SHAPES)
        moved = dense(update.adapter, SHAPES)
        spread = sum(references.spectrum(moved[m] - start[m])["entropy"] for m in SHAPES) / len(SHAPES)
        own += found.weights[update.client_id] * spread
    assert noise["entropy"]["exact"] == pytest.approx(merged, rel=1e-6)
    assert noise["entropy"]["clients"] == pytest.approx(own, rel=1e-6)
    assert noise["entropy"]["gap"] == pytest.approx(merged - own, rel=1e-6)


def test_the_entropy_gap_is_zero_for_one_direction_and_ln_k_for_k_apart():
    def replies(rows):
        deltas = [{"q": LowRankDelta(torch.eye(8)[row : row + 1], torch.eye(8)[:, row : row + 1])} for row in rows]
        return [ClientUpdate(f"c{i}", 1, delta) for i, delta in enumerate(deltas)]

    weights = {f"c{i}": 0.25 for i in range(4)}
    same = measure_noise(replies([3, 3, 3, 3]), weights, GlobalModel(), build_method("flora"))["entropy"]
    apart = measure_noise(replies([0, 1, 2, 3]), weights, GlobalModel(), build_method("flora"))["entropy"]
    assert same["gap"] == pytest.approx(0, abs=1e-9)
    assert same["suggested_rank"] == 1
    assert apart["gap"] == pytest.approx(math.log(4))
    assert apart["suggested_rank"] == 4


@pytest.mark.parametrize("run", sorted(set(AGGREGATORS) - {"full"}))
def test_what_asks_something_else_of_its_clients_is_not_judged_on_others_replies(run):
    found = next(play(run, ranks_for(run, (6, 3)), [("q", "v")] * 2, (1, 1), 1, 0.3))
    noise = measure_noise(found.updates, found.weights, found.before, build_method(run))["methods"]
    assert noise.keys() == set(AGGREGATORS) | {f"top-{r}" for r in ranks_for(run, (6, 3))}
    for name, figures in noise.items():
        constrained = name in AGGREGATORS and bool(build_method(name).foreign) and name != run
        assert not constrained or figures["not_applicable"] == build_method(name).foreign
    assert "not_applicable" not in noise[run]


def test_replies_of_clients_that_carried_are_not_given_to_methods_that_would_drop_it():
    found = list(play("warm", (6, 3), [("q", "v")] * 2, (1, 1), 2, 0.3))[-1]
    noise = measure_noise(found.updates, found.weights, found.before, build_method("warm"))["methods"]
    assert noise["zero-padding"]["not_applicable"].startswith("c1 carried what its rank does not hold")
    assert noise["warm"]["relative_error"] < 1e-6
    equal = list(play("warm", (4, 4), [("q", "v")] * 2, (1, 1), 2, 0.3))[-1]
    assert measure_noise(equal.updates, equal.weights, equal.before, build_method("warm"))["methods"]["fedit"]["gain"]


def test_where_nobody_moves_there_is_nothing_to_be_relative_to():
    model = GlobalModel(start={"q": random_delta(*SHAPES["q"], 4, 1)})
    updates = [ClientUpdate(f"c{k}", 1, {"q": model.start["q"]}) for k in range(2)]
    noise = measure_noise(updates, client_weights(updates), model, build_method("rbla"))
    assert noise["methods"]["rbla"]["relative_error"] is None
    assert noise["methods"]["top-4"]["modules"] == {"q": None}


def holds(rank: int, size: int) -> LowRankDelta:
    """The first `rank` components of the identity: component i is entry (i, i) of ΔW."""
    return LowRankDelta(torch.eye(size)[:rank].contiguous(), torch.eye(size)[:, :rank].contiguous())


def test_zero_padding_shrinks_each_slice_by_the_weight_of_those_who_hold_it():
    """Identity I2 at the ranks of FLoRA: 10, 6, 4, 2 and 1 of the 10 clients hold the five slices."""
    updates = [ClientUpdate(f"c{k}", 1, {"q": holds(rank, 64)}) for k, rank in enumerate(FLORA_RANKS)]
    weights = client_weights(updates)
    exact = build_method("flora").aggregate(updates, weights, GlobalModel()).merge["q"].dense().diagonal()
    slices = [0, 4, 8, 16, 32]
    for name, gains in (("zero-padding", [1, 0.6, 0.4, 0.2, 0.1]), ("rbla", [1, 1 / 0.6, 2.5, 5, 10])):
        reached = build_method(name).aggregate(updates, weights, GlobalModel()).start["q"].dense().diagonal()
        assert (reached / exact)[slices].tolist() == pytest.approx(gains, rel=1e-5)


def test_independent_factors_reach_the_model_at_one_kth_in_every_slice():
    size = 600
    updates = [
        ClientUpdate(f"c{k}", 1, {"q": random_delta(size, size, rank, 100 + k, 1 / size)})
        for k, rank in enumerate(FLORA_RANKS)
    ]
    weights = client_weights(updates)
    start = build_method("zero-padding").aggregate(updates, weights, GlobalModel()).start["q"].double()
    for first, last in ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64)):
        exact = sum(
            weights[u.client_id] * u.adapter["q"].B[:, first:last].double() @ u.adapter["q"].A[first:last].double()
            for u in updates
            if u.adapter["q"].rank > first
        )
        reached = start.B[:, first:last] @ start.A[first:last]
        assert float((reached * exact).sum() / exact.square().sum()) == pytest.approx(0.1, rel=0.15)


def test_a_shared_a_at_equal_ranks_gives_fedit_no_noise():
    a = random_delta(12, 9, 4, 1).A
    updates = [ClientUpdate(f"c{k}", k + 1, {"q": LowRankDelta(a, random_delta(12, 9, 4, k).B)}) for k in range(4)]
    noise = measure_noise(updates, client_weights(updates), GlobalModel(), build_method("flora"))["methods"]
    assert noise["fedit"]["relative_error"] < 1e-6
    other = [ClientUpdate(f"c{k}", k + 1, {"q": random_delta(12, 9, 4, 10 + k)}) for k in range(4)]
    noise = measure_noise(other, client_weights(other), GlobalModel(), build_method("flora"))["methods"]
    assert noise["fedit"]["relative_error"] > 0.3


def test_a_download_is_counted_by_rank_and_shape():
    found = next(play("flora", (6, 2), [("q", "v")] * 2, (1, 1), 1, 0.3))
    noise = measure_noise(found.updates, found.weights, found.before, build_method("flora"))["methods"]
    assert noise["zero-padding"]["bytes_down"] == {
        "c0": 4 * 6 * (12 + 9 + 5 + 9),
        "c1": 4 * 2 * (12 + 9 + 5 + 9),
    }
    whole = 4 * (8 * (12 + 9) + 5 * (5 + 9))  # v has five rows, so no more than five components
    assert noise["flora"]["bytes_down"] == {"c0": whole, "c1": whole}
    assert noise["flora"]["client_error"] < 1e-6
    assert noise["flexlora"]["relative_error"] < 1e-6 < noise["flexlora"]["client_error"]


def test_a_client_whose_modules_have_different_ranks_is_counted_module_by_module():
    patterned = {"q": random_delta(*SHAPES["q"], 2, 1), "v": random_delta(*SHAPES["v"], 4, 2)}
    plain = {m: random_delta(*SHAPES[m], 4, 3) for m in SHAPES}
    updates = [ClientUpdate("a", 1, patterned), ClientUpdate("b", 1, plain)]
    noise = measure_noise(updates, client_weights(updates), GlobalModel(), build_method("flora"))["methods"]
    assert "rank 2 from a and 4 from b for q" in noise["fedit"]["not_applicable"]
    assert noise["flexlora"]["bytes_down"]["a"] == 4 * (2 * (12 + 9) + 4 * (5 + 9))


def test_a_server_optimizer_does_not_hide_the_method_that_made_the_replies():
    method = with_optimizer(build_method("fedex"), "fedavgm")
    found = list(play(method, (4, 2), [("q", "v")] * 2, (1, 1), 2, 0.3))[-1]
    noise = measure_noise(found.updates, found.weights, found.before, method)
    assert noise["method"] == "fedex + fedavgm"
    assert noise["methods"]["fedex"]["relative_error"] < 1e-5
