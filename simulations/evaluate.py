"""A run's checkpoint beside its base, on a file: answers to prompts, or multiple choice."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.adapters import Base, carrying
from corolla.aggregation import AdapterState
from corolla.client.choices import Likelihoods, encode_choices, score_choices
from corolla.client.data import Source, encode_source, read_questions, read_source
from corolla.client.tasks import find_task
from corolla.client.tasks.task import Row
from corolla.server.config import Config
from corolla.simulations.export import open_checkpoint

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """The metrics of the base and of base + adapter, and a line for each example with what both said."""

    base: Metrics
    tuned: Metrics
    lines: Iterable[Row]


def evaluate_checkpoint(
    run: Path, data: Path, round_number: int | None = None, answers: Path | None = None
) -> tuple[Metrics, Metrics]:
    """The metrics of the base and of the run's global model on a file; `answers` gets what both said.

    Rows with "choices" and "answer" are multiple choice (`corolla.client.choices`); all others are the task's own, in
    the same encoding and decoding as in the run.
    """
    config, base, adapter = open_checkpoint(run, round_number)
    source = read_source(str(data), config.data)
    questions = read_questions(source, config.data)
    if questions is not None:
        found = _choose(config, base, adapter, questions)
    else:
        found = _answer(config, base, adapter, source, bool(answers))
    if answers:
        answers.write_text("".join(json.dumps(line) + "\n" for line in found.lines))
    return found.base, found.tuned


def _answer(config: Config, base: Base, adapter: AdapterState, source: Source, with_answers: bool) -> Evaluated:
    task = find_task(config.train.task)
    examples = encode_source(source, config.data, task, base.tokenizer).examples
    metrics, given = [], []
    for part in ({}, adapter):
        with carrying(base.model, part) as model:
            metrics.append(task.evaluate(model.eval(), base, examples, config.data))
            given.append(task.answer(model.eval(), base, examples, config.data) if with_answers else [])
    lines = [
        {"prompt": example.prompt, "completion": example.completion, "base": before, "global": after}
        for example, before, after in (zip(examples, *given, strict=True) if with_answers else ())
    ]
    return Evaluated(metrics[0], metrics[1], lines)


def _choose(config: Config, base: Base, adapter: AdapterState, questions: list[Row]) -> Evaluated:
    if not base.model.can_generate():
        raise ValueError(
            f"multiple choice needs a language model, got a run with train.task = {config.train.task!r}: evaluate it "
            "on rows of its own"
        )
    examples = [encode_choices(base.tokenizer, config.data, question) for question in questions]
    found: list[Likelihoods] = []
    for part in ({}, adapter):
        with carrying(base.model, part) as model:
            found.append(score_choices(model, base, examples))
    columns: list[tuple[str, Any]] = []
    for name, one in zip(("base", "global"), found, strict=True):
        columns += [(name, one.picks()), (f"{name}_norm", one.picks_by_character())]
        columns += [(f"{name}_log_p", one.sums), (f"{name}_log_p_per_token", one.per_token())]
    lines = [question | {name: column[i] for name, column in columns} for i, question in enumerate(questions)]
    return Evaluated(found[0].metrics(), found[1].metrics(), lines)
