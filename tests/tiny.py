"""Tiny random models, made in a moment and identical on every machine."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SqueezeBertConfig,
    SqueezeBertModel,
)

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=special[2:]
    )
    fast.chat_template = CHAT
    return fast


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, 32 wide, grouped key/value projections of 16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers are Conv1D: weights stored (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder as a hub snapshot has it."""
    tiny_llama(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_bert(folder: Path) -> Path:
    """An encoder without a classifier, as sentence encoders are published."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=256,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_squeezebert(folder: Path) -> Path:
    """An encoder whose layers are convolutions of size 1, some in groups."""
    torch.manual_seed(0)
    groups = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate")} | {"output_groups": 2}
    config = SqueezeBertConfig(
        vocab_size=264, hidden_size=32, embedding_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=256, **groups,
    )  # fmt: skip
    SqueezeBertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
