import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.server.control import _toml
from corolla.simulations.superlink import EngineError, Fleet, run_on_superlink

# Two nodes; what they do depends on `task`. A client answers (partition + 1) · factor + TOY_TERM.
TOY = """
import os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    print("the toy client prints", flush=True)
    Path(context.run_config["folder"], f"started-{context.node_config['partition-id']}").touch()
    if context.run_config["task"] == "crash":
        os._exit(1)
    if context.run_config["task"] == "wait":
        time.sleep(600)
    value = (context.node_config["partition-id"] + 1) * context.run_config["adapter.factor"]
    value += float(os.environ["TOY_TERM"])
    return Message(RecordDict({"metrics": MetricRecord({"value": value})}), reply_to=message)

@server.main()
def main(grid, context):
    print("the toy server prints " + context.run_config["note"])
    if context.run_config["task"] == "fail":
        raise ValueError("the toy server gave up")
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    content = RecordDict({"config": ConfigRecord({"round": 1})})
    messages = [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    replies = [reply for reply in grid.send_and_receive(messages) if not reply.has_error()]
    total = sum(reply.content["metrics"]["value"] for reply in replies)
    Path(context.run_config["folder"], "total").write_text(str(total))
    if context.run_config["task"] == "crash":
        time.sleep(600)
"""
NOTE = 'a "quoted" note \\ with [brackets] and ü'


def run_toy(folder: Path, task: str, on_line: Callable[[str], None] = print) -> None:
    """Nothing, once the toy app in `folder` has done its task."""
    run_on_superlink(
        "toy_app:server",
        "toy_app:client",
        {"folder": str(folder), "task": task, "adapter.factor": 2.5, "note": NOTE},
        Fleet(nodes=2),
        environment={"PYTHONPATH": str(folder), "TOY_TERM": "100"},
        on_line=on_line,
    )


def alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a zombie does not."""

    def runs(process: psutil.Process) -> bool:
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if runs(process)]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the toy app."""
    (tmp_path / "toy_app.py").write_text(TOY)
    return tmp_path


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, which must be empty at the end; pytest's own is too long for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert list(Path(name).iterdir()) == []


@pytest.fixture
def descendants(scratch: Path) -> Iterator[set[psutil.Process]]:
    """Every process started below this one, sampled; at the end none may be left."""
    me, seen, over = psutil.Process(), set[psutil.Process](), threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            seen.update(me.children(recursive=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    left = alive(seen)
    over.set()
    watcher.join()
    assert left == []


@pytest.mark.ray
def test_a_run_off_the_main_thread_completes_and_leaves_nothing(toy: Path, descendants: set[psutil.Process]) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor() as pool:
        pool.submit(run_toy, toy, "add", lines.append).result()
    assert (toy / "total").read_text() == "207.5"  # 2.5 + 5.0 + two terms of 100
    assert f"the toy server prints {NOTE}" in lines
    assert any(line.endswith("the toy client prints") for line in lines)
    assert len(descendants) > 5  # else the watcher saw nothing and its check was empty


@pytest.mark.ray
def test_a_failing_serverapp_raises_with_its_reason(toy: Path, descendants: set[psutil.Process]) -> None:
    with pytest.raises(EngineError, match=r"got finished:failed: .*the toy server gave up"):
        run_toy(toy, "fail")


@pytest.mark.ray
def test_a_crashed_client_process_stops_the_run(toy: Path, descendants: set[psutil.Process]) -> None:
    with pytest.raises(EngineError, match="ActorDiedError"):
        run_toy(toy, "crash")  # whose server would go on for ten minutes


@pytest.mark.ray
def test_an_exception_in_the_caller_stops_the_run(toy: Path, descendants: set[psutil.Process]) -> None:
    def interrupt(line: str) -> None:
        if "the toy client prints" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy(toy, "wait", interrupt)


@pytest.mark.ray
@pytest.mark.parametrize("victim", ["caller", "owner"])
def test_nothing_outlives_a_killed_process(victim: str, toy: Path, scratch: Path) -> None:
    run = (
        "import sys; from pathlib import Path; from corolla.simulations.superlink import *; "
        "run_on_superlink('toy_app:server', 'toy_app:client', "
        "{'folder': sys.argv[1], 'task': 'wait', 'adapter.factor': 1.0, 'note': ''}, Fleet(2), "
        "environment={'PYTHONPATH': sys.argv[1]})"
    )
    command = [sys.executable, "-c", run, str(toy)]
    caller = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (toy / "started-0").exists() and caller.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        below = psutil.Process(caller.pid).children(recursive=True)
        assert len(below) > 5
        os.kill(caller.pid if victim == "caller" else psutil.Process(caller.pid).children()[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while alive(set(below)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert alive(set(below)) == []
        assert caller.wait(20) == (-signal.SIGKILL if victim == "caller" else 1)
    finally:
        caller.kill()
        caller.wait()


def test_missing_commands_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EngineError, match=r"flower-superlink.* was needed, got none; install corolla\[ray\]"):
        run_on_superlink("a:app", "b:app", {}, Fleet(1))


@pytest.mark.parametrize("value", [None, [1], {"a": 1}])
def test_a_run_config_holds_scalars_only(value: object, scratch: Path) -> None:
    with pytest.raises(ValueError, match="a string, int, float or bool was needed"):
        run_on_superlink("a:app", "b:app", {"key": value}, Fleet(1))  # type: ignore[dict-item]


@pytest.mark.parametrize("sizes", [{"nodes": 0}, {"nodes": 1, "cpus": 0}, {"nodes": 1, "gpus": float("nan")}])
def test_a_fleet_without_nodes_or_means_is_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a fleet of nodes >= 1"):
        Fleet(**sizes)  # type: ignore[arg-type]


@given(st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans())
def test_toml_reads_back_what_was_written(value: str | int | float | bool) -> None:
    back = tomllib.loads(f"{_toml(str(value))} = {_toml(value)}")
    assert back == {str(value): value}
    assert type(back[str(value)]) is type(value)
