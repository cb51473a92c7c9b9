"""`corolla plan`: what each rank holds in memory and sends, and which one a budget allows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from corolla.terminal import Settings, Verbose, console, exit_codes, quiet

if TYPE_CHECKING:
    from corolla.client.plan import Plan


def plan(
    config: Annotated[Path | None, typer.Argument(help="the run's TOML file; without one, the demo's settings")] = None,
    model: Annotated[str | None, typer.Option(help="instead of model.name: a hub id, a folder, a .gguf file")] = None,
    device: Annotated[str | None, typer.Option(help="instead of model.device: cpu, cuda, cuda:1, balanced")] = None,
    memory: Annotated[float | None, typer.Option(help="the budget in GiB; default: what the device has", min=0)] = None,
    length: Annotated[int | None, typer.Option(help="tokens of an example; default: train.max_length", min=2)] = None,
    settings: Settings = None,
    verbose: Verbose = False,
) -> None:
    """Predict memory and traffic of a client for each rank, and pick rank and micro-batch for a budget.

    Of the base, only the configuration is read. clients.ranks = "auto" makes every node do the same for itself, with
    its own longest example. Exits with 1 where no rank fits.
    """
    quiet(verbose)
    with exit_codes(cure="nothing was written"):
        from corolla.client.estimate import Work
        from corolla.client.plan import HEADROOM, make_plan
        from corolla.simulations.simulate import load_config

        named = [f"model.{k}={json.dumps(v)}" for k, v in (("name", model), ("device", device)) if v]
        chosen = load_config(config, [*(settings or ()), *named])
        budget = memory * 2**30 if memory is not None else None
        with console.status("estimating"):
            found = make_plan(chosen.settings(), budget, Work(length or chosen.train.max_length))
        title = f"{chosen.model.name} on {found.device}, {found.length} tokens, {found.budget / 2**30:.2f} GiB"
        console.print(_table(found, title))
        best = found.choice
        console.print(
            f"rank {best.limits.rank}, micro-batch {best.limits.micro_batch} × {best.limits.accumulation}: "
            f"{best.peak / 2**30:.2f} GiB of the {HEADROOM * found.budget / 2**30:.2f} that are planned for",
            soft_wrap=True,
        )


def _table(found: "Plan", title: str) -> Table:
    """A row a rank, in MiB; the micro-batch is the largest that fits, or the smallest."""
    table = Table(title=f"{title} (MiB)", title_justify="left", box=None, header_style="bold", pad_edge=False)
    names = ("rank", "batch", "process", "base", "frozen", "adapter", "optimizer", "activations", "peak", "fits")
    broken = {"optimizer": "opti-\nmizer", "activations": "activ-\nations"}
    for name in (*names, "down", "up"):
        table.add_column(broken.get(name, name), justify="right")
    for option in found.options:
        parts = (option.process, *(getattr(option.memory, name) for name in names[3:8]), option.peak)
        sent = (option.traffic.down, option.traffic.up)
        shown = [f"{size / 2**20:.0f}" for size in parts] + ["yes" if found.fits(option) else "no"]
        sizes = (str(option.limits.rank), str(option.limits.micro_batch))
        table.add_row(*sizes, *shown, *(f"{size / 2**20:.1f}" for size in sent))
    return table
