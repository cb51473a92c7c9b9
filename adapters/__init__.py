"""Bases and adapters: the only folder that knows PEFT's and transformers' models by name."""

from corolla.adapters.base import DEMO, Base, Source, base_hash, find_base, open_base
from corolla.adapters.export import export_adapter, export_merged
from corolla.adapters.folder import read_peft_folder, write_peft_folder
from corolla.adapters.lora import LOCAL, MERGED, attached, carrying, read_adapter, target_shapes, write_adapter
from corolla.adapters.spec import AdapterSpec

__all__ = [
    "DEMO",
    "LOCAL",
    "MERGED",
    "AdapterSpec",
    "Base",
    "Source",
    "attached",
    "base_hash",
    "carrying",
    "export_adapter",
    "export_merged",
    "find_base",
    "open_base",
    "read_adapter",
    "read_peft_folder",
    "target_shapes",
    "write_adapter",
    "write_peft_folder",
]
