"""The server's own held-out examples: evaluated where run.evaluate says, on the server's own model."""

import json

import pytest

from corolla import simulate, terminal
from corolla.server.config import Config, ConfigError
from corolla.server.folder import RunFolder
from corolla.server.held_out import open_judge
from corolla.simulations.evaluate import evaluate_checkpoint
from tests.simulations.federation import tiny_config


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "server.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": f"c{i}"}) + "\n" for i in range(5)))
    return path


def test_the_line_of_an_evaluation_has_the_servers_numbers(tiny_folder, rows, tmp_path):
    data = {"tasks_train": 4, "tasks_held_out": 1, "max_new_tokens": 2, "server_held_out": str(rows)}
    train = {"local_steps": 2, "batch_size": 2, "learning_rate": 3e-2}
    config = tiny_config(tiny_folder, tmp_path / "run", data=data, train=train, run={"evaluate": "each"})
    run = simulate(config)
    lines = [line for line in run.metrics if line["kind"] == "evaluation"]
    assert [line["round"] for line in lines] == [0, 1, 2]
    base, tuned = evaluate_checkpoint(run.folder, rows)
    assert lines[0]["server"] == pytest.approx(base)
    assert lines[2]["server"] == pytest.approx(tuned)
    assert base["held_out_loss"] != pytest.approx(tuned["held_out_loss"], rel=1e-3)
    assert "; server: held-out loss" in terminal.describe_line(lines[-1])
    assert json.loads(config.settings().model_dump_json())["data"]["server_held_out"] is None


def test_without_base_or_file_the_run_ends_before_it_begins(tiny_folder, rows, tmp_path):
    config = tiny_config(tiny_folder, tmp_path / "run", data={"server_held_out": str(rows)})

    def no_base():
        raise FileNotFoundError("no such path")

    with pytest.raises(FileNotFoundError, match=r"needs the base on the server, got none \(no such path\)"):
        open_judge(config, no_base)
    missing = tiny_config(tiny_folder, tmp_path / "gone", data={"server_held_out": str(tmp_path / "none.jsonl")})
    with pytest.raises(FileNotFoundError, match=r"must be on the server, got .*none\.jsonl"):
        simulate(missing)
    assert RunFolder.open(tmp_path / "gone").lines() == []


def test_a_set_that_nobody_would_evaluate_is_refused():
    with pytest.raises(ConfigError, match=r"data\.server_held_out is evaluated when run\.evaluate says so"):
        Config.load(None, ["data.server_held_out=x.jsonl", "run.evaluate=never"])
