"""The whole way, in one process, on a tiny model."""

import json

import pytest
import torch

from corolla import simulate
from corolla.adapters import open_base
from corolla.aggregation import whole
from corolla.server.folder import RunFolder
from tests.aggregation.federations import dense, difference
from tests.simulations.federation import tiny_config


def test_two_rounds_equal_the_dense_recursion_of_the_stored_replies(tiny_folder, tmp_path):
    """Ranks 2, 5 and 9, partial modules, two of three clients a round: base plus Σ p_k B_k A_k, twice."""
    config = tiny_config(
        tiny_folder,
        tmp_path / "run",
        clients={"count": 3, "ranks": (2, 5, 9), "target_modules": (("q_proj",), ("v_proj", "up_proj"), "all-linear")},
        run={"clients_per_round": 2, "keep_replies": True, "evaluate": "never", "seed": 1},
        aggregation={"download_error": 0.0},
    )
    run = simulate(config)
    folder = RunFolder.open(run.folder)
    base = open_base(str(tiny_folder), device="cpu")
    shapes = {name: tuple(m.weight.shape) for name, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    total = {m: torch.zeros(s, dtype=torch.float64) for m, s in shapes.items()}
    size = 0.0
    for line in run.metrics:
        replies = folder.load_replies(line["round"])
        assert len(replies) == 2 == len(line["clients"])
        assert len({len(reply) for reply in replies.values()}) == 2
        examples = {client: line["clients"][client]["num_examples"] for client in replies}
        for client, reply in replies.items():
            p = examples[client] / sum(examples.values())
            assert line["clients"][client]["weight"] == pytest.approx(p)
            for m, delta in dense(reply, shapes).items():
                total[m] += p * delta
                size += p * delta.norm().item()
        assert line["update"]["certificate"]["exact"]
    assert {c for line in run.metrics for c in line["clients"]} == {"client-000", "client-001", "client-002"}
    assert size > 0.01
    assert difference(dense(run.adapter, shapes), total) <= 1e-6 * size
    from corolla.adapters import carrying

    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with carrying(base.model, whole(run.model)) as model:
        running = model(tokens).logits.detach()
    weights = {name: m.weight.detach().clone() for name, m in base.model.named_modules() if name in shapes}
    try:
        for name, weight in weights.items():
            base.model.get_submodule(name).weight.data = (weight.double() + total[name]).float()
        merged = base.model(tokens).logits.detach()
    finally:
        for name, weight in weights.items():
            base.model.get_submodule(name).weight.data = weight
    assert torch.allclose(running, merged, atol=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tiny_folder, tmp_path):
    first, second = (simulate(tiny_config(tiny_folder, tmp_path / name)) for name in ("a", "b"))
    third = simulate(tiny_config(tiny_folder, tmp_path / "c", run={"seed": 1}))
    assert first.model.digest() == second.model.digest() != third.model.digest()


def test_a_run_is_extended_and_equals_the_longer_run(tiny_folder, tmp_path):
    whole_run = simulate(tiny_config(tiny_folder, tmp_path / "a", run={"rounds": 3}, train={"schedule": "constant"}))
    simulate(tiny_config(tiny_folder, tmp_path / "b", run={"rounds": 1}, train={"schedule": "constant"}))
    extended = simulate(out=tmp_path / "b", resume=True, overrides=["run.rounds=3"])
    assert extended.model.digest() == whole_run.model.digest()
    assert [line["round"] for line in extended.metrics if line["kind"] == "evaluation"] == [0, 1, 3]


def test_a_second_run_into_the_folder_must_be_meant(tiny_folder, tmp_path):
    config = tiny_config(tiny_folder, tmp_path, run={"evaluate": "never", "rounds": 1})
    first = simulate(config)
    with pytest.raises(FileExistsError, match="--resume or --overwrite"):
        simulate(config)
    assert simulate(config, overwrite=True).model.digest() == first.model.digest()
    with pytest.raises(FileNotFoundError, match=r"config\.toml"):
        simulate(out=tmp_path / "nowhere", resume=True)


def test_the_folder_holds_what_a_reader_needs(tiny_folder, tmp_path):
    run = simulate(tiny_config(tiny_folder, tmp_path, run={"rounds": 4, "keep_checkpoints": 1, "alone": True}))
    facts = json.loads((tmp_path / "run.json").read_text())
    assert {"seed", "threads", "versions", "commit"} <= facts.keys()
    rounds = [line for line in run.metrics if line["kind"] == "round"]
    for line in rounds:
        for client in line["clients"].values():
            assert {
                "rank",
                "num_examples",
                "processed",
                "weight",
                "train_loss",
                "loss_before",
                "loss_after",
            } <= client.keys()
            assert {"tokens", "seconds", "bytes_up", "bytes_down", "too_long"} <= client.keys()
    assert rounds[0]["clients"]["client-000"]["bytes_down"] == 0 < rounds[1]["clients"]["client-000"]["bytes_down"]
    best = json.loads((tmp_path / "best.json").read_text())["round"]
    kept = RunFolder.open(tmp_path).rounds()
    assert set(kept) == {4, best}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))
    table = run.comparison
    assert list(table.columns) == ["base", "client-000", "client-001", "client-002", "global"]
    assert len(table.groups) == 8


def test_alone_is_a_federation_of_one(tiny_folder, tmp_path):
    """The reply that round one kept gives the same client alone as training it again."""
    kept = simulate(tiny_config(tiny_folder, tmp_path / "a", run={"alone": True, "keep_replies": True}))
    anew = simulate(tiny_config(tiny_folder, tmp_path / "b", run={"alone": True, "keep_replies": False}))
    assert kept.comparison.columns == anew.comparison.columns
    single = tiny_config(tiny_folder, tmp_path / "c", run={"clients_per_round": 1, "keep_replies": True})
    run = simulate(single)
    assert all(len(line["clients"]) == 1 for line in run.metrics if line["kind"] == "round")


def test_a_peft_adapter_is_the_starting_point(tiny_folder, tmp_path):
    first = simulate(tiny_config(tiny_folder, tmp_path / "a", run={"rounds": 1}))
    config = tiny_config(
        tiny_folder, tmp_path / "b", run={"rounds": 1}, adapter={"init_from": str(tmp_path / "a/adapter")}
    )
    second = simulate(config)
    ends = [line["mean"]["held_out_loss"] for line in first.metrics if line["kind"] == "evaluation"]
    begins = [line["mean"]["held_out_loss"] for line in second.metrics if line["kind"] == "evaluation"]
    assert begins[0] == pytest.approx(ends[1], rel=1e-4)
    assert begins[1] < begins[0]


def test_a_resumed_run_keeps_what_its_rounds_depend_on(tiny_folder, tmp_path):
    simulate(tiny_config(tiny_folder, tmp_path, run={"rounds": 1, "evaluate": "never"}))
    with pytest.raises(ValueError, match=r"keeps its aggregation\.method = 'flora', got 'warm'"):
        simulate(out=tmp_path, resume=True, overrides=["run.rounds=2", "aggregation.method=warm"])
    assert simulate(out=tmp_path, resume=True, overrides=["run.rounds=2"]).model.round == 2
