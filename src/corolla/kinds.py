"""`corolla adapters`: the kinds of adapter, and what each sends."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from corolla.terminal import Settings, Verbose, console, exit_codes, quiet


def adapters(
    config: Annotated[Path | None, typer.Argument(help="a TOML file; without one, the demo's")] = None,
    settings: Settings = None,
    verbose: Verbose = False,
) -> None:
    """List the kinds of adapter (adapter.kind) with what a client sends per round for the configured model.

    Every one is aggregated exactly by the rule that its row names, unless that says otherwise; r is the rank, of
    which the largest of clients.ranks is taken here. Of the base, only the configuration is read.
    """
    quiet(verbose)
    with exit_codes(cure="nothing was written"):
        from corolla.adapters import empty_model, find_base
        from corolla.adapters.kinds.catalogue import FACTORS, catalogue
        from corolla.simulations.simulate import load_config

        chosen = load_config(config, settings or ())
        spec = chosen.spec()
        with console.status("reading the model's configuration"):
            base = empty_model(find_base(chosen.model.name))
            entries = list(catalogue(base, lambda kind: chosen.model_copy(
                update={"adapter": chosen.adapter.model_copy(update={"kind": kind})}).spec()))  # fmt: skip
        table = Table(title=f"{chosen.model.name}, rank {spec.rank}", title_justify="left", box=None, pad_edge=False)
        for name in ("kind", "sends, of every module", "KiB a round", "aggregated by", "methods"):
            table.add_column(name, justify="right" if name.startswith("KiB") else "left")
        for entry in entries:
            size = "–" if entry.bytes_up is None else f"{entry.bytes_up / 1024:.1f}"
            table.add_row(entry.name, entry.coordinates, size, entry.rule, "all" if entry.rule == FACTORS else "flora")
        console.print(table)
        for entry in entries:
            if entry.bytes_up is None:
                console.print(f"{entry.name}: {entry.reason}", soft_wrap=True, highlight=False)
