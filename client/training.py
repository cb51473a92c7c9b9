"""Local training with TRL's SFTTrainer, on examples chosen and ordered beforehand."""

import contextlib
import math
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from corolla.adapters import Base
from corolla.client.config import TrainConfig
from corolla.client.data import Example, as_dataset

Penalty = Callable[[Any], torch.Tensor]
"""model -> a scalar with gradients that is added to the loss."""


class RoundTrainer(SFTTrainer):
    """An SFTTrainer whose learning-rate schedule spans all rounds, though each round has a trainer of its own.

    `penalty`, if any, is added to the loss of every optimizer step.
    """

    def __init__(
        self, *args: Any, first_step: int, total_steps: int, penalty: Penalty | None = None, **kwargs: Any
    ) -> None:
        self.first_step, self.total_steps, self.penalty = first_step, total_steps, penalty
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `total_steps`, entered at `first_step`."""
        scheduler: Any = super().create_scheduler(
            max(self.total_steps, self.first_step + num_training_steps), optimizer
        )
        scheduler.lr_lambdas = [lambda step, rule=rule: rule(step + self.first_step) for rule in scheduler.lr_lambdas]
        rates = [base * rule(0) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        return scheduler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """TRL's loss, plus the penalty once per optimizer step, spread over its micro-batches."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if self.penalty is None:
            return found
        extra = self.penalty(model) / (self.args.gradient_accumulation_steps if self.model_accepts_loss_kwargs else 1)
        return (found[0] + extra, *found[1:]) if return_outputs else found + extra


def train_round(
    model: Any,
    base: Base,
    config: TrainConfig,
    examples: Sequence[Example],
    round_number: int,
    rounds: int,
    seed: int,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """Trains what takes gradients in `model`, in place, on `examples` in their order.

    One optimizer step per batch_size × accumulation examples; `penalty(model)` is added to its loss. Returns
    train_loss (mean over the steps, the penalty included), tokens (not padding, the prompt included), seconds, steps
    and peak_memory_mib. Raises RuntimeError where the loss is not finite.
    """
    steps = math.ceil(len(examples) / (config.batch_size * config.accumulation))
    began = time.perf_counter()
    cuda = base.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(base.device)
    with tempfile.TemporaryDirectory() as folder, _training_mode(model), _as_it_was(base.model):
        trainer = RoundTrainer(
            model=model,
            args=_trainer_arguments(config, steps, seed, folder, cuda),
            train_dataset=as_dataset(examples),
            processing_class=base.tokenizer,
            first_step=(round_number - 1) * steps,
            total_steps=rounds * steps,
            penalty=penalty,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"local training needs a finite loss, got {losses}: lower train.learning_rate")
    metrics = {
        "train_loss": sum(losses) / len(losses),
        "steps": float(len(losses)),
        "tokens": float(sum(len(e.input_ids) for e in examples)),
        "seconds": time.perf_counter() - began,
    }
    return metrics | {"peak_memory_mib": _peak_memory(base.device) / 2**20}


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


def _trainer_arguments(config: TrainConfig, steps: int, seed: int, folder: str, cuda: bool) -> SFTConfig:
    """Every choice that TRL and transformers would otherwise make by themselves is made here."""
    return SFTConfig(
        output_dir=folder,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
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
        gradient_checkpointing=False,
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
