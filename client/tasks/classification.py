"""Sequence classification: a text and one of several labels, with a head that is federated whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from corolla.adapters import Base
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.tasks.rounds import SpansRounds
from corolla.client.tasks.scores import by_group
from corolla.client.tasks.task import Row, Task

BATCH = 64
"""Examples that are evaluated together."""


@dataclass(frozen=True)
class LabelledExample:
    """A tokenized text and the position of its label among data.labels."""

    input_ids: tuple[int, ...]
    label: int
    prompt: str
    completion: str
    group: str

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Its label."""
        return 1

    def features(self) -> dict[str, Any]:
        """What transformers' Trainer takes."""
        return {"input_ids": list(self.input_ids), "attention_mask": [1] * self.length, "labels": self.label}

    def sequences(self) -> Mapping[str, tuple[Sequence[int], Sequence[bool]]]:
        """The text, of which nothing is predicted but the label, which names the sequence."""
        return {self.completion: (self.input_ids, [False] * self.length)}


def encode(tokenizer: Any, config: DataConfig, row: Row) -> LabelledExample:
    """A row of format text-label. Raises ValueError for a label that is not in data.labels."""
    label = str(row["label"])
    if label not in config.labels:
        raise ValueError(f"label must be one of data.labels {list(config.labels)}, got {label!r}")
    text = str(row["text"])
    ids = tuple(tokenizer(text)["input_ids"])
    return LabelledExample(ids, config.labels.index(label), text, label, str(row.get("group") or ""))


@torch.no_grad()
def _logits(model: Any, base: Base, examples: Sequence[LabelledExample]) -> torch.Tensor:
    """(examples, labels) in float32 on the CPU, in the examples' order, batches made of similar lengths."""
    model.eval()
    found = torch.empty(len(examples), len(base.head.labels))
    collate = DataCollatorWithPadding(base.tokenizer)
    for positions in _batches(examples):
        batch = collate([{"input_ids": list(examples[i].input_ids)} for i in positions]).to(base.device)
        found[positions] = model(**batch).logits.float().cpu()
    return found


def _batches(examples: Sequence[LabelledExample]) -> Iterator[list[int]]:
    order = sorted(range(len(examples)), key=lambda i: (examples[i].length, i))
    for first in range(0, len(order), BATCH):
        yield order[first : first + BATCH]


def mean_loss(model: Any, base: Base, examples: Sequence[LabelledExample]) -> float:
    """Mean cross-entropy of the labels, in nats."""
    labels = torch.tensor([example.label for example in examples])
    return float(torch.nn.functional.cross_entropy(_logits(model, base, examples), labels)) if examples else 0.0


def evaluate(model: Any, base: Base, examples: Sequence[LabelledExample], config: DataConfig) -> dict[str, float]:
    """held_out_loss, and accuracy: over all examples, and by group. Raises ValueError for no examples."""
    if not examples:
        raise ValueError("evaluation needs held-out examples, got none: set data.held_out or data.held_out_fraction")
    logits = _logits(model, base, examples)
    labels = torch.tensor([example.label for example in examples])
    hits = (logits.argmax(1) == labels).double().tolist()
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    return {"held_out_loss": loss} | by_group("accuracy", hits, [example.group for example in examples])


def answer(model: Any, base: Base, examples: Sequence[LabelledExample], config: DataConfig) -> list[str]:
    """The most likely labels."""
    return [base.head.labels[i] for i in _logits(model, base, examples).argmax(1).tolist()]


class ClassificationTrainer(SpansRounds, Trainer):
    """transformers' trainer over the rounds of a run."""


def _inputs(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.ones((rows, length), dtype=torch.long, device=model.device)
    return {"input_ids": ids, "labels": torch.zeros(rows, dtype=torch.long, device=model.device)}


def _dry_run(model: Any, train: TrainConfig, batch: int, length: int) -> Any:
    """The model's own loss."""
    return model(**_inputs(model, batch, length)).loss


@torch.no_grad()
def _dry_evaluation(model: Any, examples: int, length: int) -> None:
    model(**_inputs(model, min(examples, BATCH), length))


TASK = Task(
    name="classification",
    formats=("text-label",),
    encode=encode,
    trainer=ClassificationTrainer,
    arguments=TrainingArguments,
    evaluate=evaluate,
    mean_loss=mean_loss,
    answer=answer,
    dry_run=_dry_run,
    dry_evaluation=_dry_evaluation,
    collator=lambda base, train: DataCollatorWithPadding(base.tokenizer),
)
