import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from corolla.client import frames, worker
from corolla.client.answers import ANSWERS
from corolla.client.forward import NoWorker, WorkerFailed, forward
from corolla.client.secure import stages


def content(sizes):
    arrays = {f"m{i}/A": Array("float32", (n,), "corolla.factor.v1", os.urandom(4 * n)) for i, n in enumerate(sizes)}
    return RecordDict(
        {
            "adapter": ArrayRecord(arrays),
            "order": ConfigRecord({"round": 3, "name": "x", "on": True, "blob": b"\0\1", "list": [1, 2]}),
            "metrics": MetricRecord({"loss": 0.5, "count": 7}),
        }
    )


def same(left, right):
    return left == right and all(
        left.array_records[name][key].data == record[key].data
        for name, record in right.array_records.items()
        for key in record
    )


@given(st.lists(st.sampled_from([0, 1, 5, 2**18, 2**18 + 1, 600_000]), max_size=4))
def test_frames_carry_every_record_back(sizes):
    records = content(sizes)
    sent = list(frames.to_frames(records))
    assert max(map(len, sent[1:]), default=0) <= frames.PIECE
    assert all(sent[1:])
    assert same(frames.from_frames(sent), records)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_stream_that_ends_early_or_late_is_an_error(cut):
    sent = list(frames.to_frames(content([2**18, 2**18])))
    with pytest.raises(ValueError, match="before the stream ended"):
        frames.from_frames(sent[:-cut] if cut < len(sent) else sent[:1])
    with pytest.raises(ValueError, match="got more"):
        frames.from_frames([*sent, b"more"])


@pytest.fixture
def socket():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "own" / "worker.sock"


@pytest.fixture
def answers(monkeypatch):
    """A worker whose answers are known: what came back, doubled, and a note in the node's state."""

    def train(records, node):
        if node.config.get("fail"):
            raise ValueError("the data file is gone")
        if node.config.get("die"):
            os._exit(9)
        node.state.config_records["seen"] = ConfigRecord({"rank": node.config["rank"]})
        return RecordDict({"adapter": records.array_records["adapter"], "echo": ConfigRecord({"n": 1})})

    monkeypatch.setitem(ANSWERS, "train", train)


def node(**config):
    return Context(1, 2, {"rank": 4, **config}, RecordDict(), {})


def test_a_request_goes_to_the_worker_and_its_state_comes_back(socket, answers):
    server = worker.serve(socket)
    try:
        records, context = content([2**20, 3]), node()
        adapter = records["adapter"].copy()
        reply = forward("train", records, context, str(socket))
        assert same(RecordDict({"adapter": reply["adapter"]}), RecordDict({"adapter": adapter}))
        assert not records  # what was sent is the worker's, and held there alone
        assert context.state.config_records["seen"] == {"rank": 4}
        assert list(context.state) == ["seen"]
        forward("train", reply, context, str(socket))
        assert list(context.state) == ["seen"]
    finally:
        server.stop(0).wait()


def test_a_message_and_a_reply_without_records_leave_the_nodes_state_as_it_is(socket):
    """The end of a secure round that failed is such a message: what a node remembers must not go with its secrets."""
    server = worker.serve(socket)
    try:
        context = node()
        for name in (stages.OPENED, stages.SESSION):
            context.state.config_records[name] = ConfigRecord({"run": "a", "round": 3})
        assert forward("secure_end", RecordDict(), context, str(socket)) == RecordDict()
        assert {name: dict(record) for name, record in context.state.items()} == {
            stages.OPENED: {"run": "a", "round": 3}
        }
    finally:
        server.stop(0).wait()


def test_frames_without_an_outline_are_an_error():
    for sent in ([], [b""], [b"\x0a\x00"]):
        with pytest.raises(ValueError, match="begin with an outline"):
            frames.from_frames(sent)


def test_only_its_user_can_reach_a_worker(socket, answers):
    server = worker.serve(socket)
    try:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        with pytest.raises(FileExistsError, match="another worker listens"):
            worker.serve(socket)
    finally:
        server.stop(0).wait()


def test_a_folder_that_others_can_write_to_is_refused(socket):
    socket.parent.mkdir()
    socket.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="chmod 700"):
        worker.serve(socket)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most 100 bytes"):
        worker.serve(tmp_path / ("x" * 120) / "worker.sock")


def test_what_a_request_runs_into_is_its_answer_and_the_worker_goes_on(socket, answers):
    server = worker.serve(socket)
    try:
        with pytest.raises(WorkerFailed, match="ValueError: the data file is gone"):
            forward("train", content([1]), node(fail=True), str(socket))
        assert forward("train", content([1]), node(), str(socket))
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("letter", ["x", "\N{PILE OF POO}"])
def test_a_long_reason_arrives_cut(socket, monkeypatch, letter):
    def fail(records, node):
        raise ValueError("the reason " + letter * 20_000)

    monkeypatch.setitem(ANSWERS, "hello", fail)
    server = worker.serve(socket)
    try:
        with pytest.raises(WorkerFailed, match="ValueError: the reason"):
            forward("hello", content([1]), node(), str(socket))
    finally:
        server.stop(0).wait()


def test_a_worker_that_ends_leaves_the_socket_of_the_next_one(socket, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def slow(records, node):
        began.set()
        assert go_on.wait(30)
        return RecordDict()

    monkeypatch.setitem(ANSWERS, "train", slow)
    first = worker.serve(socket)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(forward, "train", RecordDict(), node(), str(socket))
        assert began.wait(30)
        ended = pool.submit(worker.stop, first, socket)
        until = time.monotonic() + 30
        while socket.exists() and time.monotonic() < until:
            time.sleep(0.01)
        second = worker.serve(socket)
        go_on.set()
        assert asked.result(30) == RecordDict()  # what the first one was at
        ended.result(30)
    try:
        assert socket.exists()
        assert forward("secure_end", RecordDict(), node(), str(socket)) == RecordDict()
    finally:
        worker.stop(second, socket)
    assert not socket.exists()


def test_requests_wait_for_each_other(socket, answers):
    server = worker.serve(socket)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: forward("train", content([n]), node(), str(socket)), (1, 2, 3, 4)))
        assert [len(reply.array_records["adapter"]["m0/A"].data) for reply in found] == [4, 8, 12, 16]
    finally:
        server.stop(0).wait()


def test_grpc_does_not_take_the_sockets_name_away(socket):
    """It does so some time after it has stopped, when the next worker may have the name."""
    server = worker.serve(socket)
    assert [path.name for path in socket.parent.iterdir()] == [socket.name]
    server.stop(0).wait()
    del server
    time.sleep(0.5)
    assert socket.exists()


def test_a_request_waits_for_what_comes_first(socket, answers):
    done = []
    server = worker.serve(socket, first=lambda: (time.sleep(0.3), done.append("first")))
    try:
        forward("train", content([1]), node(), str(socket))
        assert done == ["first"]
    finally:
        server.stop(0).wait()


def test_without_a_worker_nothing_is_asked(socket):
    with pytest.raises(NoWorker, match="a worker was needed"):
        forward("train", content([1]), node(), str(socket))


APP = """
import sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from corolla.client.app import app
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
message = Message(RecordDict({"settings": ConfigRecord({"json": sys.argv[2]})}), dst_node_id=1, message_type="query.hello")
context = Context(1, 2, {"worker": sys.argv[1], "name": "here", "rank": 2}, RecordDict(), {})
try:
    reply = app(message, context)
    print(reply.content.config_records["hello"]["client_id"])
except Exception as error:
    print(type(error).__name__, error)
print("torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.process
def test_the_client_app_never_imports_torch_and_a_crash_is_told(socket, tiny_folder, tmp_path):
    from corolla.simulations.simulate import load_config

    settings = load_config(None, [f"model.name={tiny_folder}", 'adapter.target_modules=["q_proj"]']).settings()
    command = [Path(sys.executable).with_name("corolla"), "worker", "--socket", socket]
    ask = [sys.executable, "-c", APP, str(socket), settings.model_dump_json()]

    def said() -> list[str]:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[-2:]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "listens" in process.stdout.readline()
            assert said() == ["here", "False False"]
            asked, event = (json.loads(process.stdout.readline()) for _ in range(2))
            assert asked["corolla"] == "question"
            assert event["what"] == "hello"
            assert event["client"] == "here"
        finally:
            process.kill()
    assert said() == ["here", "True True"]  # by itself, with no worker there
