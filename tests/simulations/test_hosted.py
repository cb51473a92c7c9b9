"""Kinds that are LoRA but in training through whole runs: mixed ranks, resume, the base, replies, what is refused."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from corolla import simulate
from corolla.adapters import HOSTED, carrying, kind_names, open_base, read_peft_folder
from corolla.adapters.kinds import dylora
from corolla.aggregation import LowRankDelta, singular_values, whole
from corolla.client.local import Client
from corolla.client.protocol import Hello, Order, pack_adapter
from corolla.client.training import train_round
from corolla.server.config import Config, ConfigError
from corolla.server.folder import RunFolder
from corolla.server.validation import Rejected, check_arrays
from corolla.simulations.alone import first_model, train_alone
from corolla.simulations.simulate import clients_of
from tests.simulations.federation import tiny_config

NEEDED = {"rslora": {"alpha": 8.0}}
PROBE = torch.arange(40).reshape(2, 20)


def config_of(model, out, kind, **sections):
    """Ranks 6, 4 and 2 under FLoRA, three rounds."""
    adapter = {"kind": kind} | NEEDED.get(kind, {}) | sections.pop("adapter", {})
    run = {"rounds": 3, "evaluate": "never"} | sections.pop("run", {})
    train = {"schedule": "constant"} | sections.pop("train", {})
    return tiny_config(model, out, adapter=adapter, run=run, train=train, **sections)


def rounds(run):
    return [line for line in run.metrics if line["kind"] == "round"]


def logits(base, adapter):
    with carrying(base.model, adapter) as model, torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.mark.parametrize("kind", HOSTED)
def test_a_run_of_mixed_ranks_is_exact_resumes_and_leaves_the_base_alone(kind, tiny_folder, tiny, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    run = config_of(tiny_folder, tmp_path / "whole", kind, run={"evaluate": "ends"})
    done = simulate(run)
    assert [line["update"]["certificate"]["exact"] for line in rounds(done)] == [True] * 3
    assert not any(line["quarantined"] for line in rounds(done))
    first, last = (line["mean"]["probe_loss"] for line in done.metrics if line["kind"] == "evaluation")
    assert last < first
    simulate(config_of(tiny_folder, tmp_path / "parts", kind, run={"rounds": 1, "evaluate": "ends"}))
    parts = simulate(None, out=tmp_path / "parts", resume=True, overrides=["run.rounds=3"])
    assert parts.model.digest() == done.model.digest()
    after = open_base(str(tiny_folder), device="cpu").model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    exported = read_peft_folder(tmp_path / "whole" / "adapter")
    gap = logits(tiny, exported) - logits(tiny, whole(done.model))
    assert float(gap.abs().max()) < 1e-4


def test_every_kind_trains_otherwise_than_lora(tiny_folder, tmp_path):
    digests = {}
    for kind in ("lora", *HOSTED):
        run = config_of(tiny_folder, tmp_path / kind, kind, run={"rounds": 1})
        digests[kind] = simulate(run).model.digest()
    assert len(set(digests.values())) == len(digests)


def test_the_callbacks_of_a_kind_are_told_of_the_steps(tiny_folder, tmp_path, monkeypatch):
    """Without them DyLoRA would train all components, and nobody would see it."""
    drawn = []
    right = dylora.drawn_rank
    monkeypatch.setattr(dylora, "drawn_rank", lambda *args: drawn.append((*args, right(*args))) or drawn[-1][-1])
    simulate(config_of(tiny_folder, tmp_path / "run", "dylora", run={"rounds": 2}))
    assert {step for _, step, *_ in drawn} == {0, 1}
    assert {rank for _, _, rank, _ in drawn} == {6, 4, 2}
    assert len({seed for seed, *_ in drawn}) == 6  # three clients, two rounds


def test_dylora_with_warm_keeps_components_by_size_and_serves_prefixes(tiny_folder, tmp_path, monkeypatch):
    begun = []
    right = Client.train

    def train(self, assignment):
        begun.append((assignment.order.round, self.rank, assignment.start))
        return right(self, assignment)

    monkeypatch.setattr(Client, "train", train)
    run = simulate(config_of(tiny_folder, tmp_path / "run", "dylora", aggregation={"method": "warm"}))
    assert [line["update"]["certificate"]["exact"] for line in rounds(run)] == [True] * 3
    for delta in run.model.start.values():
        sizes = delta.B.norm(dim=0)
        assert torch.allclose(sizes, sizes.sort(descending=True).values)
        assert torch.allclose(sizes.double(), singular_values(delta), rtol=1e-4, atol=1e-6)
    third = {rank: start for round_number, rank, start in begun if round_number == 3}
    assert set(third) == {6, 4, 2}
    for rank in (4, 2):
        for module, delta in third[rank].items():
            assert delta.rank == rank
            assert torch.equal(delta.B, third[6][module].B[:, :rank])
            assert torch.equal(delta.A, third[6][module].A[:rank])


# SoRA


def sora(model, out, threshold, **sections):
    adapter = {"sora_threshold": threshold} | sections.pop("adapter", {})
    return config_of(model, out, "sora", adapter=adapter, **sections)


def test_what_sora_drops_is_not_sent_and_the_round_stays_exact(tiny_folder, tmp_path):
    sizes, replies = {}, {}
    for threshold in (0.0, 1.0):
        out = tmp_path / str(threshold)
        config = sora(
            tiny_folder,
            out,
            threshold,
            train={"local_steps": 4},
            aggregation={"noise": True},
            run={"keep_replies": True},
        )
        run = simulate(config)
        assert all(line["update"]["certificate"]["exact"] and not line["quarantined"] for line in rounds(run))
        assert all(line["noise"]["methods"]["flora"]["relative_error"] < 1e-5 for line in rounds(run))
        sizes[threshold] = {c: facts["bytes_up"] for c, facts in rounds(run)[-1]["clients"].items()}
        replies[threshold] = RunFolder(run.folder).load_replies(3)
    assert sizes[0.0] == {"client-000": 5376, "client-001": 3584, "client-002": 1792}
    assert all(sizes[1.0][client] < size for client, size in sizes[0.0].items())
    kept = {client: [d.rank for d in adapter.values()] for client, adapter in replies[1.0].items()}
    assert len({tuple(found) for found in kept.values()}) > 1
    for client, adapter in replies[1.0].items():
        assert sizes[1.0][client] == sum(delta.nbytes for delta in adapter.values())
        assert all(delta.rank == 1 or (delta.B != 0).any(dim=0).all() for delta in adapter.values())


def test_under_a_start_zeros_stay_in_their_places(tiny_folder, tmp_path):
    config = sora(tiny_folder, tmp_path / "run", 1.0, train={"local_steps": 4}, aggregation={"method": "warm"})
    for line in rounds(simulate(config)):
        assert line["update"]["certificate"]["exact"]
        assert not line["quarantined"]
        assert {c: f["bytes_up"] for c, f in line["clients"].items()} == {
            "client-000": 5376, "client-001": 3584, "client-002": 1792
        }  # fmt: skip


def test_gates_that_all_close_are_said_to(tiny_folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"must change the base, got none .* in 1 rounds: .*sora_threshold"):
        simulate(sora(tiny_folder, tmp_path / "run", 50.0, run={"rounds": 1}))


@pytest.mark.parametrize(
    ("kind", "method", "change", "reason"),
    [
        ("sora", "flora", lambda d: LowRankDelta(d.A[:1], d.B[:, :1]), ""),
        ("sora", "flora", lambda d: widened(d, 5), "must have shape .* and rank 6, got A"),
        ("sora", "warm", lambda d: LowRankDelta(d.A[:1], d.B[:, :1]), "must have shape .* and rank 6, got A"),
        ("dylora", "flora", lambda d: LowRankDelta(d.A[:1], d.B[:, :1]), "must have shape .* and rank 6, got A"),
        ("lora", "flora", lambda d: LowRankDelta(d.A[:1], d.B[:, :1]), "must have shape .* and rank 6, got A"),
        ("sora", "flora", lambda d: LowRankDelta(d.A[:0], d.B[:, :0]), "must|rank 6"),
    ],
)
def test_a_reply_of_fewer_components_is_for_sora_without_a_start_alone(
    kind, method, change, reason, tiny_folder, tmp_path, monkeypatch
):
    right = Client.train

    def train(self, assignment):
        reply = right(self, assignment)
        if self.client_id != "client-000":
            return reply
        return replace(reply, adapter={module: change(delta) for module, delta in reply.adapter.items()})

    monkeypatch.setattr(Client, "train", train)
    run = simulate(config_of(tiny_folder, tmp_path / "run", kind, aggregation={"method": method}, run={"rounds": 1}))
    (line,) = rounds(run)
    assert line["successful"]
    if reason:
        assert re.search(reason, line["quarantined"]["client-000"])
        assert set(line["quarantined"]) == {"client-000"}
    else:
        assert not line["quarantined"]


def widened(delta, by):
    return LowRankDelta(torch.cat([delta.A, delta.A[:by]]), torch.cat([delta.B, delta.B[:, :by]], 1))


def test_a_reply_whose_factors_differ_in_rank_is_refused():
    hello, order = Hello("a", 4, "", 1, {"m": (5, 6)}), Order(1, 4, "AB", 0, 0, "", "", "")
    record = pack_adapter({"m": LowRankDelta(torch.zeros(2, 6), torch.zeros(5, 2))})
    check_arrays(record, hello, order, least=1)
    with pytest.raises(Rejected, match="rank 4"):
        check_arrays(record, hello, order)
    odd = pack_adapter({"m": LowRankDelta(torch.zeros(2, 6), torch.zeros(4, 2))})
    with pytest.raises(Rejected, match=r"m must have shape \(5, 6\)"):
        check_arrays(odd, hello, order, least=1)

    class Uneven:
        def tensors(self):
            return {"A": torch.zeros(2, 6), "B": torch.zeros(5, 3)}

    with pytest.raises(Rejected, match=r"got A \(2, 6\), B \(5, 3\)"):
        check_arrays(pack_adapter({"m": Uneven()}), hello, order, least=1)


def test_gates_do_not_decay(tiny_folder, tmp_path, monkeypatch):
    seen = {}

    class Watches(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            names = {id(p): n for n, p in kwargs["model"].named_parameters()}
            for group in kwargs["optimizer"].param_groups:
                seen.update({names[id(p)]: group["weight_decay"] for p in group["params"]})

    def watched(*args, **kwargs):
        args = [*args[:-1], [*args[-1], Watches()]]
        return train_round(*args, **kwargs)

    monkeypatch.setattr("corolla.client.local.train_round", watched)
    simulate(sora(tiny_folder, tmp_path / "run", 0.1, train={"weight_decay": 0.5}, run={"rounds": 1}))
    gates = {name for name in seen if name.endswith("sora_gate")}
    assert len(gates) == 4
    assert {seen[name] for name in gates} == {0.0}
    assert {seen[name] for name in seen.keys() - gates} == {0.5}


# beside what else a run can have


@pytest.mark.parametrize("kind", ["sora", "pissa"])
def test_secure_sums_add_up(kind, tiny_folder, tmp_path):
    adapter = {"sora_threshold": 1.0}
    plain = simulate(config_of(tiny_folder, tmp_path / "plain", kind, adapter=adapter, run={"rounds": 2}))
    secure = simulate(
        config_of(tiny_folder, tmp_path / "secure", kind, adapter=adapter, run={"rounds": 2}, secure={"sums": True})
    )
    assert all(line["successful"] and not line["quarantined"] for line in rounds(secure))
    one, other = whole(plain.model), whole(secure.model)
    for module in one:
        assert float((one[module].dense() - other[module].dense()).norm() / one[module].dense().norm()) < 1e-3


@pytest.mark.parametrize("kind", ["sora", "allora", "dylora", "pissa"])
def test_a_personal_adapter_and_a_robust_rule_go_with_it(kind, tiny_folder, tmp_path):
    config = config_of(
        tiny_folder,
        tmp_path / "run",
        kind,
        adapter={"personal_rank": 2},
        aggregation={"robust": "clip"},
        run={"rounds": 2},
    )
    assert all(line["successful"] and not line["quarantined"] for line in rounds(simulate(config)))


def test_a_client_alone_begins_where_the_run_began(tiny_folder, tmp_path, monkeypatch):
    """The run of one client, and the client alone, are the same."""
    config = config_of(
        tiny_folder, tmp_path / "run", "pissa", clients={"count": 1, "ranks": (4,)}, run={"keep_replies": True}
    )
    run = simulate(config)
    (client,) = clients_of(config).values()
    alone = train_alone(client, RunFolder(tmp_path / "run"), run.metrics, lambda what: None)
    one, other = whole(alone), whole(run.model)
    for module in one:
        assert float((one[module].dense() - other[module].dense()).norm() / other[module].dense().norm()) < 1e-3
    assert first_model(client).start.keys() == one.keys()


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("sora", {"train": {"proximal": 0.1, "local_steps": 1}}, "'sora' needs train.proximal = 0.0, got 0.1: it"),
        ("sora", {"aggregation": {"method": "hetlora"}}, "needs another aggregation.method, got 'hetlora': that has"),
        ("dylora", {"aggregation": {"method": "full"}}, "needs another aggregation.method, got 'full': it has no"),
        ("allora", {"adapter": {"dropout": 0.1}}, "got adapter.dropout = 0.1: leave it out"),
        ("allora", {"adapter": {"scaling": 4.0}}, "got adapter.scaling = 4: leave it out"),
        ("allora", {"adapter": {"alpha": 16.0}}, "got adapter.alpha = 16: leave it out"),
        ("rslora", {}, "got adapter.alpha unset"),
        ("pissa", {"model": {"quantization": "nf4"}}, 'needs model.quantization = "none", got "nf4"'),
        ("pissa", {"adapter": {"init": "independent"}}, 'needs adapter.init = "shared", got "independent"'),
        ("olora", {"aggregation": {"download_rank": 4}}, "needs aggregation.download_rank = unset, got 4"),
        ("pissa", {"aggregation": {"method": "zero-padding"}}, r"do not carry .* got clients.ranks of \[4, 8"),
        ("pissa", {"aggregation": {"method": "flexlora"}}, "begins at a part of the base's weights"),
    ],
)
def test_what_does_not_go_together_is_refused_at_configuration(kind, sections, message):
    adapter = {"kind": kind} | sections.pop("adapter", {})
    with pytest.raises(ConfigError, match=message):
        Config.build({"adapter": adapter, **sections})


def test_every_kind_is_listed_once():
    assert len(set(kind_names())) == len(kind_names())
    with pytest.raises(ConfigError, match="dylora"):
        Config.build({"adapter": {"kind": "dylorra"}})
