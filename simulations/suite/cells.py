"""One cell of a suite: a run or a reference, done once, resumed where it was cut off, and measured like all others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from corolla.adapters import Base, carrying, on_weights
from corolla.aggregation import AdapterState, adapter_norm, add_adapters, distance, whole, without_empty
from corolla.client.data import ClientData
from corolla.client.local import Client
from corolla.client.process import use_threads
from corolla.client.tasks import find_task
from corolla.server.config import Config, ConfigError
from corolla.server.folder import CONFIG, RunFolder
from corolla.server.run import run_facts
from corolla.simulations.alone import first_model, train_once
from corolla.simulations.simulate import Watch, clients_of, simulate
from corolla.simulations.suite.config import BASE, CENTRALISED, LOCAL_ONLY

DONE, REFUSED, FAILED = "done", "refused", "failed"

NUMBERS = "cell.json"
"""The file of a cell that is done."""


@dataclass(frozen=True)
class Outcome:
    """A cell of the suite: its numbers where it is done, the reason where the method refused or the run failed.

    `numbers`: held_out_loss (nats per answer token) and the task's score (0..1) of the final model on every client's
    held-out examples together; bytes_up and bytes_down of adapters, the mean of a client and round, and bytes_total;
    certificate (relative error of the last round's aggregation); lost (replies that were quarantined, so the run had
    less than its budget); seconds of training and aggregation.
    """

    row: str
    setting: str
    seed: int
    folder: Path
    status: str
    reason: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


def run_cell(row: str, setting: str, seed: int, folder: Path, make: Callable[[], Config], watch: Watch) -> Outcome:
    """The cell's outcome: from its folder where it is done, and run (or gone on with) where it is not.

    ValueError before any training is the method's refusal; any other exception is the run's failure. Raises
    ConfigError for a folder whose run had another configuration.
    """
    trained: list[str] = []

    def on_step(what: str) -> None:
        trained.append(what)
        watch.on_step(what)

    outcome = Outcome(row, setting, seed, folder, DONE)
    try:
        config = make()
    except ConfigError as error:
        return replace(outcome, status=REFUSED, reason=str(error))
    require_same(folder, config)
    try:
        return replace(outcome, numbers=_numbers(row, folder, config, Watch(on_step, watch.on_line)))
    except ValueError as error:
        begun = "train" in trained or bool(RunFolder(folder).rounds())
        return replace(outcome, status=FAILED if begun else REFUSED, reason=f"{error}")
    except Exception as error:  # whatever ends one run must not end the suite; it is named, and the exit code is 1
        return replace(outcome, status=FAILED, reason=f"{type(error).__name__}: {error}")


def require_same(folder: Path, config: Config) -> None:
    """Raises ConfigError where `folder` holds a run of another configuration than `config`."""
    if not (folder / CONFIG).is_file():
        return
    old, new = RunFolder.open(folder).config().flat(), config.flat()
    for key in new:
        if new[key] != old[key] and key != "run.out":
            raise ConfigError(
                f"{folder} must keep its {key} = {old[key]!r}, got {new[key]!r}: use another --out, or delete it"
            )


def _numbers(row: str, folder: Path, config: Config, watch: Watch) -> dict[str, float]:
    """The numbers of a cell, which are written when it is done and only read after that."""
    if (found := RunFolder(folder).read_json(NUMBERS)) is not None:
        return found
    begun = (folder / CONFIG).is_file()
    if row in (BASE, LOCAL_ONLY, CENTRALISED):
        home = RunFolder.open(folder) if begun else RunFolder.create(folder, config, run_facts(config))
        numbers = {BASE: _base, LOCAL_ONLY: _local_only, CENTRALISED: _centralised}[row](home, config, watch)
    else:
        run = simulate(config, resume=begun, watch=watch)
        home = RunFolder.open(run.folder)
        numbers = measure(run.adapter, config) | traffic(run.metrics)
    home.write_json(NUMBERS, numbers)
    return numbers


def held_out(config: Config) -> tuple[Base, list[Any]]:
    """The base, and every client's held-out examples together. Raises ValueError where there are none."""
    clients = clients_of(config)
    examples = [example for client in clients.values() for example in client.data.held_out]
    if not examples:
        raise ValueError("a comparison needs held-out examples, got none: set data.held_out or data.held_out_fraction")
    return next(iter(clients.values())).base, examples


def measure(adapter: AdapterState, config: Config) -> dict[str, float]:
    """Loss and score, of all and by group, of base + adapter on everybody's held-out examples."""
    use_threads(config.run.threads)
    base, examples = held_out(config)
    adapter = on_weights(base.model, config.spec(), without_empty(adapter))
    with carrying(base.model, adapter) as model:
        return find_task(config.train.task).evaluate(model, base, examples, config.data)


def traffic(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes of adapters, the last certificate, lost replies and seconds, from the lines of a run's rounds.

    A client's bytes count where it was sent its order (down) and where its reply was accepted (up); evaluations and
    the base model are not in them.
    """
    rounds = [line for line in lines if line["kind"] == "round"]
    sent = [client for line in rounds for client in line["clients"].values()]
    replied = [client["bytes_up"] for client in sent if "bytes_up" in client]
    up, down = sum(replied), sum(client["bytes_down"] for client in sent)
    proofs = [line["update"]["certificate"] for line in rounds if line["successful"]]
    return {
        "bytes_up": up / max(len(replied), 1),
        "bytes_down": down / max(len(sent), 1),
        "bytes_total": float(up + down),
        "certificate": proofs[-1]["relative_error"],
        "lost": float(sum(len(line["quarantined"]) for line in rounds)),
        "seconds": sum(line["seconds"] for line in rounds),
    }


def _base(home: RunFolder, config: Config, watch: Watch) -> dict[str, float]:
    return measure({}, config)


def _local_only(home: RunFolder, config: Config, watch: Watch) -> dict[str, float]:
    """The mean over the clients, each after one training of its own as long as its part of the run."""
    found = []
    for client_id, client in clients_of(config).items():
        numbers = home.read_json(f"{client_id}.json")
        if numbers is None:
            steps = config.run.rounds * config.train.steps(len(client.rows))
            numbers = measure(train_through(client, steps, watch), config)
            home.write_json(f"{client_id}.json", numbers)
        found.append(numbers)
    return {name: math.fsum(numbers[name] for numbers in found) / len(found) for name in found[0]}


def _centralised(home: RunFolder, config: Config, watch: Watch) -> dict[str, float]:
    """One client of the largest rank with everybody's data, and as many optimizer steps as all clients together."""
    clients = list(clients_of(config).values())
    run = config.run
    part = (run.clients_per_round or math.ceil(run.fraction * len(clients))) / len(clients)
    each = sum(config.train.steps(len(client.rows)) for client in clients)
    data = ClientData(tuple(e for c in clients for e in c.data.train), ())
    rank = max(client.rank for client in clients)
    everybody = replace(clients[0], client_id=CENTRALISED, rank=rank, targets=None, data=data, rows=data.train)
    return measure(train_through(everybody, round(run.rounds * part * each), watch), config)


def train_through(client: Client, steps: int, watch: Watch) -> AdapterState:
    """What one client adds to the base in one training of so many steps, with one schedule and optimizer state."""
    use_threads(client.settings.threads)
    train = client.settings.train.model_copy(update={"local_steps": steps, "local_epochs": None})
    settings = client.settings.model_copy(update={"train": train, "rounds": 1})
    before = first_model(client)
    adapter = add_adapters(before.merged, train_once(replace(client, settings=settings), before, 1))
    watch.on_step("train")
    return adapter


def divergence(folder: Path, exact: Path) -> dict[int, float]:
    """Round -> ‖W − W_exact‖_F / ‖W_exact‖_F of what two runs add to the base, where both kept the checkpoint."""
    one, other = RunFolder(folder), RunFolder(exact)
    found = {}
    for round_number in sorted(set(one.rounds()) & set(other.rounds())):
        ours, theirs = (without_empty(whole(run.load(round_number).model)) for run in (one, other))
        if size := adapter_norm(theirs):  # zero after a first round that failed
            found[round_number] = distance(ours, theirs) / size
    return found
