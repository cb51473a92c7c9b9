"""What local training will hold in memory: a step of it, run on tensors that have a size and no values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import Trainer, TrainingArguments
from trl.kernels import chunked_logprob

from corolla.adapters import (
    LOCAL,
    MERGED,
    attach_empty,
    dense_beside,
    empty_model,
    find_base,
    head_shapes,
    quantized_bytes,
    target_shapes,
)
from corolla.aggregation import DenseDelta, Shapes
from corolla.client.config import ClientSettings, TrainConfig
from corolla.client.tasks import Task, find_task


@dataclass(frozen=True)
class Work:
    """What a client has to do, whatever its rank: examples of up to `length` tokens, `held_out` of them to evaluate.

    `targets` are its own target modules, None for those of the settings; `device` is cpu or cuda.
    """

    length: int
    held_out: int = 64
    targets: str | tuple[str, ...] | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: the base; the frozen adapter beside it; the trained one; its gradients and what the
    optimizer remembers; and what a step holds beyond these at its peak (or evaluation, where that is more)."""

    base: float
    frozen: float
    adapter: float
    optimizer: float
    activations: float

    @property
    def peak(self) -> float:
        """In all."""
        return self.base + self.frozen + self.adapter + self.optimizer + self.activations


class Meter(TorchDispatchMode):
    """Counts the bytes of the live storages that were made under it, and the most that there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            finalize(storage, self._free, size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size

    def grown(self, work: Callable[[], Any]) -> int:
        """By how much `work()` makes what lives grow."""
        before = self.live
        work()
        return self.live - before

    def passing(self, work: Callable[[], Any]) -> int:
        """How much more than before `work()` holds at its peak."""
        self.peak = before = self.live
        work()
        return self.peak - before


@lru_cache(maxsize=64)
def adapted_shapes(settings: ClientSettings, targets: str | tuple[str, ...] | None = None) -> tuple[Shapes, Shapes]:
    """(module -> (out, in) of what is adapted, the same of the heads), from the base's configuration alone."""
    model = _empty(settings)
    heads = head_shapes(model, settings.head)
    with torch.device("meta"):
        return target_shapes(model, settings.adapter.spec(1, targets, tuple(heads))), heads


@lru_cache(maxsize=256)
def estimate_memory(settings: ClientSettings, work: Work, rank: int, micro_batch: int) -> Memory:
    """What a client of these settings holds while it trains an adapter of `rank`, so many examples at once.

    Nothing is held for it, and of the base only the configuration is read. The size of every tensor that the model,
    the loss, the optimizer and evaluation make is exact; what kernels take inside, an allocator's gaps, and answers
    while they are generated are not seen. Raises FileNotFoundError for a base that is not there, and what the model
    raises for examples that it cannot take.
    """
    task, base, heads = find_task(settings.train.task), _empty(settings), adapted_shapes(settings, work.targets)[1]
    spared, largest = quantized_bytes(base, settings.model.quantization)
    model = _empty(settings, computing=True)
    spec = partial(settings.adapter.spec, targets=work.targets, exclude=tuple(heads))
    width = settings.adapter.personal_rank
    with torch.device("meta"):
        peft = attach_empty(model, spec(rank), settings.expected.frozen_rank, spec(width) if width else None)
    if settings.train.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(), Meter() as meter, _kernels_of(work.device):
        meter.grown(lambda: _fill(peft, lambda name: "lora_" not in name))
        frozen = meter.grown(lambda: _fill(peft, lambda name: f".{MERGED}." in name))
        adapter = meter.grown(lambda: _fill(peft, lambda name: True))
        nothing = {module: DenseDelta(torch.zeros(shape)) for module, shape in heads.items()}
        with dense_beside(model, nothing, LOCAL, trains=True):
            evaluation = meter.passing(lambda: task.dry_evaluation(peft.eval(), work.held_out, work.length))
            kept, at_peak = _train(peft.train(), task, settings.train, (micro_batch, work.length), meter)
    activations = max(at_peak, evaluation) - kept + largest
    return Memory(_held(base) - spared, frozen, adapter, kept, max(0.0, activations))


def _empty(settings: ClientSettings, computing: bool = False) -> Any:
    """The base without values; `computing`: a quantised one in the precision of training, which its layers compute in
    and of which autocast then makes no copies to keep."""
    model, train = settings.model, settings.train
    precision = train.dtype if computing and model.quantization != "none" and train.dtype != "float32" else model.dtype
    return empty_model(find_base(model.name), precision, settings.head, model.attention)


def _held(model: Any) -> int:
    """Bytes of all parameters and buffers, each once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _train(peft: Any, task: Task, train: TrainConfig, size: tuple[int, int], meter: Meter) -> tuple[int, int]:
    """Bytes of gradients and optimizer state after a step, and the most beyond the model that a later step holds."""
    optimizer = _optimizer(peft, train.optimizer)

    def passes() -> None:
        with torch.autocast("cpu", getattr(torch, train.dtype)) if train.dtype != "float32" else nullcontext():
            loss = task.dry_run(peft, train, *size)
        loss.backward()

    before = meter.live
    in_passes = meter.passing(passes)
    gradients = meter.live - before
    in_step = meter.passing(optimizer.step) + gradients
    kept = meter.live - before
    return kept, max(in_passes + kept - gradients, in_step)


def _optimizer(model: Any, name: str) -> torch.optim.Optimizer:
    """The optimizer by transformers' name; AdamW, which remembers as much as any, in the place of one that is not
    torch's or transformers' own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments = TrainingArguments(optim=name, use_cpu=True, report_to="none")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError):
        kind, options = torch.optim.AdamW, {}
    if kind.__module__.split(".")[0] not in ("torch", "transformers"):
        kind, options = torch.optim.AdamW, {}
    return kind(trained, **options)


def _fill(model: torch.nn.Module, which: Callable[[str], bool]) -> None:
    """Puts tensors without values in the place of those on the meta device; what is shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None or isinstance(old, FakeTensor) or not which(f".{path}.{name}"):
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    parameter = isinstance(old, torch.nn.Parameter)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if parameter else new
                tensors[name] = made[id(old)]  # type: ignore[assignment]


@contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """On CUDA, TRL's head works inside its tile of logits (by Triton); elsewhere on several copies of it."""
    if device != "cuda":
        yield
        return
    before = chunked_logprob._forward_tile, chunked_logprob._backward_tile
    chunked_logprob._forward_tile = chunked_logprob._backward_tile = lambda *args, **kwargs: None
    try:
        yield
    finally:
        chunked_logprob._forward_tile, chunked_logprob._backward_tile = before
