"""What every trainer here has beside transformers': a schedule that spans the run, a penalty, factors in float32."""

from collections.abc import Callable
from typing import Any

import torch

Penalty = Callable[[Any], torch.Tensor]
"""model -> a scalar with gradients that is added to the loss."""


class SpansRounds:
    """Put before a Trainer: its learning-rate schedule spans all rounds, though each round has a trainer of its own.

    `penalty`, if any, is added to the loss of every optimizer step. What the trainer's constructor casts (TRL takes
    the factors on a quantised base to bfloat16, where a change of 1e-3 is lost) is put back.
    """

    def __init__(
        self,
        *args: Any,
        model: Any,
        first_step: int,
        total_steps: int,
        penalty: Penalty | None = None,
        **kwargs: Any,
    ) -> None:
        self.first_step, self.total_steps, self.penalty = first_step, total_steps, penalty
        before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(*args, model=model, **kwargs)  # type: ignore[call-arg]
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                parameter.data = data

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `total_steps`, entered at `first_step`."""
        scheduler: Any = super().create_scheduler(  # type: ignore[misc]
            max(self.total_steps, self.first_step + num_training_steps), optimizer
        )
        scheduler.lr_lambdas = [lambda step, rule=rule: rule(step + self.first_step) for rule in scheduler.lr_lambdas]
        rates = [base * rule(0) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        return scheduler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The task's loss, plus the penalty once per optimizer step, spread over its micro-batches."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if self.penalty is None:
            return found
        trainer: Any = self
        extra = self.penalty(model)
        if trainer.model_accepts_loss_kwargs:
            extra = extra / trainer.args.gradient_accumulation_steps
        return (found[0] + extra, *found[1:]) if return_outputs else found + extra
