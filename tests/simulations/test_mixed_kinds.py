"""Clients of different kinds in one federation: A and B of what each changed, stacked."""

from dataclasses import replace

import pytest
import torch

from corolla import simulate
from corolla.aggregation import LowRankDelta
from corolla.client.local import Client
from corolla.client.open import open_client
from corolla.server.config import Config, ConfigError
from corolla.server.folder import RunFolder
from corolla.simulations.export import export_checkpoint
from tests.simulations.federation import tiny_config
from tests.simulations.test_kinds import reloaded, rounds

KINDS = ("lora", "miss", "svfit", "vera", "sora", "loldu")


def config_of(model, out, **sections):
    clients = {"count": 6, "ranks": (6, 4, 2), "kinds": KINDS} | sections.pop("clients", {})
    run = {"rounds": 3, "evaluate": "ends", "keep_replies": True} | sections.pop("run", {})
    return tiny_config(model, out, clients=clients, run=run, train={"schedule": "constant"}, **sections)


def test_a_mixed_run_is_exact_resumes_and_exports(tiny_folder, tmp_path):
    run = simulate(config_of(tiny_folder, tmp_path / "whole", aggregation={"noise": True}))
    lines = rounds(run)
    assert [line["update"]["certificate"]["exact"] for line in lines] == [True] * 3
    assert [len(line["clients"]) for line in lines] == [6] * 3
    assert not any(line["quarantined"] for line in lines)
    assert lines[-1]["noise"]["methods"]["flora"]["relative_error"] < 1e-6
    first, last = (line["mean"]["probe_loss"] for line in run.metrics if line["kind"] == "evaluation")
    assert last < first
    whole = {}
    for line in lines:  # the model is the sum of what the clients sent, each of rank r_k
        replies = RunFolder(tmp_path / "whole").load_replies(line["round"])
        for client, adapter in replies.items():
            for module, delta in adapter.items():
                assert isinstance(delta, LowRankDelta)
                part = line["clients"][client]["weight"] * delta.double().dense()
                whole[module] = whole.get(module, 0) + part
    for module, wanted in whole.items():
        assert torch.allclose(run.model.merged[module].double().dense(), wanted, atol=1e-6)
    simulate(config_of(tiny_folder, tmp_path / "parts", run={"rounds": 1}, aggregation={"noise": True}))
    parts = simulate(None, out=tmp_path / "parts", resume=True, overrides=["run.rounds=3"])
    assert parts.model.digest() == run.model.digest()
    assert export_checkpoint(tmp_path / "whole", tmp_path / "merged", merged=True).logits_error < 1e-5
    assert reloaded(tmp_path / "merged") != reloaded(tiny_folder)
    assert (tmp_path / "whole" / "adapter" / "adapter_config.json").is_file()


def test_a_reply_of_another_rank_or_not_finite_is_quarantined(tiny_folder, tmp_path, monkeypatch):
    right = Client.train
    faults = {
        "client-001": lambda d: LowRankDelta(d.A[:-1], d.B[:, :-1]),
        "client-003": lambda d: LowRankDelta(d.A * torch.nan, d.B),
    }

    def train(self, assignment):
        reply = right(self, assignment)
        fault = faults.get(self.client_id, lambda d: d)
        return replace(reply, adapter={m: fault(d) for m, d in reply.adapter.items()})

    monkeypatch.setattr(Client, "train", train)
    kinds = {"kinds": tuple(kind for kind in KINDS if kind != "sora"), "count": 5}
    (line,) = rounds(simulate(config_of(tiny_folder, tmp_path, clients=kinds, run={"rounds": 1, "evaluate": "never"})))
    assert set(line["quarantined"]) == set(faults)
    assert line["successful"]
    assert "must be finite" in line["quarantined"]["client-003"]


def test_a_secure_sum_of_mixed_kinds_is_the_open_one(tiny_folder, tmp_path):
    run = {"rounds": 1, "evaluate": "never", "keep_replies": False}
    some = {"count": 4, "kinds": ("lora", "miss", "svfit", "vera")}
    open_ = simulate(config_of(tiny_folder, tmp_path / "open", clients=some, run=run))
    hidden = simulate(config_of(tiny_folder, tmp_path / "hidden", clients=some, run=run, secure={"sums": True}))
    for module, delta in open_.model.merged.items():
        assert torch.allclose(hidden.model.merged[module].dense(), delta.dense(), atol=1e-4)
        assert delta.dense().abs().max() > 1e-3


def test_a_node_declares_its_kind(tiny_folder, tmp_path):
    settings = config_of(tiny_folder, tmp_path, clients={"kinds": "node", "count": 3}).settings()
    found = open_client(settings, {"partition-id": 0, "kind": "vera", "rank": 5})
    assert (found.settings.adapter.kind, found.hello().rank, found.hello().basis) == ("vera", 5, "")
    assert open_client(settings, {"partition-id": 1}).settings.adapter.kind == "lora"
    with pytest.raises(ValueError, match="got 'dora': it scales the rows"):
        open_client(settings, {"partition-id": 2, "kind": "dora"})
    plain = tiny_config(tiny_folder, tmp_path).settings()
    with pytest.raises(ValueError, match=r"must be that of all, 'lora', got 'vera': the run has no clients\.kinds"):
        open_client(plain, {"partition-id": 0, "kind": "vera"})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"clients": {"kinds": ("lora", "dora")}}, r"clients\.kinds: .* got 'dora': it scales the rows"),
        ({"clients": {"kinds": ("lora", "olora")}}, "which begins at a part of it"),
        ({"clients": {"kinds": ("rslora", "vera")}}, r"adapter\.alpha"),
        ({"adapter": {"kind": "miss"}}, 'clients.kinds needs adapter.kind = "lora", got "miss"'),
        ({"aggregation": {"method": "fedit"}, "clients": {"ranks": 4}}, 'needs aggregation.method = "flora", got "fedit"'),
        ({"clients": {"ranks": "auto"}}, 'needs clients.ranks = "given", got "auto"'),
        ({"train": {"proximal": 0.1, "local_steps": 1}}, "needs train.proximal = 0.0, got 0.1"),
        ({"adapter": {"personal_rank": 2}}, "needs adapter.personal_rank = unset, got 2"),
    ],
)  # fmt: skip
def test_what_is_lora_alone_is_refused_at_configuration(sections, message):
    clients = {"kinds": ("lora", "vera"), "ranks": (4, 2)} | sections.pop("clients", {})
    with pytest.raises(ConfigError, match=message):
        Config.build({**sections, "clients": clients})


def test_the_setting_is_read_from_everywhere():
    for value in ('clients.kinds=["lora", "miss"]', "clients.kinds=['lora', 'miss']"):
        config = Config.load(None, [value])
        assert config.clients.kinds == ("lora", "miss")
        assert Config.from_flat(config.flat()) == config
    assert Config.load(None, ["clients.kinds=miss"]).clients.kinds == ("miss",)
    assert Config.load(None, ["clients.kinds=node"]).clients.kinds == ("node",)
    assert Config.from_flat({"clients.kinds": ""}).clients.kinds is None
    with pytest.raises(ConfigError, match=r"clients\.kinds: must name a kind at least, or be unset, got \[\]"):
        Config.load(None, ["clients.kinds=[]"])
