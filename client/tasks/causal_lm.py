"""Causal language modelling: answers to prompts, turns of a chat, or plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from corolla.adapters import Base
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.evaluation import BATCH, answer_all, answer_log_probs, mean_loss, tokens_at_once
from corolla.client.tasks.packing import pack
from corolla.client.tasks.rounds import SpansRounds
from corolla.client.tasks.task import IGNORED, Row, Task


@dataclass(frozen=True)
class TextExample:
    """One tokenized example: `labels` is IGNORED on what is given, and `input_ids` on answers and their end tokens.

    `completion` is the last answer, whose prompt is `prompt`; None for plain text, which has no right answer.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt: str
    completion: str | None
    group: str

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Tokens of answers; the first token of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens before the last answer."""
        masked = [i for i, label in enumerate(self.labels) if label == IGNORED]
        return self.input_ids[: masked[-1] + 1 if masked else 0]

    def features(self) -> dict[str, Any]:
        """What SFTTrainer takes as it is."""
        return {"input_ids": list(self.input_ids), "labels": list(self.labels)}

    def sequences(self) -> Mapping[str, tuple[Sequence[int], Sequence[bool]]]:
        """The one sequence."""
        return {"": (self.input_ids, [label != IGNORED for label in self.labels])}


def encode(tokenizer: Any, config: DataConfig, row: Row) -> TextExample:
    """A row of format prompt-completion, chat or text as one sequence; the loss sees answers and their end tokens.

    Raises ValueError for chat messages where the tokenizer has no chat template, or one that rewrites what was said.
    """
    group = str(row.get("group") or "")
    if "text" in row:
        ids = (*tokenizer(str(row["text"]))["input_ids"], tokenizer.eos_token_id)
        return TextExample(ids, ids, "", None, group)
    if "messages" in row or _uses_chat(tokenizer, config):
        return _encode_chat(tokenizer, config, row, group)
    prompt, completion = str(row["prompt"]), str(row["completion"])
    given = tuple(tokenizer(prompt + "\n")["input_ids"])
    answer = (*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    return TextExample(given + answer, (IGNORED,) * len(given) + answer, prompt, completion, group)


def _uses_chat(tokenizer: Any, config: DataConfig) -> bool:
    if config.template == "chat" and not tokenizer.chat_template:
        raise ValueError("data.template = 'chat' needs a tokenizer with a chat template, got one without: use 'plain'")
    return config.template != "plain" and bool(tokenizer.chat_template)


def _messages(config: DataConfig, row: Row) -> list[dict[str, str]]:
    pairs = (("user", "prompt"), ("assistant", "completion"))
    said = row.get("messages") or [{"role": role, "content": str(row[column])} for role, column in pairs]
    system = [{"role": "system", "content": config.system}] if config.system and said[0]["role"] != "system" else []
    return system + [{"role": m["role"], "content": m["content"]} for m in said]


def _encode_chat(tokenizer: Any, config: DataConfig, row: Row, group: str) -> TextExample:
    """The turns by the tokenizer's chat template; every assistant's turn is learned, to its end-of-turn token.

    A template that rewrites an only answer gets the end-of-sequence token instead.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat messages need a tokenizer with a chat template, got one without: use prompt, completion")
    said = _messages(config, row)
    turns = [i for i, message in enumerate(said) if message["role"] == "assistant"]
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn in turns:
        before = tokenizer.apply_chat_template(said[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(said[: turn + 1], tokenize=False)
        answer = said[turn]["content"]
        if not before.startswith(done) or (not after.startswith(before + answer) and len(turns) > 1):
            raise ValueError(
                f"the chat template must leave earlier turns as they were, got turn {turn + 1} of {len(said)} "
                "rewritten: use data.template = 'plain' with prompt and completion"
            )
        given = tokenizer(before[len(done) :], add_special_tokens=False)["input_ids"]
        tail = after[len(before) :] if after.startswith(before + answer) else answer
        learned, text = _to_end_of_turn(tokenizer, tail)
        ids += [*given, *learned]
        labels += [IGNORED] * len(given) + learned
        done = before + text
    last = said[turns[-1]]["content"]
    prompt = next((m["content"] for m in reversed(said[: turns[-1]]) if m["role"] == "user"), "")
    return TextExample(tuple(ids), tuple(labels), prompt, last, group)


def _to_end_of_turn(tokenizer: Any, tail: str) -> tuple[list[int], str]:
    """The tokens of an answer up to its first special token (or with the end-of-sequence token), and their text."""
    encoded = tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    special = set(tokenizer.all_special_ids)
    for position, token in enumerate(ids):
        if token in special:
            return ids[: position + 1], tail[: spans[position][1]]
    return [*ids, tokenizer.eos_token_id], tail


def evaluate(model: Any, base: Base, examples: Sequence[TextExample], config: DataConfig) -> dict[str, float]:
    """held_out_loss, and exact_match of greedy answers over the examples that have an answer; both by group too.

    Nothing is generated where data.max_new_tokens is 0. Raises ValueError for no examples.
    """
    losses = losses_by_group(model, base, examples)
    asked = [example for example in examples if example.completion is not None and config.max_new_tokens]
    return losses | (answer_all(model, base, asked, config.max_new_tokens).metrics() if asked else {})


def losses_by_group(model: Any, base: Base, examples: Sequence[TextExample]) -> dict[str, float]:
    """held_out_loss, the mean over answer tokens in nats, with its number of examples, and both by group."""
    if not examples:
        raise ValueError("evaluation needs held-out examples, got none: set data.held_out or data.held_out_fraction")
    sums = answer_log_probs(model, base, examples)
    metrics = {}
    for group in ("", *sorted({example.group for example in examples} - {""})):
        mine = [i for i, example in enumerate(examples) if group in ("", example.group)]
        end = f"/{group}" if group else ""
        tokens = sum(examples[i].learned for i in mine)
        metrics[f"held_out_loss{end}"] = -sum(sums[i] for i in mine) / max(1, tokens)
        metrics[f"examples{end}"] = float(len(mine))
    return metrics


def answer(model: Any, base: Base, examples: Sequence[TextExample], config: DataConfig) -> list[str]:
    """The greedy answers."""
    return list(answer_all(model, base, examples, config.max_new_tokens).answers)


class CausalTrainer(SpansRounds, SFTTrainer):
    """TRL's trainer over the rounds of a run."""


def _options(train: TrainConfig) -> dict[str, Any]:
    return {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "padding_free": train.batching != "padded",
    }


def dry_run(model: Any, train: TrainConfig, batch: int, length: int) -> Any:
    """SFTTrainer's loss: by its fused head, with what its metrics take. Rows without padding are one long row."""
    inner = model.get_base_model()
    if "forward" not in inner.__dict__:
        add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    rows, columns = (batch, length) if train.batching == "padded" else (1, batch * length)
    return model(**made_up(model, rows, columns, masked=batch > 1), fused_lm_head=True).loss


def made_up(model: Any, rows: int, columns: int, masked: bool) -> dict[str, Any]:
    """Token ids that are their own labels; `masked` says who sees whom, as where examples differ in length."""
    ids = torch.ones((rows, columns), dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "labels": ids}
    if masked and model.config._attn_implementation in ("sdpa", "eager"):
        inputs["attention_mask"] = torch.ones((rows, 1, columns, columns), dtype=torch.bool, device=model.device)
    return inputs


@torch.no_grad()
def dry_evaluation(model: Any, examples: int, length: int) -> None:
    """As `answer_log_probs` does it, where every token is an answer's."""
    rows = max(1, min(examples, BATCH, tokens_at_once(model) // length))
    inputs = made_up(model, rows, length, masked=rows > 1)
    targets = inputs.pop("labels")[:, 1:].flatten()
    logits = model(**inputs).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).clone().float(), targets, reduction="none")


TASK = Task(
    name="causal-lm",
    formats=("prompt-completion", "chat", "text"),
    encode=encode,
    trainer=CausalTrainer,
    arguments=SFTConfig,
    evaluate=evaluate,
    mean_loss=mean_loss,
    answer=answer,
    options=_options,
    dry_run=dry_run,
    dry_evaluation=dry_evaluation,
    pack=pack,
)
