"""A SuperLink as its operator sees it: start a run, follow it, ask after runs and nodes. Through Flower's own `flwr`.

Imports the standard library alone: the owner of a simulation's SuperLink, a small process, uses it too.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool

COMMAND_SECONDS, STATUS_SECONDS = 120.0, 30.0


class ControlError(RuntimeError):
    """A command of Flower's that was not answered, or a run that did not complete."""


def command(name: str) -> Path:
    """The path of a command installed beside this interpreter."""
    return Path(sys.executable).parent / name


def ask(*arguments: str) -> dict[str, Any]:
    """The JSON answer of `flwr`. Raises ControlError, with what it printed, where it is none or tells of a failure."""
    words = [str(command("flwr")), *arguments, "--format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        said = answer.get("error-message") or (done.stdout + done.stderr).strip()
        raise ControlError(f"an answer of `flwr {' '.join(arguments[:2])}` was needed, got: {said}")
    return answer


def stage_app(folder: Path, components: Mapping[str, str], run_config: Mapping[str, Scalar]) -> Path:
    """The folder of an app without code or dependencies, written below `folder`.

    It names `serverapp` and `clientapp` of `components`, which every machine has installed: no code travels. Raises
    ValueError for a value that is no scalar.
    """
    app = ["[project]", 'name = "corolla-run"', 'version = "1"', 'license = "Apache-2.0"', "dependencies = []"]
    app += ["[tool.flwr.app]", 'publisher = "corolla"', "[tool.flwr.app.components]"]
    app += [f"{name} = {_toml(value)}" for name, value in components.items()]
    app += ["[tool.flwr.app.config]"]
    app += [f"{_toml(key)} = {_toml(value)}" for key, value in run_config.items()]
    target = folder / "app"
    target.mkdir()
    (target / "pyproject.toml").write_text("\n".join(app) + "\n", encoding="utf-8")
    return target


def _toml(value: Scalar) -> str:
    """The value in TOML. Raises ValueError if it is not a scalar."""
    if isinstance(value, str):  # TOML's basic string is JSON's, but that DEL must be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if type(value) in (int, float):
        return repr(value)
    raise ValueError(f"a string, int, float or bool was needed in the run config, got {value!r} ({type(value)})")


def start_run(app: Path, connection: str, *options: str) -> int:
    """The id of the run that the SuperLink of `connection` (a name in Flower's config.toml) has begun."""
    return int(ask("run", str(app), connection, *options)["run-id"])


def run_status(run_id: int, connection: str) -> tuple[str, str]:
    """Flower's status of a run, such as finished:completed, and its details."""
    run = ask("list", connection, "--run-id", str(run_id))["runs"][0]
    return str(run["status"]), str(run["status-details"])


def list_runs(connection: str) -> list[dict[str, Any]]:
    """The runs that the SuperLink knows, the latest first."""
    return list(ask("list", connection)["runs"])


def stop_run(run_id: int, connection: str) -> None:
    """Asks the SuperLink to stop a run; its checkpoints stay."""
    ask("stop", str(run_id), connection)


def read_log(run_id: int, connection: str) -> list[str]:
    """The lines that the ServerApp of a run has logged so far."""
    words = [str(command("flwr")), "log", str(run_id), connection, "--show"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    return done.stdout.splitlines()


def follow_run(
    run_id: int, connection: str, on_line: Callable[[str], None], alive: Callable[[], bool] = lambda: True
) -> tuple[str, str]:
    """The status and details of a run once it has finished; `on_line` gets each line of its log as it comes.

    Raises ControlError where `alive` says no before that. Flower's own stream exits with 0 for a failed run, hence the
    question after its status.
    """
    seen = 0
    while alive():
        for number, line in enumerate(_stream(run_id, connection)):
            if number >= seen:
                seen = number + 1
                on_line(line)
        status, details = run_status(run_id, connection)
        if status.startswith("finished"):
            return status, details
        time.sleep(1)
    raise ControlError(f"run {run_id} was to be followed to its end, got a SuperLink that ended before")


def _stream(run_id: int, connection: str) -> Iterator[str]:
    """The lines of a run's log from its beginning, until the log ends, or is silent after the run has."""
    words = [str(command("flwr")), "log", str(run_id), connection]
    lines: queue.Queue[str | None] = queue.Queue()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as log:

        def read() -> None:
            for line in log.stdout or ():
                lines.put(line.rstrip("\n"))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=STATUS_SECONDS)
                except queue.Empty:
                    if run_status(run_id, connection)[0].startswith("finished"):
                        return
                    continue
                if line is None:
                    return
                yield line
        finally:
            log.terminate()


def list_nodes(connection: str) -> list[dict[str, Any]]:
    """The SuperNodes that may join: node-id, the name they were let in by, status, and since when they have that.

    Flower's list leaves the names out, so they are kept in its home, by the node's id.
    """
    known = _names()
    found = []
    for node in ask("supernode", "list", connection)["nodes"]:
        if node["status"] not in ("unregistered", "deleted"):
            since = node.get(f"{node['status']}-at") or node["created-at"]
            found.append({**node, "name": known.get(str(node["node-id"]), ""), "since": since})
    return found


def _names_file() -> Path:
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "corolla-nodes.json"


def _names() -> dict[str, str]:
    file = _names_file()
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def add_node(public_key: Path, name: str, connection: str) -> None:
    """Lets the node with this key in. Raises ControlError where the key is in use already."""
    answer = ask("supernode", "register", str(public_key), connection, "--name", name)
    _names_file().write_text(json.dumps({**_names(), str(answer["node-id"]): name}, indent=2))


def remove_node(node_id: int, connection: str) -> None:
    """Revokes a node's key: the SuperLink refuses it from its next call on."""
    ask("supernode", "unregister", str(node_id), connection)
