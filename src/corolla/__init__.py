"""Corolla: federated fine-tuning of language models with LoRA adapters of different ranks, aggregated exactly."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "simulate"]


def __getattr__(name: str) -> Any:
    """`simulate` and `Run`, imported when they are asked for: Flower and transformers take seconds to import."""
    if name in ("Run", "simulate"):
        from corolla.simulations import simulate as module

        return getattr(module, name)
    raise AttributeError(f"module 'corolla' has no attribute {name!r}")
