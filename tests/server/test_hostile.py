"""What a broken or hostile client sends costs that client its part, and nobody else anything."""

import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict

from corolla.aggregation import Budget, GlobalModel, LowRankDelta, build_method
from corolla.client.protocol import Hello, Reply, unpack_metrics
from corolla.server.strategy import FederatedLoRA
from corolla.server.validation import LONGEST_REASON, reason_of
from corolla.simulations.report.page import render
from tests.aggregation.federations import principal
from tests.server.clients import SHAPES, fake_grid, with_factor
from tests.server.test_strategy import RANKS, run


def raw_hello(**changes) -> RecordDict:
    """The record of a hello with some of its raw values changed."""
    content = Hello("ann", 4, "b", 1, SHAPES).pack()
    for key, value in changes.items():
        content.config_records["hello"][key] = value
    return content


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ("[1]", r"must be modules with \(out, in\), got list"),
        ('{"q": 5}', r"shapes\.q must be \(out, in\) from 1"),
        ('{"q": [1e999, 3]}', r"shapes\.q must be"),
        ('{"q": [0, 3]}', r"got \[0, 3\]"),
        ('{"q": [10000000000000, 3]}', r"shapes\.q must be"),
        ("{", "Expecting property name"),
        ("[" * 10**5, "got JSON nested too deep"),
        ('{"q": [true, 3]}', r"got \[True, 3\]"),
        ('{"": [2, 3]}', "a module's name must be 1 to 256 printable characters"),
    ],
)
def test_a_malformed_hello_is_a_value_error(shapes, reason):
    with pytest.raises(ValueError, match=reason):
        Hello.unpack(raw_hello(shapes=shapes))


def test_metrics_that_are_no_numbers_are_a_value_error():
    for value in ([1.0, 2.0], float("nan")):
        with pytest.raises(ValueError, match="metric loss must be finite"):
            unpack_metrics(RecordDict({"metrics": MetricRecord({"loss": value})}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client_id": "../../evil"}, "must be letters, digits"),
        ({"client_id": ""}, "must be letters, digits"),
        ({"rank": 10**9}, "rank must be at most 8, the longest side"),
        ({"num_examples": 2**63 - 1}, "from 1 to 1099511627776 training examples"),
        ({"rank": 2**20, "shapes": SHAPES | {"z": (2**24, 2**24)}}, "an adapter may have 4294967296 entries"),
        (
            {"shapes": SHAPES | {"layer.q": (5, 7)}},
            r"layer\.q must have shape \(6, 8\), as other clients have it, got \(5, 7\)",
        ),
    ],
)
@pytest.mark.parametrize("method", ["flora", "ffa"])
def test_a_client_that_cannot_be_is_refused_and_the_others_go_on(change, reason, method):
    _, records = run(fake_grid(RANKS, hello_faults={"dan": lambda h: replace(h, **change)}), method=method)
    (refused,) = records[0][0].refused.items()
    assert refused[0] == change.get("client_id", "dan")
    assert re.search(reason, refused[1])
    for record, _, replies in records:
        assert record.successful
        assert replies.keys() == {"ann", "bob", "cleo"}


@pytest.mark.parametrize("method", ["flora", "warm", "fedex", "flexlora"])
def test_factors_that_would_overflow_never_reach_the_model(method):
    def huge(reply):
        return with_factor(reply, "layer.q", lambda d: LowRankDelta(1e25 * d.A, 1e25 * d.B))

    strategy, records = run(fake_grid(RANKS, {"bob": huge}), method=method)
    assert all("must change by at most" in record.quarantined["bob"] for record, _, _ in records)
    assert strategy.model.is_finite()


@pytest.mark.parametrize(("part", "reason"), [("merge", "non-finite"), ("start", "must be finite, got NaN")])
def test_an_outcome_that_is_not_finite_fails_the_round_and_leaves_the_model(part, reason):
    method = build_method("warm")

    def broken(updates, weights, model):
        outcome = method.aggregate(updates, weights, model)
        if model.round == 0:
            return outcome
        bad = {m: LowRankDelta(d.A, torch.full_like(d.B, torch.inf)) for m, d in outcome.start.items()}
        return replace(outcome, **{part: bad})

    _, records = run(fake_grid(RANKS), rounds=3, method=replace(method, aggregate=broken))
    assert [record.successful for record, _, _ in records] == [True, False, False]
    assert reason in records[1][0].update["failed"]
    assert records[2][1].digest() == records[0][1].digest()


def test_a_second_reply_changes_nothing():
    grid = fake_grid(RANKS)
    alone, _ = run(fake_grid(RANKS), rounds=1)
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [copy for reply in pull(ids) for copy in (reply, reply)]
    strategy, records = run(grid, rounds=1)
    assert not records[0][0].quarantined
    assert all(client["left_out"] == 1 for client in records[0][0].clients.values())
    assert strategy.model.digest() == alone.model.digest()


@pytest.mark.parametrize(
    ("method", "ranks", "late", "reason"),
    [
        ("fedit", dict.fromkeys(RANKS, 3), 4, "fedit has a start common to all, got rank 4: join with rank 3 and all"),
        ("ffa", RANKS, 6, "ffa has a start common to all, got rank 6: join with rank 5 or less"),
        ("ffa", RANKS, 2, None),
        ("flora", RANKS, 6, None),
    ],
)
def test_who_joins_later_fits_in_or_is_refused(method, ranks, late, reason):
    grid = fake_grid({**ranks, "eve": late})
    every = grid.get_node_ids()
    asked = []

    def nodes():
        asked.append(1)
        return every if len(asked) > 2 else every[:4]

    grid.get_node_ids = nodes
    _, records = run(grid, rounds=3, method=method)
    assert all(record.successful for record, _, _ in records)
    assert ("eve" in records[-1][0].clients) == (reason is None)
    if reason:
        assert records[-1][0].refused["eve"].startswith(reason)
    else:
        assert records[-1][0].update["certificate"]["exact"]


def test_a_run_does_not_go_on_with_another_base():
    first, _ = run(fake_grid(RANKS), rounds=1)
    other = {name: lambda h: replace(h, base_hash="other") for name in RANKS}
    with pytest.raises(ValueError, match="the run was made on the base the-base, got clients with other"):
        run(fake_grid(RANKS, hello_faults=other), rounds=2, model=first.model, rounds_done=1)


def test_an_evaluation_of_nonsense_is_named_and_left_out():
    answers = {
        "ann": RecordDict({"metrics": MetricRecord({"held_out_loss": 1.0, "examples": 2.0})}),
        "bob": RecordDict({"metrics": MetricRecord({"held_out_loss": float("nan"), "examples": 2.0})}),
        "cleo": RecordDict({"metrics": MetricRecord({"held_out_loss": 1.0, "examples": -5.0})}),
        "dan": RecordDict({"metrics": MetricRecord({"held_out_loss": [1.0, 2.0]})}),
    }
    grid, seen = fake_grid(RANKS), []
    names = dict(zip(grid.get_node_ids(), RANKS, strict=True))

    @grid._app.evaluate()
    def evaluate(message: Message, context) -> Message:
        return Message(answers[names[message.metadata.dst_node_id]], reply_to=message)

    strategy = FederatedLoRA(clients=4, evaluate="ends", on_evaluation=lambda *what: seen.append(what))
    strategy.run(grid, 1)
    for _, found, failed in seen:
        assert found == {"ann": {"held_out_loss": 1.0, "examples": 2.0}}
        assert failed.keys() == {"bob", "cleo", "dan"}


def test_a_cut_counts_in_both_errors_of_the_certificate():
    _, records = run(fake_grid(RANKS), rounds=1, budget=Budget(max_rank=2))
    proof = records[0][0].update["certificate"]
    assert not proof["exact"]
    assert proof["relative_error"] > 0.01
    assert proof["error"] > 0.01


def test_a_model_knows_whether_it_is_finite():
    assert GlobalModel(start=principal(SHAPES, 2)).is_finite()
    assert not GlobalModel(merged={"q": LowRankDelta(torch.full((1, 2), torch.nan), torch.ones(2, 1))}).is_finite()


def test_a_name_that_another_has_but_for_its_case_is_refused():
    _, records = run(fake_grid(RANKS, hello_faults={"dan": lambda h: replace(h, client_id="ANN")}))
    assert "another node has already" in records[0][0].refused["ANN"]
    assert records[0][0].clients.keys() == {"ann", "bob", "cleo"}


def test_a_bad_reply_is_not_made_good_by_a_second_one():
    grid = fake_grid(RANKS, {"bob": lambda reply: replace(reply, base_hash="other")})
    answer = grid._answer

    def twice(message):
        reply = answer(message)
        good = fake_grid(RANKS)._app(message=message, context=grid._contexts[message.metadata.dst_node_id])
        return [reply, good] if message.metadata.group_id == "1:bob" else [reply]

    grid.pull_messages = lambda ids: [reply for i in ids if i in grid._asked for reply in twice(grid._asked.pop(i))]
    _, records = run(grid, rounds=1)
    assert records[0][0].quarantined.keys() == {"bob"}
    assert records[0][2].keys() == {"ann", "cleo", "dan"}


def test_a_mistake_of_the_server_in_reading_a_reply_costs_that_client_alone(monkeypatch):
    unpack = Reply.unpack_receipt

    def stumble(content):
        if content.config_records["receipt"]["client_id"] == "bob":
            raise TypeError("nobody thought of this")
        return unpack(content)

    monkeypatch.setattr(Reply, "unpack_receipt", stumble)
    _, records = run(fake_grid(RANKS), rounds=1)
    assert records[0][0].quarantined == {"bob": "the reply cannot be read: TypeError: nobody thought of this"}
    assert records[0][2].keys() == {"ann", "cleo", "dan"}


@pytest.mark.parametrize("text", ["x" * 10**6, "\x1b[2J\x1b[H", "a\r\nb", "\u202egnp.exe", "\0" * 500, "\ud800"])
def test_a_reason_is_one_printable_line_of_some_length(text):
    reason = reason_of(text)
    assert reason.isprintable()
    assert 0 < len(reason) <= LONGEST_REASON
    assert reason_of("a plain reason: über 3 × 4") == "a plain reason: über 3 × 4"


def test_a_client_that_is_all_but_alone_in_the_mean_is_named(caplog):
    grid = fake_grid(
        RANKS,
        {"ann": lambda reply: replace(reply, num_examples=10**6)},
        {"ann": lambda hello: replace(hello, num_examples=10**6)},
    )
    with caplog.at_level(30, "flwr"):
        run(grid, rounds=1)
    assert "round 1 is all but ann's alone: p_k = 1.000" in caplog.text


def test_a_hostile_reason_is_text_in_the_report():
    reason = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    page = render({"title": reason, "runs": [{"rounds": [{"quarantined": {"ann": reason}}]}]})
    assert reason not in page
    assert "<script>alert" not in page
    assert "<img" not in page
