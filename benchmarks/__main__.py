"""Prints the table of ratios."""

import os
import platform
import warnings
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.aggregation import (
    certified_over_qr,
    dense_svd_over_compress,
    noise_over_qr,
    slots_over_copy,
    stack_memory,
    stack_over_copy,
    streamed_memory,
)
from benchmarks.training import client_over_bare, further_client, setup_over_half_a_second


def main() -> None:
    """Runs every benchmark, one after another."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    table = Table("what", "first", "second", "ratio", title=f"{platform.machine()}, {torch.get_num_threads()} threads")
    benchmarks = (
        stack_over_copy,
        slots_over_copy,
        stack_memory,
        streamed_memory,
        certified_over_qr,
        noise_over_qr,
        dense_svd_over_compress,
        *(partial(client_over_bare, rank) for rank in (0, 64, 160)),
        setup_over_half_a_second,
        further_client,
    )
    for benchmark in benchmarks:
        what, first, second = benchmark()
        if what.endswith("MiB"):
            first, second = first / 2**20, second / 2**20
        table.add_row(what, f"{first:.3f}", f"{second:.3f}", f"{first / second:.2f}")
    Console(width=160).print(table)


main()
