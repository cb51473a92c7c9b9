"""What really happens: a node is killed, one is late, one joins late, the server or the SuperLink is killed."""

import os
import signal
import time

import pytest

from corolla import simulate
from corolla.client.config import client_name
from corolla.server.folder import RunFolder
from tests.deploy.federation import Federation, as_simulated, begin, done_rounds, write_config

pytestmark = pytest.mark.deploy


def await_rounds(live: Federation, folder: RunFolder, count: int) -> list[dict]:
    """The rounds, once there are so many."""
    live.wait_for(f"round {count}", lambda: len(done_rounds(folder)) >= count)
    return done_rounds(folder)


def received(live: Federation, k: int) -> int:
    """How many train messages node k has received."""
    return live.log(f"node-{k}").count("Receiving: train message")


def await_end(live: Federation) -> str:
    """What the latest run ended as."""
    live.wait_for("the run's end", lambda: live.status().startswith("finished"))
    return live.status()


def test_a_killed_node_costs_its_round_and_a_late_one_joins_the_next(live, tiny_folder):
    folder = begin(live, tiny_folder, "killed", **{"run.rounds": 9, "run.deadline": 150, "run.evaluate": "never"})
    await_rounds(live, folder, 1)
    before = received(live, 2)
    live.wait_for("round 2 at node 2", lambda: received(live, 2) > before)
    live.kill("app-2", "worker-2", "node-2")
    lost = await_rounds(live, folder, 2)[1]
    if client_name(1) not in lost["quarantined"]:  # it had answered just before
        lost = await_rounds(live, folder, 3)[2]
    assert lost["successful"]
    assert set(lost["quarantined"]) == {client_name(1)}
    assert lost["seconds"] < 150
    live.start_client(2, as_simulated(2))
    live.wait_for("node 2 at work again", lambda: client_name(1) in done_rounds(folder)[-1]["clients"]
                  and client_name(1) not in done_rounds(folder)[-1]["quarantined"] and len(done_rounds(folder)) > lost["round"])  # fmt: skip
    joined = done_rounds(folder)[-1]
    assert joined["clients"][client_name(1)]["bytes_down"] == joined["clients"][client_name(0)]["bytes_down"] > 0
    live.corolla("stop", "--federation=prod")


def test_a_reply_after_the_deadline_does_not_count_and_is_named(live, tiny_folder):
    folder = begin(live, tiny_folder, "late", **{"run.rounds": 3, "run.deadline": 25, "run.evaluate": "never"})
    await_rounds(live, folder, 1)
    os.killpg(live.running["app-3"].pid, signal.SIGSTOP)
    try:
        late = await_rounds(live, folder, 2)[1]
        if client_name(2) not in late["quarantined"]:
            late = await_rounds(live, folder, 3)[2]
        assert late["quarantined"] == {client_name(2): "no reply within 25 s"}
        assert late["successful"]
        assert late["seconds"] < 40
    finally:
        os.killpg(live.running["app-3"].pid, signal.SIGCONT)
    assert await_end(live) == "finished:completed"
    assert done_rounds(folder)[late["round"] - 1] == late


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    """The digest of four rounds simulated."""
    folder = tmp_path_factory.mktemp("whole")
    run = simulate(write_config(folder / "run.toml", tiny_folder, **{"run.out": str(folder / "run"), "run.rounds": 4}))
    return RunFolder.open(run.folder).load().model.digest()


def test_a_killed_server_goes_on_from_its_checkpoint_bit_for_bit(live, tiny_folder, uninterrupted):
    folder = begin(live, tiny_folder, "server", **{"run.rounds": 4})
    await_rounds(live, folder, 2)
    for pid in live.children("serverapp", "flwr-serverapp"):
        os.kill(pid, signal.SIGKILL)
    assert await_end(live) == "finished:failed"
    assert len(done_rounds(folder)) < 4
    live.corolla("run", str(live.folder / "server.toml"), "--federation=prod", "--resume", seconds=500)
    assert [line["round"] for line in done_rounds(folder)] == [1, 2, 3, 4]
    assert folder.load().model.digest() == uninterrupted


def test_a_superlink_restarted_with_its_database_ends_the_run(live, tiny_folder, uninterrupted):
    folder = begin(live, tiny_folder, "superlink", **{"run.rounds": 4})
    await_rounds(live, folder, 2)
    live.kill("superlink")
    time.sleep(3)
    live.start("superlink")
    live.await_port("superlink")
    if await_end(live) != "finished:completed":
        live.corolla("run", str(live.folder / "superlink.toml"), "--federation=prod", "--resume", seconds=500)
    assert folder.load().model.digest() == uninterrupted


def test_a_crashed_worker_is_told_and_the_next_round_is_fine(live, tiny_folder):
    folder = begin(live, tiny_folder, "worker", **{"run.rounds": 4, "run.evaluate": "never", "train.local_steps": 60})
    await_rounds(live, folder, 1)
    taken = '"corolla": "question", "what": "train"'
    before = live.log("worker-1").count(taken)
    live.wait_for("round 2 at the worker", lambda: live.log("worker-1").count(taken) > before)
    live.kill("worker-1")
    live.start("worker-1")
    assert await_end(live) == "finished:completed"
    troubles = [line["quarantined"].get(client_name(0), "") for line in done_rounds(folder)]
    assert sum("ended while it was at work" in trouble for trouble in troubles) == 1
    assert troubles[-1] == ""
