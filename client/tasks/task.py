"""What a task is: a value that says how to encode, train and evaluate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from corolla.adapters import Base
    from corolla.client.config import DataConfig, TrainConfig

Row = dict[str, Any]
"""One row of data in a format of `corolla.client.data.formats`: its columns have that format's names."""

IGNORED = -100
"""The label that the loss leaves out."""


class Example(Protocol):
    """One encoded row."""

    @property
    def group(self) -> str:
        """By which results are told apart; "" for none."""

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""

    @property
    def learned(self) -> int:
        """What the loss sees of it: tokens, or 1 for a label. 0 teaches nothing."""

    def features(self) -> dict[str, Any]:
        """A row of the trainer's dataset."""

    def sequences(self) -> Mapping[str, tuple[Sequence[int], Sequence[bool]]]:
        """Name -> (token ids, which of them the loss sees), to show a person."""


def _features(model: Any, base: Any, examples: Sequence[Any]) -> list[dict[str, Any]]:
    return [example.features() for example in examples]


@dataclass(frozen=True)
class Task:
    """One kind of learning.

    `formats` are the kinds of rows that it takes (`corolla.client.data.formats`). `encode(tokenizer, data, row)` is an
    Example. `trainer` and `arguments` are transformers' Trainer and TrainingArguments or heirs of theirs, the trainer
    with `SpansRounds` before them; `rows(model, base, examples)` are its dataset (by default the examples' features),
    `options(train)` arguments of its own, `collator(base, train)` makes batches (None: the trainer's own).
    `evaluate(model, base, examples, data)` are metrics: `held_out_loss`, `examples`, and its score of `TASKS`, with
    `<score>/<group>` and `examples/<group>` where examples have groups. `mean_loss(model, base, examples)` is the loss
    alone, in nats; `pack(examples, size)` are longer examples of up to `size` tokens each, for train.batching =
    packed; `answer(model, base, examples, data)` is what the model says to each `example.prompt`, in words.
    `dry_run(model, train, batch, length)` is the trainer's loss of a micro-batch of made-up examples, all of `length`
    tokens, and `dry_evaluation(model, examples, length)` takes the most memory that evaluating so many of them takes:
    both for tensors without values, so neither may look at any.
    """

    name: str
    formats: tuple[str, ...]
    encode: "Callable[[Any, DataConfig, Row], Any]"
    trainer: type
    arguments: type
    evaluate: "Callable[[Any, Base, Sequence[Any], DataConfig], dict[str, float]]"
    mean_loss: "Callable[[Any, Base, Sequence[Any]], float]"
    answer: "Callable[[Any, Base, Sequence[Any], DataConfig], list[str]]"
    dry_run: "Callable[[Any, TrainConfig, int, int], Any]"
    dry_evaluation: "Callable[[Any, int, int], None]"
    options: "Callable[[TrainConfig], dict[str, Any]]" = lambda train: {}
    rows: "Callable[[Any, Base, Sequence[Any]], list[dict[str, Any]]]" = _features
    collator: "Callable[[Base, TrainConfig], Any] | None" = None
    pack: "Callable[[Sequence[Any], int], tuple[Any, ...]] | None" = None
