"""The laboratory's commands: what merging loses, the merge, methods against each other, and the page about runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from corolla.terminal import Verbose, console, exit_codes, quiet

if TYPE_CHECKING:
    from corolla.simulations.suite import SuiteResult
    from corolla.simulations.suite.cells import Outcome

AdapterPaths = Annotated[list[Path], typer.Argument(help="PEFT adapter folders of one base", metavar="ADAPTER…")]
Weights = Annotated[
    str | None,
    typer.Option(help="one number for each adapter, such as 3,1,1; they are scaled to sum 1", metavar="W,W,…"),
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="the adapters name their base differently, but it is one")]


def _numbers(weights: str | None) -> list[float]:
    try:
        return [float(part) for part in weights.split(",")] if weights else []
    except ValueError as error:
        raise ValueError(f"--weights must be numbers such as 3,1,1, got {weights!r}") from error


def noise(
    adapters: AdapterPaths,
    weights: Weights = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure to this file")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with plots to this file; it needs no network")] = None,
    any_base: AnyBase = False,
    verbose: Verbose = False,
) -> None:
    """What every method would make of these adapters, against their exact weighted sum.

    Ranks, alphas, rsLoRA, rank patterns and target modules may differ. No base model is needed.
    """
    quiet(verbose)
    with exit_codes():
        from corolla.simulations.laboratory import noise_of, read_adapters
        from corolla.simulations.report import render_noise

        found = noise_of(read_adapters(adapters, _numbers(weights), any_base))
        _print_noise(found)
        if json_file:
            json_file.write_text(json.dumps(found, indent=2))
        if html:
            html.write_text(render_noise(found, f"Noise of merging {', '.join(found['share'])}"))


def _print_noise(found: dict[str, Any]) -> None:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["share"].items())
    console.print(
        f"exact sum: norm {found['norm']:.4g} over {len(found['modules'])} modules; of it {shares}", soft_wrap=True
    )
    entropy = found["entropy"]
    console.print(
        f"its spectrum: entropy {entropy['exact']:.2f} nats, {entropy['clients']:.2f} of the adapters by themselves, "
        f"so {entropy['gap']:.2f} of disagreement; rank {entropy['suggested_rank']} would hold the widest module",
        soft_wrap=True,
    )
    table = Table("method", box=None, header_style="bold")
    for name in ("error", "cosine", "gain", "at own ranks", "download"):
        table.add_column(name, justify="right")
    reasons: dict[str, list[str]] = {}
    for name, figures in found["methods"].items():
        if "not_applicable" in figures:
            reasons.setdefault(figures["not_applicable"], []).append(name)
            continue
        shown = [f"{figures[key]:.2%}" if figures[key] is not None else "-" for key in ("relative_error",)]
        shown += [f"{figures[key]:.3f}" if figures[key] is not None else "-" for key in ("cosine", "gain")]
        shown += [f"{figures['client_error']:.2%}" if figures["client_error"] is not None else "-"]
        table.add_row(name, *shown, f"{max(figures['bytes_down'].values()) / 2**20:.2f} MiB")
    console.print(table)
    for reason, names in reasons.items():
        console.print(f"not applicable: {', '.join(names)}: {escape(reason)}", soft_wrap=True, highlight=False)


def merge(
    adapters: AdapterPaths,
    out: Annotated[Path, typer.Option(help="the folder to write: a PEFT adapter and certificate.json")],
    method: Annotated[str, typer.Option(help="an aggregation method; flora is exact")] = "flora",
    weights: Weights = None,
    rank: Annotated[int | None, typer.Option(help="cut every module to this rank")] = None,
    energy: Annotated[
        float | None, typer.Option(help="keep this part of every module's squared norm, such as 0.99")
    ] = None,
    any_base: AnyBase = False,
    verbose: Verbose = False,
) -> None:
    """Merge LoRA adapters of one base into one, and certify what that lost.

    Ranks, alphas, rsLoRA, rank patterns and target modules may differ; what is not plain LoRA (DoRA, PiSSA, …) is
    refused. No base model is needed.
    """
    quiet(verbose)
    with exit_codes():
        from corolla.simulations.laboratory import merge_adapters, read_adapters

        found = merge_adapters(read_adapters(adapters, _numbers(weights), any_base), out, method, rank, energy)
        proof = found.certificate
        verdict = f"exact: {proof.reason}" if proof.exact else f"not exact: {proof.reason}"
        console.print(f"{out}: rank {found.rank}, error {found.relative_error:.2e} of the exact sum", soft_wrap=True)
        console.print(escape(verdict), soft_wrap=True, highlight=False)


def compare(
    suite: Annotated[Path | None, typer.Argument(help="a suite's TOML file; without one, the tiny suite runs")] = None,
    out: Annotated[Path, typer.Option(help="the folder of all its runs, and of the table")] = Path("runs/compare"),
    markdown: Annotated[Path | None, typer.Option(help="write the table to this file as well")] = None,
    verbose: Verbose = False,
) -> None:
    """Run methods × settings × seeds on the same data and budget, and print one table of them all.

    What is done is kept: the same command goes on where it was stopped. Exits with 1 where a run failed.
    """
    quiet(verbose)
    with exit_codes("run the same command again to go on"):
        from corolla.simulations.simulate import Watch
        from corolla.simulations.suite import compare_suite

        columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("opening the base model", total=None)

            def on_cell(outcome: "Outcome", number: int, total: int) -> None:
                bar.update(task, completed=number, total=total)
                console.print(_describe_cell(outcome, number, total), soft_wrap=True, highlight=False)

            watch = Watch(on_step=lambda what: bar.update(task, description=what))
            result = compare_suite(suite, out=out, watch=watch, on_cell=on_cell)
        _print_suite(result)
        if markdown:
            markdown.write_text(result.to_markdown())
        console.print(f"table: {out / 'table.md'} and {out / 'table.json'}", soft_wrap=True)
    if result.failed:
        raise typer.Exit(1)


def _describe_cell(outcome: "Outcome", number: int, total: int) -> str:
    name = f"{number}/{total} {outcome.setting}, {outcome.row}, seed {outcome.seed}"
    if outcome.reason:
        colour = "red" if outcome.status == "failed" else "yellow"
        return f"{name}: [{colour}]{outcome.status}[/]: {escape(outcome.reason)}"
    from corolla.server.scores import describe, score_in

    return f"{name}: {describe(outcome.numbers, score_in(outcome.numbers))}"


def _print_suite(result: "SuiteResult") -> None:
    """A table a setting; reasons stand below it, where they have room."""
    for setting in result.suite.settings:
        title = f"{result.suite.title}: {setting}"
        table = Table(
            title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True, header_style="bold"
        )
        for position, name in enumerate(result.header()):
            lines = name.replace(" ", "\n")
            table.add_column(lines, no_wrap=position == 0, justify="right" if position else "left")
        reasons = []
        for name, n, *cells in result.lines(setting):
            status, colon, reason = cells[0].partition(": ")
            table.add_row(name, n, status, *cells[1:])
            if colon:
                reasons.append(f"{name} {status}: {reason}")
        console.print(table, *map(escape, reasons), sep="\n", soft_wrap=False)
    for note in result.notes():
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True, highlight=False)


def report(
    runs: Annotated[list[Path], typer.Argument(help="the folders of one or several runs")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(help="write every plot into this folder too, for a paper (pip install 'corolla[report]')"),
    ] = None,
    figure_format: Annotated[str, typer.Option("--format", help="of --figures: svg or pdf")] = "svg",
    verbose: Verbose = False,
) -> None:
    """Write one HTML page about runs: losses, noise, traffic, who took part, certificates. It needs no network."""
    quiet(verbose)
    with exit_codes():
        from corolla.simulations.report import write_figures, write_report

        drawn = write_figures(runs, figures, figure_format) if figures else []
        console.print(f"report: {write_report(runs, out)}", soft_wrap=True, markup=False)
        if drawn:
            console.print(f"figures: {figures} ({len(drawn)} files)", soft_wrap=True, markup=False)
