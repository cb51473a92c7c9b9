"""Local training with the trainer of the task, on examples chosen and ordered beforehand."""

import contextlib
import math
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback

from corolla.adapters import Base, Penalty
from corolla.client.config import TrainConfig
from corolla.client.tasks import Example, find_task


def train_round(
    model: Any,
    base: Base,
    config: TrainConfig,
    examples: Sequence[Example],
    round_number: int,
    rounds: int,
    seed: int,
    penalty: Penalty | None = None,
    moments: dict[str, Tensor] | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, float]:
    """Trains what takes gradients in `model`, in place, on `examples` in their order.

    One optimizer step per batch_size × accumulation examples; `penalty(model)` is added to its loss. `moments`, where
    given, are what the optimizer remembers, by `<parameter>/<name>`: taken up before, replaced after, in place.
    `callbacks` are told of every step. Returns
    train_loss (mean over the steps, the penalty included), tokens (not padding, the prompt included), seconds, steps
    and peak_memory_mib. Raises RuntimeError where the loss is not finite, ValueError for options that this device or
    model does not have.
    """
    task = find_task(config.task)
    steps = math.ceil(len(examples) / (config.batch_size * config.accumulation))
    began = time.perf_counter()
    cuda = base.device.type == "cuda"
    _require_device(config, cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats(base.device)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for around in (_training_mode(model), _as_it_was(base.model), _checkpointing(base.model, config)):
            stack.enter_context(around)
        trainer = task.trainer(
            model=model,
            args=task.arguments(**(_arguments(config, steps, seed, folder, cuda) | task.options(config))),
            train_dataset=Dataset.from_list(task.rows(model, base, examples)),
            data_collator=task.collator(base, config) if task.collator else None,
            processing_class=base.tokenizer,
            first_step=(round_number - 1) * steps,
            total_steps=rounds * steps,
            penalty=penalty,
            moments=moments,
            callbacks=list(callbacks),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"local training needs a finite loss, got {losses}: lower train.learning_rate")
    if moments is not None:
        found = trainer.read_moments()
        moments.clear()
        moments |= found
    metrics = {
        "train_loss": sum(losses) / len(losses),
        "steps": float(len(losses)),
        "tokens": float(sum(e.length for e in examples)),
        "seconds": time.perf_counter() - began,
    }
    return metrics | {"peak_memory_mib": _peak_memory(base.device) / 2**20}


def _require_device(config: TrainConfig, cuda: bool) -> None:
    if config.dtype == "float16" and not cuda:
        raise ValueError("train.dtype = 'float16' needs a GPU, got the CPU: use 'bfloat16' or 'float32'")


@contextlib.contextmanager
def _checkpointing(model: Any, config: TrainConfig) -> Any:
    """Activations are recomputed in the backward pass inside, where train.checkpointing says so."""
    if not config.checkpointing:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"train.checkpointing needs a model that can recompute its activations, got {type(model).__name__}: "
            "use false"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()  # the former leaves the hook where no adapter of transformers' own is there


def _peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that this round had allocated, on the CPU the most that the process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _training_mode(model: Any) -> Any:
    """Train mode inside, eval mode after: dropout must not act when the same base evaluates."""
    model.train()
    try:
        yield
    finally:
        model.eval()


@contextlib.contextmanager
def _as_it_was(model: Any) -> Any:
    """What trainers write into a model goes with them, but for the parameters that they train.

    TRL puts a forward of its own around the base's at every training and leaves it there: after a thousand of them a
    forward pass would end in a RecursionError.
    """
    before = dict(model.__dict__)
    try:
        yield
    finally:
        model.__dict__.clear()
        model.__dict__.update(before)


def _arguments(config: TrainConfig, steps: int, seed: int, folder: str, cuda: bool) -> dict[str, Any]:
    """Every choice that TRL and transformers would otherwise make by themselves is made here."""
    return dict(  # noqa: C408  (as one writes arguments)
        output_dir=folder,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_steps=steps,
        optim=config.optimizer,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        activation_checkpointing=False,  # train.checkpointing does it: the base must be as it was afterwards
        torch_compile_backend=None if config.compile == "none" else config.compile,
        seed=seed,
        data_seed=seed,
        use_cpu=not cuda,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # by default a NaN is logged as the last good loss
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
