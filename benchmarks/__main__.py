"""Prints the table of ratios."""

import os
import platform
import warnings

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.aggregation import dense_svd_over_compress, stack_over_copy
from benchmarks.training import client_over_bare


def main() -> None:
    """Runs every benchmark, one after another."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    table = Table("what", "first", "second", "ratio", title=f"{platform.machine()}, {torch.get_num_threads()} threads")
    for benchmark in (stack_over_copy, dense_svd_over_compress, client_over_bare):
        what, first, second = benchmark()
        table.add_row(what, f"{first:.3f}", f"{second:.3f}", f"{first / second:.2f}")
    Console(width=160).print(table)


main()
