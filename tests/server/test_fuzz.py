"""Hostile replies by the hundred, entering where bytes enter: none accepted wrongly, none that is harmless refused,
no round lost, and every one named.

500 cases in the default suite; 10,000 with `pytest -n 0 -m slow tests/server/test_fuzz.py -s`.
"""

import io
import json
import logging
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from corolla.aggregation import ClientUpdate, advance, build_method, client_weights
from corolla.server import stream
from corolla.server.strategy import FederatedLoRA
from corolla.server.trackers import numbers_of
from corolla.server.validation import LONGEST_REASON
from corolla.terminal import describe_line
from tests.aggregation.federations import principal
from tests.server.clients import BASE, SHAPES
from tests.server.hostile.damage import DAMAGE
from tests.server.hostile.federation import TRAIN, WHOLE_REPLY, Crew, Plan, crew_of
from tests.server.hostile.mutations import EVALUATE, HELLO, Bomb
from tests.server.hostile.wire import FIRST_NODE, grid_of

METHODS = ["flora", "ffa", "warm", "full"]

MISTAKE = "the reply cannot be read"
"""How a reason begins where the server's own code, and not a check of it, stopped a reply."""

LONGEST_LINE = 2**21
"""Bytes of a round's line of metrics.jsonl: ten thousand metrics at most for each of some clients."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(stream, "POLL", 0.0)
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)


def play(plans, method: str) -> Crew:
    """Two rounds and two evaluations with these clients and three sound ones, and the verdict on all of it."""
    crew = crew_of(plans)
    rounds, evaluations = [], []
    strategy = FederatedLoRA(
        method,
        clients=len(crew.clients),
        deadline=60.0,
        base_hash=BASE,
        principal=principal,
        on_round=lambda *what: rounds.append(what),
        on_evaluation=lambda *what: evaluations.append(what),
    )
    strategy.run(grid_of({FIRST_NODE + i: client for i, client in enumerate(crew.clients)}), 2)
    before = replace(build_method(method).initial(SHAPES, 5, 0, principal), base_hash=BASE)
    judge_hello(crew, rounds[0][0])
    for number, (record, model, replies) in enumerate(rounds):
        judge_round(crew, number, record, replies)
        before = judge_model(crew, method, before, model, replies)
        judge_line({"kind": "round", **asdict(record), "received_loss": record.received_loss})
    for number, (_, found, failed) in enumerate(evaluations):
        judge(crew, f"evaluate {number}", found, failed)
        judge_line({"kind": "evaluation", "round": number, "clients": found, "failed": failed, "mean": {}})
    assert len(rounds) == len(evaluations) == 2
    assert not Bomb.exploded
    return crew


def judge_hello(crew: Crew, record) -> None:
    """Exactly those that had to be are refused, each with a reason."""
    refused = [client for client in crew.clients if client.verdicts["hello"]]
    taking_part = {client.name for client in crew.clients} - {client.name for client in refused}
    assert record.clients.keys() == taking_part
    assert bool(record.refused) == bool(refused)
    judge_reasons(record.refused)


def judge(crew: Crew, when: str, accepted, named) -> None:
    """Every client that was asked is accepted or named, as its verdict says."""
    for client in crew.clients:
        if client.verdicts["hello"]:
            continue
        taken, verdict = client.name in accepted, client.verdicts.get(when)
        assert taken != (client.name in named), (client.name, when, client.plan)
        if verdict is not None:
            assert taken != verdict, (client.name, when, client.plan, named.get(client.name))
    judge_reasons(named)


def judge_reasons(named) -> None:
    for who, reason in named.items():
        assert max(len(who), len(reason)) <= LONGEST_REASON
        assert (who + reason).isprintable()
        assert MISTAKE not in reason, reason


def judge_round(crew: Crew, number: int, record, replies) -> None:
    """The round is there, of the sound replies, each of which is what its client sent."""
    assert record.successful
    judge(crew, f"train {number}", replies, record.quarantined)
    for client in crew.clients:
        if client.name not in replies:
            continue
        assert record.clients[client.name]["num_examples"] == 10 * client.rank
        adapter, sent = replies[client.name], client.sent[number]
        assert {m: d.shape for m, d in adapter.items()} == SHAPES
        assert all(torch.isfinite(t).all() for d in adapter.values() for t in d.tensors().values())
        for module, delta in sent.items() if client.verdicts[f"train {number}"] is False else ():
            for name, tensor in delta.tensors().items():
                assert torch.equal(tensor.view(torch.int32), adapter[module].tensors()[name].view(torch.int32))


def judge_model(crew: Crew, method: str, before, model, replies):
    """Bit for bit what the sound replies alone make of the model before, each with the weight of its hello."""
    updates = [ClientUpdate(c.name, 10 * c.rank, replies[c.name]) for c in crew.clients if c.name in replies]
    outcome = build_method(method).aggregate(updates, client_weights(updates), before)
    expected, _ = advance(before, outcome)
    assert model.digest() == expected.digest()
    return expected


def judge_line(line) -> None:
    """It can be written, tracked and shown."""
    assert len(json.dumps(line, allow_nan=False)) < LONGEST_LINE
    assert all(isinstance(value, float) for value in numbers_of(line).values())
    if line["kind"] == "round":
        out = io.StringIO()
        Console(file=out).print(describe_line(line), soft_wrap=True, highlight=False)
        assert "\x1b" not in out.getvalue()


HARMLESS = [name for name, mutation in TRAIN.items() if not mutation.harmful]
HARMFUL = [name for name, mutation in TRAIN.items() if mutation.harmful]


@st.composite
def train_names(draw) -> tuple[str, ...]:
    """Up to two harmless changes and then perhaps a harmful one, all of different parts; or one to the whole."""
    whole = draw(st.sampled_from(["", "", "", *WHOLE_REPLY]))
    if whole:
        return (whole,)
    last = draw(st.sampled_from(["", *HARMFUL, *HARMFUL]))
    names = draw(st.lists(st.sampled_from(HARMLESS), max_size=2))
    chosen = {TRAIN[name].part: name for name in [*names, *([last] if last else [])]}
    return tuple(sorted(chosen.values(), key=lambda name: TRAIN[name].part == "records"))


def plans(size: int):
    damage = st.sampled_from(["", "", *DAMAGE])
    plan = st.builds(
        Plan,
        hello=st.sampled_from([""] * len(HELLO) + list(HELLO)),
        rounds=st.tuples(train_names(), train_names()),
        evaluate=st.sampled_from(["", *EVALUATE, "error: 1", "error: 2", "metadata: group"]),
        damage=st.tuples(damage, damage),
        seed=st.integers(0, 2**32),
    )
    return st.lists(plan, min_size=size, max_size=size)


def fuzz(cases: int, seen: list[int], **options):
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(plans(8), st.sampled_from(METHODS))
    def attack(found, method):
        seen.append(play(found, method).cases)

    attack()


def test_five_hundred_hostile_replies():
    seen: list[int] = []
    fuzz(18, seen, derandomize=True)
    assert sum(seen) >= 500


@pytest.mark.slow
def test_ten_thousand_hostile_replies():
    seen: list[int] = []
    fuzz(330, seen)
    print(f"\n{sum(seen)} hostile replies in {2 * len(seen)} rounds")
    assert sum(seen) >= 10_000


@pytest.mark.parametrize("method", [m if m == "flora" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_mutation_by_itself(method):
    """`play` asserts the verdict of each, and counts them."""
    every = [Plan(rounds=((name,), ()), seed=i) for i, name in enumerate(TRAIN) if TRAIN[name].part == "adapter"]
    every += [Plan(damage=(kind, kind), seed=seed) for kind in DAMAGE for seed in range(4)]
    if method == "flora":  # what is no adapter is read alike under every method
        every += [Plan(hello=name) for name in HELLO] + [Plan(evaluate=name) for name in EVALUATE]
        every += [Plan(rounds=((), (name,))) for name in [*TRAIN, *WHOLE_REPLY]]
    assert sum(play(every[first : first + 24], method).cases for first in range(0, len(every), 24)) >= len(every)
