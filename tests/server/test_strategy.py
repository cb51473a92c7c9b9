"""The strategy: sound replies count, others are named with their reason, and the round goes on."""

import re
from dataclasses import replace

import pytest
import torch

from corolla.adapters import KINDS
from corolla.aggregation import (
    AGGREGATORS,
    GlobalModel,
    LowRankDelta,
    RowScaleDelta,
    advance,
    build_method,
    client_weights,
    whole,
)
from corolla.client.protocol import Reply
from corolla.server.strategy import NO_ARRAYS, FederatedLoRA, Sampling
from corolla.server.validation import Rejected, check_numbers
from tests.aggregation.federations import dense, difference, principal
from tests.server.clients import SHAPES, fake_grid, nan, with_factor
from tests.server.remote import Remote

RANKS = {"ann": 4, "bob": 3, "cleo": 2, "dan": 5}


def crash(reply):
    raise MemoryError("out of memory on the card")


FAULTS = {
    "NaN": (lambda r: with_factor(r, "layer.q", nan), r"layer\.q must be finite"),
    "wrong rank": (
        lambda r: with_factor(r, "layer.q", lambda d: d.first(1)),
        r"layer\.q must have shape \(6, 8\) and rank 3",
    ),
    "wrong shape": (
        lambda r: with_factor(r, "layer.v", lambda d: LowRankDelta(d.A, torch.ones(9, d.rank))),
        r"layer\.v must have shape \(4, 8\) and rank 3, got A \(3, 8\), B \(9, 3\)",
    ),
    "transposed": (
        lambda r: with_factor(r, "layer.q", lambda d: LowRankDelta(d.B.T.contiguous(), d.A.T.contiguous())),
        r"layer\.q must have shape \(6, 8\)",
    ),
    "missing module": (lambda r: replace(r, adapter={"layer.q": r.adapter["layer.q"]}), r"difference in layer\.v"),
    "other base": (lambda r: replace(r, base_hash="other"), "base hash must be the-base, got other"),
    "stale model": (lambda r: replace(r, model="old"), "model version must be"),
    "stale round": (lambda r: replace(r, round=r.round - 1), "round must be"),
    "another's name": (lambda r: replace(r, client_id="ann"), "client must be bob, got ann"),
    "no examples": (lambda r: replace(r, num_examples=0), "num_examples must be 30 as in the client's hello, got 0"),
    "NaN metric": (lambda r: replace(r, metrics={"train_loss": float("nan")}), "metric train_loss must be finite"),
    "crash": (crash, "the client failed: MemoryError: out of memory on the card"),
}


def run(grid, rounds=2, **options):
    records = []
    options = {"clients": 4, "evaluate": "never"} | options
    strategy = FederatedLoRA(
        on_round=lambda record, model, replies: records.append((record, model, replies)), **options
    )
    strategy.run(grid, rounds)
    return strategy, records


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_bad_reply_is_quarantined_with_its_reason_and_the_round_goes_on(fault):
    change, reason = FAULTS[fault]
    strategy, records = run(fake_grid(RANKS, {"bob": change}))
    good, _ = run(fake_grid({k: v for k, v in RANKS.items() if k != "bob"}), clients=3)
    for record, _, replies in records:
        assert record.successful
        assert record.quarantined.keys() == {"bob"}
        assert re.search(reason, record.quarantined["bob"])
        assert replies.keys() == {"ann", "cleo", "dan"}
        assert "weight" not in record.clients["bob"]
        assert sum(c.get("weight", 0) for c in record.clients.values()) == pytest.approx(1)
    assert strategy.model.merged.keys() == good.model.merged.keys()
    assert difference(dense(whole(strategy.model), SHAPES), dense(whole(good.model), SHAPES)) < 1e-6


def test_replies_are_let_go_when_they_are_read():
    grid, replies = fake_grid(RANKS, {"bob": lambda r: with_factor(r, "layer.q", nan)}), []
    pull = grid.pull_messages

    def pull_messages(ids):
        found = pull(ids)
        replies.extend(message for message in found if message.metadata.message_type == "train")
        return found

    grid.pull_messages = pull_messages
    _, [(record, _, adapters)] = run(grid, rounds=1)
    assert len(replies) == 4
    assert not any(reply.content for reply in replies)
    assert all(delta.dense().isfinite().all() for adapter in adapters.values() for delta in adapter.values())
    assert record.quarantined.keys() == {"bob"}


def test_flowers_own_start_is_given_any_grid():
    """Flower's grid goes through messages twice, and ours are made as they are asked for."""
    strategy, _ = run(fake_grid(RANKS), rounds=1)
    other = FederatedLoRA(clients=4, evaluate="never")
    other.start(Remote(fake_grid(RANKS)), NO_ARRAYS, 1)
    assert other.model.digest() == strategy.model.digest()


@pytest.mark.parametrize("method", ["flora", "fedit"])
def test_a_grid_to_elsewhere_makes_no_difference(method):
    ranks = dict.fromkeys(RANKS, 3)
    here, _ = run(fake_grid(ranks), method=method, evaluate="each")
    there, records = run(Remote(fake_grid(ranks)), method=method, evaluate="each")
    assert not any(record.quarantined for record, _, _ in records)
    assert here.model.digest() == there.model.digest()


def test_a_client_with_another_base_is_refused_by_name_and_the_run_goes_on():
    grid = fake_grid(RANKS, hello_faults={"cleo": lambda h: replace(h, base_hash="another")})
    _, records = run(grid)
    for record, _, _ in records:
        assert record.refused == {
            "cleo": "base hash must be the-base, got another: use the same checkpoint as the server"
        }
        assert record.clients.keys() == {"ann", "bob", "dan"}


OTHER_COORDINATES = {
    "basis": lambda h: replace(h, basis="another"),
    "rank": lambda h: replace(h, rank=3),
    "modules": lambda h: replace(h, shapes={"layer.q": SHAPES["layer.q"]}),
}


@pytest.mark.parametrize("what", OTHER_COORDINATES)
def test_a_client_with_coordinates_of_its_own_is_refused_and_not_the_others(what):
    def hello(other):
        return lambda h: other(replace(h, basis="shared"))

    faults = {name: hello(OTHER_COORDINATES[what] if name == "ann" else lambda h: h) for name in RANKS}
    grid = fake_grid(dict.fromkeys(RANKS, 2), hello_faults=faults)
    _, records = run(grid, kind=KINDS["vera"])
    assert "vera needs one basis, one rank and one set of modules" in records[0][0].refused["ann"]
    assert records[0][0].clients.keys() == {"bob", "cleo", "dan"}


def test_two_nodes_of_one_name_are_one_client():
    grid = fake_grid(RANKS, hello_faults={"cleo": lambda h: replace(h, client_id="ann")})
    _, records = run(grid)
    assert "another node has already" in records[0][0].refused["ann"]
    assert records[0][0].clients.keys() == {"ann", "bob", "dan"}


def test_no_client_at_all_is_an_error_with_the_reasons():
    faults = {name: lambda h: replace(h, base_hash="another") for name in RANKS}
    with pytest.raises(RuntimeError, match=r"at least one client, got none .*ann: base hash must be mine"):
        run(fake_grid(RANKS, hello_faults=faults), base_hash="mine")


def test_too_few_replies_fail_the_round_and_not_the_run():
    faults = {"bob": lambda r: with_factor(r, "layer.q", nan) if r.round == 1 else r}
    strategy, records = run(fake_grid(RANKS, faults), rounds=3, min_replies=4)
    assert [record.successful for record, _, _ in records] == [False, True, True]
    assert records[0][1].digest() == GlobalModel().digest()
    assert strategy.model.round == 2
    assert strategy.rounds_done == 3


@pytest.mark.parametrize("method", sorted(AGGREGATORS))
def test_the_model_is_what_the_method_makes_of_the_replies(method):
    ranks = RANKS if build_method(method).mixed_ranks else dict.fromkeys(RANKS, 3)
    from corolla.aggregation import ClientUpdate

    before = build_method(method).initial(SHAPES, max(ranks.values()), 0, principal)
    strategy, records = run(fake_grid(ranks), rounds=3, method=method, principal=principal)
    for _, model, replies in records:
        updates = [ClientUpdate(name, 10 * ranks[name], adapter) for name, adapter in replies.items()]
        outcome = build_method(method).aggregate(updates, client_weights(updates), before)
        expected, _ = advance(replace(before, base_hash="the-base"), outcome)
        assert model.digest() == expected.digest()
        before = expected
    assert strategy.model.digest() == before.digest()


def test_clients_that_the_method_cannot_serve_are_refused_before_any_training():
    with pytest.raises(ValueError, match=r"fedit averages clients of one rank, got .*'ann': 4"):
        run(fake_grid(RANKS), method="fedit")
    with pytest.raises(ValueError, match="a server without the base"):
        run(fake_grid(dict.fromkeys(RANKS, 3)), method="fr-lora")


@pytest.mark.parametrize(("method", "halves"), [("ffa", "BB"), ("rolora", "BA"), ("fedsvd", "BB"), ("warm", None)])
def test_a_fixed_factor_does_not_travel_back(method, halves):
    _, records = run(fake_grid(RANKS), method=method)
    sizes = {"A": sum(inn for _, inn in SHAPES.values()), "B": sum(out for out, _ in SHAPES.values())}
    for number, (record, _, _) in enumerate(records):
        up = record.clients["ann"]["bytes_up"]
        assert up == 4 * 4 * (sizes[halves[number]] if halves else sum(sizes.values()))
        assert record.update["certificate"]["exact"]


def test_a_client_that_moves_what_is_fixed_is_quarantined():
    def both(reply):
        return replace(reply, trains="AB")

    _, records = run(fake_grid(RANKS, {"bob": both}), method="ffa")
    assert records[0][0].quarantined == {"bob": "trained tensors must be B, got AB"}


def test_a_fixed_factor_that_comes_back_all_the_same_is_not_used():
    message = Reply("bob", 1, "m", "b", 1, 1, {"q": LowRankDelta(torch.ones(1, 3), torch.ones(2, 1))}).pack()
    message.config_records["receipt"]["trains"] = "B"
    with pytest.raises(ValueError, match=r"must hold B alone, got 'q/A'"):
        Reply.unpack(message)


def test_sampling_is_seeded_and_counts():
    names = [f"c{i}" for i in range(10)]
    draw = Sampling(fraction=0.25).draw
    assert draw(names, 0, 1) == draw(reversed(names), 0, 1)
    assert len(draw(names, 0, 1)) == 3
    assert len({tuple(draw(names, 0, r)) for r in range(10)}) > 3
    assert len({tuple(draw(names, s, 1)) for s in range(10)}) > 3
    assert Sampling(clients_per_round=4).draw(names, 0, 1) != Sampling(clients_per_round=4).draw(names, 0, 2)
    seen = {name for r in range(30) for name in draw(names, 0, r)}
    assert seen == set(names)


def test_a_client_that_answers_after_the_deadline_is_named():
    import time

    def slow(reply):
        time.sleep(0.6)
        return reply

    _, records = run(fake_grid(RANKS, {"ann": slow}), rounds=1, deadline=0.5)
    record = records[0][0]
    assert record.quarantined == dict.fromkeys(("bob", "cleo", "dan"), "no reply within 0.5 s")
    assert record.successful


def test_a_download_is_cut_to_its_budget_and_the_server_keeps_the_tail():
    from corolla.aggregation import Budget, singular_values

    strategy, records = run(fake_grid(RANKS), rounds=3, download=Budget(max_error=0.2))
    assert records[0][0].update["download_error"] == 0
    assert 0 < records[2][0].update["download_error"] <= 0.2
    assert all(len(singular_values(d)) > 3 for d in strategy.model.merged.values())
    assert all(record.update["certificate"]["exact"] for record, _, _ in records)


def test_a_strategy_goes_on_from_a_model():
    straight, _ = run(fake_grid(RANKS), rounds=3)
    first, _ = run(fake_grid(RANKS), rounds=1)
    second, records = run(fake_grid(RANKS), rounds=3, model=first.model, rounds_done=1)
    assert [record.round for record, _, _ in records] == [2, 3]
    assert second.model.digest() == straight.model.digest()


def test_the_reply_of_an_unknown_message_changes_nothing():
    strategy, _ = run(fake_grid(RANKS), rounds=1)
    model = strategy.model
    accepted, quarantined = strategy._round.collect([], 1.0)
    assert not accepted
    assert quarantined.keys() == set(RANKS)
    assert strategy.model is model


def test_a_client_cannot_answer_for_another():
    from flwr.app import Message

    grid = fake_grid(RANKS)
    answer = grid._answer

    def forged(message: Message) -> Message:
        reply = answer(message)
        if reply.metadata.group_id.endswith(":bob"):
            reply.metadata.__dict__["_src_node_id"] = 1003
        return reply

    grid._answer = forged
    _, records = run(grid, rounds=1)
    assert records[0][0].quarantined == {"bob": "the order went to node 1001, got 1003's reply"}


def test_a_failed_evaluation_is_recorded_with_its_reason():
    seen = []
    strategy = FederatedLoRA(clients=4, on_evaluation=lambda *what: seen.append(what))
    strategy.run(fake_grid(RANKS), 1)  # these fakes cannot evaluate
    assert [round_number for round_number, _, _ in seen] == [0, 1]
    assert all(failed.keys() == set(RANKS) and not found for _, found, failed in seen)
    assert "the client failed" in seen[0][2]["ann"]


def test_numbers_of_a_client_do_not_replace_those_of_the_server():
    faults = {"ann": lambda r: replace(r, metrics={"rank": 99.0, "bytes_down": 1.0, "weight": 7.0, "train_loss": 1.0})}
    _, records = run(fake_grid(RANKS, faults), rounds=1)
    ann = records[0][0].clients["ann"]
    assert (ann["rank"], ann["bytes_down"]) == (4, 0)
    assert ann["weight"] == pytest.approx(4 / 14)


def test_a_message_beyond_the_largest_is_never_sent_and_says_the_cure():
    # Replies take 4 · rank · (6 + 8 + 4 + 8) bytes: 208 and 520; downloads of round two as much together.
    _, records = run(fake_grid({"a": 2, "b": 5}), clients=2, largest_message=500 / 2**30)
    assert [sorted(record.clients) for record, *_ in records] == [["a"]] * 2
    assert "a smaller rank, or fewer target modules" in records[0][0].refused["b"]
    assert all(record.successful for record, *_ in records)


@pytest.mark.parametrize("method", ["ffa", "warm", "rolora"])
def test_a_rank_that_no_reply_can_have_does_not_become_that_of_the_model(method):
    """A start of the largest rank is made before anyone trains: a claim of thousands would take the server's memory."""
    strategy, _ = run(fake_grid({"a": 2, "b": 8}), 1, clients=2, largest_message=250 / 2**30, method=method)
    assert {delta.rank for delta in strategy.model.start.values()} == {2}
    assert list(strategy.fleet.clients) == ["a"]


def test_a_download_beyond_the_largest_leaves_its_client_out_with_the_cure():
    _, records = run(fake_grid({"a": 2, "b": 5}), clients=2, largest_message=525 / 2**30)
    assert records[0][0].successful
    assert "set aggregation.download_rank" in records[1][0].quarantined["a"]


def test_a_client_that_was_refused_and_is_admitted_is_refused_no_longer():
    wrong = {"bob"}
    grid = fake_grid(RANKS, hello_faults={"bob": lambda h: replace(h, version="0" if wrong else h.version)})
    strategy = FederatedLoRA(clients=4, evaluate="never")
    records = []

    def on_round(record, model, replies):
        records.append(record)
        wrong.clear()

    strategy.on_round = on_round
    strategy.run(grid, 2)
    assert list(records[0].refused) == ["bob"]
    assert not records[1].refused
    assert "bob" in records[1].clients


def test_a_node_of_another_version_is_refused():
    grid = fake_grid({"a": 2, "b": 5}, hello_faults={"b": lambda hello: replace(hello, version="0.0.9")})
    _, records = run(grid, 1, clients=2)
    assert sorted(records[0][0].clients) == ["a"]
    assert "install the same version" in records[0][0].refused["b"]


@pytest.mark.parametrize("shape", [(6, 8), (4, 9)])
def test_a_module_that_the_base_lacks_is_refused_where_the_server_has_the_base(shape):
    name = "layer.ghost" if shape == (6, 8) else "layer.v"
    faults = {"b": lambda hello: replace(hello, shapes={**hello.shapes, name: shape})}
    _, records = run(fake_grid({"a": 2, "b": 5}, hello_faults=faults), 1, clients=2, modules=SHAPES)
    assert sorted(records[0][0].clients) == ["a"]
    assert name in records[0][0].refused["b"]


def test_factors_are_bounded_whatever_else_travels_with_them():
    """DoRA's scales may be zero: that must not hide factors that are far too large."""
    huge = RowScaleDelta(torch.zeros(4, 1), torch.full((1, 3), 1e10), torch.full((4, 1), 1e10))
    with pytest.raises(Rejected, match=r"q must change by at most"):
        check_numbers({"q": huge})
    check_numbers({"q": RowScaleDelta(torch.zeros(4, 1), torch.ones(1, 3), torch.ones(4, 1))})
    with pytest.raises(Rejected, match=r"q must change by at most"):
        check_numbers({"q": RowScaleDelta(torch.full((4, 1), 1e13), torch.zeros(0, 3), torch.zeros(4, 0))})
