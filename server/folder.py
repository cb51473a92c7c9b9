"""A run's folder: its configuration, one line a round, checkpoints that a kill cannot harm, and the adapter."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from flwr.common.logger import log
from safetensors.torch import load_file, save_file

from corolla.aggregation import AdapterState, Delta, GlobalModel, delta_of, low_rank
from corolla.server.config import Config

CONFIG, METRICS, RUN, LOCK = "config.toml", "metrics.jsonl", "run.json", ".lock"

LOCK_SECONDS = 120.0
"""How long a run waits for another process to leave its folder: one that lost its SuperLink takes a while to end."""


@dataclass(frozen=True)
class Checkpoint:
    """The global model after `round` rounds (failed ones counted), and that round's line of metrics.jsonl."""

    model: GlobalModel
    round: int
    line: Mapping[str, Any]


class RunFolder:
    """`path` as a run's folder. Made by `create` or found by `open`; every file is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Config, facts: Mapping[str, Any], overwrite: bool = False) -> "RunFolder":
        """A new folder with the resolved configuration and the facts of the run (versions, commit, devices).

        Raises FileExistsError where a run is there already, unless `overwrite` takes it away, and RuntimeError where
        that one is at work.
        """
        folder = cls(path)
        folder._require_free(overwrite)
        path.mkdir(parents=True, exist_ok=True)
        with folder.alone():
            folder._require_free(overwrite)
            if (path / CONFIG).exists():  # else what is there is not a run's, and not ours to take away
                for old in ("checkpoints", "adapter", "replies", "trackers", "clients"):
                    shutil.rmtree(path / old, ignore_errors=True)
                for name in (METRICS, RUN, CONFIG, "best.json"):
                    (path / name).unlink(missing_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
            folder.write_json(RUN, facts)
            folder.write_config(config)
        return folder

    def _require_free(self, overwrite: bool) -> None:
        if (self.path / CONFIG).exists() and not overwrite:
            raise FileExistsError(
                f"run.out must be a new folder, got {self.path} with a run in it: use --resume or --overwrite"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that exists. Raises FileNotFoundError where there is none."""
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(f"a run's folder holds {CONFIG}, got {path} without it")
        return cls(path)

    @contextmanager
    def alone(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """While this lasts no other process writes here: two would mix their rounds.

        The lock goes with its process, however that ends. Raises RuntimeError where another holds it that long.
        """
        with (self.path / LOCK).open("w") as file:
            until = time.monotonic() + seconds
            waiting = False
            while not _locked(file.fileno()):
                if time.monotonic() >= until:
                    raise RuntimeError(
                        f"a run's folder is for one process at a time, got {self.path} with another at work in it: "
                        "corolla stop ends it, or give this run another run.out"
                    )
                if not waiting:
                    log(30, "%s: waiting for another process to leave the run's folder", self.path)
                    waiting = True
                time.sleep(0.2)
            yield

    def config(self) -> Config:
        """The configuration that the run was started with."""
        return Config.load(self.path / CONFIG)

    def run_id(self) -> str:
        """The run's own name, the same after it was resumed; "" in folders made before runs had one."""
        return str((self.read_json(RUN) or {}).get("id", ""))

    def write_config(self, config: Config) -> None:
        """Replaces the configuration; the tables leave out what is not set."""
        nested = config.model_dump(exclude_none=True)
        self._write(
            CONFIG, tomli_w.dumps({s: {k: _plain(v) for k, v in f.items()} for s, f in nested.items()}).encode()
        )

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """A JSON file, replaced at once."""
        self.write_text(name, json.dumps(values, indent=2))

    def write_text(self, name: str, text: str) -> None:
        """A text file, replaced at once."""
        self._write(name, text.encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, None where it did not."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.tmp"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def append(self, line: Mapping[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl; a last line that a kill cut off is left out."""
        if not (self.path / METRICS).is_file():
            return []
        text = (self.path / METRICS).read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint beside its place and moves it there, then the round's line."""
        folder = self._checkpoint(checkpoint.round)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        model = checkpoint.model
        save_file({k: v.contiguous() for k, v in model.tensors().items()}, temporary / "model.safetensors")
        state = {"round": checkpoint.round, "successful_rounds": model.round, "base_hash": model.base_hash}
        state |= {"digest": model.digest(), "line": dict(checkpoint.line)}
        (temporary / "state.json").write_text(json.dumps(state))
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        temporary.replace(folder)
        _sync(folder.parent)
        self.append(checkpoint.line)

    def _checkpoint(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_number:05}"

    def rounds(self) -> list[int]:
        """The rounds with a checkpoint, in order."""
        return sorted(int(p.name.removeprefix("round-")) for p in (self.path / "checkpoints").glob("round-*"))

    def load(self, round_number: int | None = None) -> Checkpoint:
        """The checkpoint of a round (None: the last). Raises FileNotFoundError where there is none, ValueError for
        one whose bytes are not those that were saved."""
        rounds = self.rounds()
        if not rounds or (round_number is not None and round_number not in rounds):
            raise FileNotFoundError(
                f"{self.path} has checkpoints of rounds {rounds}, got a request for {round_number or 'the last'}"
            )
        folder = self._checkpoint(round_number or rounds[-1])
        state = json.loads((folder / "state.json").read_text())
        model = _model_from(load_file(folder / "model.safetensors"), state)
        if model.digest() != state["digest"]:
            raise ValueError(
                f"{folder} must have the digest {state['digest']}, it was changed: resume from another round"
            )
        return Checkpoint(model, state["round"], state["line"])

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Cuts metrics.jsonl back to a checkpoint (None: to before round one); a resumed run writes the rest again."""
        done = checkpoint.round if checkpoint else 0
        kept = [line for line in self.lines() if line["round"] <= done]
        if checkpoint and not any(line["kind"] == "round" and line["round"] == done for line in kept):
            kept.append(dict(checkpoint.line))
        self._write(METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def prune(self, keep: int, scores: Mapping[int, float]) -> None:
        """Removes all checkpoints but the last `keep` and the one of the lowest score, and notes which that is."""
        rounds = self.rounds()
        best = min((r for r in rounds if r in scores), key=lambda r: (scores[r], r), default=None)
        if best is not None:
            self.write_json("best.json", {"round": best, "loss": scores[best]})
        for round_number in rounds[:-keep]:
            if round_number != best:
                shutil.rmtree(self._checkpoint(round_number))

    def save_replies(self, round_number: int, replies: Mapping[str, AdapterState]) -> None:
        """Keeps the accepted adapters of a round, a safetensors file a client."""
        folder = self.path / "replies" / f"round-{round_number:05}"
        folder.mkdir(parents=True, exist_ok=True)
        for client, adapter in replies.items():
            save_file(
                {k: v.contiguous() for k, v in GlobalModel(merged=adapter).tensors().items()},
                folder / f"{client}.safetensors",
            )

    def load_replies(self, round_number: int) -> dict[str, AdapterState]:
        """Client -> the adapter it replied in a round, empty where none were kept."""
        files = sorted((self.path / "replies" / f"round-{round_number:05}").glob("*.safetensors"))
        return {file.stem: _adapter_from(load_file(file), "merged") for file in files}


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _locked(handle: int) -> bool:
    """Whether the file is locked for this process now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _adapter_from(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, Delta]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        if key.startswith(f"{part}/"):
            module, _, name = key.removeprefix(f"{part}/").rpartition("/")
            modules.setdefault(module, {})[name] = tensors[key]
    return {module: delta_of(module, found) for module, found in modules.items()}


def _model_from(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> GlobalModel:
    own = {key.removeprefix("method/"): value for key, value in tensors.items() if key.startswith("method/")}
    merged, start = (_adapter_from(tensors, part) for part in ("merged", "start"))
    return GlobalModel(merged, low_rank(start), state["successful_rounds"], state["base_hash"], own)
