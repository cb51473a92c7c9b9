"""A client's predicted peak of memory against the measured one, in a process of its own.

    python -m benchmarks.predictions FOLDER --rank 16 --batch 8 --length 256 [--frozen 64] [--device cuda] [--set K=V …]

FOLDER holds a base with its tokenizer. The client trains one round of three steps on made-up text of up to LENGTH
tokens, beside a frozen adapter of rank FROZEN, and evaluates: as it would for a server. On the CPU the peak is
that of the process, on CUDA what torch allocated. Prints one line of JSON, in bytes; Linux alone.
"""

import gc
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.memory import reset_peak, resident, resident_peak
from corolla.adapters import find_base, open_tokenizer
from corolla.aggregation import LowRankDelta
from corolla.client.config import ClientSettings
from corolla.client.estimate import Work
from corolla.client.local import Client
from corolla.client.open import open_client
from corolla.client.plan import Option, make_plan
from corolla.client.protocol import Assignment, Order, share_digest
from corolla.server.config import Config

STEPS = 3


def build_settings(values: dict[str, Any], frozen: int, more: list[str]) -> ClientSettings:
    """One client that adapts every linear layer, with `values` and what `more` sets."""
    values = {
        "data.max_new_tokens": 0,
        "data.held_out_fraction": 0.2,
        "adapter.target_modules": "all-linear",
        "clients.count": 1,
        "clients.ranks": "auto",
        "train.local_steps": STEPS,
        "run.threads": 1,
    } | values
    config = Config.load(None, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *more])
    settings = config.settings()
    return settings.model_copy(update={"expected": settings.expected.model_copy(update={"frozen_rank": frozen})})


def write_rows(path: Path, tokenizer: Any, count: int, length: int, labels: tuple[str, ...]) -> None:
    """Texts of different lengths, every other one of `length` tokens with what encoding adds."""
    letters = "etaoin shrdlu"
    with path.open("w") as file:
        for row in range(count):
            text = letters[row % 13] * (length if row % 2 == 0 else length // 2 + row % 7)
            ids = tokenizer(text)["input_ids"][: length - 3 if row % 2 == 0 else length // 2]
            found = {"text": tokenizer.decode(ids, skip_special_tokens=True)}
            file.write(json.dumps(found | ({"label": labels[row % 2]} if labels else {})) + "\n")


def first_order(client: Client, frozen_rank: int) -> Assignment:
    """An order of round two with a frozen part, through its message."""
    hello = client.hello()
    generator = torch.Generator().manual_seed(0)
    frozen = {}
    for module, (o, i) in hello.shapes.items() if frozen_rank else ():
        rank = min(frozen_rank, o, i)
        sizes = ((rank, i), (o, rank))
        frozen[module] = LowRankDelta(*(torch.randn(size, generator=generator) * 0.01 for size in sizes))
    order = Order(2, client.rank, "AB", 2, 0, "model", share_digest(frozen, {}), hello.base_hash)
    return Assignment.unpack(Assignment(order, frozen, {}).pack())


def measure(option: Option, settings: ClientSettings) -> float:
    """The peak of opening the client, a round of training and an evaluation."""
    cuda = settings.model.device != "cpu"
    reset_peak()
    client = open_client(settings, {}, option.limits)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    assignment = first_order(client, settings.expected.frozen_rank)
    client.train(assignment).pack()
    client.evaluate(assignment)
    return float(torch.cuda.max_memory_allocated()) if cuda else resident_peak()


def main(
    model: str,
    rank: Annotated[int, typer.Option()] = 16,
    batch: Annotated[int, typer.Option()] = 8,
    length: Annotated[int, typer.Option(help="tokens of the longest example")] = 256,
    frozen: Annotated[int, typer.Option(help="rank of the frozen adapter")] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
    more: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE")] = None,
) -> None:
    """Prints the parts of the prediction, the measured peak, and both beyond the process itself."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        values = {"model.name": model, "model.device": device, "data.train": str(data), "clients.max_rank": rank}
        values |= {"train.batch_size": batch, "train.max_length": length}
        settings = build_settings(values, frozen, more or [])
        tokenizer = open_tokenizer(find_base(model))
        write_rows(data, tokenizer, 2 * STEPS * batch, length, settings.data.labels)
        held_out = round(settings.data.held_out_fraction * 2 * STEPS * batch)
        gc.collect()
        before = resident() if device == "cpu" else 0.0
        option = make_plan(settings, 2.0**60, Work(length, held_out), before).choice
        peak = measure(option, settings)
    parts = {name: getattr(option.memory, name) for name in ("base", "frozen", "adapter", "optimizer", "activations")}
    predicted, measured = option.peak - before, peak - before
    parts |= {"process": before, "predicted": predicted, "measured": measured, "ratio": predicted / measured}
    print(json.dumps(parts))


if __name__ == "__main__":
    typer.run(main)
