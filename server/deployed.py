"""A run on a deployed federation, from its operator's side: begun, followed, asked after."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.client.events import read_event
from corolla.server import control
from corolla.server.config import Config

APPS = {"serverapp": "corolla.server.app:app", "clientapp": "corolla.client.app:app"}


def start(config: Path, overrides: Iterable[str], connection: str) -> int:
    """The id of the run that has begun. No code travels: both apps are those that the machines have installed."""
    chosen = Config.load(config, overrides)
    with tempfile.TemporaryDirectory(prefix="corolla-") as folder:
        return control.start_run(control.stage_app(Path(folder), APPS, chosen.flat()), connection)


def follow(run_id: int, connection: str, on_line: Callable[[str], None]) -> None:
    """Gives `on_line` each line of the run's log until it ends. Raises ControlError unless it completes."""
    status, details = control.follow_run(run_id, connection, on_line)
    if status != "finished:completed":
        raise control.ControlError(f"a run that completes was needed, got {status}: {details}")


def find_run(connection: str, run_id: int | None) -> int:
    """The run of that id, or the latest. Raises ControlError where there is none."""
    if run_id is not None:
        return run_id
    if not (runs := control.list_runs(connection)):
        raise control.ControlError("a federation with a run was needed, got one without any: corolla run begins one")
    return int(max(runs, key=lambda run: str(run["pending-at"]))["run-id"])


@dataclass
class ClientStatus:
    """One client in a run's log: `last` is the last round that it took part in, `trouble` the last that it had."""

    rank: int | None = None
    rounds: int = 0
    last: int | None = None
    loss: float | None = None
    trouble: str = ""


@dataclass
class RunStatus:
    """A run as its log tells it."""

    run_id: int
    status: str
    details: str
    round: int = 0
    rounds: int | None = None
    clients: dict[str, ClientStatus] = field(default_factory=dict)


def read_status(connection: str, run_id: int | None = None) -> RunStatus:
    """Where a run (None: the latest) is. Raises ControlError where there is none."""
    chosen = find_run(connection, run_id)
    found = RunStatus(chosen, *control.run_status(chosen, connection))
    for line in control.read_log(chosen, connection):
        if event := read_event(line):
            _take(found, event)
    return found


def _take(found: RunStatus, event: Mapping[str, Any]) -> None:
    if event.get("kind") == "begin":
        found.rounds = event["rounds"]
    if event.get("kind") != "round":
        return
    found.round = number = event["round"]
    troubles = {**event["refused"], **event["quarantined"]}
    for name, facts in event["clients"].items():
        client = found.clients.setdefault(name, ClientStatus())
        client.rank = facts.get("rank", client.rank)
        if name not in event["quarantined"]:  # refused may be another node that claims the name, or this one before
            client.rounds, client.last, client.loss = client.rounds + 1, number, facts.get("train_loss", client.loss)
    for name, reason in troubles.items():
        found.clients.setdefault(name, ClientStatus()).trouble = f"round {number}: {reason}"
