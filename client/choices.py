"""Multiple choice by log-likelihood: which of the given answers the model finds most likely. Nothing is generated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from corolla.adapters import Base
from corolla.client.config import DataConfig
from corolla.client.evaluation import answer_log_probs
from corolla.client.tasks.causal_lm import TextExample, encode
from corolla.client.tasks.task import Row

ACCURACY, NORMALISED = "choice_accuracy", "choice_accuracy_norm"


@dataclass(frozen=True)
class ChoiceExample:
    """One question: every choice as an encoded answer to it, without an end token, and the index of the right one."""

    prompt: str
    choices: tuple[TextExample, ...]
    answer: int
    group: str


@dataclass(frozen=True)
class Likelihoods:
    """A model's Σ log p(token of the choice | prompt and the tokens before), in nats, by question and choice."""

    examples: tuple[ChoiceExample, ...]
    sums: tuple[tuple[float, ...], ...]

    def picks(self) -> list[int]:
        """The most likely choice of each question (lm-eval's acc); the first of equals."""
        return [_largest(sums) for sums in self.sums]

    def picks_by_character(self) -> list[int]:
        """The same after division by the characters of each choice (lm-eval's acc_norm)."""
        return [_largest(_each(sums, _characters(e))) for e, sums in zip(self.examples, self.sums, strict=True)]

    def per_token(self) -> list[list[float]]:
        """The mean log p of a choice's tokens, in nats."""
        counts = ([choice.learned for choice in example.choices] for example in self.examples)
        return [_each(sums, tokens) for sums, tokens in zip(self.sums, counts, strict=True)]

    def metrics(self) -> dict[str, float]:
        """choice_accuracy (lm-eval's acc), choice_accuracy_norm (its acc_norm) and examples; all three by group too."""
        found = {}
        for group in ("", *sorted({example.group for example in self.examples} - {""})):
            mine = [i for i, example in enumerate(self.examples) if group in ("", example.group)]
            end = f"/{group}" if group else ""
            for name, picks in ((ACCURACY, self.picks()), (NORMALISED, self.picks_by_character())):
                found[name + end] = sum(picks[i] == self.examples[i].answer for i in mine) / len(mine)
            found[f"examples{end}"] = float(len(mine))
        return found


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _each(sums: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [value / size for value, size in zip(sums, sizes, strict=True)]


def _characters(example: ChoiceExample) -> list[int]:
    return [len(choice.completion or "") for choice in example.choices]


def encode_choices(tokenizer: Any, config: DataConfig, row: Row) -> ChoiceExample:
    """A row of format multiple-choice; prompt and choices have the tokens that training would give them."""
    pairs = ({"prompt": row["prompt"], "completion": choice, "group": row.get("group")} for choice in row["choices"])
    choices = tuple(_without_end(encode(tokenizer, config, pair)) for pair in pairs)
    return ChoiceExample(row["prompt"], choices, row["answer"], str(row.get("group") or ""))


def _without_end(example: TextExample) -> TextExample:
    return replace(example, input_ids=example.input_ids[:-1], labels=example.labels[:-1])


def score_choices(model: Any, base: Base, examples: Sequence[ChoiceExample]) -> Likelihoods:
    """The log-likelihoods of every choice. Raises ValueError for no examples."""
    if not examples:
        raise ValueError("evaluation needs questions, got none")
    found = iter(answer_log_probs(model, base, [choice for example in examples for choice in example.choices]))
    return Likelihoods(tuple(examples), tuple(tuple(next(found) for _ in example.choices) for example in examples))
