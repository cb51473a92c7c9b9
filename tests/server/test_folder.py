"""A run's folder: what was saved comes back, what was damaged is refused, what is old goes."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from corolla.aggregation import GlobalModel
from corolla.server.config import Config
from corolla.server.folder import Checkpoint, RunFolder
from corolla.server.run import prepare_folder, run_server
from tests.aggregation.federations import random_delta


def model(round_number: int) -> GlobalModel:
    return GlobalModel(
        merged={"layer/with/slash": random_delta(5, 4, 3, round_number), "layer.q": random_delta(3, 4, 0, 0)},
        start={"layer.q": random_delta(3, 4, 2, round_number)},
        round=round_number,
        base_hash="base",
        method_state={"momentum": torch.full((2,), float(round_number))},
    )


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", Config(), {"seed": 0})


def save(folder, *rounds):
    for r in rounds:
        folder.save(Checkpoint(model(r), r, {"kind": "round", "round": r}))


def test_a_checkpoint_comes_back_bit_for_bit(folder):
    save(folder, 1, 2)
    back = folder.load()
    assert (back.round, back.model.round, back.model.base_hash) == (2, 2, "base")
    assert back.model.digest() == model(2).digest()
    assert folder.load(1).model.digest() == model(1).digest()
    with pytest.raises(FileNotFoundError, match=r"rounds \[1, 2\], got a request for 7"):
        folder.load(7)


def test_a_changed_checkpoint_is_refused(folder):
    save(folder, 1)
    weights = folder.path / "checkpoints" / "round-00001" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="it was changed"):
        folder.load()


def test_a_kill_between_checkpoint_and_line_or_inside_a_line_is_mended(folder):
    save(folder, 1, 2)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder.path / "metrics.jsonl").write_text(lines[0] + lines[1][:9])
    folder.rewind(folder.load())
    assert [line["round"] for line in folder.lines()] == [1, 2]
    (folder.path / "metrics.jsonl").write_text("".join(lines) + json.dumps({"kind": "round", "round": 3}) + "\n")
    folder.rewind(folder.load())
    assert [line["round"] for line in folder.lines()] == [1, 2]


def test_a_half_written_checkpoint_is_not_seen(folder):
    save(folder, 1)
    half = folder.path / "checkpoints" / ".round-00002.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert folder.rounds() == [1]
    save(folder, 2)
    assert folder.rounds() == [1, 2]


def test_the_last_and_the_best_are_kept(folder):
    save(folder, 1, 2, 3, 4)
    folder.prune(2, {1: 0.5, 2: 0.3, 3: 0.4})
    assert folder.rounds() == [2, 3, 4]
    assert json.loads((folder.path / "best.json").read_text()) == {"round": 2, "loss": 0.3}


def test_the_configuration_comes_back(tmp_path):
    config = Config.load(
        None, ["clients.target_modules=[['a', 'b'], 'all-linear']", "train.local_epochs=0.5", "model.name=x"]
    )
    assert RunFolder.create(tmp_path, config, {}).config() == config


def test_a_folder_with_a_run_is_not_overwritten_by_accident(folder):
    save(folder, 1)
    with pytest.raises(FileExistsError, match="--resume or --overwrite"):
        RunFolder.create(folder.path, Config(), {})
    assert folder.rounds() == [1]
    assert RunFolder.create(folder.path, Config(), {}, overwrite=True).rounds() == []
    assert folder.lines() == []


def test_replies_come_back(folder):
    adapter = {"layer/with/slash": random_delta(5, 4, 3, 1)}
    folder.save_replies(2, {"ann": adapter})
    assert GlobalModel(merged=folder.load_replies(2)["ann"]).digest() == GlobalModel(merged=adapter).digest()
    assert folder.load_replies(1) == {}


HOLD = """
import sys, time
from pathlib import Path
from corolla.server.folder import RunFolder
with RunFolder(Path(sys.argv[1])).alone():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_a_folder_is_one_process_alone_until_that_ends_however_it_does(tmp_path):
    """A server that lost its SuperLink may be at work still when its run is resumed: two would mix their rounds."""
    config = Config.load(None, [f"run.out={tmp_path / 'run'}"])
    folder = prepare_folder(config)
    with subprocess.Popen([sys.executable, "-c", HOLD, folder.path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = folder.path.joinpath("config.toml").stat().st_mtime_ns
        with pytest.raises(RuntimeError, match="another at work in it: corolla stop"), folder.alone(0.5):
            pass
        with ThreadPoolExecutor(1) as pool:
            resumed = pool.submit(prepare_folder, config, True)
            time.sleep(1)
            assert not resumed.done()
            assert folder.path.joinpath("config.toml").stat().st_mtime_ns == before
            other.kill()
            assert resumed.result(30).run_id() == folder.run_id()
    with folder.alone(0.5):
        pass


def test_a_run_does_not_begin_in_a_folder_where_another_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr("corolla.server.run._run", lambda grid, config, folder, progress: folder.path)
    monkeypatch.setattr(RunFolder.alone.__wrapped__, "__defaults__", (0.2,))
    config = Config.load(None, [f"run.out={tmp_path / 'run'}"])
    folder = prepare_folder(config)
    with folder.alone(), pytest.raises(RuntimeError, match="one process at a time"):
        run_server(None, config, folder)
    assert run_server(None, config, folder) == folder.path


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_runs_is_not_taken_away(overwrite, tmp_path):
    for name in ("clients", "adapter", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.jsonl").write_text("kept")
    prepare_folder(Config.load(None, [f"run.out={tmp_path}"]), overwrite=overwrite)
    assert {path.read_text() for path in tmp_path.glob("*/mine.jsonl")} == {"kept"}
    assert len([*tmp_path.glob("*/mine.jsonl")]) == 3


def test_a_run_at_work_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder.alone.__wrapped__, "__defaults__", (0.2,))
    config = Config.load(None, [f"run.out={tmp_path / 'run'}"])
    folder = prepare_folder(config)
    with folder.alone(), pytest.raises(RuntimeError, match="one process at a time"):
        prepare_folder(config, overwrite=True)
    assert folder.run_id() != prepare_folder(config, overwrite=True).run_id()
