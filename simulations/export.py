"""A run's checkpoint for the world: opened, and exported."""

from dataclasses import dataclass
from pathlib import Path

from corolla.adapters import Base, export_adapter, export_merged, head_modules, is_lora, on_weights
from corolla.aggregation import (
    AdapterState,
    Budget,
    adapter_norm,
    compress_adapter,
    is_low_rank,
    ranks,
    whole,
    without,
    without_empty,
)
from corolla.client.config import head_of
from corolla.client.process import use_threads
from corolla.server.config import Config
from corolla.server.folder import RunFolder


@dataclass(frozen=True)
class ExportReport:
    """`cut_error`: ‖cut‖ / ‖update‖ of what --rank or --energy took away; `logits_error`: relative, on reloading."""

    rank: int
    cut_error: float
    logits_error: float


def export_checkpoint(
    run: Path,
    out: Path,
    merged: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    round_number: int | None = None,
) -> ExportReport:
    """Writes the global model of a run to `out`, as a PEFT folder or as a full float32 checkpoint, and proves it.

    `rank` cuts every module to that rank, `energy` keeps that part of its squared singular values. Raises
    FileExistsError for a folder that is not empty, ValueError for an energy outside (0, 1].
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out must be a new folder, got {out} with files in it")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"--energy must be in (0, 1], got {energy}: 0.99 keeps 99 % of the squared norm")
    config, base, adapter = open_checkpoint(run, round_number)
    if config.aggregation.method == "full" and (not merged or rank or energy):
        raise ValueError(
            f"full fine-tuning makes no adapter, got a run of method 'full' in {run}: use --merged, without a cut"
        )
    heads = head_modules(base.model, base.head)
    if not is_lora(config.adapter.kind) and not is_low_rank(without(adapter, heads)) and (not merged or rank or energy):
        raise ValueError(
            f"an adapter of kind {config.adapter.kind!r} is no LoRA, got one in {run}: use --merged, without a cut"
        )
    budget = Budget(rank, (1 - energy) ** 0.5 if energy is not None else 0.0)
    small, lost = compress_adapter(adapter, budget)
    small = without_empty(small)
    error = (export_merged if merged else export_adapter)(base, small, out)
    return ExportReport(max(ranks(small).values()), lost / adapter_norm(adapter), error)


def open_checkpoint(run: Path, round_number: int | None) -> tuple[Config, Base, AdapterState]:
    """A run's configuration, its base, and all that the run adds to it by a round (None: the last)."""
    folder = RunFolder.open(run)
    config = folder.config()
    use_threads(config.run.threads)
    checkpoint = folder.load(round_number)
    base = config.model.open(head_of(config.train, config.data))
    if base.hash != checkpoint.model.base_hash:
        raise ValueError(
            f"the run was made on the base {checkpoint.model.base_hash}, got {base.hash} from {config.model.name}"
        )
    return config, base, on_weights(base.model, config.spec(), without_empty(whole(checkpoint.model)))
