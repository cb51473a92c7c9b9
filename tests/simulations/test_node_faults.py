"""Nodes that cannot take part: each is named with its reason, and the round goes on with the others."""

import json
import shutil

import pytest
import torch

from corolla.client import local
from corolla.client.app import app
from corolla.client.seeding import seed_of
from corolla.server.run import prepare_folder, run_server
from corolla.simulations.grid import InProcessGrid
from tests.simulations.federation import tiny_config
from tests.tiny import write_tiny_model


def run(config, nodes):
    """The lines of rounds of a run over nodes with these configurations."""
    folder = prepare_folder(config)
    run_server(InProcessGrid(app, nodes, config.flat()), config, folder)
    return [line for line in folder.lines() if line["kind"] == "round"]


def config_of(tiny_folder, tmp_path, **adapter):
    return tiny_config(
        tiny_folder, tmp_path / "run", run={"rounds": 2, "evaluate": "never"},
        clients={"count": 2, "ranks": "node"}, train={"local_steps": 1}, adapter=adapter,
    )  # fmt: skip


def node(name, k, **own):
    return {"name": name, "partition-id": k, "rank": 2, **own}


@pytest.fixture
def other_base(tmp_path):
    return write_tiny_model(tmp_path / "other", seed=1)


@pytest.fixture
def other_tokenizer(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "tokenizer")
    found = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("which", ["other_base", "other_tokenizer"])
def test_a_node_with_another_base_or_tokenizer_is_refused_with_the_cure(which, request, tiny_folder, tmp_path):
    wrong = request.getfixturevalue(which)
    lines = run(config_of(tiny_folder, tmp_path), [node("right", 0), node("wrong", 1, model=str(wrong))])
    assert [sorted(line["clients"]) for line in lines] == [["right"]] * 2
    assert "use the same checkpoint as the server" in lines[0]["refused"]["wrong"]


def test_a_node_without_a_disk_is_named(tiny_folder, tmp_path):
    config = config_of(tiny_folder, tmp_path, personal_rank=2)
    (tmp_path / "file").write_text("in the way")
    nodes = [node("right", 0, state=str(tmp_path / "kept")), node("full", 1, state=str(tmp_path / "file"))]
    lines = run(config, nodes)
    assert all(line["successful"] and set(line["quarantined"]) == {"full"} for line in lines)
    assert str(tmp_path / "file") in lines[0]["quarantined"]["full"]


@pytest.mark.parametrize(
    ("fault", "reason"), [("nan", "finite"), ("memory", "local training needs more memory even with micro-batch 1")]
)
def test_a_node_whose_training_fails_is_named(fault, reason, tiny_folder, tmp_path, monkeypatch):
    real = local.train_round
    marked = {seed_of(0, "wrong", round_number) for round_number in (1, 2)}

    def train_round(model, base, config, examples, round_number, rounds, seed, *rest):
        if seed in marked and fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if seed in marked:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        return real(model, base, config, examples, round_number, rounds, seed, *rest)

    monkeypatch.setattr(local, "train_round", train_round)
    lines = run(config_of(tiny_folder, tmp_path), [node("right", 0), node("wrong", 1)])
    assert all(line["successful"] and set(line["quarantined"]) == {"wrong"} for line in lines)
    assert all(reason in line["quarantined"]["wrong"] for line in lines)


SECRET = "Jane Roe was admitted with"
BROKEN = {
    "cut.jsonl": f'{{"prompt": "a", "completion": "b"}}\n{{"prompt": "{SECRET}',
    "chat.jsonl": f'{{"messages": [{{"role": "doctor", "content": "{SECRET}"}}]}}\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_shown_to_its_owner_and_not_to_the_server(name, tiny_folder, tmp_path, caplog):
    (tmp_path / name).write_text(BROKEN[name])
    heard = []
    caplog.set_level("INFO")
    config = config_of(tiny_folder, tmp_path)
    folder = prepare_folder(config)
    grid = InProcessGrid(app, [node("right", 0), node("wrong", 1, data=str(tmp_path / name))], config.flat())
    grid.pull_messages = _listening(grid.pull_messages, heard)
    run_server(grid, config, folder)
    (why,) = folder.lines()[0]["refused"].values()
    assert "the log of its worker says which row" in why
    assert heard
    assert not any(SECRET in text for text in heard)
    assert SECRET not in (folder.path / "metrics.jsonl").read_text()
    assert any(SECRET in record.getMessage() for record in caplog.records)


def _listening(pull, heard):
    """`pull_messages` with the reasons of all errors noted."""

    def listen(ids):
        for reply in pull(ids):
            if reply.has_error():
                heard.append(reply.error.reason)
            yield reply

    return listen
