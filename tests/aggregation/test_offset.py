"""Methods whose clients begin at a part S of the base's weights, with −S merged."""

import pytest

from corolla.aggregation import (
    Budget,
    FreshRows,
    add_adapters,
    build_method,
    distance,
    offset,
    ranks,
    whole,
    with_offset,
)
from corolla.aggregation.rounds import cut
from corolla.aggregation.start import fill_adapter
from tests.aggregation.federations import SHAPES, play, principal

CARRYING = ["flora", "florist", "warm", "fedex", "ffa", "rolora", "fedsvd"]
ONE_RANK = ["fedit", "zero-padding", "rbla", "lora-fair"]
COUNTS, SETS = (3, 1, 2), [tuple(SHAPES)] * 3
NAMES = [*CARRYING, *ONE_RANK]


def begun(name):
    return with_offset(build_method(name), "pissa")


def ranks_of(name):
    return (4, 3, 1) if name in CARRYING else (4, 4, 4)


def size(adapter):
    return sum(delta.dense().double().square().sum().item() for delta in adapter.values()) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_first_model_is_the_base(name):
    model = begun(name).initial(SHAPES, 4, 0, principal)
    assert model.start.keys() == SHAPES.keys()
    assert max(float(d.dense().abs().max()) for d in whole(model).values()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_where_nobody_moves_nothing_changes(name):
    for round_ in play(begun(name), ranks_of(name), SETS, COUNTS, rounds=3, moves=0.0):
        assert size(whole(round_.after)) < 1e-5 * size(round_.before.start)


@pytest.mark.parametrize("name", NAMES)
def test_every_client_begins_at_the_global_model(name):
    """base + frozen + L_k is base + merged + start, whatever the rank."""
    for round_ in play(begun(name), ranks_of(name), SETS, COUNTS, rounds=2, moves=0.3):
        for part, rank in zip(round_.shares, ranks_of(name), strict=True):
            begin = fill_adapter(part.start, SHAPES, rank, FreshRows(0))
            gap = distance(add_adapters(part.frozen, begin), whole(round_.before))
            assert gap < 1e-5 * size(round_.before.start)


def off_by(name: str) -> float:
    """How far three rounds are from the mean of what the clients' models changed, computed densely."""
    worst = 0.0
    for round_ in play(begun(name), ranks_of(name), SETS, COUNTS, rounds=3, moves=0.3):
        assert round_.outcome.certificate.exact
        after_ = whole(round_.after)
        for module in SHAPES:
            mean = 0.0
            for update, part in zip(round_.updates, round_.shares, strict=True):
                held = part.frozen[module].double().dense() if module in part.frozen else 0.0
                client = held + update.adapter[module].double().dense()
                mean = mean + round_.weights[update.client_id] * client
            got = after_[module].double().dense()
            worst = max(worst, float((got - mean).norm() / round_.before.start[module].dense().norm()))
    return worst


@pytest.mark.parametrize("name", ["flora", "warm", "fedex", "ffa", "rolora", "fedsvd"])
def test_a_round_is_the_mean_of_the_clients_models(name):
    assert off_by(name) < 2e-6


def test_a_start_that_is_added_again_each_round_is_caught(monkeypatch):
    def faulty(method, updates, weights, model):
        outcome = method.aggregate(updates, weights, model)
        return offset.replace(outcome, start=model.start)

    monkeypatch.setattr(offset, "_begun_again", faulty)
    assert off_by("flora") > 0.1


@pytest.mark.parametrize("name", ["flora", "florist"])
def test_a_method_that_begins_afresh_begins_at_the_same_start_each_round(name):
    starts = [r.after.start for r in play(begun(name), (4, 2), SETS[:2], (1, 1), rounds=3, moves=0.3)]
    first = begun(name).initial(SHAPES, 4, 0, principal).start
    assert all(distance(start, first) == 0 for start in starts)


def test_modules_too_small_for_the_rank_have_room_for_components_that_clients_draw():
    model = begun("warm").initial(SHAPES, 4, 0, lambda shapes, rank: principal(shapes, 2))
    assert set(ranks(model.start).values()) == {4}
    begin = fill_adapter(model.start, SHAPES, 4, FreshRows(0))
    assert all(delta.A[2:].any() and not delta.B[:, 2:].any() for delta in begin.values())


def test_a_download_keeps_a_change_that_is_small_beside_the_start():
    *_, last = play(begun("flora"), (4, 2), SETS[:2], (1, 1), rounds=2, moves=1e-2)
    reduced, error = cut(last.after, Budget(max_error=1e-3))
    assert error <= 1e-3
    assert distance(whole(reduced), whole(last.after)) <= 2e-3 * size(whole(last.after))


@pytest.mark.parametrize("name", ["full", "flexlora", "hetlora"])
def test_methods_that_would_lose_parts_of_the_base_are_refused(name):
    with pytest.raises(ValueError, match=rf"'olora' begins at a part of the base's weights, got .*'{name}': its? "):
        with_offset(build_method(name), "olora")


def test_methods_that_do_not_carry_need_one_rank():
    with pytest.raises(ValueError, match=r"zero-padding \+ pissa averages clients of one rank"):
        begun("zero-padding").require({"a": 4, "b": 2}, {})
    begun("warm").require({"a": 4, "b": 2}, {})


def test_fr_lora_is_what_it_was():
    assert with_offset(build_method("fr-lora"), "pissa").name == "fr-lora"
