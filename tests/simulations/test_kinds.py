"""Every kind of adapter through whole runs: partial participation, resume, export, quarantine, and what is refused."""

import atexit
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from corolla import simulate
from corolla.adapters import KINDS
from corolla.client.local import Client
from corolla.client.open import open_client
from corolla.server.config import Config, ConfigError
from corolla.simulations.export import export_checkpoint
from corolla.simulations.report import write_report
from tests.simulations.federation import tiny_config


def config_of(model, out, kind, **sections):
    run = {"rounds": 3, "clients_per_round": 2, "evaluate": "ends"} | sections.pop("run", {})
    clients = {"count": 3, "ranks": (4,)}
    train = {"schedule": "constant"}  # one that spans the run would make a run of one round another run
    return tiny_config(model, out, adapter={"kind": kind}, clients=clients, run=run, train=train, **sections)


def rounds(run):
    return [line for line in run.metrics if line["kind"] == "round"]


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
probe = torch.arange(40).reshape(2, 20)
for folder in sys.stdin:
    model = AutoModelForCausalLM.from_pretrained(folder.strip(), dtype=torch.float32)
    print(float(model(input_ids=probe).logits.double().square().sum()), flush=True)
"""


@cache
def elsewhere() -> subprocess.Popen[str]:
    """A process that knows nothing of this one, and makes something of each checkpoint that it is told of."""
    words = [sys.executable, "-c", FRESH]
    found = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    atexit.register(found.kill)
    return found


def reloaded(folder) -> float:
    """What a process of its own makes of a checkpoint."""
    process = elsewhere()
    process.stdin.write(f"{folder}\n")
    return float(process.stdout.readline())


@pytest.fixture(scope="module")
def base(tiny_folder):
    return reloaded(tiny_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_and_exports(kind, tiny_folder, tmp_path, base):
    whole = simulate(config_of(tiny_folder, tmp_path / "whole", kind))
    proofs = [line["update"]["certificate"] for line in rounds(whole)]
    assert [(proof["exact"], "not linear" in proof["reason"]) for proof in proofs] == [
        (not KINDS[kind].inexact, bool(KINDS[kind].inexact))
    ] * 3
    assert all(len(line["clients"]) == 2 for line in rounds(whole))
    simulate(config_of(tiny_folder, tmp_path / "parts", kind, run={"rounds": 1}))
    parts = simulate(None, out=tmp_path / "parts", resume=True, overrides=["run.rounds=3"])
    assert parts.model.digest() == whole.model.digest()
    first, last = (line["mean"]["probe_loss"] for line in whole.metrics if line["kind"] == "evaluation")
    assert last < first
    report = export_checkpoint(tmp_path / "whole", tmp_path / "merged", merged=True)
    assert report.logits_error < 1e-5
    assert reloaded(tmp_path / "merged") != base


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_that_is_not_finite_is_quarantined(kind, tiny_folder, tmp_path, monkeypatch):
    right = Client.train

    def train(self, assignment):
        reply = right(self, assignment)
        if self.client_id != "client-001":
            return reply
        broken = {m: type(d)(**{n: t * torch.nan for n, t in d.tensors().items()}) for m, d in reply.adapter.items()}
        return replace(reply, adapter=broken)

    monkeypatch.setattr(Client, "train", train)
    run = simulate(
        config_of(tiny_folder, tmp_path / "run", kind, run={"rounds": 2, "clients_per_round": 3, "evaluate": "never"})
    )
    assert run.model.is_finite()
    for line in rounds(run):
        assert line["successful"]
        assert "must be finite" in line["quarantined"]["client-001"]
        assert set(line["clients"]) - set(line["quarantined"]) == {"client-000", "client-002"}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_up_are_those_of_the_coordinates(kind, tiny_folder, tmp_path):
    run = simulate(config_of(tiny_folder, tmp_path / "run", kind, run={"rounds": 1, "evaluate": "never"}))
    sizes = {  # of q (32, 32) and v (16, 32) in two layers, rank 4, in floats
        "dora": sum(out + 4 * (out + 32) for out in (32, 16)),
        "ia3": 32 + 16,
        "loha": 2 * 4 * (32 + 32) + 2 * 4 * (16 + 32),
        "loha-dense": (32 + 16) * 32,
        "loldu": 4 + 4,
        "lora-sb": 4 * 4 + 4 * 4,
        "lokr": (4 * 4 + 8 * 8) + (4 * 4 + 4 * 8),  # 32 = 4 · 8 and 16 = 4 · 4: no factor is split at rank 4
        "lokr-dense": (32 + 16) * 32,
        "miss": 4 * 32 + 4 * 16,
        "miss-bat": 32 * 4 + 16 * 4,
        "miss-mini": 4 * 4 + 4 * 4,
        "randlora": (4 * 8 + 8 * 32) + (4 * 4 + 4 * 16),
        "svfit": 4 + 4,
        "vera": (32 + 4) + (16 + 4),
    }
    assert {c["bytes_up"] for c in rounds(run)[0]["clients"].values()} == {4 * 2 * sizes[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_averaging_parameters_is_reported(kind, tiny_folder, tmp_path):
    run = simulate(config_of(tiny_folder, tmp_path / "run", kind, run={"rounds": 2}, aggregation={"noise": True}))
    noise = rounds(run)[1]["noise"]
    rule, parameters = (noise["methods"][name] for name in ("flora", "parameter-averaging"))
    assert (rule["relative_error"] < 1e-6) == (not KINDS[kind].inexact)
    if kind.endswith("-dense"):
        assert parameters == {"not_applicable": f"the parameters of {kind} do not travel"}
    else:
        assert (parameters["relative_error"] > 1e-3) == (kind in ("dora", "loha", "lokr", "randlora", "vera"))
    assert sum(noise["share"].values()) == pytest.approx(1)
    assert "parameter-averaging" in write_report([tmp_path / "run"], tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"aggregation": {"method": "fedit"}}, 'needs aggregation.method = "flora", got "fedit"'),
        ({"clients": {"ranks": (4, 2)}}, "needs clients.ranks = 1, got 2: all share one basis"),
        ({"secure": {"sums": True}}, "needs secure.sums = false"),
        ({"adapter": {"personal_rank": 2}}, "needs adapter.personal_rank = unset, got 2"),
        ({"train": {"proximal": 0.1, "local_steps": 1}}, "needs train.proximal = 0.0, got 0.1"),
    ],
)
def test_what_is_made_for_lora_is_refused_at_configuration(sections, message):
    sections = {"adapter": {"kind": "miss"}, "clients": {"ranks": (4,)}} | {
        name: values | ({"kind": "miss"} if name == "adapter" else {}) for name, values in sections.items()
    }
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        Config.build(sections)


def test_an_unknown_kind_lists_the_right_ones():
    with pytest.raises(ConfigError, match=r"adapter\.kind: must be one of lora, dora, ia3"):
        Config.build({"adapter": {"kind": "dorra"}})


def test_a_node_of_another_rank_than_the_runs_is_refused(tiny_folder, tmp_path):
    settings = config_of(tiny_folder, tmp_path, "vera").settings()
    assert open_client(settings, {"partition-id": 0, "rank": 4}).rank == 4
    with pytest.raises(
        ValueError, match=r"rank of client-000 must be that of all, 4, .* 'vera', got 8: leave rank out"
    ):
        open_client(settings, {"partition-id": 0, "rank": 8})
