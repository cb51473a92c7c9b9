"""What a tracker holds is what metrics.jsonl holds, also after a resume; and the run is the same with and without."""

import logging

import pytest
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker

from corolla import simulate
from corolla.server.config import Config, ConfigError
from corolla.server.folder import RunFolder
from corolla.server.trackers import TRACKERS, numbers_of, tracking
from tests.simulations.federation import tiny_config

pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def config(tiny_folder, tmp_path_factory):
    data = {"tasks_train": 4, "tasks_held_out": 1, "max_new_tokens": 2}
    run = {"rounds": 2, "evaluate": "each", "trackers": "tensorboard"}
    return tiny_config(tiny_folder, tmp_path_factory.mktemp("run"), data=data, run=run)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return simulate(config, out=tmp_path_factory.mktemp("runs") / "tracked")


def events(run) -> dict[str, dict[int, float]]:
    """Name -> step -> value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.folder / "trackers" / "corolla")).Reload()
    values = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert all(len(dict(pairs)) == len(pairs) for pairs in values.values()), "a step must be there once"
    return {name: dict(pairs) for name, pairs in values.items()}


def check(run) -> None:
    """Every number of every line, and no other."""
    expected: dict[str, dict[int, float]] = {}
    for line in run.metrics:
        for name, value in numbers_of(line).items():
            expected.setdefault(name, {})[line["round"]] = pytest.approx(value, rel=1e-6)
    assert events(run) == expected


def test_tensorboard_holds_the_numbers_of_the_lines(finished):
    check(finished)
    found, lines = events(finished), finished.metrics
    rounds = [line for line in lines if line["kind"] == "round"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    losses = {line["round"]: line["clients"]["client-001"]["train_loss"] for line in rounds}
    assert found["train/client-001/train_loss"] == pytest.approx(losses, rel=1e-6)
    assert found["round/norm"] == pytest.approx({line["round"]: line["update"]["norm"] for line in rounds}, rel=1e-6)
    assert found["round/certificate/exact"] == {1: 1.0, 2: 1.0}
    assert found["round/clients"] == {1: 3.0, 2: 3.0}
    means = {line["round"]: line["mean"]["held_out_loss"] for line in evaluations}
    assert means.keys() == {0, 1, 2}
    assert found["evaluation/mean/held_out_loss"] == pytest.approx(means, rel=1e-6)
    assert list((finished.folder / "trackers").rglob("hparams.yml"))


def test_a_resumed_run_has_every_step_once(finished, config, tmp_path):
    run = simulate(config, out=tmp_path / "run")
    check(run)
    check(simulate(out=run.folder, resume=True, overrides=["run.rounds=3"]))
    assert events(run)["round/norm"].keys() == {1, 2, 3}


def test_a_tracker_changes_nothing_in_the_run(finished, config, tmp_path):
    other = simulate(config, overrides=["run.trackers="], out=tmp_path / "run")
    assert other.model.digest() == finished.model.digest()
    assert not (other.folder / "trackers").exists()


@pytest.mark.parametrize("before", [{}, {"_cpu": True, "device": "mine"}])
def test_accelerates_state_is_left_as_it_was(before, config, tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, config, {})
    monkeypatch.setattr(PartialState, "_shared_state", dict(before))
    if before:
        PartialState._shared_state |= {"distributed_type": "NO", "process_index": 0, "num_processes": 1}
        PartialState._shared_state |= {"local_process_index": 0}
    left = dict(PartialState._shared_state)
    with tracking(config, folder) as track:
        assert PartialState._shared_state == left
        track({"kind": "evaluation", "round": 0, "clients": {}, "mean": {"held_out_loss": 1.0}})
        assert PartialState._shared_state == left
    assert PartialState._shared_state == left


def test_a_tracker_that_fails_does_not_end_the_run(config, tmp_path, monkeypatch, caplog):
    def away(self, values, step=None, **options):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(TensorBoardTracker, "log", away)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    run = simulate(config, overrides=["run.rounds=1"], out=tmp_path / "run")
    assert run.model.round == 1
    assert "tensorboard did not take the round of round 1: nobody answers" in caplog.text


def test_a_missing_package_is_named_before_round_one(config, tmp_path):
    with pytest.raises(ImportError, match=r"run\.trackers = 'comet_ml' needs its package, .* pip install comet-ml"):
        simulate(config, overrides=["run.trackers=comet_ml"], out=tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").lines() == []


def test_names_are_those_of_accelerate():
    assert TRACKERS.keys() == LOGGER_TYPE_TO_CLASS.keys()
    assert Config.load(None, ['run.trackers=["wandb", "mlflow", "wandb"]']).run.trackers == ("wandb", "mlflow")
    one = Config.load(None, ["run.trackers=wandb"])
    assert Config.from_flat(one.flat()) == one
    assert one.run.trackers == ("wandb",)
    with pytest.raises(ConfigError, match=r"run\.trackers: must be one of aim, clearml, .*got .*tensorbord"):
        Config.load(None, ["run.trackers=tensorbord"])
