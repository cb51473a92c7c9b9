"""What a base ends with: a language model's head, which stays as it is, or a classifier's, which is trained whole."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@dataclass(frozen=True)
class Head:
    """`kind` is one of HEADS; `labels` are a classifier's classes in the order of its logits.

    Raises ValueError for an unknown kind, or labels that do not fit it.
    """

    kind: str = "causal-lm"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise ValueError(f"a head must be one of {', '.join(HEADS)}, got {self.kind!r}")
        if (self.kind == "classification") != (len(self.labels) > 1):
            raise ValueError(f"classification needs two labels or more (data.labels), got {list(self.labels)}")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must differ from each other (data.labels), got {list(self.labels)}")

    def identity(self, digest: str) -> str:
        """The hash of a base with this head, from that of its files: the order of the labels is part of it."""
        if not self.labels:
            return digest
        return hashlib.sha256(f"{digest}:{self.kind}:{json.dumps(self.labels)}".encode()).hexdigest()

    def options(self) -> dict[str, Any]:
        """What from_pretrained is told."""
        if not self.labels:
            return {}
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


HEADS: Mapping[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
"""Kind -> transformers' class that opens a base with it."""

TASK_TYPES: Mapping[str, str] = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
"""Kind -> PEFT's task_type."""


LANGUAGE_MODEL = Head()
"""The head of a causal language model, which stays as it is."""


def head_modules(model: Any, head: Head) -> list[str]:
    """The linear modules of a classifier's head, sorted: those that the plain model (`base_model`) does not have.

    None for a language model, whose head belongs to the base.
    """
    if not head.labels:
        return []
    inside = model.base_model_prefix + "."
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)]
    if not found:
        raise ValueError(f"a classifier needs a linear head outside {inside[:-1]}, got none in {type(model).__name__}")
    return sorted(found)


@torch.no_grad()
def draw_head(model: Any, head: Head, missing: Collection[str]) -> None:
    """Draws the parameters that the checkpoint lacks, in place: the same on every machine, whatever was drawn before.

    Weights from N(0, 0.02²) by their names, biases 0. Raises ValueError for anything else that is missing: a base
    that is not whole cannot be the same for all clients.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(missing):
        module, _, kind = name.rpartition(".")
        if name not in parameters or not isinstance(model.get_submodule(module), nn.Linear) or not head.labels:
            raise ValueError(f"the base must hold all its weights, got none for {name}: use a complete checkpoint")
        if kind == "bias":
            parameters[name].zero_()
            continue
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        drawn = torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        parameters[name].copy_(drawn)


def head_shapes(model: Any, head: Head) -> dict[str, tuple[int, int]]:
    """Module -> (out, in), with one column more for the bias where the module has one."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in head_modules(model, head)}
    return {
        name: (layer.weight.shape[0], layer.weight.shape[1] + (layer.bias is not None))
        for name, layer in layers.items()
    }
