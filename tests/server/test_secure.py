"""Secure sums: the same model as in the clear, from messages that say nothing about one client."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from corolla.aggregation import build_method, client_weights, whole
from corolla.aggregation.whole_modules import aggregate_round
from corolla.client.secure.protocol import END, KEYS, PROJECT, REVEAL, SHARES, TRAIN
from corolla.client.secure.stages import OPENED
from corolla.server.secure import SecureSums, SumSettings
from corolla.server.secure_strategy import SecureFederatedLoRA
from corolla.server.strategy import FederatedLoRA, Sampling
from corolla.server.validation import LONGEST_REASON
from tests.aggregation.federations import dense, difference
from tests.server.remote import Remote
from tests.server.secure_clients import RANKS, SHAPES, SecureFederation, crash

HEADS = {"head": (3, 17)}


def run(federation, rounds=1, **options):
    records = []
    options = {"clients": len(federation.ranks), "evaluate": "never", "method": "flora"} | options
    strategy = SecureFederatedLoRA(
        on_round=lambda record, model, replies: records.append((record, model, replies)), **options
    )
    strategy.run(federation.grid, rounds)
    return strategy, records


def test_a_grid_to_elsewhere_makes_no_difference():
    """What was sent is let go there, and the next client's message is whole all the same."""
    here, there = SecureFederation(heads=HEADS), SecureFederation(heads=HEADS)
    there.grid = Remote(there.grid)
    (one, [(record, _, _)]), (other, [(same, _, _)]) = run(here), run(there)
    assert record.successful
    assert not same.quarantined
    assert one.model.digest() == other.model.digest()


def mean_change(federation, round_number, clients, module):
    """Σ n ΔW / Σ n in float64: what a server would sum that saw everything."""
    weights = {c: federation.replies[round_number, c].num_examples for c in clients}
    total = torch.zeros(SHAPES[module], dtype=torch.float64)
    for client in clients:
        if module in federation.replies[round_number, client].adapter:
            total += weights[client] * federation.change(round_number, client, module)
    return total / sum(weights.values())


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("weights", ["examples", "processed", "uniform"])
def test_the_sum_is_the_mean_of_mixed_ranks_and_modules_to_the_recorded_error(weights, bits):
    federation = SecureFederation()
    clip = 2.0**24 if bits == 64 else 2.0**11
    strategy, [(record, _, replies)] = run(federation, weights=weights, sums=SumSettings(bits=bits, clip=clip))
    assert record.successful
    assert not replies
    assert not record.quarantined
    facts = record.update["secure"]
    p = client_weights(federation.updates(1), weights)
    merged = strategy.model.merged
    squared = 0.0
    for module, shape in SHAPES.items():
        exact = torch.zeros(shape, dtype=torch.float64)
        for client in RANKS:
            if module in federation.replies[1, client].adapter:
                exact += p[client] * federation.change(1, client, module)
        squared += float(torch.linalg.norm(merged[module].double().dense() - exact)) ** 2
    rounding = 1e-6 * record.update["norm"]
    assert squared**0.5 <= facts["quantisation_error"] + 3 * facts["sketch_error"] + rounding
    if bits == 64:
        assert squared**0.5 < 1e-6 * record.update["norm"]
        assert record.update["certificate"]["exact"]
        assert facts["sketch_error"] < 1e-8 * record.update["norm"]


@pytest.mark.parametrize("method", ["flora", "florist", "warm"])
def test_three_rounds_are_those_in_the_clear(method):
    federation = SecureFederation(heads=HEADS)
    strategy, records = run(federation, rounds=3, method=method)
    model = build_method(method).initial(SHAPES, 4, 0, None)
    from corolla.aggregation import advance

    for number in (1, 2, 3):
        updates = federation.updates(number)
        outcome = aggregate_round(build_method(method), updates, client_weights(updates), model, set(HEADS))
        model, proof = advance(model, outcome)
        assert records[number - 1][0].update["certificate"]["exact"] == proof.exact
    shapes = {**SHAPES, **HEADS}
    assert difference(dense(whole(strategy.model), shapes), dense(whole(model), shapes)) < 1e-5
    assert strategy.model.round == 3


def test_a_narrow_sketch_is_estimated_and_is_not_called_exact():
    estimates, errors = [], []
    for seed in range(12):
        federation = SecureFederation()
        strategy, [(record, _, _)] = run(federation, sums=SumSettings(sketch=3), seed=seed)
        assert not record.update["certificate"]["exact"]
        assert record.update["secure"]["width"] == 3
        error = sum(
            float(
                torch.linalg.norm(
                    strategy.model.merged[m].double().dense() - mean_change(federation, 1, tuple(RANKS), m)
                )
            )
            ** 2
            for m in SHAPES
        )
        estimates.append(record.update["secure"]["sketch_error"])
        errors.append(error**0.5)
    assert min(errors) > 0.05
    ratios = [estimate / error for estimate, error in zip(estimates, errors, strict=True)]
    assert 0.8 < float(np.sqrt(np.mean(np.square(ratios)))) < 1.25  # unbiased in the square
    assert all(0.4 < ratio < 2.0 for ratio in ratios)


def test_what_the_server_sees_says_nothing_about_one_client():
    """Of all messages: no adapter, no vector that is not uniform, none that knows a client's own sketch."""
    federation = SecureFederation()
    run(federation)
    from corolla.client.secure.plan import SumPlan

    vectors = {}
    for kind, name, content in federation.seen:
        if kind.startswith("from "):
            assert "adapter" not in content
            if kind not in (f"from {TRAIN}", f"from {PROJECT}"):
                assert not content.array_records
        if "masked" in content:
            vectors[kind, name] = np.frombuffer(content.array_records["masked"]["vector"].data, dtype="<i8")
    told = next(c for k, _, c in federation.seen if k == f"to {TRAIN}")
    plan = SumPlan.from_json(told.config_records["secure"]["plan"])
    assert len(vectors) == 2 * len(RANKS)
    for (kind, name), vector in vectors.items():
        counts = np.bincount(np.frombuffer(vector.tobytes(), dtype=np.uint8), minlength=256)
        chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 150 < chi < 390, (kind, name)  # 255 degrees of freedom: five and more standard deviations
        if kind == f"from {TRAIN}":
            change = {m: federation.replies[1, name].adapter[m] for m in federation.replies[1, name].adapter}
            truth = plan.numbers.encode(plan.first(change, 10.0 * RANKS[name])).numpy()
            assert abs(np.corrcoef(vector.astype(float), truth.astype(float))[0, 1]) < 5 / len(truth) ** 0.5
            assert not (vector == truth).any()
    for one, other in itertools.combinations(vectors, 2):  # no two vectors share masks, and none undo each other's
        size = min(len(vectors[one]), len(vectors[other]))
        for both in (vectors[one][:size] - vectors[other][:size], vectors[one][:size] + vectors[other][:size]):
            counts = np.bincount(np.frombuffer(both.tobytes(), dtype=np.uint8), minlength=256)
            assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 390


def test_every_sum_that_the_server_can_form_is_of_three_clients_at_least():
    """A client that revealed shares did so once a pass, for survivors' seeds and lost clients' keys, never both."""
    federation = SecureFederation(faults={("dan", TRAIN): crash, ("eve", PROJECT): crash})
    _, [(record, _, _)] = run(federation)
    assert not record.successful
    asked = [
        (name, tuple(c.config_records["secure"]["survivors"])) for k, name, c in federation.seen if k == f"to {REVEAL}"
    ]
    assert len(asked) == len(set(asked)) == 4  # the first pass alone
    assert {survivors for _, survivors in asked} == {("ann", "bob", "cleo", "eve")}


@pytest.mark.parametrize("kind", [KEYS, SHARES, TRAIN])
def test_a_client_lost_before_its_first_vector_is_left_out(kind):
    federation = SecureFederation(faults={("cleo", kind): crash})
    strategy, [(record, _, _)] = run(federation)
    assert record.successful
    assert "the node is gone" in record.quarantined["cleo"]
    left = ("ann", "bob", "dan", "eve")
    assert record.update["secure"]["clients"] == list(left)
    for module in SHAPES:
        exact = mean_change(federation, 1, left, module)
        got = strategy.model.merged[module].double().dense()
        assert torch.linalg.norm(got - exact) < 1e-6 * torch.linalg.norm(exact)


def test_a_client_lost_after_its_second_vector_counts():
    def gone_in_pass_two(message, context):
        if json.loads(context.state["corolla.secure.session"]["json"])["step"] == "masked 2":
            crash(message, context)

    federation = SecureFederation(faults={("bob", REVEAL): gone_in_pass_two})
    strategy, [(record, _, _)] = run(federation)
    assert record.successful
    assert record.update["secure"]["clients"] == sorted(RANKS)
    exact = mean_change(federation, 1, tuple(RANKS), "layer.q")
    assert torch.linalg.norm(strategy.model.merged["layer.q"].double().dense() - exact) < 1e-6


def test_one_or_two_lost_between_the_passes_fail_the_round_and_the_next_goes_on():
    """The first sum less the second's sketch would be the sketch of those alone."""
    once = iter([True])

    def gone_once(message, context):
        if next(once, False):
            crash(message, context)

    federation = SecureFederation(faults={("eve", PROJECT): gone_once})
    strategy, [(failed, before, _), (record, _, _)] = run(federation, rounds=2)
    assert not failed.successful
    assert "lost between the passes must be none or at least 3, got eve" in failed.update["failed"]
    assert not before.merged
    assert "the node is gone" in failed.quarantined["eve"]
    assert record.successful
    assert strategy.model.round == 1
    assert all(set(state) <= {OPENED} for state in federation.states.values())  # nothing is kept of either round


TEN = tuple(f"c{i}" for i in range(10))
LEFT = tuple(name for name in TEN if name not in ("c1", "c4", "c7"))


def three_lost_between(ranks, **options):
    federation = SecureFederation(ranks, faults={(name, PROJECT): crash for name in set(TEN) - set(LEFT)})
    strategy, [(record, _, _)] = run(federation, **options)
    assert set(record.quarantined) == {"c1", "c4", "c7"}
    squared = 0.0
    for module in SHAPES:
        exact, got = mean_change(federation, 1, LEFT, module), strategy.model.merged.get(module)
        squared += float(torch.linalg.norm((got.double().dense() if got else 0) - exact)) ** 2
    return record, squared**0.5


def test_three_lost_between_the_passes_leave_the_sum_of_the_others_exact():
    record, error = three_lost_between(dict.fromkeys(TEN, 1))
    assert record.successful
    assert record.update["secure"]["lost_between"] == ["c1", "c4", "c7"]
    assert record.update["certificate"]["exact"]
    assert error < 1e-6 * record.update["norm"]


def test_where_the_sketch_does_not_span_what_is_left_the_round_fails_or_says_by_how_much():
    """19 components in 16 columns: the range of all clients' sum does not hold that of seven clients' sum."""
    ranks = {name: 1 + i % 3 for i, name in enumerate(TEN)}
    record, _ = three_lost_between(ranks)
    assert not record.successful
    assert re.search(
        r"outside, since c1, c4, c7 were lost between the passes: set secure\.sketch", record.update["failed"]
    )
    record, error = three_lost_between(ranks, sums=SumSettings(sketch=16))
    assert record.successful
    assert not record.update["certificate"]["exact"]
    assert error > 0.1
    assert 0.4 < record.update["secure"]["sketch_error"] / error < 2.0


def test_below_the_threshold_the_round_fails_by_name_and_the_model_stays():
    faults = {(name, TRAIN): crash for name in ("ann", "bob")}
    strategy, [(record, _, _)] = run(SecureFederation(faults=faults), sums=SumSettings(threshold=0.8))
    assert not record.successful
    assert "a secure sum needs at least 4 clients, got 3: cleo, dan, eve" in record.update["failed"]
    assert not strategy.model.merged
    faults = {(name, KEYS): crash for name in ("ann", "bob", "cleo")}
    _, [(record, _, _)] = run(SecureFederation(faults=faults))
    assert "needs at least 4 clients, got 2" in record.update["failed"]


def test_three_clients_must_all_stay():
    ranks = {"ann": 1, "bob": 2, "cleo": 3}
    _, [(record, _, _)] = run(SecureFederation(ranks))
    assert record.successful
    _, [(record, _, _)] = run(SecureFederation(ranks, faults={("cleo", TRAIN): crash}))
    assert "at least 3 clients, got 2" in record.update["failed"]


def flip(record, name):
    def change(content, context):
        values = dict(content.config_records[record])
        values[name] = values[name][:-1] + bytes([values[name][-1] ^ 1])
        for key, value in values.items():
            content.config_records[record][key] = value

    return change


def test_sealed_shares_that_were_changed_are_refused_by_the_client_that_gets_them():
    federation = SecureFederation(faults={("ann", f"after {SHARES}"): flip("sealed", "bob")})
    _, [(record, _, _)] = run(federation)
    assert record.successful
    assert "shares of ann for bob" in record.quarantined["bob"]
    assert "a text that was changed" in record.quarantined["bob"]


def test_a_revealed_share_that_was_changed_fails_the_round():
    federation = SecureFederation(faults={("ann", f"after {REVEAL}"): flip("shares", "dan")})
    _, [(record, _, _)] = run(federation)
    assert "the shares of dan's secret must give it" in record.update["failed"]


def keys_as(change):
    """A fault: ann publishes what `change` makes of her keys (JSON, parsed)."""

    def fault(content, context):
        published = json.loads(content.config_records["keys"]["json"])
        content.config_records["keys"] = ConfigRecord({"json": change(published)})

    return fault


def with_key(name, place=None):
    """Keys of which one is the point of order one."""

    def change(published):
        if place is None:
            published["ann"][name] = bytes(32).hex()
        else:
            published["ann"][name][place] = bytes(32).hex()
        return json.dumps(published)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda published: 3, "flat JSON"),
        (lambda published: [1, 2], "flat JSON"),
        (lambda published: "[" * 100_000, "flat JSON"),
        (lambda published: json.dumps({"ann": 3}), "must be"),
        (with_key("channel"), "large order"),
        (with_key("masks", 0), "large order"),
        (with_key("masks", 1), "large order"),
    ],
)
def test_keys_that_are_none_cost_their_client_the_round_and_nobody_else(change, reason):
    federation = SecureFederation(faults={("ann", f"after {KEYS}"): keys_as(change)})
    _, [(record, _, _)] = run(federation)
    assert record.successful
    assert list(record.quarantined) == ["ann"]
    assert reason in record.quarantined["ann"]
    assert record.update["secure"]["clients"] == ["bob", "cleo", "dan", "eve"]


def test_a_reply_that_trips_the_server_costs_its_client_alone(monkeypatch):
    """A mistake of the server's in reading one message: no client's bytes end a run."""
    read = SecureSums.vector

    def trip(self, client, *rest):
        if client == "ann":
            raise TypeError("nobody thought of that")
        return read(self, client, *rest)

    monkeypatch.setattr(SecureSums, "vector", trip)
    _, [(record, _, _)] = run(SecureFederation())
    assert record.successful
    assert record.quarantined == {"ann": "its message cannot be read: TypeError: nobody thought of that"}


def test_what_a_client_says_is_recorded_as_one_short_line():
    def fault(content, context):
        content.config_records["receipt"]["client_id"] = "\n\x1b[31m" + "x" * 10**6

    def fail(message, context):
        raise ValueError("\n\x1b[31m" + "y" * 10**6)

    federation = SecureFederation(faults={("ann", f"after {TRAIN}"): fault, ("bob", TRAIN): fail})
    _, [(record, _, _)] = run(federation)
    assert set(record.quarantined) == {"ann", "bob"}
    assert all(len(why) <= LONGEST_REASON and why.isprintable() for why in record.quarantined.values())


def test_another_clients_share_is_refused():
    def cut(content, context):
        content.config_records["shares"]["dan"] = b"\x09" + content.config_records["shares"]["dan"][1:]

    federation = SecureFederation(faults={("ann", f"after {REVEAL}"): cut})
    _, [(record, _, _)] = run(federation, sums=SumSettings(threshold=0.6))
    assert not record.successful  # without ann, the second pass would be one short


def test_a_number_beyond_the_clip_is_refused_on_the_client_with_the_cure():
    _, [(record, _, _)] = run(SecureFederation(), sums=SumSettings(clip=20.0))
    assert not record.successful
    assert any("raise secure.clip" in reason for reason in record.quarantined.values())


def test_nothing_stays_in_a_clients_memory_after_the_round():
    federation = SecureFederation()
    run(federation)
    assert all(set(state) <= {OPENED} for state in federation.states.values())
    federation = SecureFederation(faults={("ann", f"after {REVEAL}"): flip("shares", "dan")})
    run(federation)
    assert all(set(state) <= {OPENED} for state in federation.states.values())
    assert any(kind == f"to {END}" for kind, _, _ in federation.seen)


def test_a_round_that_was_opened_is_not_summed_again():
    """Its training is seeded: over one client less, the difference of two sums would be that client's."""
    federation = SecureFederation()
    run(federation, run_id="ab")
    _, [(record, _, _), (later, _, _)] = run(federation, run_id="ab", rounds=2)
    assert not record.successful
    assert "round is summed once, got round 1 after round 1 was opened" in record.quarantined["ann"]
    assert later.successful
    _, [(record, _, _)] = run(federation, run_id="cd")
    assert record.successful


def test_masks_differ_and_the_model_does_not():
    one, other = SecureFederation(), SecureFederation()
    (first, _), (second, _) = run(one, rounds=2), run(other, rounds=2)
    assert first.model.digest() == second.model.digest()
    sent = [[c["masked"]["vector"].data for k, _, c in f.seen if k == f"from {TRAIN}"] for f in (one, other)]
    assert not set(sent[0]) & set(sent[1])


def test_bytes_are_proportional_to_the_sketch_and_recorded():
    _, [(wide, _, _)] = run(SecureFederation())
    _, [(narrow, _, _)] = run(SecureFederation(), sums=SumSettings(sketch=2))
    q, v = SHAPES["layer.q"], SHAPES["layer.v"]
    entries = (2 + 4) * (q[0] + v[0]) + 2 * (q[1] + v[1]) + 1  # with four probes
    assert {c["bytes_up"] for c in narrow.clients.values()} == {8 * entries}
    assert wide.clients["ann"]["bytes_up"] > 3 * narrow.clients["ann"]["bytes_up"]
    assert narrow.clients["ann"]["bytes_down"] >= 8 * 2 * (q[0] + v[0])


def test_what_needs_replies_is_refused():
    with pytest.raises(ValueError, match="got method 'zero-padding', which needs every client's factors"):
        SecureFederatedLoRA("zero-padding")
    with pytest.raises(ValueError, match="shows no reply that noise could be measured on"):
        SecureFederatedLoRA("flora", noise=lambda *a: {})


def test_the_draw_of_clients_and_the_loss_are_those_in_the_clear():
    federation = SecureFederation()
    _, [(record, _, _)] = run(federation, sampling=Sampling(clients_per_round=3))
    assert sorted(record.clients) == Sampling(clients_per_round=3).draw(RANKS, 0, 1)
    assert record.received_loss == 1.0
    assert issubclass(SecureFederatedLoRA, FederatedLoRA)


def test_sketches_beyond_the_largest_message_fail_the_round_with_the_cure():
    ranks = {"ann": 1, "bob": 2, "cleo": 3}  # in the clear every reply fits into 800 bytes
    _, [(record, _, _)] = run(SecureFederation(ranks), largest_message=800 / 2**30)
    assert "set secure.sketch to a smaller number" in record.update["failed"]
    _, [(record, _, _)] = run(SecureFederation(ranks), largest_message=4000 / 2**30)
    assert record.successful
