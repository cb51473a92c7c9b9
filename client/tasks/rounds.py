"""What every trainer here has beside transformers': a schedule that spans the run, a penalty, factors in float32."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from corolla.adapters import GATE, Penalty
from corolla.client.store import under


class SpansRounds:
    """Put before a Trainer: its learning-rate schedule spans all rounds, though each round has a trainer of its own.

    `penalty`, if any, is added to the loss of every optimizer step; `moments` are what the optimizer remembers from an
    earlier round, by `<parameter>/<name>`. What the trainer's constructor casts (TRL takes
    the factors on a quantised base to bfloat16, where a change of 1e-3 is lost) is put back.
    """

    def __init__(
        self,
        *args: Any,
        model: Any,
        first_step: int,
        total_steps: int,
        penalty: Penalty | None = None,
        moments: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.first_step, self.total_steps, self.penalty, self.moments = first_step, total_steps, penalty, moments or {}
        before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(*args, model=model, **kwargs)  # type: ignore[call-arg]
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                parameter.data = data

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer, with the moments of those parameters that have the same shape as then."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        model: Any = self.model  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters():
            found = under(self.moments, name)
            if parameter.requires_grad and all(t.ndim == 0 or t.shape == parameter.shape for t in found.values()):
                optimizer.state[parameter] |= {k: _where(k, t, parameter) for k, t in found.items()}
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """What decays: not the gates of an adapter, whose size is what they say."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if not name.endswith(GATE)]

    def read_moments(self) -> dict[str, Tensor]:
        """What the optimizer remembers, as copies on the CPU. Raises ValueError for what is no tensor."""
        trainer: Any = self
        state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
        found = {}
        for name, parameter in trainer.model.named_parameters():
            for key, value in state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.shape not in ((), parameter.shape):
                    raise ValueError(
                        "train.keep_optimizer needs an optimizer that remembers tensors of its parameters' shapes, "
                        f"got {key} from {trainer.args.optim.value}: use adamw_torch, or keep_optimizer = false"
                    )
                found[f"{name}/{key}"] = value.detach().cpu().clone()
        return found

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


def _where(key: str, tensor: Tensor, parameter: Any) -> Tensor:
    """A copy where the optimizer keeps it: AdamW counts its steps on the CPU."""
    return tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
