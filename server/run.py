"""One run on a server, from its configuration to the exported adapter: what the ServerApp does, in every engine."""

import importlib.metadata
import os
import platform
import subprocess
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.common.logger import log
from flwr.serverapp import Grid

from corolla.adapters import (
    KINDS,
    Base,
    FolderFacts,
    base_hash,
    empty_model,
    export_adapter,
    find_base,
    head_modules,
    is_lora,
    measure_parameters,
    on_weights,
    principal_components,
    read_peft_folder,
    weight_shapes,
    write_peft_folder,
)
from corolla.aggregation import (
    AdapterState,
    Budget,
    DenseDelta,
    GlobalModel,
    NoiseOf,
    Shapes,
    compress_adapter,
    is_low_rank,
    low_rank,
    measure_noise,
    whole,
    without,
    without_empty,
)
from corolla.client.config import head_of
from corolla.client.tasks import TASKS
from corolla.server.config import Config, ConfigError
from corolla.server.folder import Checkpoint, RunFolder
from corolla.server.held_out import Judge, open_judge
from corolla.server.record import RoundRecord
from corolla.server.scores import average
from corolla.server.sections import SecureConfig
from corolla.server.secure import SumSettings
from corolla.server.secure_strategy import SecureFederatedLoRA
from corolla.server.strategy import FederatedLoRA, Sampling
from corolla.server.trackers import tracking

Progress = Callable[[Mapping[str, Any]], None]
"""Called with each line as it is written to metrics.jsonl."""


class Recorder:
    """Puts each round and each evaluation into the run's folder as it happens."""

    def __init__(self, folder: RunFolder, config: Config, progress: Progress, judge: Judge | None = None) -> None:
        self.folder, self.config, self.progress, self.judge = folder, config, progress, judge

    def round(self, record: RoundRecord, model: GlobalModel, replies: Mapping[str, AdapterState]) -> None:
        """The round's replies if they are kept, its checkpoint and line; then old checkpoints go."""
        line = {"kind": "round", **asdict(record), "received_loss": record.received_loss}
        if not record.noise:
            del line["noise"]
        if self.config.run.keep_replies:
            self.folder.save_replies(record.round, replies)
        self.folder.save(Checkpoint(model, record.round, line))
        self.folder.prune(self.config.run.keep_checkpoints, scores(self.folder.lines()))
        self.progress(line)

    def evaluation(
        self,
        round_number: int,
        clients: Mapping[str, Mapping[str, float]],
        failed: Mapping[str, str],
        model: GlobalModel,
    ) -> None:
        """The line of an evaluation: every client's numbers, their means by held-out examples, and the server's own."""
        line = {"kind": "evaluation", "round": round_number, "score": TASKS[self.config.train.task].score}
        line |= {"clients": dict(clients), "mean": average(clients), "failed": dict(failed)}
        if self.judge:
            line["server"] = self.judge(model)
        self.folder.append(line)
        self.folder.prune(self.config.run.keep_checkpoints, scores(self.folder.lines()))
        self.progress(line)


def scores(lines: list[dict[str, Any]]) -> dict[int, float]:
    """Round -> probe loss of its outcome, as the next round's clients or an evaluation found it."""
    found = {line["round"] - 1: line["received_loss"] for line in lines if line["kind"] == "round"}
    found |= {line["round"]: line["mean"].get("probe_loss") for line in lines if line["kind"] == "evaluation"}
    return {round_number: loss for round_number, loss in found.items() if loss is not None}


def prepare_folder(config: Config, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """The run's folder: new, or an existing one whose configuration gets this one's number of rounds.

    Raises FileExistsError for a folder with a run in it where neither `resume` nor `overwrite` is said, ConfigError
    for a resumed run whose other settings than those of [run] were changed, and RuntimeError for one that is at work.
    """
    path = Path(config.run.out)
    if not resume:
        return RunFolder.create(path, config, run_facts(config), overwrite)
    folder = RunFolder.open(path)
    with folder.alone():
        if folder.rounds():
            _require_resumable(folder.config(), config)
        folder.write_config(config)
    return folder


def _require_resumable(before: Config, now: Config) -> None:
    """Raises ConfigError where a setting changed that the rounds done so far depend on."""
    old, new = before.flat(), now.flat()
    for key in new:
        kept = {"run.seed", *(("run.fraction",) if before.private() else ())}  # the rounds done spent ε by that
        if new[key] != old[key] and (not key.startswith("run.") or key in kept):
            raise ConfigError(
                f"a resumed run keeps its {key} = {old[key]!r}, got {new[key]!r}: start a new run for that"
            )


def run_server(grid: Grid, config: Config, folder: RunFolder, progress: Progress = lambda line: None) -> Path:
    """Runs (or goes on with) the rounds of `config` over `grid`, and returns the folder of the exported adapter.

    Raises RuntimeError where another process is at work in the folder, or no round succeeded.
    """
    with folder.alone():
        return _run(grid, config, folder, progress)


def _run(grid: Grid, config: Config, folder: RunFolder, progress: Progress) -> Path:
    checkpoint = folder.load() if folder.rounds() else None
    folder.rewind(checkpoint)
    judge = open_judge(config, partial(_base, config))
    with tracking(config, folder) as track:

        def on_line(line: Mapping[str, Any]) -> None:
            track(line)
            progress(line)

        strategy = build_strategy(config, checkpoint, folder, Recorder(folder, config, on_line, judge))
        strategy.run(grid, config.run.rounds)
    if strategy.model and strategy.model.round and config.hosted() and not without_empty(whole(strategy.model)):
        raise RuntimeError(
            f"the clients' replies must change the base, got none that does in {strategy.model.round} rounds: raise "
            "train.learning_rate, or lower adapter.sora_threshold where adapter.kind = 'sora'"
        )
    if strategy.model is None or not strategy.model.round or not without_empty(whole(strategy.model)):
        raise RuntimeError(
            f"no round of {config.run.rounds} succeeded: see the reasons in {folder.path / 'metrics.jsonl'}"
        )
    return export_run(config, whole(strategy.model), folder)


def build_strategy(
    config: Config, checkpoint: Checkpoint | None, folder: RunFolder, recorder: Recorder
) -> FederatedLoRA:
    """The strategy that `config` describes, at `checkpoint` where there is one."""
    run, aggregation = config.run, config.aggregation
    start = read_peft_folder(Path(config.adapter.init_from)) if config.adapter.init_from else {}
    method, download = config.method(), Budget(aggregation.download_rank, aggregation.download_error)
    hosted = config.hosted()
    begin = hosted.start if hosted and hosted.begins else principal_components
    strategy: FederatedLoRA = _strategy(config.secure)(
        method,
        settings=config.settings().model_dump_json(),
        run_id=folder.run_id(),
        seed=run.seed,
        weights=aggregation.weights,
        sampling=Sampling(run.fraction, run.clients_per_round),
        clients=config.clients.count,
        min_replies=run.min_replies,
        deadline=run.deadline,
        largest_message=run.largest_message,
        budget=aggregation.budget(run.rounds),
        download=download,
        noise=_noise(config) if aggregation.noise else None,
        judge=aggregation.judge(),
        privacy=config.private(),
        evaluate=run.evaluate,
        base_hash=_base_hash(config),
        modules=_modules(config),
        kind=KINDS.get(config.adapter.kind),
        drops=config.drops(),
        first_step=config.adapter.sb_step,
        principal=lambda shapes, rank: begin(_base(config).model, shapes, rank),
        model=checkpoint.model if checkpoint else None,
        merged=compress_adapter(start, Budget())[0],
        rounds_done=checkpoint.round if checkpoint else 0,
        evaluated=[line["round"] for line in folder.lines() if line["kind"] == "evaluation"],
        on_round=recorder.round,
        on_evaluation=lambda number, clients, failed: recorder.evaluation(
            number, clients, failed, strategy.model or GlobalModel()
        ),
    )
    return strategy


def _noise(config: Config) -> NoiseOf:
    """What measures a round's noise: that of other kinds than LoRA on the base's weights.

    Raises FileNotFoundError where that needs a base and this machine has none.
    """
    if is_lora(config.adapter.kind):
        download = Budget(config.aggregation.download_rank, config.aggregation.download_error)
        return partial(measure_noise, method=config.method(), init=config.adapter.init, download=download)
    try:
        base = _base(config)
    except (FileNotFoundError, ImportError) as error:
        raise FileNotFoundError(
            f"aggregation.noise needs the base on the server for adapter.kind = {config.adapter.kind!r}, got none "
            f"({error}): fetch it there, or leave aggregation.noise out"
        ) from error
    return partial(measure_parameters, base.model, KINDS[config.adapter.kind], config.spec())


def _strategy(secure: SecureConfig) -> Callable[..., FederatedLoRA]:
    if not secure.sums:
        return FederatedLoRA
    sums = SumSettings(secure.sketch, secure.threshold, secure.bits, secure.clip, secure.deadline)
    return partial(SecureFederatedLoRA, sums=sums)


def _base_hash(config: Config) -> str:
    """The base's identity, from model.hash or from this machine's base; empty (most clients' counts) without both."""
    head = head_of(config.train, config.data)
    try:
        return head.identity(config.model.hash or base_hash(find_base(config.model.name)))
    except FileNotFoundError as error:
        log(30, "the server has no base of its own, so the clients' counts: %s", error)
        return ""


def _modules(config: Config) -> Shapes | None:
    """The modules of this machine's base that can be adapted; None without one."""
    try:
        source, head = find_base(config.model.name), head_of(config.train, config.data)
        return weight_shapes(empty_model(source, head=head, attention="eager"))  # which every architecture has
    except FileNotFoundError:
        return None  # _base_hash has said so


def _base(config: Config) -> Base:
    return config.model.open(head_of(config.train, config.data))


def export_run(config: Config, adapter: AdapterState, folder: RunFolder) -> Path:
    """Writes `adapter/` in the run's folder, proven against the base where this machine has it.

    What is no adapter (full fine-tuning) stays in the checkpoint: `corolla export --merged` makes a model of it.
    """
    target = folder.path / "adapter"
    if config.aggregation.method == "full":
        log(20, "whole weights are no adapter: export the checkpoint with --merged")
        return folder.path
    small: AdapterState = without_empty(compress_adapter(adapter, Budget())[0])
    try:
        base = _base(config)
        small = on_weights(base.model, config.spec(), small)
    except (FileNotFoundError, ImportError) as error:
        if not is_lora(config.adapter.kind):
            log(30, "an adapter of kind %s is not written for want of the base: %s", config.adapter.kind, error)
            return folder.path
        log(30, "the adapter is written without a head and not proven, for want of the base: %s", error)
        factors = {module: delta for module, delta in small.items() if not isinstance(delta, DenseDelta)}
        return write_peft_folder(low_rank(factors), target, FolderFacts(config.model.name))
    if not is_lora(config.adapter.kind) and not is_low_rank(without(small, head_modules(base.model, base.head))):
        log(20, "an adapter of kind %s is no LoRA: export the checkpoint with --merged", config.adapter.kind)
        return folder.path
    log(
        20,
        "adapter exported; its logits differ by %.1e from the running model's",
        export_adapter(base, small, target),
    )
    return target


def run_facts(config: Config) -> dict[str, Any]:
    """What a reader needs to rerun it: versions, commit, machine."""
    packages = ("corolla", "flwr", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
    return {
        "id": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.run.seed,
        "threads": config.run.threads or len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the working copy that the package runs from, None for an installed one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
