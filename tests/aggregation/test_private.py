"""Client-level privacy: what is released, that no client moves it by more than the clip, and the noise itself."""

import math
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
    Mechanism,
    aggregate_round,
    build_method,
    private_update,
    require_linear,
    secure_gaussian,
    whole,
    with_optimizer,
)
from corolla.aggregation.rounds import advance
from tests.aggregation.federations import SHAPES, dense, difference, move, play, random_delta

LINEAR = ["fedsvd", "ffa", "full", "rolora"]
HEAD = {"head": (3, 7)}


def silent(shape):
    """No noise."""
    return torch.zeros(*shape, dtype=torch.float64)


def seeded(seed):
    """Noise that can be drawn again."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def clipped_mean(updates, start, mechanism, shapes):
    """Σ clip(D_k) / m, dense."""
    total = {m: torch.zeros(s, dtype=torch.float64) for m, s in shapes.items()}
    for update in updates:
        held = {m: start[m].first(d.rank) for m, d in update.adapter.items() if m in start}
        moved, begin = dense(update.adapter, shapes), dense(held, shapes)
        change = {m: moved[m] - begin[m] for m in shapes}
        norm = math.sqrt(sum(float(c.square().sum()) for c in change.values()))
        for m, c in change.items():
            total[m] += c * min(1, mechanism.clip_norm / norm if norm else 1) / mechanism.expected
    return total


def replies(start, trains, ranks, seed, size=1.0):
    """Clients of these ranks that moved `trains` alone, and a head."""
    updates = []
    for k, rank in enumerate(ranks):
        moved = {m: move(d.first(rank), {trains}, size, seed + 10 * k + i) for i, (m, d) in enumerate(start.items())}
        head = {"head": DenseDelta(size * random_delta(3, 7, 2, seed + k).dense())}
        updates.append(ClientUpdate(f"c{k}", 1, {**moved, **head}))
    return updates


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from("AB"),
    st.lists(st.integers(1, 8), max_size=4),
    st.integers(0, 2**20),
    st.sampled_from([1e-2, 3.0, 1e3]),
    st.sampled_from([1.0, 2.5]),
)
def test_without_noise_the_release_is_the_mean_of_the_clipped_changes(trains, ranks, seed, clip_norm, expected):
    """For ranks up to 8, beyond out of v (5), and for nobody at all."""
    start = {m: random_delta(*s, 8, seed + i) for i, (m, s) in enumerate(SHAPES.items())}
    mechanism = Mechanism(clip_norm, 1.0, expected)
    updates = replies(start, trains, ranks, seed)
    found = private_update(updates, start, HEAD, mechanism, trains, silent)
    shapes = {**SHAPES, **HEAD}
    wanted = clipped_mean(updates, start, mechanism, shapes)
    begin = dense(start, shapes)
    assert found.adapter.keys() == shapes.keys()
    reached = dense(found.adapter, shapes)
    assert difference(reached, {m: begin[m] + wanted[m] for m in shapes}) < 1e-4 * (
        1 + difference(wanted, dense({}, shapes))
    )
    fixed = "A" if trains == "B" else "B"
    assert all(torch.equal(getattr(found.adapter[m], fixed), getattr(start[m], fixed)) for m in start)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from("AB"), st.integers(0, 2**20), st.floats(0.1, 1e3), st.floats(1e-3, 1e4))
def test_one_client_more_moves_the_release_by_at_most_the_clip(trains, seed, clip_norm, size):
    """The sensitivity that the accountant assumes, in the coordinates the noise is added in: those of ΔW."""
    start = {m: random_delta(*s, 4, seed + i) for i, (m, s) in enumerate(SHAPES.items())}
    mechanism = Mechanism(clip_norm, 1.0, 1.0)
    updates = replies(start, trains, (4, 2, 3), seed, size)
    shapes = {**SHAPES, **HEAD}
    for k in range(3):
        rest = [u for j, u in enumerate(updates) if j != k]
        one, other = (dense(private_update(u, start, HEAD, mechanism, trains, silent).adapter, shapes) for u in (updates, rest))  # fmt: skip
        assert difference(one, other) <= clip_norm * (1 + 1e-4) + 1e-3


@pytest.mark.parametrize("trains", ["A", "B"])
def test_the_noise_has_its_deviation_in_every_direction_of_the_change(trains):
    """ΔW's noise is Y Q with orthonormal Q, whatever the rows of A weigh: here by factors of 1 to 1000."""
    weigh = torch.logspace(0, 3, 4)
    start = random_delta(2000, 2000, 4, 3)
    start = LowRankDelta(start.A * weigh[:, None], start.B) if trains == "B" else LowRankDelta(start.A, start.B * weigh)
    mechanism = Mechanism(clip_norm=2.0, noise_multiplier=1.5, expected=4.0)
    found = private_update([], {"q": start}, {"head": (200, 200)}, mechanism, trains, seeded(1)).adapter
    noise = found["q"].dense().double() - start.double().dense()
    basis = torch.linalg.qr(start.A.double().T if trains == "B" else start.B.double()).Q
    inside = noise @ basis if trains == "B" else noise.T @ basis
    size = float(noise.norm())
    assert float(inside.norm()) == pytest.approx(size, rel=1e-3)  # all of it where a change can be
    for column in inside.T:  # 2000 normals of deviation σ C / m each
        assert float(column.std()) == pytest.approx(0.75, rel=0.08)
    assert float(inside.std()) == pytest.approx(0.75, rel=0.03)
    assert float(found["head"].W.std()) == pytest.approx(0.75, rel=0.03)


def test_noise_comes_where_nobody_does_and_for_modules_that_nobody_adapts():
    start = {m: random_delta(*s, 3, 5) for m, s in SHAPES.items()}
    mechanism = Mechanism(1.0, 1.0, 2.0)
    only_v = [ClientUpdate("a", 1, {"v": start["v"]})]
    for updates in ([], only_v):
        found = private_update(updates, start, HEAD, mechanism, "B").adapter
        for m in (*SHAPES, "head"):
            begin = start[m].dense() if m in start else torch.zeros(HEAD[m])
            assert float((found[m].dense() - begin).norm()) > 1e-2


def test_a_direction_that_the_fixed_factor_lacks_gets_no_noise():
    """A with two equal rows has rank 2; its inverse would be infinite."""
    start = random_delta(6, 9, 3, 1)
    start = LowRankDelta(start.A[[0, 1, 1]], start.B)
    found = private_update([], {"q": start}, {}, Mechanism(1.0, 1.0, 1.0), "B").adapter["q"]
    assert float((found.dense() - start.dense()).norm()) < 30
    dead = LowRankDelta(torch.zeros(2, 9), torch.zeros(6, 2))
    same = private_update([], {"q": dead}, {}, Mechanism(1.0, 1.0, 1.0), "B").adapter["q"]
    assert torch.equal(same.dense(), dead.dense())


def test_another_fixed_factor_is_an_error():
    start = {"q": random_delta(*SHAPES["q"], 3, 5)}
    other = {"q": LowRankDelta(start["q"].A + 1, start["q"].B)}
    with pytest.raises(ValueError, match="q must keep the other factor of its start where B is trained"):
        private_update([ClientUpdate("a", 1, other)], start, {}, Mechanism(1.0, 1.0, 1.0), "B")


def test_the_methods_that_may_be_noised_are_those_that_are_linear():
    assert [name for name in sorted(AGGREGATORS) if not _refusal(build_method(name))] == LINEAR
    for name in sorted(set(AGGREGATORS) - set(LINEAR)):
        assert "product, ξ_B ξ_A" in _refusal(build_method(name))
    require_linear(with_optimizer(build_method("ffa"), "fedadam"))


def _refusal(method) -> str:
    try:
        require_linear(method)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_method_goes_on_from_what_was_released(name):
    """S + Σ clip(D_k) / m after the method's own step, three rounds on, with ranks and modules that differ."""
    ranks, sets = (4, 2, 3), (("q", "v"), ("q",), ("v",))
    method = build_method(name)
    for number, played in enumerate(play(method, ranks, sets, (1, 2, 3), 3, 1.0), 1):
        (trains,) = method.constrain(number).trains
        shapes = SHAPES if trains == "W" else {}
        mechanism = Mechanism(0.7, 1.0, 1.5)
        private = private_update(played.updates, played.before.start, shapes, mechanism, trains, silent)
        outcome = aggregate_round(method, [private], {private.client_id: 1.0}, played.before)
        after, proof = advance(played.before, outcome)
        change = clipped_mean(played.updates, played.before.start, mechanism, SHAPES)
        begin = dense(whole(played.before), SHAPES)
        assert difference(dense(whole(after), SHAPES), {m: begin[m] + change[m] for m in SHAPES}) < 1e-4
        assert proof.exact


# --- the noise --------------------------------------------------------------------------------------------------------

COUNT = 1_000_000
SIGMAS = 6.5
"""A normal statistic is further out with a probability below 1e-10."""


def test_the_secure_noise_is_standard_normal():
    """Moments, tail and largest gap to Φ; all bounds fail by chance less often than once in 1e9 runs together."""
    x = secure_gaussian((COUNT,))
    assert x.dtype == torch.float64
    root = math.sqrt(COUNT)
    assert abs(float(x.mean())) < SIGMAS / root
    assert abs(float(x.square().mean()) - 1) < SIGMAS * math.sqrt(2) / root
    assert abs(float(x.pow(3).mean())) < SIGMAS * math.sqrt(15) / root
    assert abs(float(x.pow(4).mean()) - 3) < SIGMAS * math.sqrt(96) / root
    beyond = math.erfc(3 / math.sqrt(2))
    assert abs(float((x.abs() > 3).double().mean()) - beyond) < SIGMAS * math.sqrt(beyond) / root
    ordered, steps = x.sort().values, torch.arange(1, COUNT + 1) / COUNT
    gap = (torch.special.ndtr(ordered) - steps).abs().max()
    assert float(gap) < math.sqrt(math.log(2 / 1e-10) / (2 * COUNT)) + 1 / COUNT  # Dvoretzky–Kiefer–Wolfowitz


def test_neighbours_are_independent_and_no_two_draws_are_alike():
    x, y = secure_gaussian((COUNT,)), secure_gaussian((COUNT,))
    bound = SIGMAS / math.sqrt(COUNT)
    half = COUNT // 2  # cosine and sine of one pair stand half apart
    for lag in (1, 2, half):
        assert abs(float((x[:-lag] * x[lag:]).sum()) / COUNT) < bound
        assert abs(float(((x[:-lag] ** 2 - 1) * (x[lag:] ** 2 - 1)).sum()) / COUNT) < 2 * bound
    assert abs(float((x * y).mean())) < bound
    assert len(torch.cat([x, y]).unique()) > 2 * COUNT - 5


def test_shapes_and_seeds():
    torch.manual_seed(0)
    one = secure_gaussian((3, 5))
    torch.manual_seed(0)
    other = secure_gaussian((3, 5))
    assert one.shape == (3, 5)
    assert not torch.equal(one, other)
    assert secure_gaussian((0, 4)).shape == (0, 4)
    assert bool(secure_gaussian((7,)).isfinite().all())


def test_the_release_is_what_a_reply_would_be():
    """It passes through a method with a head as one client of full rank."""
    start = {m: random_delta(*s, 3, 5) for m, s in SHAPES.items()}
    model = GlobalModel(start=start)
    private = private_update(replies(start, "B", (3, 2), 1), start, HEAD, Mechanism(1.0, 1.0, 1.0), "B")
    private = replace(private, num_examples=1)
    outcome = aggregate_round(build_method("ffa"), [private], {"private": 1.0}, model, ["head"])
    assert outcome.merge.keys() == {"head"}
    assert outcome.certificate.exact
