"""ClientApps are forked from a process that has everything imported, and get one of their own where that is gone."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus

from corolla.client import superexec
from corolla.client.superexec import ForkingExecutor

SPEC = ExecutionSpec(TaskType.CLIENT_APP, "node:9094", "secret", False, "/ca.crt", False, 1, False, 7)

FORKS = """
import os, sys, time
from corolla.client.superexec import fork_for_each

def run(order):
    if order == "raise":
        raise KeyError("of a message's own")
    if order == "exit":
        sys.exit(3)
    os.write(1, f"{order} {os.getpid()} {os.getppid()}\\n".encode())

fork_for_each(sys.stdin, run)
os.write(1, f"parent {os.getpid()}\\n".encode())
time.sleep(0.5)
"""


@pytest.fixture
def started(monkeypatch):
    """The commands of what would have been started."""
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda args, **_: commands.append(args))
    return commands


def test_a_client_app_is_ordered_and_gets_no_interpreter(started):
    orders = io.StringIO()
    assert ForkingExecutor(orders).launch(SPEC).status == LaunchResultStatus.ACCEPTED
    (line,) = orders.getvalue().splitlines()
    order = json.loads(line)
    assert (order["token"], order["root_certificates_path"], order["parent_pid"]) == ("secret", "/ca.crt", 1)
    assert not started


def test_anything_else_is_flowers_own(started):
    orders = io.StringIO()
    ForkingExecutor(orders).launch(replace(SPEC, task_type=TaskType.SERVER_APP))
    assert orders.getvalue() == ""
    assert started[0][0] == "flwr-serverapp"


def test_without_a_process_to_fork_from_each_message_gets_an_interpreter(started, caplog):
    read, write = os.pipe()
    executor = ForkingExecutor(os.fdopen(write, "w"))
    os.close(read)
    for _ in range(2):
        assert executor.launch(SPEC).status == LaunchResultStatus.ACCEPTED
    assert [command[0] for command in started] == ["flwr-clientapp"] * 2
    assert "an interpreter of its own" in caplog.text


def test_where_no_process_can_be_made_the_next_try_waits(monkeypatch, caplog):
    found = iter([BlockingIOError(11, "Resource temporarily unavailable"), 4711])

    def fork():
        if isinstance(answer := next(found), OSError):
            raise answer
        return answer

    monkeypatch.setattr(superexec, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    superexec.fork_for_each(['"one"'], None)
    assert next(found, None) is None
    assert "a process for a message cannot be made now" in caplog.text


WAITING = """
import ctypes, os
from corolla.client import superexec
dumpable = lambda: ctypes.CDLL(None).prctl(3)
superexec.fork_for_each = lambda orders, run: print("waiting", dumpable())
superexec._wait_and_fork(os.pipe()[0])
import flwr.supernode.runtime.run_clientapp as flower
flower.run_clientapp = lambda **arguments: print("running", dumpable(), arguments["token"])
superexec.run_client_app({"runtime_api_address": "n:1", "token": "secret", "insecure": True, "parent_pid": 1,
    "root_certificates_path": None, "runtime_dependency_install": False, "suppress_output": False})
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such setting")
def test_the_waiting_process_cannot_be_read_and_a_messages_can_as_flowers():
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["waiting 0", "running 1 secret"], done.stderr


EXECUTORS = """
import importlib
cli = importlib.import_module("flwr.supercore.cli.flower_superexec")
from flwr.supercore.constant import ExecutorType
from flwr.supercore.superexec import run_superexec
from corolla.client import superexec

def shown():
    print(type(run_superexec.get_executor(ExecutorType.SUBPROCESS)).__name__)
    try:
        run_superexec.get_executor(ExecutorType.KUBERNETES)
    except ValueError as error:
        print(error)

cli.flower_superexec = shown
superexec.main()
"""


@pytest.mark.process
def test_superexec_forks_where_it_is_to_start_processes_and_only_there():
    done = subprocess.run([sys.executable, "-c", EXECUTORS], capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert said[0] == "ForkingExecutor", done.stderr
    assert "Kubernetes executor requires" in said[1]


@pytest.mark.process
def test_every_message_has_a_process_and_none_takes_others_with_it():
    lines = "".join(json.dumps(order) + "\n" for order in ("first", "raise", "exit", "second"))
    done = subprocess.run([sys.executable, "-c", FORKS], input=lines, capture_output=True, text=True)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said.keys() == {"first", "second", "parent"}, done.stderr
    (first, above), (second, also) = said["first"].split(), said["second"].split()
    assert len({first, second, said["parent"]}) == 3
    assert {above, also} == {said["parent"]}
    assert "of a message's own" in done.stderr
