"""The services of docker/compose.yml as processes on loopback: the very commands, with names and paths translated.

A host name becomes 127.0.0.1 with a port of its own, a mounted path the folder that is mounted there. Every process
is ended by its id; one that a service starts goes with it (they share a process group).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from corolla.client.config import client_name
from corolla.server.folder import RunFolder
from corolla.server.keys import write_keys

DOCKER = Path(__file__).parents[2] / "docker"
PORT = {"superlink": 8000, "proxy": 8443}


SETTINGS = {
    "data.train": "tasks", "data.tasks_train": 8, "data.tasks_held_out": 2, "clients.count": 3,
    "clients.ranks": [2, 4, 8], "train.local_steps": 2, "train.batch_size": 2, "run.rounds": 2, "run.threads": 1,
    "run.deadline": 240, "adapter.target_modules": ["q_proj", "v_proj"], "run.keep_replies": True,
}  # fmt: skip


def write_config(path: Path, model: Path, **changes: object) -> Path:
    """A configuration of the tiny model on generated tasks, as TOML."""
    nested: dict[str, list[str]] = {}
    for key, value in {**SETTINGS, "model.name": str(model), **changes}.items():
        section, name = key.split(".")
        nested.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
    path.write_text("\n".join("\n".join([f"[{s}]", *lines]) for s, lines in nested.items()))
    return path


def as_simulated(k: int) -> dict[str, str]:
    """Node number k under the name that the simulation gives its client."""
    return {f'name="node-{k}"': f'name="{client_name(k - 1)}"'}


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """A federation in `folder` whose services can be started, killed and started again."""

    def __init__(self, folder: Path, model: Path, data: Path, nodes: int = 3) -> None:
        self.folder, self.model = folder, model
        self.secrets = folder / "secrets"
        values = {"COROLLA_SECRETS": self.secrets, "COROLLA_MODEL": model, "COROLLA_DATA": data}
        text = (DOCKER / "compose.yml").read_text()
        text = re.sub(r"\$\{(\w+)(?::[-?][^}]*)?\}", lambda found: str(values.get(found[1], "0")), text)
        self.services = yaml.safe_load(text)["services"]
        self.ports = {name: free_port() for name in self.services if name in PORT or name.startswith("node-")}
        self.nodes = [f"node-{k}" for k in range(1, nodes + 1)]
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        write_keys(self.secrets, self.nodes, ["superlink", "proxy"], f"127.0.0.1:{self.ports['superlink']}")
        self.environment = {
            **os.environ, "FLWR_HOME": str(self.secrets / "operator"), "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "COROLLA_LOG": "json",
            "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def path(self, service: str, inside: str) -> Path:
        """Where a path inside a service's container is here."""
        for volume in self.services[service].get("volumes", []):
            source, target = volume.split(":")[:2]
            if inside == target or inside.startswith(target + "/"):
                if not source.startswith(("/", ".")):
                    source = str(self.folder / source)
                    Path(source).mkdir(exist_ok=True)
                    Path(source).chmod(0o1777)  # as a new volume is: the image's folder, open to every user
                return Path(source.replace("./", f"{DOCKER}/", 1) + inside.removeprefix(target))
        raise KeyError(f"{inside} must be on a volume of {service}")

    def translate(self, service: str, text: str) -> str:
        """A word of the service's command, or its configuration, for loopback. A node declares its worker's paths."""
        if text.startswith("--node-config="):
            service = service.replace("node-", "worker-")
        text = re.sub(
            r"(?<![\w/.-])/(?:secrets|state|runs|run/corolla|model|data|etc/corolla)[\w./-]*",
            lambda found: str(self.path(service, found[0])),
            text,
        )
        for name, port in self.ports.items():
            inside = PORT.get(name, 9094)
            text = re.sub(rf"(?<![\w-]){name}:{inside}", f"127.0.0.1:{port}", text)
            if name == service:
                text = text.replace(f"--port={inside}", f"--port={port}").replace(
                    f"0.0.0.0:{inside}", f"127.0.0.1:{port}"
                )
        return text.replace("--host=0.0.0.0", "--host=127.0.0.1")

    def command(self, service: str) -> list[str]:
        """The service's command for loopback. The operator's words are added by the caller."""
        found = self.services[service]
        if service == "proxy":
            config = self.folder / "nginx.conf"
            text = (DOCKER / "nginx.conf").read_text().replace("/tmp/nginx", f"{self.folder}/nginx")
            config.write_text(self.translate("proxy", text))
            return ["nginx", "-g", "daemon off;", "-c", str(config)]
        return [self.translate(service, word) for word in found["command"]]

    def start(self, *services: str, node_config: Mapping[str, str] = {}, **environment: str) -> None:
        """Starts services; `node_config` replaces parts of a node's configuration."""
        for service in services:
            words = self.command(service)
            for old, new in node_config.items():
                words = [word.replace(old, new) for word in words]
            own = self.services[service].get("environment", {})
            own = {name: own[name] for name in ("HF_HUB_OFFLINE", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL") if name in own}
            log = (self.folder / f"{service}.log").open("ab")
            cwd = self.folder / "runs"
            cwd.mkdir(exist_ok=True)
            self.running[service] = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, start_new_session=True,
                env={**self.environment, **own, **environment},
            )  # fmt: skip

    def kill(self, *services: str, number: int = signal.SIGKILL) -> None:
        """Ends services, with what they started."""
        for service in services:
            process = self.running.pop(service)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.wait(30)

    def await_port(self, service: str, seconds: float = 90) -> None:
        """Waits until the service listens."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.ports[service])) == 0:
                    return
            if (code := self.running[service].poll()) is not None:
                raise RuntimeError(f"{service} ended with {code}: {self.log(service)[-3000:]}")
            time.sleep(0.2)
        raise TimeoutError(f"{service} did not listen: {self.log(service)[-3000:]}")

    def wait_for(self, what: str, found: Callable[[], object], seconds: float = 180) -> None:
        """Waits until `found` is true. Raises TimeoutError with the services' last words."""
        until = time.monotonic() + seconds
        while not found():
            if time.monotonic() > until:
                logs = "\n".join(f"{name}: {self.log(name)[-600:]}" for name in self.running)
                raise TimeoutError(f"{what} was needed within {seconds:g} s, got\n{logs}")
            time.sleep(0.05)

    def children(self, service: str, name: str) -> list[int]:
        """The processes called `name` that a service has started."""
        below = psutil.Process(self.running[service].pid).children(recursive=True)
        return [p.pid for p in below if name == p.name() or any(name in word for word in p.cmdline()[:2])]

    def log(self, service: str) -> str:
        """What a service has printed."""
        path = self.folder / f"{service}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def corolla(self, *words: str, seconds: float = 300, check: bool = True) -> str:
        """What the command line prints for the operator."""
        done = subprocess.run(
            [Path(sys.executable).with_name("corolla"), *words], env=self.environment, capture_output=True, text=True,
            timeout=seconds, cwd=self.folder,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"corolla {words} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def status(self) -> str:
        """What the latest run is, such as finished:completed; empty where the SuperLink has no answer."""
        return next(iter(re.findall(r"run \d+: (\S+)", self.corolla("status", "--federation=prod", check=False))), "")

    def start_server(self) -> None:
        """The SuperLink, its ServerApp's executor and the proxy, with the nodes enrolled."""
        self.start("superlink")
        self.await_port("superlink")
        self.start("serverapp", "proxy")
        self.await_port("proxy")
        self.corolla("nodes", "--federation=prod", "add", *(str(self.secrets / "nodes" / n) for n in self.nodes))

    def start_client(self, k: int, node_config: Mapping[str, str] = {}, worker: bool = True) -> None:
        """Node number k with its app and its worker."""
        if worker:
            self.start(f"worker-{k}")
        self.start(f"node-{k}", node_config=node_config)
        self.await_port(f"node-{k}")
        self.start(f"app-{k}")

    def stop(self) -> None:
        """Ends everything."""
        for service in list(self.running):
            self.kill(service)


@contextmanager
def federation(folder: Path, model: Path, data: Path, nodes: int = 3) -> Iterator[Federation]:
    """A federation that is ended whatever happens."""
    found = Federation(folder, model, data, nodes)
    try:
        yield found
    finally:
        found.stop()


def begin(live: Federation, model: Path, name: str, **changes: object) -> RunFolder:
    """The folder of a run that has begun."""
    config = write_config(live.folder / f"{name}.toml", model, **{"run.out": name, **changes})
    live.corolla("run", str(config), "--federation=prod", "--detach")
    path = live.folder / "runs" / name
    live.wait_for("a run's folder", (path / "config.toml").exists)
    return RunFolder.open(path)


def done_rounds(folder: RunFolder) -> list[dict]:
    """The rounds that are done."""
    return [line for line in folder.lines() if line["kind"] == "round"]
