"""A federation on one machine, from a configuration to a result."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from corolla.aggregation import AdapterState, GlobalModel, whole
from corolla.client.answers import CLIENTS
from corolla.client.app import app as client_app
from corolla.client.config import AUTO, client_name
from corolla.client.local import Client
from corolla.client.open import open_client
from corolla.client.process import use_threads
from corolla.server.config import Config
from corolla.server.folder import RunFolder
from corolla.server.run import prepare_folder, run_server
from corolla.simulations.alone import Comparison, compare, compared
from corolla.simulations.grid import InProcessGrid

log = logging.getLogger(__name__)

DEMO_CONFIG = Path(__file__).parent / "demo.toml"
"""The default run."""

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Run:
    """A run as its folder has it: while it goes on, after it ended, or read again later."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        return RunFolder.open(self.folder).config()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: rounds and evaluations, in order."""
        return RunFolder.open(self.folder).lines()

    @property
    def model(self) -> GlobalModel:
        """The global model after the last round."""
        return RunFolder.open(self.folder).load().model

    @property
    def adapter(self) -> AdapterState:
        """All that the run adds to the base, module by module: ΔW = B @ A."""
        return whole(self.model)

    @property
    def comparison(self) -> Comparison | None:
        """Base, clients alone and global by group, where the run made it (run.alone)."""
        path = self.folder / COMPARISON
        return Comparison(json.loads(path.read_text()), compared(self.metrics)) if path.is_file() else None


@dataclass(frozen=True)
class Watch:
    """What a simulation tells while it runs: each message that was answered, each step of the comparison, and each
    line of metrics.jsonl."""

    on_step: Callable[[str], None] = lambda what: None
    on_line: Callable[[Mapping[str, Any]], None] = lambda line: None


def simulate(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch = Watch(),
) -> Run:
    """Runs a federation on this machine and returns it.

    `config` is a Config, a TOML file, nested tables, or None for the demo; `overrides` are `section.name=value`.
    With `resume`, `out` names a run that goes on where it stopped, with its own configuration and these overrides
    of [run] (more rounds, say). Raises ConfigError, FileExistsError for a folder with a run in it, and RuntimeError
    where no round succeeded.
    """
    settings = list(overrides) + ([f"run.out={json.dumps(str(out))}"] if out else [])
    if resume:
        path = Path(out or load_config(config, ()).run.out)
        loaded = _with(RunFolder.open(path).config(), settings)
    else:
        loaded = load_config(config, settings)
    folder = prepare_folder(loaded, resume, overwrite)
    if loaded.run.backend == "ray":
        _run_on_ray(loaded, folder, watch)
    else:
        use_threads(loaded.run.threads)
        grid = InProcessGrid(client_app, nodes(loaded), loaded.flat(), watch.on_step)
        run_server(grid, loaded, folder, watch.on_line)
    if loaded.run.alone:
        use_threads(loaded.run.threads)
        comparison = compare(folder, clients_of(loaded, _planned(loaded, folder)), watch.on_step)
        folder.write_json(COMPARISON, comparison.columns)
    return Run(folder.path)


def load_config(config: Config | str | Path | Mapping[str, Any] | None, overrides: Iterable[str]) -> Config:
    """A Config from any of what `simulate` takes."""
    if isinstance(config, Config):
        return _with(config, overrides)
    if isinstance(config, Mapping):
        return _with(Config.build(config), overrides)
    return Config.load(DEMO_CONFIG if config is None else Path(config), overrides)


def _with(config: Config, overrides: Iterable[str]) -> Config:
    return Config.from_flat(config.flat() | Config.parse(overrides))


def nodes(config: Config) -> list[dict[str, Any]]:
    """The node configuration of every simulated client."""
    common = {"num-partitions": config.clients.count, "state": str(Path(config.run.out) / CLIENTS)}
    return [{"partition-id": k, **common} for k in range(config.clients.count)]


def _planned(config: Config, folder: RunFolder) -> dict[str, int]:
    """The rank that each client of the run planned, none where they were given."""
    if config.clients.ranks != AUTO:
        return {}
    rounds = [line["clients"] for line in folder.lines() if line["kind"] == "round"]
    return {client: facts["rank"] for clients in rounds for client, facts in clients.items()}


def clients_of(config: Config, ranks: Mapping[str, int] = {}) -> dict[str, Client]:
    """Every client of a simulation, open in this process, by name; they keep nothing from round to round.

    `ranks` are those of clients that planned them in a run.
    """
    forgets = {"adapter.personal_rank": "", "train.keep_optimizer": False}
    settings = Config.from_flat(config.flat() | forgets).settings()
    named = [(client_name(int(node["partition-id"])), node) for node in nodes(config)]
    clients = [open_client(settings, node | ({"rank": ranks[n]} if n in ranks else {})) for n, node in named]
    return {client.client_id: client for client in clients}


def _run_on_ray(config: Config, folder: RunFolder, watch: Watch) -> None:
    """The same two apps on Flower's Ray engine, through a SuperLink of our own. Raises EngineError."""
    from corolla.simulations.superlink import Fleet, run_on_superlink  # Ray is an extra

    config = Config.from_flat(config.flat() | {"run.out": str(folder.path.resolve())})
    environment = {"COROLLA_RUN_FOLDER": str(folder.path.resolve())}
    environment |= {k: v for k, v in os.environ.items() if k.startswith(("HF_", "XDG_CACHE_HOME"))}
    fleet = Fleet(config.clients.count, config.run.ray_cpus, config.run.ray_gpus)
    apps = ("corolla.server.app:app", "corolla.client.app:app")
    run_on_superlink(*apps, config.flat(), fleet, environment=environment, on_line=log.info)
    for line in folder.lines():
        watch.on_line(line)
    if folder.rounds()[-1:] != [config.run.rounds]:
        raise RuntimeError(f"the run on Ray must end after round {config.run.rounds}, got rounds {folder.rounds()}")
