"""A run that is killed goes on, and ends where the run that was never killed ends: bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from corolla import simulate
from corolla.server.folder import RunFolder
from tests.simulations.federation import tiny_config

SECTIONS = {
    "run": {"rounds": 4, "fraction": 0.7, "evaluate": "each", "keep_checkpoints": 9},
    "adapter": {"dropout": 0.1, "target_modules": "all-linear"},
    "train": {"local_steps": 3, "schedule": "cosine"},
    "aggregation": {"method": "warm"},
}

SCRIPT = """
import sys
from corolla import simulate
from corolla.server.config import Config
out, resume, config = sys.argv[1], sys.argv[2] == "resume", Config.model_validate_json(sys.argv[3])
simulate(out=out, resume=True) if resume else simulate(config, out=out)
"""


def what_counts(folder) -> list:
    """Everything in metrics.jsonl but the clock and the memory."""
    lines = RunFolder.open(folder).lines()
    return json.loads(
        json.dumps(lines), object_hook=lambda d: {k: v for k, v in d.items() if k not in ("seconds", "peak_memory_mib")}
    )


@pytest.mark.process
def test_a_run_killed_twice_equals_the_run_that_was_not(tiny_folder, tmp_path):
    straight = simulate(tiny_config(tiny_folder, tmp_path / "straight", **SECTIONS))
    out, config = tmp_path / "killed", tiny_config(tiny_folder, tmp_path / "killed", **SECTIONS)
    dice = random.Random()
    for attempt, mode in enumerate(("new", "resume")):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), mode, config.model_dump_json()])
        done = _wait_for_round(out, attempt + 1, process)
        time.sleep(dice.uniform(0, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
        assert done >= attempt + 1
    resumed = simulate(out=out, resume=True)
    assert resumed.model.digest() == straight.model.digest()
    assert what_counts(out) == what_counts(tmp_path / "straight")
    assert [line["round"] for line in resumed.metrics if line["kind"] == "round"] == [1, 2, 3, 4]


def _wait_for_round(out, wanted: int, process: subprocess.Popen) -> int:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if (out / "checkpoints").is_dir() and (rounds := RunFolder(out).rounds()) and rounds[-1] >= wanted:
            return rounds[-1]
        time.sleep(0.02)
    return RunFolder(out).rounds()[-1]


@pytest.mark.process
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_a_resumable_folder_and_its_exit_code(how, tiny_folder, tmp_path):
    out = tmp_path / "run"
    config = tiny_config(tiny_folder, out, **SECTIONS)
    settings = [part for key, value in config.flat().items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "corolla", "simulate", *settings, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    _wait_for_round(out, 1, process)
    process.send_signal(how)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "--resume" in printed
    straight = simulate(tiny_config(tiny_folder, tmp_path / "straight", **SECTIONS))
    assert simulate(out=out, resume=True).model.digest() == straight.model.digest()


AT = """
import os, signal, sys
from corolla import simulate
from corolla.server import folder, strategy
from corolla.server.config import Config
module, name, count = {"aggregation": (strategy, "advance", 2), "checkpoint": (folder, "save_file", 3)}[sys.argv[3]]
real, left = getattr(module, name), [count]

def dying(*arguments):
    left[0] -= 1
    if left[0]:
        return real(*arguments)
    if name == "save_file":
        arguments[1].write_bytes(b"half a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, name, dying)
simulate(Config.model_validate_json(sys.argv[2]), out=sys.argv[1])
"""


@pytest.mark.process
@pytest.mark.parametrize(("where", "done"), [("aggregation", 1), ("checkpoint", 2)])
def test_a_server_killed_in_the_middle_of_a_step_goes_on_before_it(where, done, tiny_folder, tmp_path):
    sections = {**SECTIONS, "run": {**SECTIONS["run"], "rounds": 3}}
    straight = simulate(tiny_config(tiny_folder, tmp_path / "straight", **sections))
    out = tmp_path / "killed"
    config = tiny_config(tiny_folder, out, **sections).model_dump_json()
    ended = subprocess.run([sys.executable, "-c", AT, str(out), config, where], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert RunFolder.open(out).rounds() == list(range(1, done + 1))
    resumed = simulate(out=out, resume=True)
    assert resumed.model.digest() == straight.model.digest()
    assert what_counts(out) == what_counts(tmp_path / "straight")
