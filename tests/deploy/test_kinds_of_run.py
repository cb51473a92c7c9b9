"""Runs of other kinds on real processes: robust rules, privacy, secure sums, other adapters, one that is stopped."""

from pathlib import Path

import psutil
import pytest

from corolla import simulate
from corolla.client.config import client_name
from corolla.server.folder import RunFolder
from tests.deploy.federation import Federation, as_simulated, begin, done_rounds, federation, write_config

pytestmark = pytest.mark.deploy


def both(live: Federation, model: Path, folder: Path, name: str, **changes: object) -> tuple[RunFolder, RunFolder]:
    """A run on the federation, and the same as a simulation."""
    changes = {"run.evaluate": "never", **changes}
    config = write_config(live.folder / f"{name}.toml", model, **{"run.out": name, **changes})
    said = live.corolla("run", str(config), "--federation=prod", seconds=500)
    assert "has completed" in said
    simulated = simulate(write_config(folder / "run.toml", model, **{"run.out": str(folder / "run"), **changes}))
    return RunFolder.open(live.folder / "runs" / name), RunFolder.open(simulated.folder)


def test_the_clientapp_is_forked_without_torch_and_a_run_is_stopped(live, tiny_folder):
    changes = {"run.rounds": 50, "run.evaluate": "never", "train.local_steps": 100}
    folder = begin(live, tiny_folder, "long", **changes)
    live.wait_for("a train message at the worker", lambda: '"question", "what": "train"' in live.log("worker-1"))
    (app,) = live.children("app-1", "flwr-clientapp")
    mapped = Path(f"/proc/{app}/maps").read_text()
    assert "libpython" in mapped or "python3" in mapped
    assert "libtorch" not in mapped
    assert "corolla.client.superexec" in psutil.Process(app).cmdline()
    assert "libtorch" in Path(f"/proc/{live.running['worker-1'].pid}/maps").read_text()
    live.wait_for("a round", lambda: len(done_rounds(folder)) >= 1)
    (forked_from,) = psutil.Process(live.running["app-1"].pid).children()
    forked_from.kill()
    live.wait_for("a ClientApp of its own", lambda: "gets an interpreter of its own" in live.log("app-1"))
    done = len(done_rounds(folder))

    def replied() -> bool:
        return any("bytes_up" in line["clients"][client_name(0)] for line in done_rounds(folder)[done + 1 :])

    live.wait_for("a round with it", replied)
    live.corolla("stop", "--federation=prod")
    live.wait_for("the run's end", lambda: live.status() == "finished:stopped")
    done = len(done_rounds(folder))
    assert done < 50
    assert folder.load().model.round == done
    live.kill("app-1")
    live.start("app-1")


def test_a_robust_rule_gives_the_simulations_model(live, tiny_folder, tmp_path):
    ours, theirs = both(live, tiny_folder, tmp_path, "robust", **{"aggregation.robust": "geometric-median"})
    assert ours.load().model.digest() == theirs.load().model.digest()
    assert set(done_rounds(ours)[1]["update"]) == set(done_rounds(theirs)[1]["update"])


def test_secure_sums_give_the_simulations_model(live, tiny_folder, tmp_path):
    ours, theirs = both(live, tiny_folder, tmp_path, "secure", **{"secure.sums": True, "run.keep_replies": False})
    assert ours.load().model.round == 2
    assert ours.load().model.digest() == theirs.load().model.digest()
    assert all(client_name(k) in done_rounds(ours)[1]["clients"] for k in range(3))


def test_differential_privacy_keeps_its_account(live, tiny_folder, tmp_path):
    ours, theirs = both(live, tiny_folder, tmp_path, "private", **{"aggregation.method": "ffa",
        "clients.ranks": 4, "aggregation.weights": "uniform", "privacy.noise_multiplier": 1.0, "privacy.clip_norm": 0.5, "run.keep_replies": False})  # fmt: skip
    spent = [[line["update"]["privacy"]["epsilon"] for line in done_rounds(folder)] for folder in (ours, theirs)]
    assert spent[0] == spent[1]
    assert 0 < spent[0][0] < spent[0][1]
    assert (
        ours.load().model.digest() != theirs.load().model.digest()
    )  # noise of the system's own source, never repeated


def test_different_kinds_of_adapter_give_the_simulations_model(live, tiny_folder, tmp_path):
    kinds = {"clients.kinds": ["lora", "vera", "svfit"], "clients.ranks": [2, 4, 8]}
    ours, theirs = both(live, tiny_folder, tmp_path, "mixed", **kinds)
    assert ours.load().model.digest() == theirs.load().model.digest()
    assert [line["update"]["certificate"]["exact"] for line in done_rounds(ours)] == [True, True]
    assert [client["rank"] for client in done_rounds(ours)[1]["clients"].values()] == [2, 4, 8]


def test_bases_from_first_gradients_are_the_simulations(tiny_folder, tmp_path):
    kind = {"adapter.kind": "lora-sb", "clients.ranks": 4, "clients.count": 2, "run.rounds": 1}
    (tmp_path / "federation").mkdir()
    with federation(tmp_path / "federation", tiny_folder, tiny_folder, 2) as live:
        live.start_server()
        for k in (1, 2):  # compose.yml's nodes have ranks of their own, which no kind but LoRA can have
            live.start_client(k, {**as_simulated(k), f" rank={2**k}": " rank=4"})
        ours, theirs = both(live, tiny_folder, tmp_path, "sketched", **kind)
        assert ours.load().model.digest() == theirs.load().model.digest()
        sketches = done_rounds(ours)[0]["update"]["first_gradients"]
        assert sketches["bytes_up"].keys() == {"client-000", "client-001"}
