"""Every method in a whole run on a tiny model: real clients, real training, several rounds."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from corolla import simulate
from corolla.aggregation import AGGREGATORS, DenseDelta, adapter_norm, build_method
from corolla.server.config import ConfigError
from corolla.simulations.export import export_checkpoint
from tests.simulations.federation import tiny_config


def run(name, tiny_folder, out, **sections):
    ranks = (6, 2) if build_method(name).mixed_ranks else 4
    sections["aggregation"] = {"method": name} | sections.get("aggregation", {})
    sections = {"clients": {"count": 2, "ranks": ranks}, "run": {"rounds": 3, "evaluate": "never"}} | sections
    return simulate(tiny_config(tiny_folder, out, **sections))


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_a_run_trains_what_its_method_allows(name, tiny_folder, tmp_path):
    found = run(name, tiny_folder, tmp_path, run={"rounds": 2, "evaluate": "never"})
    rounds = [line for line in found.metrics if line["kind"] == "round"]
    assert [line["successful"] for line in rounds] == [True] * 2
    assert not any(line["quarantined"] for line in rounds)
    assert adapter_norm(found.adapter) > 0
    assert all(math.isfinite(c["train_loss"]) for line in rounds for c in line["clients"].values())
    first = rounds[0]["clients"].values()
    assert all(c["loss_after"] < c["loss_before"] for c in first)  # a client's own steps teach it something
    exact = {line["update"]["certificate"]["exact"] for line in rounds}
    assert exact == {name in {"flora", "warm", "fedex", "ffa", "rolora", "fedsvd", "full"}} or name == "flexlora"
    if name == "full":
        assert all(isinstance(delta, DenseDelta) for delta in found.adapter.values())


def test_full_fine_tuning_is_exported_as_a_model_and_not_as_an_adapter(tiny_folder, tmp_path):
    found = run("full", tiny_folder, tmp_path / "run", run={"rounds": 1, "evaluate": "never"})
    with pytest.raises(ValueError, match=r"full fine-tuning makes no adapter, .*use --merged"):
        export_checkpoint(found.folder, tmp_path / "adapter")
    report = export_checkpoint(found.folder, tmp_path / "merged", merged=True)
    assert report.logits_error < 1e-5
    before = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for module, delta in found.adapter.items():
        assert torch.allclose(after[f"{module}.weight"] - before[f"{module}.weight"], delta.dense(), atol=1e-6)


@pytest.mark.parametrize(("name", "fixed"), [("ffa", ["A", "A", "A"]), ("rolora", ["A", "B", "A"]), ("fedsvd", ["A"])])
def test_the_fixed_factor_does_not_move_on_any_client(name, fixed, tiny_folder, tmp_path):
    from corolla.server.folder import RunFolder

    options = {"rounds": len(fixed), "evaluate": "never", "keep_replies": True, "keep_checkpoints": 9}
    found = run(name, tiny_folder, tmp_path, run=options)
    folder = RunFolder(found.folder)
    for number, factor in enumerate(fixed, start=1):
        held = [reply["model.layers.0.self_attn.q_proj"] for reply in folder.load_replies(number).values()]
        narrow = min(delta.rank for delta in held)
        values = [getattr(d, factor)[:narrow] if factor == "A" else getattr(d, factor)[:, :narrow] for d in held]
        assert all(torch.allclose(value, values[0], rtol=1e-6, atol=0) for value in values)


def test_hetlora_takes_ranks_away_and_a_resumed_run_remembers(tiny_folder, tmp_path):
    options = {"aggregation": {"keep": 0.5, "penalty": 50.0}, "train": {"learning_rate": 0.05, "local_steps": 4}}
    whole = run("hetlora", tiny_folder, tmp_path / "whole", **options)
    ranks = [[c["rank"] for c in line["clients"].values()] for line in whole.metrics if line["kind"] == "round"]
    assert ranks[0] == [6, 2]
    assert sum(ranks[-1]) < sum(ranks[0])
    first = run("hetlora", tiny_folder, tmp_path / "two", run={"rounds": 2, "evaluate": "never"}, **options)
    again = simulate(out=first.folder, resume=True, overrides=["run.rounds=3"])
    assert [[c["rank"] for c in m["clients"].values()] for m in again.metrics if m["kind"] == "round"] == ranks


@pytest.mark.parametrize("optimizer", ["fedavgm", "module-adam"])
def test_a_server_optimizer_resumes_with_its_memory(optimizer, tiny_folder, tmp_path):
    sections = {"aggregation": {"server_optimizer": optimizer}, "train": {"schedule": "constant"}}
    whole = run("flora", tiny_folder, tmp_path / "whole", **sections)
    first = run("flora", tiny_folder, tmp_path / "part", run={"rounds": 1, "evaluate": "never"}, **sections)
    again = simulate(out=first.folder, resume=True, overrides=["run.rounds=3"])
    assert again.model.digest() == whole.model.digest()
    assert any(key.startswith("velocity/") for key in again.model.method_state)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"aggregation": {"method": "fedit"}}, "fedit averages clients of one rank"),
        ({"aggregation": {"method": "ffa"}, "adapter": {"init": "independent"}}, "a start common to all"),
        ({"aggregation": {"method": "flora", "energy": 0.9}}, "flora has no options, got energy"),
        ({"aggregation": {"method": "warm", "server_optimizer": "fedadam"}}, "got warm: use ffa"),
        ({"aggregation": {"method": "full", "max_rank": 4}}, "for adapters: leave them out"),
        ({"aggregation": {"method": "full", "download_rank": 4}}, "aggregation.download_rank, which are for adapters"),
        ({"aggregation": {"method": "fr-lora", "download_rank": 4}, "clients": {"ranks": 4}}, "keeps −S in its merged"),
        ({"aggregation": {"method": "flora", "server_momentum": 0.5}}, "set aggregation.server_optimizer"),
    ],
)
def test_an_impossible_combination_is_refused_before_anything_runs(sections, reason, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        simulate(tiny_config(tiny_folder, tmp_path, **sections))


def test_a_squeezed_run_ends_at_the_rank_that_is_wanted_and_says_what_each_cut_lost(tiny_folder, tmp_path):
    config = tiny_config(
        tiny_folder, tmp_path / "run", aggregation={"max_rank": "8..2"}, run={"rounds": 3, "evaluate": "never"}
    )
    run = simulate(config)
    updates = [line["update"] for line in run.metrics if line["kind"] == "round"]
    assert [update["merged_rank"] for update in updates] == [8, 4, 2]
    assert [update["certificate"]["exact"] for update in updates] == [False] * 3
    assert all("was cut to rank" in update["certificate"]["reason"] for update in updates)
    with pytest.raises(ConfigError, match=r"aggregation\.max_rank: ranks that are halved must fall, got 2\.\.8"):
        tiny_config(tiny_folder, tmp_path / "other", aggregation={"max_rank": "2..8"})
