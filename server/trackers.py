"""The run's numbers in TensorBoard, Weights & Biases, MLflow and so on, through accelerate's trackers."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corolla.server.config import Config
    from corolla.server.folder import RunFolder

TRACKERS: Mapping[str, str] = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""accelerate's name of a tracker -> the package that it needs."""

PROJECT = "corolla"

FOLDER = "trackers"
"""Where in the run's folder a tracker writes that writes files."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {"tensorboard": {"purge_step": 0}}
"""What a tracker is opened with. A resumed run gives every line again, and TensorBoard shall show it once."""

Log = Callable[[Mapping[str, Any]], None]
"""Takes a line of metrics.jsonl."""

log = logging.getLogger("flwr")


def parse_names(value: Any) -> Any:
    """One name, or a list of them as JSON in a string: Flower's run config holds scalars only."""
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else [value] if value else []
    return tuple(value) if isinstance(value, list) else value


@contextlib.contextmanager
def tracking(config: "Config", folder: "RunFolder") -> Iterator[Log]:
    """Gives every line to the trackers of run.trackers, the lines that are in the folder already first.

    The step is the round. A tracker that fails on a line is logged and the run goes on. Raises ImportError for a
    tracker whose package is not there.
    """
    trackers: list[Any] = []
    try:
        for name in config.run.trackers:
            trackers.append(_open(name, config, folder))
        track: Log = lambda line: _log_all(trackers, line)  # noqa: E731
        for line in folder.lines() if trackers else ():
            track(line)
        yield track
    finally:
        for tracker in trackers:
            with _accelerate_state():
                tracker.finish()


def _open(name: str, config: "Config", folder: "RunFolder") -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise ImportError(
            f"run.trackers = {name!r} needs its package, got none installed: pip install {TRACKERS[name]}"
        )
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = (str(folder.path / FOLDER),) if kind.requires_logging_directory else ()
    with _accelerate_state():
        tracker = kind(PROJECT, *place, **OPTIONS.get(name, {}))
        tracker.start()
        tracker.store_init_configuration(config.flat())
    return tracker


@contextlib.contextmanager
def _accelerate_state() -> Iterator[None]:
    """accelerate's trackers need its process-wide state, which clients in this process must find as they left it."""
    from accelerate.state import PartialState

    before = dict(PartialState._shared_state)
    PartialState(cpu=True)
    try:
        yield
    finally:
        PartialState._shared_state.clear()
        PartialState._shared_state.update(before)


def _log_all(trackers: list[Any], line: Mapping[str, Any]) -> None:
    found = numbers_of(line) if trackers else {}
    for tracker in trackers:
        try:
            with _accelerate_state():
                tracker.log(found, step=line["round"])
        except Exception as error:  # a tracker's server that is away must not end a run of days
            log.warning("%s did not take the %s of round %d: %s", tracker.name, line["kind"], line["round"], error)


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's numbers by name: train/<client>/…, round/…, noise/<method>/…, evaluation/<client, mean or server>/…"""
    if line["kind"] == "evaluation":
        parts = {"mean": line["mean"], "server": line.get("server", {}), **line["clients"]}
        return {f"evaluation/{name}": value for name, value in _flatten(parts).items()}
    own = {name: line.get(name) for name in ("successful", "seconds", "received_loss")}
    counts = {name: len(line.get(name) or ()) for name in ("clients", "quarantined", "refused")}
    methods = (line.get("noise") or {}).get("methods") or {}
    noise = {method: {n: v for n, v in figures.items() if _is_number(v)} for method, figures in methods.items()}
    return _flatten({"train": line["clients"], "round": {**own, **counts, **line["update"]}, "noise": noise})


def _flatten(values: Mapping[str, Any]) -> dict[str, float]:
    """a/b/c -> number; what is no number is left out, true is 1."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": inner for key, inner in _flatten(value).items()}
        elif _is_number(value):
            found[name] = float(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
