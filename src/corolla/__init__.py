"""Corolla: federated fine-tuning of language models with LoRA adapters of different ranks, aggregated exactly."""

__version__ = "0.1.0"
