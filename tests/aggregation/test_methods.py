"""The contract of every registered method, and single cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import (
    AGGREGATORS,
    Budget,
    ClientUpdate,
    DenseDelta,
    FreshRows,
    GlobalModel,
    LowRankDelta,
    add,
    advance,
    build_method,
    client_weights,
    cut,
    exact_mean,
    fill_adapter,
    scale,
    share,
    whole,
)
from corolla.aggregation.exact import certify
from tests.aggregation.federations import (
    SHAPES,
    dense,
    difference,
    local_start,
    play,
    principal,
    random_delta,
    ranks_for,
)

EVERY = sorted(AGGREGATORS)
CARRYING = [name for name in EVERY if build_method(name).constrain(1).carries]
EXACT = {"flora", "warm", "fedex", "ffa", "rolora", "fedsvd", "full"}
"""Whatever the ranks; FlexLoRA is exact where nobody cuts, FLoRIST at an energy of 1."""
STARTING = [name for name in EVERY if build_method(name).initial(SHAPES, 2, 0, principal).start]
ONE_RANK = [name for name in EVERY if not build_method(name).mixed_ranks]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*CARRYING, "flora", "florist", "full"]),
    st.lists(st.integers(1, 14), min_size=2, max_size=5),
    st.data(),
)
def test_where_nobody_moves_nothing_changes(name, ranks, data):
    sets = [data.draw(st.sampled_from([("q",), ("v",), ("q", "v")])) for _ in ranks]
    counts = [data.draw(st.integers(1, 50)) for _ in ranks]
    method = build_method(name)
    merged = {"q": random_delta(*SHAPES["q"], 3, 1)}
    if name == "full":
        merged = {"q": DenseDelta(merged["q"].dense())}
    start = {m: random_delta(*SHAPES[m], max(ranks), 2) for m in SHAPES} if name in CARRYING else {}
    if name == "fedsvd":  # its start always comes out of an SVD
        start = (
            build_method("warm").aggregate([ClientUpdate("c", 1, start)], {"c": 1.0}, GlobalModel(start=start)).start
        )
    model = GlobalModel(merged=merged, start=start)
    assert_nothing_changes(method, model, ranks, sets, counts)


@pytest.mark.parametrize("name", ONE_RANK)
def test_where_nobody_of_one_rank_moves_nothing_changes(name):
    method = build_method(name)
    model = GlobalModel(start={m: random_delta(*SHAPES[m], 3, 2) for m in SHAPES})
    assert_nothing_changes(method, model, [3, 3], [("q", "v")] * 2, [1, 2], exact=False)


def assert_nothing_changes(method, model, ranks, sets, counts, exact=True):
    rule = method.constrain(1)
    updates = []
    for k, (rank, modules, count) in enumerate(zip(ranks, sets, counts, strict=True)):
        part, begin = local_start(model, rule, rank, modules, 0)
        together = {m: v + dense(begin, SHAPES)[m] for m, v in dense(part.frozen, SHAPES).items()}
        assert difference(together, dense(whole(model), SHAPES)) < 1e-4  # every client computes the whole model
        updates.append(ClientUpdate(f"c{k}", count, begin))
    after, proof = advance(model, method.aggregate(updates, client_weights(updates), model))
    size = sum(d.norm().item() for d in dense(whole(model), SHAPES).values())
    limit = 1e-6 if exact else 5e-4  # the ridge of LoRA-FAIR pulls by rounding only
    assert difference(dense(whole(after), SHAPES), dense(whole(model), SHAPES)) <= limit * size
    assert proof.exact or method.name == "florist" or not exact


@pytest.mark.parametrize("name", EVERY)
def test_one_client_is_left_alone(name):
    if name in ("florist", "lora-fair"):
        pytest.skip("it cuts, or pulls towards the mean, by design")
    *_, last = play(name, (4,), [("q", "v")], (3,), 2, 0.3)
    alone = {m: v + dense(last.updates[0].adapter, SHAPES)[m] for m, v in dense(last.before.merged, SHAPES).items()}
    assert difference(dense(whole(last.after), SHAPES), alone) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_agreeing_clients_are_left_alone(name):
    method = build_method(name, energy=1) if name == "florist" else build_method(name)
    model = method.initial(SHAPES, 3, 0, principal)
    rule = method.constrain(1)
    _, begin = local_start(model, rule, 3, ("q", "v"), 0)
    step = {m: random_delta(*SHAPES[m], 3, 8) for m in SHAPES}
    if name == "full":
        adapter = {m: DenseDelta(step[m].dense()) for m in SHAPES}
    else:
        adapter = {
            m: LowRankDelta(d.A + step[m].A * ("A" in rule.trains), d.B + step[m].B * ("B" in rule.trains))
            for m, d in begin.items()
        }
    updates = [ClientUpdate(f"c{k}", k + 1, adapter) for k in range(4)]
    after, _ = advance(model, method.aggregate(updates, client_weights(updates), model))
    expected = {m: v + dense(adapter, SHAPES)[m] for m, v in dense(model.merged, SHAPES).items()}
    assert difference(dense(whole(after), SHAPES), expected) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_order_does_not_matter_and_inputs_are_untouched(name):
    ranks = ranks_for(name, (2, 4, 3))
    found = next(play(name, ranks, [("q", "v")] * 3, (5, 1, 2), 1, 0.3))
    before = [found.before.digest(), *(GlobalModel(merged=u.adapter).digest() for u in found.updates)]
    again = build_method(name).aggregate(found.updates[::-1], found.weights, found.before)
    assert (
        GlobalModel(again.merge, again.start).digest() == GlobalModel(found.outcome.merge, found.outcome.start).digest()
    )
    assert before == [found.before.digest(), *(GlobalModel(merged=u.adapter).digest() for u in found.updates)]


@pytest.mark.parametrize("name", EVERY)
def test_the_certificate_is_the_dense_distance_and_only_exact_methods_get_one(name):
    ranks = ranks_for(name, (6, 3, 2))
    for number, found in enumerate(play(name, ranks, [("q", "v")] * 3, (5, 3, 2), 3, 0.3), start=1):
        target = dense_target(found.updates, found.weights, found.before.start)
        merge, start = dense(found.outcome.merge, SHAPES), dense(found.outcome.start, SHAPES)
        reached = {m: merge[m] + start[m] for m in SHAPES}
        proof = found.outcome.certificate
        assert proof.error == pytest.approx(difference(reached, target), abs=1e-6)
        assert proof.exact == (name in EXACT or (name == "flexlora" and number == 1))
        assert proof.reason


def dense_target(updates, weights, start) -> dict[str, torch.Tensor]:
    """S + Σ p_k (L_k − S_k), from the definition, dense."""
    target = dense(start, SHAPES)
    for update in updates:
        for m, delta in update.adapter.items():
            change = delta.double().dense()
            if m in start:
                held = start[m].first(delta.rank)
                change = change - held.B.double() @ held.A.double()
            target[m] = target[m] + weights[update.client_id] * change
    return target


def test_zero_padding_is_what_its_equation_says():
    model = GlobalModel(start={"q": LowRankDelta(torch.zeros(3, 2), torch.zeros(2, 3))})
    one = ClientUpdate("a", 1, {"q": random_delta(2, 2, 1, 1)})
    two = ClientUpdate("b", 1, {"q": random_delta(2, 2, 2, 2)})
    start = build_method("zero-padding").aggregate([one, two], {"a": 0.5, "b": 0.5}, model).start["q"]
    a, b = one.adapter["q"], two.adapter["q"]
    assert torch.allclose(start.A, torch.stack([(a.A[0] + b.A[0]) / 2, b.A[1] / 2, torch.zeros(2)]))
    assert torch.allclose(start.B, torch.stack([(a.B[:, 0] + b.B[:, 0]) / 2, b.B[:, 1] / 2, torch.zeros(2)], 1))


def test_a_component_that_nobody_holds_keeps_its_value():
    model = GlobalModel(start={"q": random_delta(*SHAPES["q"], 5, 1)})
    update = ClientUpdate("a", 1, {"q": random_delta(*SHAPES["q"], 2, 2)})
    start = build_method("zero-padding").aggregate([update], {"a": 1.0}, model).start["q"]
    assert torch.equal(start.A[2:], model.start["q"].A[2:])
    assert torch.equal(start.B[:, 2:], model.start["q"].B[:, 2:])
    assert not torch.equal(start.A[:2], model.start["q"].A[:2])


def test_fedit_names_the_client_of_another_rank():
    updates = [
        ClientUpdate("a", 1, {"q": random_delta(2, 2, 1, 1)}),
        ClientUpdate("b", 1, {"q": random_delta(2, 2, 2, 2)}),
    ]
    model = GlobalModel(start={"q": random_delta(2, 2, 2, 3)})
    with pytest.raises(ValueError, match=r"rank 1 from a and 2 from b for q; use flora"):
        build_method("fedit").aggregate(updates, {"a": 0.5, "b": 0.5}, model)
    with pytest.raises(ValueError, match="fedit averages clients of one rank"):
        build_method("fedit").require({"a": 4, "b": 8}, {"a": ["q"], "b": ["q"]})
    with pytest.raises(ValueError, match="same modules"):
        build_method("fedit").require({"a": 4, "b": 4}, {"a": ["q"], "b": ["q", "v"]})
    build_method("flora").require({"a": 4, "b": 8}, {"a": ["q"], "b": ["v"]})


def test_hetlora_gives_up_a_tail_that_shrank_and_the_tail_is_gone():
    """Both clients shrink components 2 and 3: their rank becomes 2, and the global model loses the tail with them."""
    start = {"q": random_delta(*SHAPES["q"], 4, 1)}
    shrunk = LowRankDelta(start["q"].A, start["q"].B * torch.tensor([1.0, 1.0, 0.01, 0.01]))
    updates = [ClientUpdate(name, 1, {"q": shrunk}) for name in ("a", "b")]
    outcome = build_method("hetlora", keep=0.5).aggregate(updates, {"a": 0.5, "b": 0.5}, GlobalModel(start=start))
    assert {k: int(v) for k, v in outcome.method_state.items()} == {"rank/a": 2, "rank/b": 2}
    assert torch.allclose(outcome.start["q"].dense(), start["q"].first(2).dense(), atol=1e-6)
    kept = build_method("hetlora", keep=0.5).aggregate(
        [ClientUpdate("a", 1, start)], {"a": 1.0}, GlobalModel(start=start)
    )
    assert kept.method_state == {}
    assert torch.allclose(kept.start["q"].dense(), start["q"].dense(), atol=1e-6)


def test_fedit_noise_is_the_cross_covariance_of_the_factors():
    adapters = [{"q": random_delta(*SHAPES["q"], 3, seed)} for seed in (1, 2, 3)]
    updates = [ClientUpdate(f"c{k}", k + 1, adapter) for k, adapter in enumerate(adapters)]
    weights = client_weights(updates)
    model = GlobalModel(start={"q": random_delta(*SHAPES["q"], 3, 9)})
    outcome = build_method("fedit").aggregate(updates, weights, model)
    mean = outcome.start["q"].double()
    noise = sum(
        weights[u.client_id] * (u.adapter["q"].B.double() - mean.B) @ (u.adapter["q"].A.double() - mean.A)
        for u in updates
    )
    assert outcome.certificate.error == pytest.approx(noise.norm().item(), rel=1e-5)


def test_a_false_claim_of_exactness_is_found_out():
    updates = [ClientUpdate("a", 1, {"q": random_delta(3, 3, 2, 1)})]
    wrong = {"q": random_delta(3, 3, 2, 2)}
    proof = certify(wrong, updates, {"a": 1.0}, {}, claim="because I say so")
    assert not proof.exact
    assert "claimed exact" in proof.reason


def test_a_round_that_truncates_is_not_exact():
    found = next(play("flora", (7, 4), [("q",)] * 2, (1, 1), 1, 0.3))
    assert advance(found.before, found.outcome)[1].exact
    after, proof = advance(found.before, found.outcome, Budget(max_rank=3))
    assert not proof.exact
    assert "cut to rank 3" in proof.reason
    assert proof.rank == after.merged["q"].rank == 3


def test_a_download_of_fr_lora_keeps_an_update_that_is_small_beside_its_start():
    """merged is −S plus the update: a cut relative to merged alone would take the update away."""
    start = {"q": random_delta(*SHAPES["q"], 3, 1, 100.0)}
    update = random_delta(*SHAPES["q"], 2, 2, 1e-3)
    merged = {"q": add([scale(start["q"], -1.0), update])}
    reduced, lost = cut(GlobalModel(merged=merged, start=start), Budget(max_error=1e-3))
    reached = dense(whole(reduced), SHAPES)["q"]
    expected = update.double().dense()
    assert (reached - expected).norm() < 0.02 * expected.norm()  # what float32 leaves of it beside S
    assert lost <= 1e-3


def test_dropping_the_remainder_is_found_out():
    """The planted fault: averaging absolute factors of mixed ranks without T_k moves a model that nobody moved."""
    start = {"q": random_delta(*SHAPES["q"], 6, 1)}
    updates = [ClientUpdate(f"c{k}", 1, {"q": start["q"].first(r)}) for k, r in enumerate((6, 2))]
    weights = client_weights(updates)
    assert certify(start, updates, weights, start, claim="nobody moved").exact
    without = exact_mean(updates, weights, {})
    assert not certify(without, updates, weights, start, claim="nobody moved").exact


def test_an_unknown_method_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"fedex, fedit, .*, zero-padding, got 'fedavg'"):
        build_method("fedavg")


def test_fresh_rows_nest_are_shared_and_differ_by_round():
    fresh = FreshRows(seed=3, round=2)
    wide, narrow = fresh.rows("q", 0, 8, 20), fresh.rows("q", 0, 3, 20)
    assert torch.equal(wide[:3], narrow)
    assert wide.abs().max() <= 20**-0.5
    assert not torch.equal(wide, FreshRows(3, 1).rows("q", 0, 8, 20))
    assert not torch.equal(wide, FreshRows(3, 2, client="a").rows("q", 0, 8, 20))
    assert not torch.equal(wide, FreshRows(3, 2).rows("v", 0, 8, 20))


def test_a_dead_component_is_drawn_afresh_and_the_product_stays():
    start = {
        "q": LowRankDelta(torch.cat([torch.ones(1, 9), torch.zeros(1, 9)]), torch.ones(12, 2) * torch.tensor([1.0, 0]))
    }
    filled = fill_adapter(start, {"q": SHAPES["q"]}, 3, FreshRows(0))["q"]
    assert torch.equal(filled.dense(), start["q"].dense())
    assert (filled.A.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("name", STARTING)
def test_non_carrying_methods_report_what_a_small_client_loses(name):
    model = GlobalModel(start={m: random_delta(*SHAPES[m], 6, 1) for m in SHAPES})
    rule = build_method(name).constrain(1)
    part = share(model, rule, 2, ["q"])
    lost = dense({"q": model.start["q"].after(2), "v": model.start["v"]}, SHAPES)
    size = sum(d.square().sum().item() for d in lost.values()) ** 0.5
    assert part.dropped == pytest.approx(0.0 if rule.carries else size, rel=1e-5)
