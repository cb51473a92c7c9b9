"""`corolla data`: what the loss will see of a file, and who will hold which rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from corolla.terminal import Settings, Verbose, console, exit_codes, quiet

if TYPE_CHECKING:
    from corolla.client.data.show import Holdings

app = typer.Typer(help="See what the loss sees of a file, and who holds which rows.", no_args_is_help=True)


@app.command()
def preview(
    file: Annotated[str, typer.Argument(help="a file, a folder or a hub id, as in data.train")],
    config: Annotated[Path | None, typer.Option(help="the run's TOML file; without one, the demo's settings")] = None,
    settings: Settings = None,
    rows: Annotated[int, typer.Option(help="examples to show", min=0)] = 3,
    verbose: Verbose = False,
) -> None:
    """The format of a file, what of it is left out and why, and its first examples as the model will see them.

    What the loss sees is between » and «, underlined; everything else is given. Only the tokenizer is opened.
    """
    quiet(verbose)
    with exit_codes(cure="nothing was written"):
        from corolla.adapters import find_base, open_tokenizer
        from corolla.client.data import encode_source, read_source
        from corolla.client.data.show import shown_examples
        from corolla.client.tasks import find_task
        from corolla.simulations.simulate import load_config

        chosen = load_config(config, settings or ())
        tokenizer, task = open_tokenizer(find_base(chosen.model.name)), find_task(chosen.train.task)
        found = encode_source(read_source(file, chosen.data), chosen.data, task, tokenizer, chosen.train.max_length)
        lengths = sorted(example.length for example in found.examples) or [0]
        console.print(
            f"{file}: format {found.format}, {len(found.source)} rows, {len(found.examples)} examples of {lengths[0]} "
            f"to {lengths[-1]} tokens, the middle one {lengths[len(lengths) // 2]}; the loss sees "
            f"{sum(example.learned for example in found.examples)} of {sum(lengths)}",
            soft_wrap=True,
        )
        left_out = {reason: number for reason, number in found.left_out.items() if number}
        told = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in left_out.items())
        console.print(f"[yellow]left out[/]: {told}" if told else "nothing is left out")
        for number, sequences in enumerate(shown_examples(found, tokenizer, rows), 1):
            for name, parts in sequences.items():
                text = Text(f"{number} {name}\n".replace(" \n", "\n"), style="bold")
                for words, learned in parts:
                    text.append(
                        f"»{words}«" if learned else words, style="not bold green underline" if learned else "not bold"
                    )
                console.print(text, soft_wrap=True)


@app.command()
def partition(
    config: Annotated[Path | None, typer.Argument(help="the run's TOML file; without one, the demo's settings")] = None,
    settings: Settings = None,
    plot: Annotated[Path | None, typer.Option(help="also draw it to this file: .png, .svg, .pdf")] = None,
    verbose: Verbose = False,
) -> None:
    """Who holds what: the rows of every simulated client, by label or group. No model is opened."""
    quiet(verbose)
    with exit_codes(cure="nothing was written"):
        from corolla.client.data.show import holdings
        from corolla.simulations.simulate import load_config

        chosen = load_config(config, settings or ())
        found = holdings(chosen.data, chosen.clients.count, chosen.run.seed)
        console.print(_table(found))
        if plot:
            _draw(found, plot)
            console.print(f"plot: {plot}", soft_wrap=True)


def _table(found: "Holdings") -> Table:
    table = Table("client", "train", "held out", f"training rows by {found.column}")
    for client, counts in found.train.items():
        told = ", ".join(f"{value} {counts[value]}" for value in found.values if counts.get(value))
        table.add_row(client, str(sum(counts.values())), str(found.held_out[client]), told)
    return table


def _draw(found: "Holdings", path: Path) -> None:
    """A bar a client, its rows by value. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'corolla[report]'") from error
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(found.train)), layout="constrained")
    axes = figure.subplots()
    clients = list(found.train)[::-1]
    left = [0] * len(clients)
    for value in found.values:
        widths = [found.train[client].get(value, 0) for client in clients]
        axes.barh(clients, widths, left=left, label=value)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("training rows")
    if len(found.values) > 1:
        figure.legend(title=found.column, loc="outside right upper", fontsize="small")
    figure.savefig(path)
