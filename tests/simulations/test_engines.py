"""The same run in three engines: in this process, on Ray, and by `flwr run`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from corolla import simulate
from corolla.server.folder import RunFolder
from corolla.simulations.superlink import EngineError
from tests.simulations.federation import tiny_config

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def in_process(tiny_folder, tmp_path_factory):
    return simulate(tiny_config(tiny_folder, tmp_path_factory.mktemp("in-process")))


def test_ray_gives_the_same_adapter(in_process, tiny_folder, tmp_path):
    run = simulate(tiny_config(tiny_folder, tmp_path / "run", run={"backend": "ray"}))
    assert run.model.digest() == in_process.model.digest()
    kinds = [(line["kind"], line["round"]) for line in run.metrics]
    assert kinds == [(line["kind"], line["round"]) for line in in_process.metrics]
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_ray_sums_securely_to_the_same_adapter(tiny_folder, tmp_path):
    """The clients' secrets last from message to message in their nodes' memory, in whichever process they are answered."""
    one = simulate(tiny_config(tiny_folder, tmp_path / "one", secure={"sums": True}))
    ray = simulate(tiny_config(tiny_folder, tmp_path / "ray", secure={"sums": True}, run={"backend": "ray"}))
    assert ray.model.digest() == one.model.digest()
    assert [line["successful"] for line in ray.metrics if line["kind"] == "round"] == [True, True]


def test_a_failure_on_ray_is_an_error_here(tiny_folder, tmp_path):
    targets = [["q_proj"], ["v_proj"], ["q_proj"]]  # only the clients know which modules these names find
    clients = {"ranks": 4, "target_modules": targets}
    sections = {"run": {"backend": "ray"}, "aggregation": {"method": "fedit"}, "clients": {"count": 3, **clients}}
    with pytest.raises(EngineError, match="fedit averages clients with the same modules"):
        simulate(tiny_config(tiny_folder, tmp_path / "run", **sections))


def test_flwr_run_gives_the_same_adapter(in_process, tiny_folder, tmp_path):
    """`flwr run . local` against a SuperLink of the test's own, with run-config keys, as the README says."""
    home, out = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    port = _free_port()
    (home / "config.toml").write_text(f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    changes = {k: v for k, v in tiny_config(tiny_folder, out).flat().items() if _demo()[k] != v}
    overrides = " ".join(f"{key}={_toml(value)}" for key, value in changes.items())
    command = [BIN / "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--port", str(port)]
    superlink = subprocess.Popen([*command, "--host", "127.0.0.1"], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port, superlink)
        sizing = "num-supernodes=3 client-resources-num-cpus=1 client-resources-num-gpus=0.0"
        flwr = [
            BIN / "flwr",
            "run",
            str(ROOT),
            "local",
            "--stream",
            "--run-config",
            overrides,
            "--federation-config",
            sizing,
        ]
        done = subprocess.run(flwr, env=environment, capture_output=True, text=True, timeout=280)
        assert (out / "adapter" / "adapter_model.safetensors").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    finally:
        _end(superlink.pid)
    assert RunFolder.open(out).load().model.digest() == in_process.model.digest()


def _demo() -> dict:
    from corolla.simulations.simulate import load_config

    return load_config(None, ()).flat()


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else str(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_port(port: int, process: subprocess.Popen) -> None:
    import time

    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError("the SuperLink did not come up")


def _end(pid: int) -> None:
    """Ends a process and all that came of it."""
    family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=10)
