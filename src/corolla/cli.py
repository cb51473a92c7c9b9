"""The command line: every command is a thin shell around a function of the package."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from corolla import __version__, data, deploy, laboratory
from corolla.evaluate import evaluate
from corolla.kinds import adapters
from corolla.plan import plan
from corolla.terminal import RunPath, Settings, Verbose, console, describe_line, exit_codes, quiet

if TYPE_CHECKING:
    from corolla.server.config import Config
    from corolla.simulations.alone import Comparison

app = typer.Typer(
    help="Fine-tune language models across clients that share no data, with LoRA adapters of different ranks.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
for command in (plan, adapters, evaluate, laboratory.compare, laboratory.noise, laboratory.merge, laboratory.report):
    app.command()(command)
for command_of_deployment in (deploy.keys, deploy.run, deploy.status, deploy.stop, deploy.doctor, deploy.worker):
    app.command(rich_help_panel="Deployment")(command_of_deployment)
app.add_typer(deploy.nodes_app, name="nodes", rich_help_panel="Deployment")
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    """Fine-tune language models across clients that share no data, with LoRA adapters of different ranks."""
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help="a TOML file; without one, the demo runs")] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; default: run.out")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="go on with the run in this folder; --set run.rounds=9 adds rounds")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that is in the folder")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a federation on this machine: every client of the configuration, one after another or on Ray.

    Writes the configuration, one line of metrics a round, checkpoints and the PEFT adapter into the run's folder.
    All settings with their defaults: corolla settings.
    """
    quiet(verbose)
    with exit_codes():
        from corolla.client.process import pass_over_libraries
        from corolla.server.folder import RunFolder
        from corolla.simulations.simulate import Watch, load_config
        from corolla.simulations.simulate import simulate as run_simulation

        if resume and (config or out or overwrite):
            raise ValueError(
                "--resume goes on with a run and its own configuration: give changes of [run] by --set alone"
            )
        out = resume or out
        chosen = RunFolder.open(resume).config() if resume else load_config(config, settings or ())
        pass_over_libraries()
        with _progress(chosen) as watch:
            run = run_simulation(
                config,
                overrides=settings or (),
                out=out,
                resume=resume is not None,
                overwrite=overwrite,
                watch=Watch(*watch),
            )
        if run.comparison:
            console.print(_table(run.comparison, run.config))
        _say_where(run)


def _say_where(run: Any) -> None:
    from corolla.server.scores import describe_change, score_of

    lines = run.metrics
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    for name, words in (("mean", ""), ("server", "server: ")):
        found = [line[name] for line in evaluations if name in line]
        if found and (change := describe_change(found[0], found[-1], score_of(lines))):
            console.print(f"{words}{change}")
    adapter = run.folder / "adapter"
    result = f"adapter: {adapter}" if adapter.exists() else "no adapter: corolla export --merged writes the model"
    console.print(f"run: {run.folder}   {result}", soft_wrap=True)


@contextmanager
def _progress(config: "Config") -> Iterator[tuple[Any, Any]]:
    """A bar that counts the clients' answers, and a line for every round."""
    run, count = config.run, config.clients.count
    chosen = run.participants(count)
    evaluations = {"never": 0, "ends": 2, "each": run.rounds + 1}[run.evaluate]
    alone = (run.rounds - (config.aggregation.method == "flora" and run.keep_replies) + 1) * count if run.alone else 0
    total = count + run.rounds * chosen + evaluations * count + alone
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("opening the base model", total=total)
        doing = {"query.hello": "clients say hello", "train": "training", "evaluate": "evaluating"}

        def on_step(kind: str) -> None:
            bar.update(task, advance=1, description=doing.get(kind, kind))

        yield on_step, lambda line: console.print(describe_line(line), soft_wrap=True, highlight=False)


def _table(comparison: "Comparison", config: "Config") -> Table:
    """The comparison's metric, a score in percent: a row a group, a column a model."""
    factor, unit = (100, ", %") if comparison.is_score else (1, "")
    whole, mean = (".0f", ".1f") if comparison.is_score else (".3f", ".3f")
    table = Table(title=f"{comparison.title} on held-out examples{unit}", title_justify="left")
    table.add_column("", no_wrap=True)
    for position, column in enumerate(comparison.columns):
        rank = config.clients.rank(position - 1) if column not in ("base", "global") else None
        table.add_column(f"{column}\nalone\nrank {rank}" if rank else column, justify="right")
    for group in comparison.groups:
        cells = (column.get(group) for column in comparison.columns.values())
        table.add_row(group, *("–" if value is None else f"{factor * value:{whole}}" for value in cells))
    table.add_section()
    averages = (f"{factor * comparison.average(c):{mean}}" for c in comparison.columns)
    table.add_row("average", *averages, style="bold")
    return table


@app.command()
def settings() -> None:
    """List every setting with its meaning and its default, and what the demo sets."""
    from corolla.server.config import Config
    from corolla.simulations.simulate import load_config

    demo = load_config(None, ()).flat()
    table = Table("setting", "default", "demo", "meaning", box=None)
    for key, value in Config().flat().items():
        section, name = key.split(".")
        meaning = Config.model_fields[section].annotation.model_fields[name].description or ""  # type: ignore[union-attr]
        table.add_row(key, str(value) or "-", "" if demo[key] == value else str(demo[key]), meaning)
    console.print(table)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="the folder to write")],
    merged: Annotated[
        bool, typer.Option("--merged", help="a full float32 checkpoint instead of a PEFT adapter")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="cut the adapter to this rank, for engines that cap it")] = None,
    energy: Annotated[
        float | None, typer.Option(help="keep this part of the squared norm of every module, such as 0.99")
    ] = None,
    round_number: Annotated[
        int | None, typer.Option("--round", help="the checkpoint of this round; default: the last")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write a run's result as a PEFT adapter (alpha = rank), or merged into a full checkpoint.

    What is written is loaded again and its logits are compared with the running model's.
    """
    quiet(verbose)
    with exit_codes():
        from corolla.simulations.export import export_checkpoint

        report = export_checkpoint(run, out, merged, rank, energy, round_number)
        console.print(
            f"{out}: rank {report.rank}, cut {report.cut_error:.2e} of the update's norm, "
            f"logits within {report.logits_error:.1e} of the running model",
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(app())
