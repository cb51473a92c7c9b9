"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corolla.adapters.lora import PREFIX
from corolla.adapters.spec import refuse_unsupported
from corolla.aggregation import LowRankDelta, LowRankState, ranks, zeros
from corolla.aggregation.lowrank import add

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class FolderFacts:
    """What a PEFT folder says beside its factors: the base's name, whether weights are stored (in, out), the task.

    The task has PEFT's name, none where it is empty. `kernels` are the (in, k…) of those modules that are convolutions:
    their A is written as one (rank, in, k…).
    """

    base_name: str
    fan_in_fan_out: bool = False
    task_type: str = "CAUSAL_LM"
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Heads = Mapping[str, Mapping[str, torch.Tensor]]
"""Module -> its parameters by name, whole."""


def write_peft_folder(
    adapter: LowRankState,
    folder: Path,
    facts: FolderFacts,
    heads: Heads = {},  # noqa: B006  (only read)
) -> Path:
    """Writes `adapter` so that `PeftModel.from_pretrained(base, folder)` computes base + B @ A, and returns the folder.

    alpha = r, so the scaling is 1 and no reader can get it wrong; modules of smaller rank are padded with zeros to
    the largest, so no rank pattern is needed. `heads` are saved whole beside it (PEFT's modules_to_save). Raises
    ValueError for an adapter without any component.
    """
    widest = max(ranks(adapter).values(), default=0)
    if widest == 0:
        raise ValueError("an adapter folder needs at least one component, got an adapter that changes nothing")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for module, delta in adapter.items():
        padded = add([delta, zeros(*delta.shape, widest - delta.rank)])
        kernel = facts.kernels.get(module, (delta.shape[1],))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = padded.A.reshape(widest, *kernel).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = padded.B.reshape(
            *padded.B.shape, *(1,) * len(kernel[1:])
        ).contiguous()
    for module, parameters in heads.items():
        tensors |= {f"{PREFIX}{module}.{name}": tensor.contiguous() for name, tensor in parameters.items()}
    config = LoraConfig(
        r=widest,
        lora_alpha=widest,
        target_modules=sorted(adapter),
        bias="none",
        task_type=facts.task_type or None,
        inference_mode=True,
        modules_to_save=sorted(heads) or None,
        base_model_name_or_path=facts.base_name,
        fan_in_fan_out=facts.fan_in_fan_out,
    )
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def read_peft_folder(folder: Path) -> dict[str, LowRankDelta]:
    """The adapter in a PEFT folder with each module's scaling folded into B; every tensor is used or refused.

    Raises ValueError for anything but plain LoRA on linear modules and convolutions, and FileNotFoundError, naming
    it, for a folder without an adapter.
    """
    config = _read_config(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    adapter = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        a = tensors.pop(key)
        b = tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        if b is None:
            raise ValueError(f"every A needs its B, got {key} alone in {folder}")
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{module} must be finite, got NaN or infinity in {folder}")
        scaling = _scaling(config, module, a.shape[0])
        adapter[module] = LowRankDelta(a.float().flatten(1), (b.double() * scaling).float().flatten(1))
    if tensors:
        raise ValueError(
            f"only LoRA factors of linear modules and convolutions can be read, got {sorted(tensors)[0]} in {folder}"
        )
    if not adapter:
        raise ValueError(f"an adapter must have LoRA factors, got none in {folder}")
    return adapter


def read_peft_facts(folder: Path) -> FolderFacts:
    """What the folder's configuration says. Raises what `read_peft_folder` raises for it."""
    config = _read_config(folder)
    task = getattr(config.task_type, "value", config.task_type)
    name, ending = str(config.base_model_name_or_path or ""), ".lora_A.weight"
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if key.endswith(ending)}  # noqa: SIM118
    kernels = {k.removeprefix(PREFIX).removesuffix(ending): tuple(s[1:]) for k, s in shapes.items() if len(s) > 2}
    return FolderFacts(name, bool(config.fan_in_fan_out), task or "", kernels)


def _read_config(folder: Path) -> LoraConfig:
    for name in ("adapter_config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"a PEFT adapter folder holds {name}, got {folder} without it")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"only plain LoRA can be federated, got peft_type = {config.peft_type} in {folder}")
    try:
        refuse_unsupported(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return config


def _scaling(config: LoraConfig, module: str, rank: int) -> float:
    alpha = (config.alpha_pattern or {}).get(
        get_pattern_key(list(config.alpha_pattern or {}), module), config.lora_alpha
    )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
