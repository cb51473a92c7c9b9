"""Held-out loss and exact match by greedy decoding: deterministic, and the same wherever it is called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from corolla.adapters import Base
from corolla.client.tasks.scores import by_group
from corolla.client.tasks.task import IGNORED

BATCH, TOKENS = 32, 4096
"""Examples that are evaluated together, and their tokens with padding."""

LOGITS = 2**25
"""Most logits of a batch: 128 MiB in float32, of which there are three copies. An example is never split."""


def tokens_at_once(model: Any) -> int:
    """Most tokens of a batch whose logits are needed."""
    return int(min(TOKENS, LOGITS // model.config.get_text_config().vocab_size))


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to some examples, in their order."""

    examples: tuple[Any, ...]
    answers: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        """exact_match (0..1) with its number of examples, and both per group: `exact_match/<group>`."""
        pairs = zip(self.examples, self.answers, strict=True)
        hits = [float(answer.strip() == example.completion.strip()) for example, answer in pairs]
        return by_group("exact_match", hits, [example.group for example in self.examples])


def answer_all(model: Any, base: Base, examples: Sequence[Any], max_new_tokens: int) -> Evaluation:
    """The greedy answers of `model` to `examples`. Raises ValueError for no examples."""
    if not examples:
        raise ValueError("evaluation needs held-out examples, got none: set data.held_out or data.held_out_fraction")
    model.eval()
    answers = [""] * len(examples)
    for positions in _batches(examples):
        texts = _answer(model, base, [examples[i] for i in positions], max_new_tokens)
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text
    return Evaluation(tuple(examples), tuple(answers))


def _batches(examples: Sequence[Any], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Positions in batches of similar length, the same batches for the same examples."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
    batch: list[int] = []
    for position in order:
        if batch and (len(batch) == BATCH or (len(batch) + 1) * len(examples[position].input_ids) > tokens):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def mean_loss(model: Any, base: Base, examples: Sequence[Any]) -> float:
    """Mean negative log-likelihood per answer token (the end token included), in nats."""
    found = answer_log_probs(model, base, examples)
    return -sum(found) / max(1, sum(example.learned for example in examples))


@torch.no_grad()
def answer_log_probs(model: Any, base: Base, examples: Sequence[Any]) -> list[float]:
    """Σ log p(answer token | what stands before it) of each example, in nats, in their order."""
    model.eval()
    found = [0.0] * len(examples)
    for positions in _batches(examples, tokens_at_once(base.model)):
        batch = [examples[i] for i in positions]
        width = max(len(e.input_ids) for e in batch)
        pad = base.tokenizer.pad_token_id
        ids = torch.tensor([[*e.input_ids, *[pad] * (width - len(e.input_ids))] for e in batch], device=base.device)
        labels = torch.tensor([[*e.labels, *[IGNORED] * (width - len(e.labels))] for e in batch], device=base.device)
        mask = torch.tensor(
            [[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in batch], device=base.device
        )
        logits, targets = model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
        learned = targets != IGNORED
        losses = torch.nn.functional.cross_entropy(logits[learned].float(), targets[learned], reduction="none")
        sums = losses.new_zeros(len(batch), dtype=torch.float64).index_add(0, learned.nonzero()[:, 0], losses.double())
        for position, loss in zip(positions, sums.tolist(), strict=True):
            found[position] = -loss
    return found


@torch.no_grad()
def _answer(model: Any, base: Base, examples: Sequence[Any], max_new_tokens: int) -> list[str]:
    prompts = [example.prompt_ids for example in examples]
    width = max(map(len, prompts))
    pad = base.tokenizer.pad_token_id
    ids = torch.tensor([[*[pad] * (width - len(p)), *p] for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    ends = {base.tokenizer.eos_token_id} | {example.input_ids[-1] for example in examples}
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=sorted(ends), use_cache=True
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    return base.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
