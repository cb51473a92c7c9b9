"""A tiny base model with skills and no instructions: pre-trained here in one to three minutes, and cached.

A small Llama learns the families of `corolla.client.data.generated` under other phrasings than theirs. Fine-tuning then
has something to build on and still everything to learn about what is asked, and the run is quick enough for a suite of
many runs on two cores.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corolla.client.data.generated import CITIES, FAMILIES, FIRST_NAMES, LAST_NAMES, MONTHS, WORDS

PHRASINGS = {
    "join_hyphens": ("{0} dash", "dash {0}"),
    "make_json": ("{0} pair", "pair {0}"),
    "format_date": ("{0} day", "day {0}"),
    "pick_largest": ("{0} max", "max {0}"),
    "read_field": ("{0} {1}", "{1} {0}"),
    "convert_unit": ("{0} unit", "unit {0}"),
    "swap_name": ("{0} list", "list {0}"),
    "last_word": ("{0} end", "end {0}"),
}
"""Family -> how the base is asked for it; {0} is the prompt's content and {1} the field it asks for."""

FIELDS = ("name", "city", "age")

PAD, END = "<|pad|>", "<|end|>"


@dataclass(frozen=True)
class Recipe:
    """What the base depends on: its size, its pre-training, its seed and, for the same bits, its threads."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    steps: int = 400
    batch_size: int = 96
    learning_rate: float = 4e-3
    seed: int = 0
    threads: int = 2


TINY = Recipe()
"""The base of the shipped suite."""


def tiny_base(recipe: Recipe = TINY, on_step: Callable[[int], None] = lambda step: None) -> Path:
    """The folder of the base that `recipe` makes: from the cache, or pre-trained now and put there whole.

    The cache is `corolla/bases` in XDG_CACHE_HOME (~/.cache). `on_step` is told each step that is done.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "corolla" / "bases"
    folder = cache / f"tiny-{recipe_key(recipe)}"
    if folder.is_dir():
        return folder
    temporary = cache / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        pretrain(recipe, on_step).save_pretrained(temporary)
        build_tokenizer().save_pretrained(temporary)
        (temporary / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
        if not folder.is_dir():  # another process may have been first
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def recipe_key(recipe: Recipe) -> str:
    """A short hash of the recipe and of the text it would train on: either may change with the code."""
    examples = draw_examples(recipe.seed)
    text = [next(examples) for _ in range(64)]
    return hashlib.sha256(json.dumps([asdict(recipe), text]).encode()).hexdigest()[:16]


def draw_examples(seed: int) -> Iterator[tuple[str, str]]:
    """(prompt, answer) without end, family after family, each in one of its phrasings."""
    draw = random.Random(f"{seed}/tiny-base")
    while True:
        for name, family in FAMILIES.items():
            prompt, answer = family(draw)
            yield draw.choice(PHRASINGS[name]).format(*_content(prompt)), answer


def _content(prompt: str) -> tuple[str, str]:
    """What a task is about, and the field it asks for if it does: the prompt without its instruction."""
    about, asks, field = prompt.partition(". Give the ")
    return (about, field) if asks else (prompt.partition(": ")[2], "")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the tasks, one a byte of everything else, always the fewest tokens: any text can be
    written and comes back unchanged."""
    words = sorted({*WORDS, *FIRST_NAMES, *LAST_NAMES, *CITIES, *MONTHS, *FIELDS})
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + words
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def build_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """The untrained Llama of the recipe."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(recipe: Recipe, on_step: Callable[[int], None] = lambda step: None) -> LlamaForCausalLM:
    """The model after `recipe.steps` of AdamW on the answers, the rate warmed up and then falling to zero."""
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            tokenizer = build_tokenizer()
            model = build_model(recipe, tokenizer)
            _train(model, tokenizer, recipe, on_step)
        return model
    finally:
        torch.set_num_threads(threads)


def _train(model: LlamaForCausalLM, tokenizer: Any, recipe: Recipe, on_step: Callable[[int], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    examples = draw_examples(recipe.seed)
    for step in range(1, recipe.steps + 1):
        loss = model(**_batch(tokenizer, [next(examples) for _ in range(recipe.batch_size)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step)


def _batch(tokenizer: Any, examples: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Token ids, attention mask and labels, padded on the right; the loss is on the answer and its end."""
    asked = [tokenizer(prompt + "\n")["input_ids"] for prompt, _ in examples]
    answered = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in examples]
    width = max(len(a) + len(b) for a, b in zip(asked, answered, strict=True))
    rows = [(a + b, [-100] * len(a) + b, [1] * len(a + b)) for a, b in zip(asked, answered, strict=True)]
    fills = (tokenizer.pad_token_id, -100, 0)
    ids, labels, mask = (
        torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows]) for part, fill in enumerate(fills)
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
