"""Robust aggregation: every rule against a dense reference, what a poisoned client can still do, and exactness."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import (
    AGGREGATORS,
    ClientUpdate,
    DenseDelta,
    GlobalModel,
    LowRankDelta,
    aggregate_round,
    build_judge,
    build_method,
    client_weights,
    stack,
    whole,
)
from corolla.aggregation.geometry import client_change, measure_geometry
from corolla.aggregation.robust import distances_to_mean, geometric_median, krum_scores, median_cosines, parse_rules
from corolla.aggregation.rounds import advance
from tests.aggregation.federations import SHAPES, dense, difference, play, random_delta

BY_PRODUCT = sorted(name for name in AGGREGATORS if build_method(name).by_product)
OPTIONS = {
    "clip": {"clip_norm": 0.5},
    "clip ": {"clip_norm": "median"},
    "cosine": {"cosine_threshold": 0.2},
    "krum": {"byzantine": 1},
    "multi-krum": {"byzantine": 1},
    "geometric-median": {},
    "multi-krum+clip": {"byzantine": 1, "clip_norm": 0.5},
}
FLORA = build_method("flora")


def judged(names, updates, model=None, method=FLORA, weights=None, **options):
    return build_judge(names, method, **options)(updates, weights or client_weights(updates), model or GlobalModel())


def weight_of(chosen):
    return dict(chosen.counted)


def honest(count: int, seed: int = 0, spread: float = 0.3, rank: int = 3) -> list[ClientUpdate]:
    """Clients that move about the same way: a common change, and `spread` of their own."""
    common = {m: random_delta(*s, rank, seed + i) for i, (m, s) in enumerate(SHAPES.items())}
    updates = []
    for k in range(count):
        own = {
            m: LowRankDelta(
                torch.cat([d.A, random_delta(*d.shape, 1, seed + 31 * k + i).A]),
                torch.cat([d.B, spread * random_delta(*d.shape, 1, seed + 37 * k + i).B], dim=1),
            )
            for i, (m, d) in enumerate(common.items(), 1)
        }
        updates.append(ClientUpdate(f"c{k}", 10, own))
    return updates


def scaled(update: ClientUpdate, factor: float) -> ClientUpdate:
    return replace(update, adapter={m: LowRankDelta(d.A, factor * d.B) for m, d in update.adapter.items()})


def randomly(update: ClientUpdate) -> ClientUpdate:
    return replace(update, adapter={m: random_delta(*d.shape, d.rank, 999 + len(m)) for m, d in update.adapter.items()})


POISON = {"×100": lambda u: scaled(u, 100.0), "flipped": lambda u: scaled(u, -3.0), "random": randomly}


def poisoned(kind: str, count: int = 7) -> list[ClientUpdate]:
    clients = honest(count)
    return [*clients[:-1], POISON[kind](clients[-1])]


def outcome(chosen) -> dict[str, torch.Tensor]:
    return dense(stack(chosen.updates, chosen.weights), SHAPES)


def off(kind: str, names: str, **options) -> float:
    """The distance of the outcome from the honest clients' mean, relative to it."""
    clients = poisoned(kind)
    target = dense(stack(clients[:-1], client_weights(clients[:-1])), SHAPES)
    reached = outcome(judged(names, clients, **options))
    return difference(reached, target) / difference(target, {m: 0 * v for m, v in target.items()})


# --- geometry ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=2, max_size=5), st.integers(0, 2**20), st.booleans())
def test_geometry_is_that_of_the_dense_changes(ranks, seed, started):
    start = {"q": random_delta(*SHAPES["q"], 5, seed)} if started else {}
    updates = [
        ClientUpdate(f"c{k}", 1, {m: random_delta(*SHAPES[m], r, seed + 5 * k + i) for i, m in enumerate(SHAPES) if (k + i) % 3})
        for k, r in enumerate(ranks)
    ]  # fmt: skip
    head = {"head": DenseDelta(random_delta(4, 3, 3, seed).dense())}
    updates[0] = replace(updates[0], adapter={**updates[0].adapter, **head})
    updates[-1] = replace(updates[-1], adapter={**updates[-1].adapter, "head": DenseDelta(2 * head["head"].W)})
    found = measure_geometry(updates, start)
    shapes = {**SHAPES, "head": (4, 3)}
    flat = []
    for update in updates:
        held = {m: start[m].first(d.rank) for m, d in update.adapter.items() if m in start}
        moved, begin = dense(update.adapter, shapes), dense(held, shapes)
        flat.append(torch.cat([(moved[m] - begin[m]).flatten() for m in shapes]))
    matrix = torch.stack(flat)
    torch.testing.assert_close(found.gram, matrix @ matrix.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.squared, torch.cdist(matrix, matrix) ** 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("relative", [1e-2, 1e-5, 1e-7])
def test_two_nearly_equal_clients_are_as_far_apart_as_they_are(relative):
    one = random_delta(40, 30, 4, 1)
    a, b = one.A.double(), one.B.double()
    step = relative * random_delta(40, 30, 4, 2).B.double()
    updates = [ClientUpdate("a", 1, {"q": LowRankDelta(a, b)}), ClientUpdate("b", 1, {"q": LowRankDelta(a, b + step)})]
    found = float(measure_geometry(updates, {}).squared[0, 1] ** 0.5)
    assert found == pytest.approx(float((step @ a).norm()), rel=1e-6)


def test_components_that_cancel_do_not_hide_a_change():
    """Two components of 1e7 whose difference is 1: a Gram matrix of the factors reads 0 or thousands."""
    a, b, step = torch.randn(1, 30), torch.randn(40, 1), torch.randn(40, 1)
    huge = LowRankDelta(torch.cat([a, a]).double(), torch.cat([1e7 * b.double(), step.double() - 1e7 * b.double()], 1))
    norms = measure_geometry([ClientUpdate("a", 1, {"q": huge})], {}).norms
    assert float(norms[0]) == pytest.approx(float((step.double() @ a.double()).norm()), rel=1e-6)


@given(st.floats(-6, 6), st.integers(0, 2**20))
def test_factors_that_hide_their_size_are_judged_as_their_product(power, seed):
    clients = honest(5, seed)
    c = 10.0**power
    hidden = [replace(u, adapter={m: LowRankDelta(d.A / c, d.B * c) for m, d in u.adapter.items()}) for u in clients]
    one, other = (measure_geometry(u, {}) for u in (clients, hidden))
    torch.testing.assert_close(one.gram, other.gram, rtol=1e-5, atol=1e-5)


def test_a_change_of_one_factor_keeps_its_rank():
    start = {"q": random_delta(*SHAPES["q"], 4, 1)}
    held = start["q"].first(2)
    moved = client_change({"q": LowRankDelta(held.A, held.B + 1)}, start)["q"]
    assert moved.rank == 2
    torch.testing.assert_close(moved.dense(), torch.ones(12, 2).double() @ held.A.double())


# --- rules ------------------------------------------------------------------------------------------------------------


def dense_matrix(updates) -> torch.Tensor:
    flat = [torch.cat([v.flatten() for v in dense(u.adapter, SHAPES).values()]) for u in updates]
    return torch.stack(flat)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.integers(5, 9), st.integers(1, 6))
def test_krum_is_krum(seed, count, rank):
    updates = [
        ClientUpdate(f"c{k}", k + 1, {m: random_delta(*s, rank, seed + 9 * k + i) for i, (m, s) in enumerate(SHAPES.items())})
        for k in range(count)
    ]  # fmt: skip
    x = dense_matrix(updates)
    scores = []
    for k in range(count):
        others = sorted(float((x[k] - x[j]).square().sum()) for j in range(count) if j != k)
        scores.append(sum(others[: count - 1 - 2]))
    torch.testing.assert_close(krum_scores(measure_geometry(updates, {}), 1), torch.tensor(scores).double(), rtol=1e-6, atol=1e-6)  # fmt: skip
    best = sorted(range(count), key=lambda k: scores[k])
    assert weight_of(judged("krum", updates, byzantine=1)) == {f"c{k}": float(k == best[0]) for k in range(count)}
    kept = best[: count - 1]
    total = sum(k + 1 for k in kept)
    expected = {f"c{k}": (k + 1) / total * (k in kept) for k in range(count)}
    assert weight_of(judged("multi-krum", updates, byzantine=1)) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(4, 7))
def test_the_geometric_median_is_the_point_of_least_weighted_distance(seed, count):
    updates = [ClientUpdate(f"c{k}", 1 + k % 2, u.adapter) for k, u in enumerate(honest(count, seed, spread=2.0))]
    p = torch.tensor([client_weights(updates)[u.client_id] for u in updates], dtype=torch.float64)
    x = dense_matrix(updates)
    found = geometric_median()(measure_geometry(updates, {}), p)

    def total(z):
        return float((p * (x - z).norm(dim=1)).sum())

    z = found.weights @ x
    assert float(found.weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(found.scores["distance"], (x - z).norm(dim=1), rtol=1e-5, atol=1e-5)
    steps = [torch.randn(z.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(8)]
    steps += [row - z for row in x]
    assert all(total(z) <= total(z + size * step) + 1e-5 * total(z) for step in steps for size in (1e-2, 1e-1, 1.0))


def test_distances_to_a_mean():
    updates = honest(5)
    x, w = dense_matrix(updates), torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    torch.testing.assert_close(distances_to_mean(measure_geometry(updates, {}), w), (x - w @ x).norm(dim=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0.1, 5.0, 40.0, "median"]))
def test_clip_scales_each_change_to_the_norm(seed, limit):
    updates = [scaled(u, 1 + 3 * k) for k, u in enumerate(honest(5, seed))]
    x = dense_matrix(updates)
    c = float(x.norm(dim=1).median()) if limit == "median" else limit
    expected = 0.2 * (x * (c / x.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    reached = torch.cat([v.flatten() for v in outcome(judged("clip", updates, clip_norm=limit)).values()])
    torch.testing.assert_close(reached, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.floats(-0.5, 0.9))
def test_cosine_keeps_those_that_most_others_agree_with(seed, threshold):
    updates = [*honest(4, seed), *honest(3, seed + 1)]
    updates = [replace(u, client_id=f"c{k}") for k, u in enumerate(updates)]
    x = torch.nn.functional.normalize(dense_matrix(updates), dim=1)
    medians = [sorted(float(x[k] @ x[j]) for j in range(7) if j != k)[2] for k in range(7)]
    kept = [k for k in range(7) if medians[k] >= threshold]
    if not kept:
        with pytest.raises(ValueError, match="a median cosine of at least"):
            judged("cosine", updates, cosine_threshold=threshold)
        return
    expected = {f"c{k}": (k in kept) / len(kept) for k in range(7)}
    assert weight_of(judged("cosine", updates, cosine_threshold=threshold)) == pytest.approx(expected)


def test_a_case_by_eye():
    """Four clients change a 1×1 weight by 1, 2, 3 and 100."""
    updates = [
        ClientUpdate(f"c{v:03}", 1, {"q": LowRankDelta(torch.ones(1, 1), torch.full((1, 1), float(v)))})
        for v in (1, 2, 3, 100)
    ]
    shape = {"q": (1, 1)}

    def mean(names, **options):
        chosen = judged(names, updates, **options)
        return float(dense(stack(chosen.updates, chosen.weights), shape)["q"])

    assert mean("none") == pytest.approx(26.5)
    assert mean("clip", clip_norm=3.0) == pytest.approx((1 + 2 + 3 + 3) / 4)
    assert mean("clip") == pytest.approx((1 + 2 + 2 + 2) / 4)  # the lower median of the norms is 2
    assert mean("geometric-median") == pytest.approx(2.0, abs=1.01)  # any point between 2 and 3 is one
    # n = 4, f = 0: the two nearest others; 1: 1 + 4, 2: 1 + 1, 3: 1 + 4
    assert mean("krum", byzantine=0) == pytest.approx(2.0)


# --- a poisoned client ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "options", "kinds"),
    [
        ("clip", {}, {"×100": 0.5}),
        ("cosine", {"cosine_threshold": 0.3}, {"flipped": 1e-6, "random": 1e-6}),
        ("cosine+clip", {"cosine_threshold": 0.3}, {"×100": 0.3, "flipped": 0.3, "random": 0.3}),
        ("krum", {"byzantine": 1}, {"×100": 0.5, "flipped": 0.5, "random": 0.5}),
        ("multi-krum", {"byzantine": 1}, {"×100": 1e-6, "flipped": 1e-6, "random": 1e-6}),
        ("geometric-median", {}, {"×100": 0.15, "flipped": 0.15, "random": 0.15}),
    ],
)
def test_a_poisoned_client_is_weakened_where_the_theory_promises_it(names, options, kinds):
    for kind, limit in kinds.items():
        assert off(kind, names, **options) < limit
        assert off(kind, names, **options) < 0.8 * off(kind, "none")


def test_the_mean_is_wrecked():
    assert off("×100", "none") > 10
    assert off("flipped", "none") > 0.4


@pytest.mark.parametrize("names", ["multi-krum", "krum", "geometric-median"])
def test_an_enormous_change_leaves_the_digits_of_the_others(names):
    clients = honest(7)
    target = dense(stack(clients[:-1], client_weights(clients[:-1])), SHAPES)
    options = {} if names == "geometric-median" else {"byzantine": 1}
    chosen = judged(names, [*clients[:-1], scaled(clients[-1], 1e9)], **options)
    size = difference(target, {m: 0 * v for m, v in target.items()})
    assert difference(outcome(chosen), target) / size < 0.5


def test_clients_that_all_did_the_same_are_all_kept():
    one = honest(1)[0]
    same = [replace(one, client_id=f"c{k}") for k in range(5)]
    for names, options in OPTIONS.items():
        weights = weight_of(
            judged(names.strip(), same, **{**options, "clip_norm": 1e6} if "clip_norm" in options else options)
        )
        assert sum(weights.values()) == pytest.approx(1), names
    away = [*same, scaled(replace(one, client_id="z"), -50.0)]
    assert weight_of(judged("geometric-median", away))["z"] < 1e-6


# --- what a judgement is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", sorted(OPTIONS))
def test_the_outcome_is_the_stack_of_the_chosen_weights(names):
    """Bit for bit: clients of weight 0 are as if they had not come."""
    clients = poisoned("×100")
    chosen = judged(names.strip(), clients, **OPTIONS[names])
    weights = {client: w for client, w in weight_of(chosen).items() if w > 0}
    expected = stack([u for u in clients if u.client_id in weights], weights)
    proof = aggregate_round(FLORA, chosen.updates, chosen.weights, GlobalModel())
    assert proof.certificate.exact
    for module, delta in expected.items():
        assert torch.equal(delta.A, proof.merge[module].A)
        assert torch.equal(delta.B, proof.merge[module].B)


@pytest.mark.parametrize("names", sorted(OPTIONS))
def test_the_order_of_the_replies_does_not_matter(names):
    clients = poisoned("flipped")
    one, other = (judged(names.strip(), c, **OPTIONS[names]) for c in (clients, clients[::-1]))
    assert weight_of(one) == weight_of(other)


@pytest.mark.parametrize("method", BY_PRODUCT)
@pytest.mark.parametrize("names", sorted(OPTIONS))
def test_every_method_reaches_the_start_and_the_chosen_part_of_each_change(method, names):
    """S + Σ w_k (L_k − S_k), with components and modules that some clients lack, over three rounds."""
    ranks, sets = (5, 3, 2, 4, 1), (("q", "v"), ("q",), ("q", "v"), ("v",), ("q", "v"))
    built = build_method(method, energy=1.0) if method == "florist" else build_method(method)
    for played in play(built, ranks, sets, (5, 1, 2, 2, 9), 3, 1.0):
        options = OPTIONS[names]
        if names == "cosine":  # random steps agree on nothing: three of five stay
            cosines = median_cosines(measure_geometry(played.updates, played.before.start))
            options = {"cosine_threshold": float(cosines.sort().values[2])}
        chosen = judged(names.strip(), played.updates, played.before, built, played.weights, **options)
        weights = weight_of(chosen)
        assert any(weights[k] < 0.99 * w for k, w in played.weights.items())
        after, proof = advance(played.before, aggregate_round(built, chosen.updates, chosen.weights, played.before))
        expected = dense(whole(played.before), SHAPES)
        if method == "flexlora":  # what its clients cut is lost: nobody holds more than the widest of those who came
            expected = dense({}, SHAPES)
            for update in chosen.updates:
                for m, v in dense(update.adapter, SHAPES).items():
                    expected[m] += chosen.weights[update.client_id] * v
            touched = {m for u in chosen.updates for m in u.adapter}
            expected |= {m: v for m, v in dense(whole(played.before), SHAPES).items() if m not in touched}
        else:
            for update in played.updates:
                for m, v in dense(client_change(update.adapter, played.before.start), SHAPES).items():
                    expected[m] += weights[update.client_id] * v
            assert proof.relative_error < 1e-6
        assert difference(dense(whole(after), SHAPES), expected) < 1e-4 * max(
            1, difference(expected, dense({}, SHAPES))
        )


@pytest.mark.parametrize("method", sorted(set(AGGREGATORS) - set(BY_PRODUCT)))
def test_methods_that_average_factors_are_refused_with_the_reason(method):
    with pytest.raises(ValueError, match=r"\(c B, A / c\), the same product"):
        build_judge("krum", build_method(method), byzantine=1)
    build_judge("none", build_method(method))


@pytest.mark.parametrize("method", BY_PRODUCT)
def test_methods_by_product_are_not_moved_by_hidden_factors(method):
    """What the refusal stands on: with (c B, A / c) from one client the outcome is the same."""
    trains = build_method(method).constrain(1).trains
    (played,) = play(method, (4, 3, 2), (("q", "v"),) * 3, (1, 1, 1), 1, 1.0)
    if trains != {"A", "B"}:
        return  # the server itself supplies the other factor
    c = 1e4
    hidden = [*played.updates]
    hidden[1] = replace(hidden[1], adapter={m: LowRankDelta(d.A / c, d.B * c) for m, d in hidden[1].adapter.items()})
    after, _ = advance(played.before, build_method(method).aggregate(hidden, played.weights, played.before))
    assert difference(dense(whole(after), SHAPES), dense(whole(played.after), SHAPES)) < 1e-4


def test_a_method_that_averages_factors_is_moved_by_them():
    (played,) = play("fedit", (3, 3, 3), (("q", "v"),) * 3, (1, 1, 1), 1, 1.0)
    hidden = [*played.updates]
    hidden[1] = replace(
        hidden[1], adapter={m: LowRankDelta(d.A / 1e4, d.B * 1e4) for m, d in hidden[1].adapter.items()}
    )
    after, _ = advance(played.before, build_method("fedit").aggregate(hidden, played.weights, played.before))
    assert difference(dense(whole(after), SHAPES), dense(whole(played.after), SHAPES)) > 1e2


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("krums", {}, "must be none, or of clip, cosine, geometric-median, krum, multi-krum joined by"),
        ("clip+krum", {"byzantine": 1}, "clip must come last"),
        ("krum", {}, "needs byzantine, got none"),
        ("krum", {"byzantine": 1, "clip_norm": 1.0}, "clip_norm is no option of robust = 'krum'"),
        ("none", {"clip_norm": 1.0}, "clip_norm is no option of robust = 'none'"),
        ("clip", {"clip_norm": "mean"}, "must be a number above 0 or 'median'"),
        ("geometric-median", {"weiszfeld_steps": 0}, "at least 1"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(names, options, message):
    with pytest.raises(ValueError, match=message):
        build_judge(names, FLORA, **options)


def test_krum_needs_a_majority():
    with pytest.raises(ValueError, match=r"needs 2f \+ 3 = 5 clients in a round, got 4"):
        judged("krum", honest(4), byzantine=1)
    assert parse_rules("none") == []


def test_the_record_has_every_score():
    chosen = judged("multi-krum+clip", poisoned("×100"), byzantine=1, clip_norm=1.0)
    scores = chosen.scores
    assert scores["c0"].keys() == {"norm", "cosine", "krum", "clip_norm", "weight_before"}
    assert chosen.counted["c6"] == 0
    assert "clip_norm" not in scores["c6"]  # it was gone by then
    assert scores["c6"]["norm"] == pytest.approx(100 * scores["c0"]["norm"], rel=0.5)
    assert scores["c6"]["krum"] > 100 * scores["c0"]["krum"]
    assert judged("none", honest(2)).scores == {}
