"""A whole federation of real processes, TLS and node authentication on, through the proxy: equal to the simulation."""

import ssl
import time
import urllib.error
import urllib.request

import pytest
import torch

from corolla import simulate
from corolla.client.config import client_name
from corolla.client.events import read_event
from corolla.server.folder import RunFolder
from tests.deploy.federation import Federation, write_config

pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def finished(live: Federation, tiny_folder):
    """The folder of a run that has completed on the federation, and what the operator saw."""
    config = write_config(live.folder / "run.toml", tiny_folder, **{"run.out": "first"})
    said = live.corolla("run", str(config), "--federation=prod", seconds=500)
    return RunFolder.open(live.folder / "runs" / "first"), said


def test_the_result_is_the_simulations(finished, tiny_folder, tmp_path):
    folder, said = finished
    assert "round 2: 3 clients" in said
    assert "has completed" in said
    config = write_config(tmp_path / "run.toml", tiny_folder, **{"run.out": str(tmp_path / "simulated")})
    simulated = simulate(config)
    ours, theirs = folder.load().model, RunFolder.open(simulated.folder).load().model
    assert ours.round == 2
    assert ours.digest() == theirs.digest()
    assert ours.tensors().keys() == theirs.tensors().keys()
    assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in ours.tensors().items())


def test_bytes_up_and_down_are_the_formulas(finished):
    folder, _ = finished
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32)}
    sides = 2 * sum(out + inner for out, inner in shapes.values())
    lines = [line for line in folder.lines() if line["kind"] == "round"]
    ranks = {client_name(0): 2, client_name(1): 4, client_name(2): 8}
    for name, rank in ranks.items():
        assert [line["clients"][name]["bytes_up"] for line in lines] == [4 * rank * sides] * 2
        assert lines[0]["clients"][name]["bytes_down"] == 0
        assert lines[1]["clients"][name]["bytes_down"] <= 4 * sum(ranks.values()) * sides


def test_the_workers_answered_every_message(live, finished):
    for k in (1, 2, 3):
        assert [e["what"] for e in answers(live, k)] == ["hello", "evaluate", "train", "train", "evaluate"]
        assert "opens the base itself" not in live.log(f"app-{k}")


def answers(live: Federation, k: int) -> list[dict]:
    """What the worker of node k answered."""
    events = [event for line in live.log(f"worker-{k}").splitlines() if (event := read_event(line))]
    return [event for event in events if event["kind"] == "answer"]


def test_status_and_nodes_tell_the_operator(live, finished):
    status = live.corolla("status", "--federation=prod")
    assert "finished:completed" in status
    assert "round 2 of 2" in status
    for k, rank in enumerate((2, 4, 8)):
        row = next(line.split() for line in status.splitlines() if client_name(k) in line)
        assert row[1:4] == [str(rank), "2", "2"]
    nodes = live.corolla("nodes", "--federation=prod")
    assert all(f"node-{k}" in nodes for k in (1, 2, 3))
    assert nodes.count("online") == 3


def post(live: Federation, path: str, port: str = "proxy") -> int:
    """The status of a POST to the proxy, or to the SuperLink itself."""
    context = ssl.create_default_context(cafile=str(live.secrets / "ca.crt"))
    request = urllib.request.Request(f"https://127.0.0.1:{live.ports[port]}{path}", data=b"", method="POST")
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


@pytest.mark.parametrize(
    "path",
    ["/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/", "/docs", "/v1/fleet/../control/list-runs",
     "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/%252e%252e/control/list-runs", "/v1/fleet/..%2fcontrol/list-runs",
     "//v1/control/list-runs", "/v1/fleet/get-run/../../control/list-runs", "/V1/Control/list-runs"],
)  # fmt: skip
def test_the_proxy_lets_nodes_reach_the_fleet_api_alone(live, path):
    assert post(live, path) in (403, 404)


def test_the_proxy_passes_the_fleet_api_and_the_superlink_asks_for_a_key(live):
    assert post(live, "/v1/fleet/get-run") in (400, 401, 415, 422)
    assert post(live, "/v1/control/list-runs", "superlink") not in (403, 404)  # what the proxy keeps away from


def test_flwr_run_is_refused_at_the_proxy(live, tmp_path):
    config = live.secrets / "operator" / "config.toml"
    text = config.read_text()
    config.write_text(text + text.split("[superlink.prod]")[1].join(["\n[superlink.outside]", ""]).replace(
        str(live.ports["superlink"]), str(live.ports["proxy"])))  # fmt: skip
    try:
        said = live.corolla("run", str(live.folder / "run.toml"), "--federation=outside", check=False)
    finally:
        config.write_text(text)
    assert "has begun" not in said
    assert "error" in said


def test_a_stranger_and_a_revoked_node_are_refused(live, tmp_path):
    from corolla.server.keys import write_keys

    write_keys(tmp_path / "other", ["node-9"], ["superlink"])
    live.kill("app-3", "node-3", "worker-3")
    stolen = {
        str(live.secrets / "nodes" / "node-3" / "node.key"): str(tmp_path / "other" / "nodes" / "node-9" / "node.key")
    }
    live.start("node-3", node_config=stolen)
    until = time.monotonic() + 60
    while time.monotonic() < until and live.running["node-3"].poll() is None:
        time.sleep(0.5)
    assert live.running.pop("node-3").poll() not in (None, 0)
    live.corolla("nodes", "--federation=prod", "remove", "node-3")
    live.start("node-3")
    while time.monotonic() < until + 60 and live.running["node-3"].poll() is None:
        time.sleep(0.5)
    assert live.running.pop("node-3").poll() not in (None, 0)
