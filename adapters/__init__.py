"""Bases and adapters: the only folder that knows PEFT's and transformers' models by name."""

from corolla.adapters.base import (
    DEVICE_MAPS,
    QUANTIZATIONS,
    Base,
    choose_device,
    empty_model,
    open_base,
    open_tokenizer,
    quantized_bytes,
)
from corolla.adapters.carry import carrying
from corolla.adapters.dense import dense_beside, read_dense
from corolla.adapters.export import export_adapter, export_merged
from corolla.adapters.folder import FolderFacts, read_peft_facts, read_peft_folder, write_peft_folder
from corolla.adapters.heads import Head, head_modules, head_shapes
from corolla.adapters.kinds import KINDS, LORA, Kind, kind_shapes, on_weights, train_kind
from corolla.adapters.lora import (
    LOCAL,
    MERGED,
    PERSONAL,
    attach_empty,
    attached,
    personal_beside,
    read_adapter,
    target_shapes,
    weight_shapes,
    without_adapters,
    write_adapter,
)
from corolla.adapters.penalties import Penalty, proximal_penalty, tail_penalty
from corolla.adapters.principal import principal_components
from corolla.adapters.source import DEMO, Source, base_hash, find_base
from corolla.adapters.spec import AdapterSpec

__all__ = [
    "DEMO",
    "DEVICE_MAPS",
    "KINDS",
    "LOCAL",
    "LORA",
    "MERGED",
    "PERSONAL",
    "QUANTIZATIONS",
    "AdapterSpec",
    "Base",
    "FolderFacts",
    "Head",
    "Kind",
    "Penalty",
    "Source",
    "attach_empty",
    "attached",
    "base_hash",
    "carrying",
    "choose_device",
    "dense_beside",
    "empty_model",
    "export_adapter",
    "export_merged",
    "find_base",
    "head_modules",
    "head_shapes",
    "kind_shapes",
    "on_weights",
    "open_base",
    "open_tokenizer",
    "personal_beside",
    "principal_components",
    "proximal_penalty",
    "quantized_bytes",
    "read_adapter",
    "read_dense",
    "read_peft_facts",
    "read_peft_folder",
    "tail_penalty",
    "target_shapes",
    "train_kind",
    "weight_shapes",
    "without_adapters",
    "write_adapter",
    "write_peft_folder",
]
