"""Private rounds through the strategy: the draw, the ledger, empty rounds, and robust rounds beside them."""

import builtins
import math
from functools import partial

import pytest
import torch

from corolla.aggregation import (
    GlobalModel,
    LowRankDelta,
    adapter_norm,
    build_judge,
    build_method,
    measure_noise,
    whole,
)
from corolla.server.privacy import Privacy, spent
from tests.aggregation.federations import dense, difference
from tests.server.clients import SHAPES, fake_grid, with_factor
from tests.server.test_strategy import RANKS, run

ZERO = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}


def test_poisson_sampling_takes_each_client_by_itself():
    """Sizes vary, nobody is preferred, and no seed repeats a draw; bounds fail less often than once in 1e9."""
    privacy, names, count = Privacy(1.0, 1.0, 8, 0.3), [f"c{k}" for k in range(8)], 20_000
    draws = [privacy.draw(names, 0, 1) for _ in range(count)]
    assert all(draw == sorted(draw) for draw in draws)
    for name in names:
        assert abs(sum(name in draw for draw in draws) / count - 0.3) < 6.2 * math.sqrt(0.21 / count)
    both = sum("c0" in draw and "c1" in draw for draw in draws) / count
    assert abs(both - 0.09) < 6.2 * math.sqrt(0.09 * 0.91 / count)
    nobody = sum(not draw for draw in draws) / count
    assert abs(nobody - 0.7**8) < 6.2 * math.sqrt(0.7**8 / count)
    assert len({tuple(draw) for draw in draws}) > 100
    assert Privacy(1.0, 1.0, 8).draw(names, 0, 1) == names


def analytic_epsilon(sigma: float, delta: float) -> float:
    """ε of one Gaussian mechanism of sensitivity 1 (Balle and Wang, arXiv:1805.06530, theorem 8), by bisection."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    low, high = 0.0, 100.0
    for _ in range(200):
        e = (low + high) / 2
        found = phi(1 / (2 * sigma) - e * sigma) - math.exp(e) * phi(-1 / (2 * sigma) - e * sigma)
        low, high = (e, high) if found > delta else (low, e)
    return high


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (1.0, 3), (2.0, 10), (0.7, 2)])
def test_the_ledger_without_sampling_is_the_gaussian_mechanism(noise, rounds):
    """`rounds` Gaussians of σ are one of σ / √rounds: a closed form that the library knows nothing of."""
    exact = analytic_epsilon(noise / math.sqrt(rounds), 1e-5)
    assert exact <= spent(noise, 1.0, rounds, 1e-5) * (1 + 1e-6)
    assert spent(noise, 1.0, rounds, 1e-5) == pytest.approx(exact, rel=5e-3)


def test_the_ledger_grows_with_rounds_and_falls_with_sampling():
    assert spent(1.0, 0.1, 0, 1e-5) == 0
    assert spent(1.0, 0.1, 5, 1e-5) < spent(1.0, 0.1, 10, 1e-5) < spent(1.0, 0.5, 10, 1e-5) < spent(0.8, 0.5, 10, 1e-5)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'corolla\[dp\]'"):
        spent(1.2345, 1.0, 1, 1e-5)


@pytest.mark.parametrize("method", ["ffa", "rolora", "fedsvd", "full"])
def test_a_private_round_is_the_clipped_mean_but_for_its_noise(method, monkeypatch):
    """With a noise of 1e-9, what is left is Σ clip(D_k) / N; in ranks 2 to 5."""
    monkeypatch.setattr("corolla.server.privacy.spent", lambda *of: 1e9)  # the accountant has no number for that
    privacy = Privacy(1e-9, 0.05, clients=5)  # one more than there are: the denominator is that of the configuration
    _, records = run(fake_grid(RANKS), rounds=1, method=method, privacy=privacy)
    record, model, replies = records[0]
    assert model.round == 1
    assert record.update["certificate"]["exact"]
    plain, _ = run(fake_grid(RANKS), rounds=1, method=method, weights="uniform")
    assert adapter_norm(whole(model)) < 0.05 * 4 / 5 + 1e-4 < adapter_norm(whole(plain.model))
    expected = dict(ZERO)
    for adapter in replies.values():
        change = dense(adapter, SHAPES)  # B = 0 at first, so the reply is the change
        part = min(1, 0.05 / difference(change, ZERO))
        expected = {m: expected[m] + part * change[m] / 5 for m in SHAPES}
    assert difference(dense(whole(model), SHAPES), expected) < 1e-5
    assert all(facts["weight"] == 0.2 for facts in record.clients.values())


class NobodyComes(Privacy):
    """A draw that leaves all out, as it may."""

    def draw(self, clients, seed, round_number):
        return []


def test_an_empty_round_counts_and_changes_nothing_but_the_noise():
    strategy, records = run(fake_grid(RANKS), rounds=2, method="ffa", privacy=NobodyComes(1.0, 1.0, 4, 0.5))
    assert [record.successful for record, _, _ in records] == [True, True]
    assert [record.clients for record, _, _ in records] == [{}, {}]
    assert strategy.model.round == strategy.rounds_done == 2
    size = 0.5 * math.sqrt(2 * 5 * (6 + 4))  # σ C / (q N) in rank 5 of 6 + 4 rows, twice; χ with 100 degrees
    assert 0.6 * size < adapter_norm(whole(strategy.model)) < 1.5 * size
    ledger = [record.update["privacy"]["epsilon"] for record, _, _ in records]
    assert 0 < ledger[0] < ledger[1]


def test_the_noise_of_a_run_is_its_own():
    one, other = (run(fake_grid(RANKS), method="ffa", privacy=Privacy(1.0, 1.0, 4))[0].model for _ in range(2))
    assert difference(dense(whole(one), SHAPES), dense(whole(other), SHAPES)) > 1e-2


def test_the_record_says_nothing_about_single_changes():
    _, records = run(fake_grid(RANKS), method="ffa", privacy=Privacy(1.0, 1.0, 4))
    for record, _, _ in records:
        assert not any("judged" in facts for facts in record.clients.values())
        assert record.update["privacy"].keys() == {"epsilon", "delta", "noise_multiplier", "clip_norm", "probability"}


def test_a_method_that_is_not_linear_is_refused_by_the_strategy_too():
    with pytest.raises(ValueError, match="linear in what clients train, got flora"):
        run(fake_grid(RANKS), method="flora", privacy=Privacy(1.0, 1.0, 4))


# --- robust rounds ----------------------------------------------------------------------------------------------------

HONEST = {"ann": 4, "bob": 3, "cleo": 2, "dan": 5, "eve": 3, "fay": 2}


def poison(reply):
    """A hundredfold update, its size hidden in A."""
    for module in SHAPES:
        reply = with_factor(reply, module, lambda d: LowRankDelta(1e5 * d.A, 1e-3 * d.B))
    return reply


def flora_judge(**options):
    return build_judge("multi-krum", build_method("flora"), **options)


def test_a_poisoned_client_is_left_out_and_the_record_says_why():
    judge = flora_judge(byzantine=1)
    _, records = run(fake_grid(HONEST, {"eve": poison}), rounds=1, clients=6, judge=judge)
    good, _ = run(fake_grid({k: v for k, v in HONEST.items() if k != "eve"}), rounds=1, clients=5)
    wrecked, _ = run(fake_grid(HONEST, {"eve": poison}), rounds=1, clients=6)
    record, model, replies = records[0]
    assert "eve" in replies  # sound in form
    assert record.clients["eve"]["weight"] == 0
    assert record.clients["eve"]["judged"]["weight_before"] > 0
    scores = {client: facts["judged"]["krum"] for client, facts in record.clients.items()}
    assert max(scores, key=scores.get) == "eve"
    target = dense(whole(good.model), SHAPES)
    assert difference(dense(whole(model), SHAPES), target) < 1e-5
    assert difference(dense(whole(wrecked.model), SHAPES), target) > 5
    assert record.update["certificate"]["exact"]


def test_too_few_clients_for_krum_fail_the_round_and_leave_the_model():
    def crash(reply):
        raise MemoryError("out of memory")

    _, records = run(
        fake_grid(HONEST, {"eve": crash, "fay": crash}), rounds=1, clients=6, judge=flora_judge(byzantine=1)
    )
    record, model, _ = records[0]
    assert not record.successful
    assert "needs 2f + 3 = 5 clients in a round, got 4" in record.update["failed"]
    assert model.digest() == GlobalModel(base_hash="the-base").digest()


def test_noise_is_measured_with_the_chosen_weights():
    noise = partial(measure_noise, method=build_method("flora"))
    grid = fake_grid(HONEST, {"eve": poison})
    _, records = run(grid, rounds=1, clients=6, judge=flora_judge(byzantine=1), noise=noise)
    found = records[0][0].noise
    assert found["share"].keys() == HONEST.keys() - {"eve"}
    assert sum(found["share"].values()) == pytest.approx(1)
    assert found["norm"] == pytest.approx(records[0][0].update["norm"], rel=1e-5)
    assert found["methods"]["flora"]["relative_error"] < 1e-6
