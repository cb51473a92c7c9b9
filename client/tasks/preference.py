"""Preference tuning: of two answers the better one, by direct preference optimisation (DPO, arXiv:2305.18290).

The reference is the base as it is, so its log-probabilities are computed once for each example.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, DPOTrainer

from corolla.adapters import Base, without_adapters
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.evaluation import BATCH, answer_all, answer_log_probs
from corolla.client.tasks import causal_lm
from corolla.client.tasks.causal_lm import TextExample
from corolla.client.tasks.rounds import SpansRounds
from corolla.client.tasks.scores import by_group
from corolla.client.tasks.task import Row, Task


@dataclass(frozen=True)
class Pair:
    """The same prompt with a better and a worse answer."""

    chosen: TextExample
    rejected: TextExample

    @property
    def group(self) -> str:
        """That of its row."""
        return self.chosen.group

    @property
    def prompt(self) -> str:
        """What both answer."""
        return self.chosen.prompt

    @property
    def completion(self) -> str | None:
        """The better answer."""
        return self.chosen.completion

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return max(self.chosen.length, self.rejected.length)

    @property
    def learned(self) -> int:
        """Answer tokens of both; 0 where one has none, or both are the same: there is nothing to prefer."""
        if self.chosen.input_ids == self.rejected.input_ids or not min(self.chosen.learned, self.rejected.learned):
            return 0
        return self.chosen.learned + self.rejected.learned

    def features(self) -> dict[str, Any]:
        """What DPOTrainer's collator takes."""
        given = len(self.chosen.prompt_ids)
        return {
            "prompt_ids": list(self.chosen.prompt_ids),
            "chosen_ids": list(self.chosen.input_ids[given:]),
            "rejected_ids": list(self.rejected.input_ids[given:]),
        }

    def sequences(self) -> Mapping[str, tuple[Sequence[int], Sequence[bool]]]:
        """Both sequences."""
        return {"chosen": self.chosen.sequences()[""], "rejected": self.rejected.sequences()[""]}


def encode(tokenizer: Any, config: DataConfig, row: Row) -> Pair:
    """A row of format preference: each answer encoded after the prompt as causal-lm does."""
    pairs = ({**row, "completion": row[name]} for name in ("chosen", "rejected"))
    chosen, rejected = (causal_lm.encode(tokenizer, config, pair) for pair in pairs)
    return Pair(chosen, rejected)


_REFERENCES: dict[tuple[str, str, bool, TextExample], float] = {}
"""(base, its precision, example) -> its log-probability under the base: the same in every round."""

_MOST_REFERENCES = 100_000


def _reference(model: Any, base: Base, examples: Sequence[TextExample]) -> list[float]:
    """Σ log p of each answer under the base without any adapter, in nats."""
    keys = [(base.hash, base.dtype, base.quantized, example) for example in examples]
    unknown = list(dict.fromkeys(key for key in keys if key not in _REFERENCES))
    if len(_REFERENCES) + len(unknown) > _MOST_REFERENCES:
        _REFERENCES.clear()
        unknown = list(dict.fromkeys(keys))
    if unknown:
        was_training = model.training
        with without_adapters(model) as plain:
            found = answer_log_probs(plain, base, [key[-1] for key in unknown])
        model.train(was_training)
        _REFERENCES.update(zip(unknown, found, strict=True))
    return [_REFERENCES[key] for key in keys]


def _rows(model: Any, base: Base, examples: Sequence[Pair]) -> list[dict[str, Any]]:
    """Features with the reference's log-probabilities, under the names that TRL reads them by."""
    references = {
        name: _reference(model, base, [getattr(e, name) for e in examples]) for name in ("chosen", "rejected")
    }
    return [
        example.features() | {f"ref_{name}_logps": values[i] for name, values in references.items()}
        for i, example in enumerate(examples)
    ]


def _margins(model: Any, base: Base, examples: Sequence[Pair]) -> list[float]:
    """log π(chosen)/π_ref(chosen) − log π(rejected)/π_ref(rejected) of each pair, in nats."""
    sides = []
    for name in ("chosen", "rejected"):
        texts = [getattr(example, name) for example in examples]
        policy = answer_log_probs(model, base, texts)
        sides.append([p - r for p, r in zip(policy, _reference(model, base, texts), strict=True)])
    return [chosen - rejected for chosen, rejected in zip(*sides, strict=True)]


def _loss(margins: Sequence[float], beta: float) -> float:
    """−log σ(β · margin), the mean."""
    return sum(math.log1p(math.exp(-abs(beta * m))) + max(0.0, -beta * m) for m in margins) / max(1, len(margins))


def mean_loss(model: Any, base: Base, examples: Sequence[Pair]) -> float:
    """DPO's loss with β = 0.1, in nats: log 2 where the model is the base."""
    return _loss(_margins(model, base, examples), EVALUATED_BETA)


EVALUATED_BETA = 0.1
"""β of every reported loss, whatever the training used, so that runs compare."""


def evaluate(model: Any, base: Base, examples: Sequence[Pair], config: DataConfig) -> dict[str, float]:
    """held_out_loss, and preference_accuracy: how often the better answer gained more on the base than the worse one.

    Ties count half, so the base itself has 0.5. Raises ValueError for no examples.
    """
    if not examples:
        raise ValueError("evaluation needs held-out examples, got none: set data.held_out or data.held_out_fraction")
    margins = _margins(model, base, examples)
    hits = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    scores = by_group("preference_accuracy", hits, [example.group for example in examples])
    return {"held_out_loss": _loss(margins, EVALUATED_BETA), "margin": sum(margins) / len(margins)} | scores


def answer(model: Any, base: Base, examples: Sequence[Pair], config: DataConfig) -> list[str]:
    """The greedy answers."""
    return list(answer_all(model, base, [pair.chosen for pair in examples], config.max_new_tokens).answers)


class PreferenceTrainer(SpansRounds, DPOTrainer):
    """TRL's trainer over the rounds of a run, on pairs that are tokenized and have their reference already."""

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        # Without a reference model TRL would copy an adapter named "default" to be one. This one is never asked.
        super().__init__(*args, model=model, ref_model=copy.copy(model.get_base_model()), **kwargs)
        self.ref_model = None
        self.precompute_ref_logps = True  # set in the arguments, it would make TRL compute them again

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _options(train: TrainConfig) -> dict[str, Any]:
    return {"beta": train.beta, "max_length": None, "disable_dropout": False}


def _dry_run(model: Any, train: TrainConfig, batch: int, length: int) -> Any:
    """DPOTrainer's passes: each example is two sequences; what it does with their sums is small.

    Before them come the reference's log-probabilities of the round's examples.
    """
    causal_lm.dry_evaluation(model.eval(), BATCH, length)
    model.train()
    return causal_lm.dry_run(model, train, 2 * batch, length)


TASK = Task(
    name="preference",
    formats=("preference",),
    encode=encode,
    trainer=PreferenceTrainer,
    arguments=DPOConfig,
    evaluate=evaluate,
    mean_loss=mean_loss,
    answer=answer,
    options=_options,
    dry_run=_dry_run,
    dry_evaluation=causal_lm.dry_evaluation,
    rows=_rows,
)
