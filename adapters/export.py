"""A run's result for the world: a PEFT adapter, or a full checkpoint merged on an fp32 master. Both are proven."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corolla.adapters.base import Base, Opening, load_model
from corolla.adapters.carry import added, carrying
from corolla.adapters.folder import FolderFacts, write_peft_folder
from corolla.adapters.heads import HEADS, TASK_TYPES, head_modules
from corolla.adapters.matrix import as_matrix, as_stored, is_convolution
from corolla.aggregation import AdapterState, DenseDelta, low_rank

AGREES = 1e-4
"""Largest relative difference of logits that a written export may have to the running model, in float32."""


def export_adapter(base: Base, adapter: AdapterState, folder: Path) -> float:
    """Writes a PEFT folder (alpha = r), reloads it with plain PEFT, and returns the relative error of its logits.

    A classifier's head goes along as PEFT's modules_to_save. Raises RuntimeError where the logits differ by more than
    1e-4 (float32; 5e-2 in half precision or on a quantised base) from the running model's, ValueError for a change
    that is neither low-rank nor a head: `export_merged` writes that.
    """
    heads = {m: delta for m in head_modules(base.model, base.head) if isinstance(delta := adapter.get(m), DenseDelta)}
    factors = low_rank({module: delta for module, delta in adapter.items() if module not in heads})
    expected = running_logits(base, adapter)
    task, kernels = TASK_TYPES[base.head.kind], kernels_of(base.model, factors)
    facts = FolderFacts(base.source.name, has_conv1d(base.model, factors), task, kernels)
    write_peft_folder(factors, folder, facts, _whole_heads(base, heads))
    with _put_back(base.model, heads):
        model = PeftModel.from_pretrained(base.model, str(folder)).eval()
        try:
            error = _difference(_logits(model, base), expected)
        finally:
            model.unload()
            base.model.__dict__.pop("peft_config", None)
    return _require_agreement(error, AGREES if base.dtype == "float32" and not base.quantized else 5e-2, folder)


def _whole_heads(base: Base, heads: Mapping[str, DenseDelta]) -> dict[str, dict[str, Tensor]]:
    """Module -> its parameters by name, the change added to them, in float32."""
    found = {}
    for name, delta in heads.items():
        layer: Any = base.model.get_submodule(name)
        inputs = layer.weight.shape[1]
        found[name] = {"weight": layer.weight.detach().float().cpu() + delta.W[:, :inputs]}
        if layer.bias is not None:
            found[name]["bias"] = layer.bias.detach().float().cpu() + delta.W[:, inputs]
    return found


@contextmanager
def _put_back(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """At the end, these modules are the objects that they were: PEFT replaces those that it saves."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        yield
    finally:
        for name, module in before.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)


def export_merged(base: Base, adapter: AdapterState, folder: Path) -> float:
    """Writes base + B @ A as a full float32 checkpoint with its tokenizer, reloads it, and returns the logits' error.

    The master is opened afresh in float32, whatever precision the run used: a realistic update merged into bf16
    loses more than half of itself. The reloaded checkpoint is compared with base and adapter side by side, on the
    CPU. Raises RuntimeError where a merge or the logits are off, ValueError for a weight that two modules share.
    """
    fresh = load_model(base.source, Opening(head=base.head)).eval()
    master = replace(base, model=fresh, dtype="float32", device=torch.device("cpu"))
    expected = running_logits(master, adapter)
    merge_into(master.model, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(master.model.config, "quantization_config"):  # a dequantised GGUF file is an ordinary checkpoint now
        del master.model.config.quantization_config
    master.model.save_pretrained(folder)
    master.tokenizer.save_pretrained(folder)
    auto = HEADS[base.head.kind]
    reloaded = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return _require_agreement(_difference(_logits(reloaded, master), expected), AGREES, folder)


@torch.no_grad()
def merge_into(model: nn.Module, adapter: AdapterState) -> None:
    """Adds B @ A to the float32 weights of `model` in place, and checks each sum.

    Raises ValueError for a weight that is not float32 or is shared, RuntimeError where what was added differs from
    B @ A by more than 1 % (the update is too small for the weight's precision).
    """
    for module, delta in adapter.items():
        layer: Any = model.get_submodule(module)
        weight = layer.weight
        if weight.dtype != torch.float32:
            raise ValueError(f"merging needs a float32 master, got {weight.dtype} at {module}")
        if sum(weight is other for other in _weights(model)) > 1:
            raise ValueError(f"merging needs a weight of its own, got one shared with another module at {module}")
        matrix = as_matrix(layer, weight)
        dense = added(delta, matrix).float()
        if dense.shape[1] > matrix.shape[1] and layer.bias is not None:
            layer.bias += dense[:, -1]
            dense = dense[:, :-1]
        dense, before = as_stored(layer, dense), weight.clone()
        weight += dense
        lost = float((weight.double() - before.double() - dense.double()).norm())
        if lost > 0.01 * float(dense.norm()):
            raise RuntimeError(f"the update of {module} is lost in rounding: {lost / float(dense.norm()):.1%} of it")


def _weights(model: nn.Module) -> list[Tensor]:
    found = (getattr(module, "weight", None) for module in model.modules())
    return [weight for weight in found if isinstance(weight, Tensor)]


def has_conv1d(model: nn.Module, adapter: AdapterState) -> bool:
    """Whether the adapted modules are transformers' Conv1D, whose weight is stored (in, out)."""
    return any(isinstance(model.get_submodule(module), Conv1D) for module in adapter)


def kernels_of(model: nn.Module, adapter: AdapterState) -> dict[str, tuple[int, ...]]:
    """Module -> (in, k…) of the adapted convolutions."""
    layers: dict[str, Any] = {module: model.get_submodule(module) for module in adapter}
    return {module: tuple(layer.weight.shape[1:]) for module, layer in layers.items() if is_convolution(layer)}


def running_logits(base: Base, adapter: AdapterState) -> Tensor:
    """The logits of base + adapter on the probe, with the adapter as the run has it: frozen beside the base."""
    with carrying(base.model, adapter) as model:
        return _logits(model.eval(), base)


@torch.no_grad()
def _logits(model: Any, base: Base) -> Tensor:
    """Float32 logits on a fixed probe of 2 × 32 random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    probe = torch.randint(0, vocabulary, (2, 32), generator=generator).to(base.device)
    return model(input_ids=probe, attention_mask=torch.ones_like(probe)).logits.float().cpu()


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def _require_agreement(error: float, limit: float, folder: Path) -> float:
    if not error <= limit:
        raise RuntimeError(
            f"the export in {folder} must give the running model's logits, got a relative error {error:.1e}"
        )
    return error
