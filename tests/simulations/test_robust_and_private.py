"""Whole runs on a tiny model: a poisoned client, and a private run that goes on where it stopped."""

from dataclasses import replace

import pytest

from corolla import simulate
from corolla.aggregation import LowRankDelta, adapter_norm, distance
from corolla.client.local import Client
from corolla.server.config import ConfigError
from corolla.server.privacy import spent
from tests.simulations.federation import tiny_config

KRUM = {"method": "flora", "robust": "multi-krum", "byzantine": 1}
FIVE = {"count": 5, "ranks": (4, 3, 2)}


@pytest.fixture
def poisoned(monkeypatch):
    """Client 2 sends its update times −100, hidden as (1e-4 B, 1e6 A)."""
    train = Client.train

    def poison(client, assignment):
        reply = train(client, assignment)
        if client.client_id != "client-002":
            return reply
        worse = {m: LowRankDelta(1e6 * d.A, -1e-4 * d.B) for m, d in reply.adapter.items()}
        return replace(reply, adapter=worse)

    monkeypatch.setattr(Client, "train", poison)


def test_multi_krum_leaves_a_poisoned_client_out(tiny_folder, tmp_path, poisoned):
    quiet = {"rounds": 2, "evaluate": "never"}
    robust = simulate(tiny_config(tiny_folder, tmp_path / "robust", clients=FIVE, aggregation=KRUM, run=quiet))
    mean = simulate(tiny_config(tiny_folder, tmp_path / "mean", clients=FIVE, run=quiet))
    for line in robust.metrics:
        assert line["successful"]
        assert line["clients"]["client-002"]["weight"] == 0
        assert sum(facts["weight"] for facts in line["clients"].values()) == pytest.approx(1)
        scores = {client: facts["judged"]["krum"] for client, facts in line["clients"].items()}
        assert max(scores, key=scores.get) == "client-002"
        assert line["update"]["certificate"]["exact"]
    assert adapter_norm(mean.adapter) > 10 * adapter_norm(robust.adapter) > 0


PRIVATE = {
    "aggregation": {"method": "ffa", "weights": "uniform"},
    "privacy": {"noise_multiplier": 1.0, "clip_norm": 0.1},
}


def test_a_private_run_counts_its_epsilon_and_goes_on_counting(tiny_folder, tmp_path):
    run = {"rounds": 2, "fraction": 0.6, "evaluate": "never"}
    first = simulate(tiny_config(tiny_folder, tmp_path / "run", run=run, **PRIVATE))
    with pytest.raises(ConfigError, match=r"a resumed run keeps its run\.fraction = 0\.6, got 1\.0"):
        simulate(out=first.folder, resume=True, overrides=["run.fraction=1.0"])
    with pytest.raises(ConfigError, match=r"privacy\.epsilon|keeps its privacy"):
        simulate(out=first.folder, resume=True, overrides=["privacy.noise_multiplier=5.0"])
    assert simulate(out=first.folder, resume=True, overrides=["run.rounds=4"]).metrics[:2] == first.metrics[:2]
    lines = simulate(out=first.folder, resume=True).metrics
    ledger = [line["update"]["privacy"]["epsilon"] for line in lines]
    assert ledger == [spent(1.0, 0.6, rounds, 1e-5) for rounds in (1, 2, 3, 4)]
    assert all(line["successful"] for line in lines)
    assert ledger == sorted(set(ledger))


def test_two_private_runs_of_one_seed_differ(tiny_folder, tmp_path):
    run = {"rounds": 1, "evaluate": "never"}
    one, other = (simulate(tiny_config(tiny_folder, tmp_path / name, run=run, **PRIVATE)) for name in "ab")
    assert distance(one.adapter, other.adapter) > 1e-3
