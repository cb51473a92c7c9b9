"""The contract of every registered method, and dense references over two rounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import (
    AGGREGATORS,
    Budget,
    ClientUpdate,
    FreshRows,
    GlobalModel,
    LowRankDelta,
    advance,
    build_method,
    client_weights,
    exact_mean,
    fill_adapter,
    share,
    whole,
)
from corolla.aggregation.exact import certify
from tests.aggregation.federations import dense, difference, random_delta

SHAPES = {"q": (12, 9), "v": (5, 9)}
CARRYING = sorted(name for name in AGGREGATORS if build_method(name).constrain(1).carries)
EXACT = ("flora", "warm")
START_FREE = ("flora",)


def ranks_for(name: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
    return ranks if build_method(name).mixed_ranks else (max(ranks),) * len(ranks)


def local_start(model: GlobalModel, rule, rank: int, modules, seed: int, client: str):
    """What a client's adapter is before it trains, exactly as the client builds it."""
    part = share(model, rule, rank, modules)
    fresh = FreshRows(seed, model.round + 1 if rule.fresh_per_round else 0)
    return part, fill_adapter(part.start, {m: SHAPES[m] for m in modules}, rank, fresh)


def play(name: str, ranks, module_sets, counts, rounds: int, moves: float, seed: int = 0):
    """Rounds of a federation whose clients move by a random step of size `moves`; yields each round's record."""
    method = build_method(name)
    model = method.initial(SHAPES, max(ranks), seed)
    for round_number in range(1, rounds + 1):
        rule = method.constrain(round_number)
        updates, shares = [], []
        for k, (rank, modules, count) in enumerate(zip(ranks, module_sets, counts, strict=True)):
            part, begin = local_start(model, rule, rank, modules, seed, f"c{k}")
            moved = {
                m: LowRankDelta(
                    d.A + moves * random_delta(*SHAPES[m], rank, 97 * round_number + 7 * k).A,
                    d.B + moves * random_delta(*SHAPES[m], rank, 31 * round_number + 3 * k).B,
                )
                for m, d in begin.items()
            }
            updates.append(ClientUpdate(f"c{k}", count, moved))
            shares.append(part)
        weights = client_weights(updates)
        outcome = method.aggregate(updates, weights, model)
        yield model, updates, shares, weights, outcome
        model, _ = advance(model, outcome)
    yield model, [], [], {}, None


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*CARRYING, "flora"]),
    st.lists(st.integers(1, 14), min_size=2, max_size=5),
    st.data(),
)
def test_where_nobody_moves_nothing_changes(name, ranks, data):
    sets = [data.draw(st.sampled_from([("q",), ("v",), ("q", "v")])) for _ in ranks]
    counts = [data.draw(st.integers(1, 50)) for _ in ranks]
    method = build_method(name)
    model = GlobalModel(
        merged={"q": random_delta(*SHAPES["q"], 3, 1)},
        start={m: random_delta(*SHAPES[m], max(ranks), 2) for m in SHAPES} if name != "flora" else {},
    )
    rule = method.constrain(1)
    updates = []
    for k, (rank, modules, count) in enumerate(zip(ranks, sets, counts, strict=True)):
        part, begin = local_start(model, rule, rank, modules, 0, f"c{k}")
        together = {m: v + dense(begin, SHAPES)[m] for m, v in dense(part.frozen, SHAPES).items()}
        assert difference(together, dense(whole(model), SHAPES)) < 1e-4  # every client computes the whole model
        updates.append(ClientUpdate(f"c{k}", count, begin))
    after, proof = advance(model, method.aggregate(updates, client_weights(updates), model))
    size = sum(d.norm().item() for d in dense(whole(model), SHAPES).values())
    assert difference(dense(whole(after), SHAPES), dense(whole(model), SHAPES)) <= 1e-6 * size
    assert proof.exact


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_one_client_is_left_alone(name):
    *_, (model, updates, _, _, outcome), _ = play(name, (4,), [("q", "v")], (3,), 2, 0.3)
    after, _ = advance(model, outcome)
    alone = {m: v + dense(updates[0].adapter, SHAPES)[m] for m, v in dense(model.merged, SHAPES).items()}
    assert difference(dense(whole(after), SHAPES), alone) < 1e-5


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_agreeing_clients_are_left_alone(name):
    method = build_method(name)
    model = method.initial(SHAPES, 3, 0)
    adapter = {m: random_delta(*SHAPES[m], 3, 8) for m in SHAPES}
    updates = [ClientUpdate(f"c{k}", k + 1, adapter) for k in range(4)]
    after, _ = advance(model, method.aggregate(updates, client_weights(updates), model))
    assert difference(dense(whole(after), SHAPES), dense(adapter, SHAPES)) < 1e-5


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_order_does_not_matter_and_inputs_are_untouched(name):
    ranks = ranks_for(name, (2, 4, 3))
    model, updates, _, weights, outcome = next(play(name, ranks, [("q", "v")] * 3, (5, 1, 2), 1, 0.3))
    before = [model.digest(), *(GlobalModel(merged=u.adapter).digest() for u in updates)]
    again = build_method(name).aggregate(updates[::-1], weights, model)
    assert GlobalModel(again.merge, again.start).digest() == GlobalModel(outcome.merge, outcome.start).digest()
    assert before == [model.digest(), *(GlobalModel(merged=u.adapter).digest() for u in updates)]


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_the_certificate_is_the_dense_distance_and_only_exact_methods_get_one(name):
    ranks = ranks_for(name, (6, 3, 2))
    for model, updates, _, weights, outcome in play(name, ranks, [("q", "v")] * 3, (5, 3, 2), 2, 0.3):
        if outcome is None:
            return
        target = dense_target(updates, weights, model.start)
        reached = {m: dense(outcome.merge, SHAPES)[m] + dense(outcome.start, SHAPES)[m] for m in SHAPES}
        assert outcome.certificate.error == pytest.approx(difference(reached, target), abs=1e-6)
        assert outcome.certificate.exact == (name in EXACT)


def dense_target(updates, weights, start) -> dict[str, torch.Tensor]:
    """S + Σ p_k (L_k − S_k), from the definition, dense."""
    target = dense(start, SHAPES)
    for update in updates:
        for m, delta in update.adapter.items():
            held = start[m].first(delta.rank) if m in start else None
            change = delta.B.double() @ delta.A.double()
            if held is not None:
                change = change - held.B.double() @ held.A.double()
            target[m] = target[m] + weights[update.client_id] * change
    return target


@pytest.mark.parametrize("name", EXACT)
def test_two_rounds_equal_the_dense_recursion(name):
    sets = [("q", "v"), ("q",), ("v",)]
    expected = None
    for model, updates, _, weights, outcome in play(name, (7, 4, 2), sets, (4, 4, 2), 2, 0.3):
        if expected is not None:
            assert difference(dense(whole(model), SHAPES), expected) < 1e-5
        if outcome is not None:
            target = dense_target(updates, weights, model.start)
            expected = {m: dense(model.merged, SHAPES)[m] + target[m] for m in SHAPES}


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
    model, _, _, _, outcome = next(play("flora", (7, 4), [("q",)] * 2, (1, 1), 1, 0.3))
    assert advance(model, outcome)[1].exact
    after, proof = advance(model, outcome, Budget(max_rank=3))
    assert not proof.exact
    assert "cut to rank 3" in proof.reason
    assert proof.rank == after.merged["q"].rank == 3


def test_dropping_the_remainder_is_found_out():
    """The planted fault: averaging absolute factors of mixed ranks without T_k moves a model that nobody moved."""
    start = {"q": random_delta(*SHAPES["q"], 6, 1)}
    updates = [ClientUpdate(f"c{k}", 1, {"q": start["q"].first(r)}) for k, r in enumerate((6, 2))]
    weights = client_weights(updates)
    assert certify(start, updates, weights, start, claim="nobody moved").exact
    without = exact_mean(updates, weights, {})
    assert not certify(without, updates, weights, start, claim="nobody moved").exact


def test_an_unknown_method_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"fedit, flora, warm, zero-padding, got 'fedavg'"):
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


@pytest.mark.parametrize("name", sorted(set(AGGREGATORS) - set(START_FREE)))
def test_non_carrying_methods_report_what_a_small_client_loses(name):
    model = GlobalModel(start={m: random_delta(*SHAPES[m], 6, 1) for m in SHAPES})
    rule = build_method(name).constrain(1)
    part = share(model, rule, 2, ["q"])
    lost = dense({"q": model.start["q"].after(2), "v": model.start["v"]}, SHAPES)
    size = sum(d.square().sum().item() for d in lost.values()) ** 0.5
    assert part.dropped == pytest.approx(0.0 if rule.carries else size, rel=1e-5)
