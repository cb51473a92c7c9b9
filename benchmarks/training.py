"""A client's local training against a bare script of PEFT and TRL that carries the same frozen adapter.

    python -m benchmarks.training                                  # SmolLM2-135M on the CPU
    python -m benchmarks.training --size 1b --device cuda --dtype bfloat16 --batch-size 8 --length 1024 --steps 20

Both train the same batches on one open base, in turns, and the best turn of each counts. Set-up is what passes before
the first forward pass of a round, the trainer's part of it what comes after the adapters are attached; tokens/s are of
what comes after it. Model FLOPs are 4 per token and weight of the base and of the frozen adapter (forward, and backward
to the activations) and 6 per weight of the trained adapter.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from benchmarks.memory import peak_bytes
from corolla.adapters import DEMO, AdapterSpec, Base, Source, attached, open_base, read_adapter, target_shapes
from corolla.aggregation import LowRankDelta
from corolla.client.config import TrainConfig
from corolla.client.tasks.causal_lm import TextExample
from corolla.client.training import train_round

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
"""Llamas of random weights; 1b has the shape of Llama-3.2-1B."""

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOPs a second by the makers' data sheets."""


@dataclass(frozen=True)
class Work:
    """What is trained: `steps` optimizer steps of `batch_size` examples of `length` tokens, all of them learned."""

    base: Base
    batch_size: int = 8
    length: int = 128
    steps: int = 4
    dtype: str = "float32"

    def examples(self) -> list[TextExample]:
        """Random tokens."""
        size = (self.steps * self.batch_size, self.length)
        rows = torch.randint(3, self.base.model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
        return [TextExample(tuple(row), tuple(row), "", None, "") for row in rows.tolist()]

    @property
    def tokens(self) -> int:
        """Of all steps."""
        return self.steps * self.batch_size * self.length


@dataclass(frozen=True)
class Turn:
    """One training: seconds before its first forward pass, of these the trainer's, seconds after it, and bytes at the
    peak (CUDA alone)."""

    setup: float
    trainer: float
    training: float
    peak: int


def random_base(size: str, device: str, dtype: str) -> Base:
    """A Llama of random weights, the same on every machine."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128_256 if size == "1b" else 512, num_key_value_heads=4, **SIZES[size])
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).requires_grad_(False).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2}, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    return Base(Source(f"random-{size}", Path(), ""), model, tokenizer, "random", dtype, model.device)


def frozen_adapter(base: Base, rank: int) -> dict[str, LowRankDelta]:
    """A global adapter of this rank on every linear module; nothing for rank 0."""
    generator = torch.Generator().manual_seed(1)
    shapes = target_shapes(base.model, AdapterSpec(RANK, 32.0, TARGETS)) if rank else {}
    return {
        m: LowRankDelta(*(torch.randn(size, generator=generator) * 0.01 for size in ((rank, i), (o, rank))))
        for m, (o, i) in shapes.items()
    }


def client_turn(work: Work, frozen: dict[str, LowRankDelta]) -> Turn:
    """A round of Corolla's client: attach, train."""
    config = TrainConfig(local_steps=work.steps, batch_size=work.batch_size, dtype=work.dtype, max_length=work.length)  # type: ignore[arg-type]
    examples = work.examples()

    def run() -> float:
        with attached(work.base.model, AdapterSpec(RANK, 32.0, TARGETS), frozen=frozen) as model:
            attached_at = time.perf_counter()
            train_round(model, work.base, config, examples, 1, 1, 0)
        return attached_at

    return _timed(work.base, run)


def bare_turn(work: Work, frozen: dict[str, LowRankDelta]) -> Turn:
    """The same by PEFT and TRL alone."""
    examples = work.examples()

    def run() -> float:
        model = _bare_model(work.base, frozen)
        attached_at = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            dataset = Dataset.from_list([example.features() for example in examples])
            arguments = _bare_arguments(work, folder)
            SFTTrainer(model, arguments, train_dataset=dataset, processing_class=work.base.tokenizer).train()
        model.unload()
        work.base.model.__dict__.pop("peft_config", None)
        work.base.model.__dict__.pop("forward", None)  # TRL's own, which it leaves there
        return attached_at

    return _timed(work.base, run)


def _bare_model(base: Base, frozen: dict[str, LowRankDelta]) -> Any:
    model: Any = get_peft_model(base.model, LoraConfig(r=RANK, lora_alpha=32, target_modules=list(TARGETS)))
    if frozen:
        rank = next(iter(frozen.values())).rank
        model.add_adapter("merged", LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
        state = model.state_dict()
        for module, delta in frozen.items():
            for name, tensor in (("A", delta.A), ("B", delta.B)):
                state[f"base_model.model.{module}.lora_{name}.merged.weight"].copy_(tensor)
        model.base_model.set_adapter(["default", "merged"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default." in name)
    return model


def _bare_arguments(work: Work, folder: str) -> SFTConfig:
    return SFTConfig(
        folder,
        max_steps=work.steps,
        per_device_train_batch_size=work.batch_size,
        train_sampling_strategy="sequential",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=work.dtype == "bfloat16",
        use_cpu=work.base.device.type == "cpu",
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _timed(base: Base, run: Callable[[], float]) -> Turn:
    gc.collect()
    cuda = base.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(base.device)
    with _first_forward(base.model) as seen:
        began = time.perf_counter()
        attached_at = run()
        if cuda:
            torch.cuda.synchronize(base.device)
        ended = time.perf_counter()
    peak = torch.cuda.max_memory_allocated(base.device) if cuda else 0
    return Turn(seen[0] - began, seen[0] - attached_at, ended - seen[0], peak)


@contextmanager
def _first_forward(model: torch.nn.Module) -> Iterator[list[float]]:
    """The time of every forward pass as it begins."""
    seen: list[float] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda *_: seen.append(time.perf_counter())
    )
    try:
        yield seen
    finally:
        handle.remove()


def best_turns(work: Work, frozen_rank: int, pairs: int) -> dict[str, Turn]:
    """The fastest turn of each, after one that does not count."""
    frozen = frozen_adapter(work.base, frozen_rank)
    turns: dict[str, list[Turn]] = {"client": [], "bare": []}
    for pair in range(pairs + 1):
        for name, turn in (("client", client_turn), ("bare", bare_turn)):
            found = turn(work, frozen)
            if pair:
                turns[name].append(found)
    return {name: min(found, key=lambda turn: turn.training) for name, found in turns.items()}


def utilisation(work: Work, frozen_rank: int, turn: Turn) -> float | None:
    """Model FLOPs by those that the GPU has; None where they are not known."""
    name = torch.cuda.get_device_name(work.base.device) if work.base.device.type == "cuda" else ""
    peak = next((flops for key, flops in PEAKS.items() if key in name), None)
    if peak is None:
        return None
    factors = sum(o + i for o, i in target_shapes(work.base.model, AdapterSpec(RANK, 32.0, TARGETS)).values())
    weights = sum(p.numel() for p in work.base.model.parameters())
    flops = 4 * (weights + frozen_rank * factors) + 6 * RANK * factors
    return flops * work.tokens / turn.training / peak


def client_over_bare(frozen_rank: int) -> tuple[str, float, float]:
    """(what, tokens/s of a client, tokens/s of the bare script): SmolLM2-135M in float32 on the CPU."""
    work = Work(open_base(DEMO, device="cpu"), batch_size=4, steps=3)
    best = best_turns(work, frozen_rank, pairs=2)
    what = f"a client's tokens/s / bare PEFT + TRL's, SmolLM2-135M, rank {RANK}, frozen adapter of rank {frozen_rank}"
    return what, *(work.tokens / best[name].training for name in ("client", "bare"))  # type: ignore[return-value]


def setup_over_half_a_second() -> tuple[str, float, float]:
    """(what, seconds from a model with its adapters to its first forward pass, 0.5)."""
    work = Work(open_base(DEMO, device="cpu"), batch_size=1, steps=1, length=16)
    turns = [client_turn(work, frozen_adapter(work.base, 64)) for _ in range(4)]
    what = "a trainer's set-up in a round / 0.5 s, SmolLM2-135M, frozen adapter of rank 64"
    return what, min(turn.trainer for turn in turns[1:]), 0.5


def further_client() -> tuple[str, float, float]:
    """(what, resident bytes that each further client of one process adds at the peak, its adapter and AdamW state)."""
    work = Work(open_base(DEMO, device="cpu"), batch_size=2, steps=1, length=32)
    spec, replies = AdapterSpec(64, 128.0, TARGETS), []
    config = TrainConfig(local_steps=1, batch_size=2)

    def train_one() -> None:
        with attached(work.base.model, spec) as model:
            train_round(model, work.base, config, work.examples(), 1, 1, 0)
            replies.append(read_adapter(model))

    def train_some(count: int) -> None:
        for _ in range(count):
            train_one()

    train_some(2)
    alone = peak_bytes(lambda: train_some(1))
    five = peak_bytes(lambda: train_some(5))
    own = 3 * sum(delta.A.nbytes + delta.B.nbytes for delta in replies[0].values())
    return "what a further client adds / its adapter and AdamW state, rank 64, MiB", (five - alone) / 4, own


def main(
    size: Annotated[str, typer.Option(help="smollm2 (the demo's weights), 1b or tiny (random weights)")] = "smollm2",
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the base and of autocast")] = "float32",
    batch_size: Annotated[int, typer.Option()] = 4,
    length: Annotated[int, typer.Option(help="tokens of an example")] = 128,
    steps: Annotated[int, typer.Option()] = 3,
    pairs: Annotated[int, typer.Option(help="turns of each that count")] = 2,
) -> None:
    """Prints tokens/s of the client and of the bare script, with frozen adapters of rank 0, 64 and 160."""
    base = open_base(DEMO, dtype, device) if size == "smollm2" else random_base(size, device, dtype)
    work = Work(base, batch_size, length, steps, dtype)
    columns = (
        "frozen rank",
        "client tokens/s",
        "bare tokens/s",
        "ratio",
        "set-up, s",
        "trainer's, s",
        "MFU",
        "peak, MiB",
    )
    table = Table(*columns, title=f"{size}, {device}, {dtype}, {batch_size} × {length} tokens, rank {RANK}")
    for rank in (0, 64, 160):
        best = best_turns(work, rank, pairs)
        client, bare = (work.tokens / best[name].training for name in ("client", "bare"))
        part, peak = utilisation(work, rank, best["client"]), best["client"].peak
        shown = ("–" if part is None else f"{part:.1%}", f"{peak / 2**20:.0f}" if peak else "–")
        table.add_row(
            *(f"{rank}", f"{client:.0f}", f"{bare:.0f}", f"{client / bare:.3f}"),
            *(f"{best['client'].setup:.2f}", f"{best['client'].trainer:.2f}", *shown),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
