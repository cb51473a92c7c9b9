"""What a client can afford: the largest rank, and then micro-batch, whose predicted memory fits into its budget."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil
import torch

from corolla.adapters import DEVICE_MAPS, choose_device, is_lora
from corolla.client.afford import Limits
from corolla.client.config import ClientSettings
from corolla.client.estimate import Memory, Work, adapted_shapes, estimate_memory

HEADROOM = 0.9
"""The part of a budget that is planned for: docs/memory.md has predictions beside measured peaks."""

FURTHER = 64 * 2**20
"""Bytes that a process on the CPU comes to need after planning: the tokenizer, examples, a trainer."""

CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round of one client: what comes at the most, in the last round, and what goes."""

    down: int
    up: int


@dataclass(frozen=True)
class Option:
    """One way to train. `process` are bytes of the process itself and of what it receives (on the CPU alone)."""

    limits: Limits
    memory: Memory
    process: float
    traffic: Traffic

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return self.memory.peak + self.process

    def fits(self, budget: float) -> bool:
        """Whether it stays within `budget` bytes, with some headroom."""
        return self.peak <= HEADROOM * budget


@dataclass(frozen=True)
class Plan:
    """A client's options, a rank each, the largest first: with the largest micro-batch that fits, or the smallest."""

    options: tuple[Option, ...]
    budget: float
    device: str
    length: int

    def fits(self, option: Option) -> bool:
        """Whether it stays within the plan's budget."""
        return option.fits(self.budget)

    @property
    def choice(self) -> Option:
        """The largest rank that fits. Raises ValueError where none does."""
        if fitting := [option for option in self.options if self.fits(option)]:
            return fitting[0]
        least = self.options[-1]
        raise ValueError(
            f"rank {least.limits.rank} with micro-batch {least.limits.micro_batch} and {self.length} tokens needs "
            f"{least.peak / HEADROOM / 2**30:.2f} GiB on {self.device}, of which {least.memory.frozen / 2**30:.2f} for "
            f"what the federation has learned, got {self.budget / 2**30:.2f}: use a smaller base, model.quantization, "
            "train.checkpointing, a smaller train.max_length, clients.max_rank or aggregation.download_rank"
        )


PROCESS = float(psutil.Process().memory_info().rss)
"""Bytes of this process on the CPU before any base is open."""


def available_memory(device: str) -> float:
    """Bytes that this process may use on a device (torch's name, "auto", or one of DEVICE_MAPS: on all GPUs).

    On the CPU what the machine has free and the process began with, and no more than its control group allows. Raises
    ValueError for a GPU that is not there.
    """
    if device != "auto" and device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"model.device = {device!r} needs a GPU, got none: name a budget (--memory), or use 'cpu'")
    if device in DEVICE_MAPS:
        return sum(available_memory(f"cuda:{i}") for i in range(torch.cuda.device_count()))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return float(torch.cuda.mem_get_info(chosen)[0] + torch.cuda.memory_reserved(chosen))
    free = psutil.virtual_memory().available + PROCESS
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return float(min(free, int(limit)) if limit.isdigit() else free)


def make_plan(
    settings: ClientSettings, budget: float | None = None, work: Work | None = None, process: float | None = None
) -> Plan:
    """The options for `budget` bytes (None: what the device has) and this work (None: examples of train.max_length).

    `process` are the bytes of the process by itself (None: on the CPU those that it began with). Raises ValueError for
    full fine-tuning, which has no rank, for a kind of adapter that is no LoRA, and for a GPU that is not there, and
    what `estimate_memory` raises.
    """
    if not set("".join(settings.expected.turns)) <= set("AB"):
        raise ValueError(
            f"a plan chooses the rank of an adapter, got a method that trains {settings.expected.turns[0]}: use another"
        )
    if settings.clients.kinds:
        raise ValueError(
            f"a plan is LoRA's, got clients.kinds = {[*settings.clients.kinds]}: leave it out, or give the rank"
        )
    if not is_lora(settings.adapter.kind):
        raise ValueError(
            f"a plan is LoRA's, got adapter.kind = {settings.adapter.kind!r}: use 'lora', or give the rank"
        )
    name, train = settings.model.device, settings.train
    budget = available_memory(name) if budget is None else budget
    device = "cuda" if name in DEVICE_MAPS else choose_device(name).type
    work = replace(work or Work(train.max_length), device=device)
    ranks = _ranks(settings.clients.max_rank)
    sizes = list(_sizes(Limits(train.batch_size, train.accumulation, 1)))
    grid = _Grid(settings, work, ranks, [size.micro_batch for size in sizes])
    options = []
    for rank in ranks:
        traffic = expected_traffic(settings, rank, work.targets)
        own = (PROCESS if process is None else process) + FURTHER + 2 * (traffic.down + traffic.up)
        tried = [
            Option(
                Limits(size.micro_batch, size.accumulation, rank),
                grid.memory(rank, size.micro_batch),
                own if device == "cpu" else 0.0,
                traffic,
            )
            for size in sizes
        ]
        options.append(next((option for option in tried if option.fits(budget)), tried[-1]))
    return Plan(tuple(options), budget, device, work.length)


def _ranks(largest: int) -> list[int]:
    """`largest`, and the powers of two below it."""
    return [largest, *(2**k for k in reversed(range(largest.bit_length())) if 2**k < largest)]


def _sizes(limits: Limits) -> list[Limits]:
    """The micro-batches of `limits` and below, the largest first."""
    found = [limits]
    while found[-1].micro_batch > 1 and (smaller := found[-1].halved()):
        found.append(smaller)
    return found


class _Grid:
    """Memory by rank and micro-batch, estimated where both are smallest or largest.

    The frozen part does not depend on the rank, and all else is a largest of sums that are linear in each: convex, so
    that in between it is at most what is interpolated.
    """

    def __init__(self, settings: ClientSettings, work: Work, ranks: Sequence[int], sizes: Sequence[int]) -> None:
        self.ranks, self.sizes = (min(ranks), max(ranks)), (min(sizes), max(sizes))
        self._known = {
            (rank, size): estimate_memory(settings, work, rank, size) for rank in self.ranks for size in self.sizes
        }

    def memory(self, rank: int, size: int) -> Memory:
        """At `rank` and micro-batch `size`."""
        ends = [_between(size, self.sizes, [self._known[end, other] for other in self.sizes]) for end in self.ranks]
        return _between(rank, self.ranks, ends)


def _between(at: int, ends: tuple[int, int], memories: Sequence[Memory]) -> Memory:
    (a, b), (low, high) = ends, memories
    part = (at - a) / (b - a) if b > a else 0.0
    names = [field.name for field in fields(Memory)]
    return Memory(**{n: (1 - part) * getattr(low, n) + part * getattr(high, n) for n in names})


def expected_traffic(settings: ClientSettings, rank: int, targets: str | tuple[str, ...] | None = None) -> Traffic:
    """What an adapter of `rank` costs in a round, in float32: its factors and heads, and what comes before training."""
    (shapes, heads), expected = adapted_shapes(settings, targets), settings.expected
    factors = {"A": sum(i for _, i in shapes.values()), "B": sum(o for o, _ in shapes.values())}
    head = 4 * sum(o * i for o, i in heads.values())
    start = 4 * rank * sum(factors.values()) if expected.begins else 0
    frozen = sum(4 * min(expected.frozen_rank, o, i) * (o + i) for o, i in shapes.values())
    up = max(sum(factors[name] for name in turn) for turn in expected.turns)
    return Traffic(frozen + start + head, 4 * rank * up + head)
