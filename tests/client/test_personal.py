"""What stays on a client: its personal adapter and its optimizer's moments, through rounds, kills and new runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from corolla import simulate
from corolla.aggregation import distance
from corolla.client.store import KEPT, Store
from corolla.server.folder import RunFolder
from tests.simulations.federation import tiny_config
from tests.simulations.test_resume import what_counts

FEDIT = {"aggregation": {"method": "fedit"}, "clients": {"count": 2, "ranks": 4}}


def test_a_store_gives_what_was_saved_before_a_round_and_keeps_the_latest(tmp_path):
    store = Store.of(tmp_path, "ab12", "../node 1")
    assert store.folder.parent == tmp_path / "ab12"
    assert store.load(5) == {}
    for number in (1, 2, 3, 4, 5):
        store.save(number, {"x": torch.tensor([float(number)])})
    assert store.load(6)["x"].item() == 5
    assert store.load(5)["x"].item() == 4
    assert len(list(store.folder.iterdir())) == KEPT
    store.save(4, {"x": torch.tensor([40.0])})  # a round done again
    assert store.load(5)["x"].item() == 40
    with pytest.raises(ValueError, match="hexadecimal"):
        Store.of(tmp_path, "../elsewhere", "a")


def test_personal_adapters_stay_on_their_clients_and_are_evaluated(tiny_folder, tmp_path):
    sections = {"run": {"rounds": 3, "evaluate": "each", "keep_replies": True}, "adapter": {"personal_rank": 3}}
    sections |= {"train": {"local_steps": 4}, "clients": {"count": 2, "ranks": 4}}
    run = simulate(tiny_config(tiny_folder, tmp_path / "run", **sections))
    evaluations = [line for line in run.metrics if line["kind"] == "evaluation"]
    first, last = evaluations[0]["clients"]["client-000"], evaluations[-1]["clients"]["client-000"]
    assert first["personal_held_out_loss"] == first["held_out_loss"]
    assert last["personal_held_out_loss"] != last["held_out_loss"]
    assert "personal_held_out_loss" in evaluations[-1]["mean"]
    files = sorted((run.folder / "clients").glob("*/client-*/round-00003.safetensors"))
    assert len(files) == 2
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys()
    assert {tensor.shape[0 if name.endswith("/A") else 1] for name, tensor in one.items()} == {3}
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if name.endswith("/B"))
    assert any((one[name] != other[name]).any() for name in one)
    replies = RunFolder.open(run.folder).load_replies(3)
    assert {delta.rank for reply in replies.values() for delta in reply.values()} == {4}


def test_the_personal_part_goes_on_from_round_to_round(tiny_folder, tmp_path):
    """Without what it kept, a client's third round is another one."""
    sections = {"adapter": {"personal_rank": 2}, "clients": {"count": 1, "ranks": 2}, "run": {"rounds": 2}}
    run = simulate(tiny_config(tiny_folder, tmp_path / "run", **sections))
    shutil.copytree(run.folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "clients")
    kept, lost = (
        simulate(out=folder, resume=True, overrides=["run.rounds=3"]) for folder in (run.folder, tmp_path / "other")
    )
    assert distance(kept.adapter, lost.adapter) > 1e-4


@pytest.mark.parametrize("sections", [{"train": {"keep_optimizer": True}}, {"adapter": {"personal_rank": 2}}], ids=str)
def test_a_resumed_run_finds_what_its_clients_kept(tiny_folder, tmp_path, sections):
    """The killed run had done round 3 on its clients when the server lost it: they do it again from round 2."""
    sections = FEDIT | sections
    straight = simulate(tiny_config(tiny_folder, tmp_path / "straight", run={"rounds": 3}, **sections))
    killed = simulate(tiny_config(tiny_folder, tmp_path / "killed", run={"rounds": 3}, **sections))
    folder = RunFolder.open(killed.folder)
    shutil.rmtree(folder.path / "checkpoints" / sorted(p.name for p in (folder.path / "checkpoints").iterdir())[-1])
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["round"] < 3]
    (folder.path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    resumed = simulate(out=folder.path, resume=True)
    assert resumed.model.digest() == straight.model.digest()
    assert what_counts(folder.path) == what_counts(straight.folder)


def test_kept_moments_change_the_run_and_a_new_run_begins_without_them(tiny_folder, tmp_path):
    plain = simulate(tiny_config(tiny_folder, tmp_path / "plain", **FEDIT))
    keeping = tiny_config(tiny_folder, tmp_path / "kept", train={"keep_optimizer": True}, **FEDIT)
    kept = simulate(keeping)
    assert distance(kept.adapter, plain.adapter) > 1e-4
    again = simulate(keeping, overwrite=True)
    assert again.model.digest() == kept.model.digest()
    files = sorted((tmp_path / "kept" / "clients").glob("*/client-client-000/*"))
    assert [file.name for file in files] == ["round-00001.safetensors", "round-00002.safetensors"]


def test_a_node_without_a_folder_is_told_to_name_one(tiny_folder, tmp_path):
    from corolla.client.open import open_client
    from tests.client.test_options import first_order

    config = tiny_config(tiny_folder, tmp_path, adapter={"personal_rank": 2})
    client = open_client(config.settings(), {"partition-id": 0, "num-partitions": 3})
    with pytest.raises(ValueError, match=r"got none at client-000: set state='/a/folder'"):
        client.train(first_order(client))
