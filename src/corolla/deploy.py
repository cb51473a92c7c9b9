"""The commands of a deployed federation: keys, run, status, nodes, doctor, worker."""

import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from corolla.terminal import Settings, Verbose, console, describe_line, exit_codes, quiet

Federation = Annotated[
    str, typer.Option("--federation", "-f", help="a connection of Flower's config.toml, such as [superlink.prod]")
]
RunId = Annotated[int | None, typer.Option("--run", help="the run's id; default: the latest")]

nodes_app = typer.Typer(help="List the nodes of a federation, let one in, or revoke its key.")


def keys(
    out: Annotated[Path, typer.Option(help="the folder to write; nothing in it is overwritten")],
    nodes: Annotated[int, typer.Option(min=0, help="how many nodes, named node-1, node-2, …")] = 0,
    name: Annotated[list[str] | None, typer.Option(help="a node by name, such as hospital-1; may be repeated")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="a name or address that nodes reach the server by; may be repeated")
    ] = None,
    address: Annotated[str, typer.Option(help="where the operator reaches the SuperLink")] = "superlink:8000",
) -> None:
    """Make the keys of a federation: an authority, the server's certificate, and a key pair for every node.

    For development, and federations in one hand; docs/deploy.md says what production does instead.
    """
    with exit_codes():
        from corolla.server.keys import write_keys

        names = [*(f"node-{k}" for k in range(1, nodes + 1)), *(name or ())]
        written = write_keys(out.resolve(), names, ("superlink", "proxy", *(host or ())), address)
        for folder in written:
            console.print(f"{folder}", soft_wrap=True, highlight=False)
        console.print(f"{out / 'ca.key'} signs whoever nodes will trust as the server: keep it offline")


def run(
    config: Annotated[Path, typer.Argument(help="a TOML file")],
    federation: Federation,
    settings: Settings = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in run.out on the server, if one is there")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="start it, print its id and leave")] = False,
    verbose: Verbose = False,
) -> None:
    """Start a run on a deployed federation and follow it. Interrupting this command leaves the run going.

    run.out is a folder on the server, relative to where its ServerApp runs.
    """
    quiet(verbose)
    with exit_codes("the run goes on; corolla status tells how it is"):
        from corolla.server import deployed

        overrides = [*(settings or ()), *(["run.resume=true"] if resume else [])]
        run_id = deployed.start(config, overrides, federation)
        console.print(f"run {run_id} has begun", highlight=False)
        if not detach:
            deployed.follow(run_id, federation, lambda line: _show(line, verbose))
            console.print(f"run {run_id} has completed", highlight=False)


def _show(line: str, verbose: bool) -> None:
    from corolla.client.events import read_event

    if event := read_event(line):
        if event.get("kind") in ("round", "evaluation"):
            console.print(describe_line(event), soft_wrap=True, highlight=False)
            return
        line = str(event.get("message", line))
    elif not verbose:
        return
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def status(federation: Federation, run_id: RunId = None) -> None:
    """Where a run is: its round, every client with its rank, when it was last heard of, who was quarantined and why."""
    with exit_codes():
        from corolla.server import deployed

        found = deployed.read_status(federation, run_id)
        console.print(
            f"run {found.run_id}: {found.status} {found.details}, round {found.round} of {found.rounds}",
            highlight=False,
            markup=False,
        )
        table = Table("client", "rank", "rounds", "last round", "last loss", "last trouble", box=None)
        for name, client in sorted(found.clients.items()):
            loss = "" if client.loss is None else f"{client.loss:.3f}"
            table.add_row(
                escape(name),
                str(client.rank or ""),
                str(client.rounds),
                str(client.last or ""),
                loss,
                escape(client.trouble),
            )
        console.print(table)


def stop(federation: Federation, run_id: RunId = None) -> None:
    """Stop a run. What its rounds made is kept: corolla run --resume goes on with it."""
    with exit_codes():
        from corolla.server import control, deployed

        chosen = deployed.find_run(federation, run_id)
        control.stop_run(chosen, federation)
        console.print(f"run {chosen} is stopped", highlight=False)


@nodes_app.callback(invoke_without_command=True)
def nodes(context: typer.Context, federation: Federation) -> None:
    """List the nodes that the federation knows: name, state, last seen."""
    context.obj = federation
    if context.invoked_subcommand:
        return
    with exit_codes():
        from corolla.server import control

        table = Table("name", "node id", "status", "since", box=None)
        for node in control.list_nodes(federation):
            table.add_row(*(escape(str(node.get(key, ""))) for key in ("name", "node-id", "status", "since")))
        console.print(table)


@nodes_app.command("add")
def add(
    context: typer.Context,
    folders: Annotated[list[Path], typer.Argument(help="folders of nodes that `corolla keys` made, or .pub files")],
) -> None:
    """Let nodes in by their public keys. One that is in already stays."""
    with exit_codes():
        from corolla.server import control

        known = {str(node.get("name")) for node in control.list_nodes(context.obj)}
        for folder in folders:
            key = folder / "node.pub" if folder.is_dir() else folder
            name = key.parent.name if key.name == "node.pub" else key.stem
            if name in known:
                console.print(f"{name} is in already", highlight=False)
                continue
            control.add_node(key, name, context.obj)
            console.print(f"{name} may join", highlight=False)


@nodes_app.command("remove")
def remove(context: typer.Context, name: Annotated[str, typer.Argument(help="the node's name")]) -> None:
    """Revoke a node's key: it is refused from its next call on."""
    with exit_codes():
        from corolla.server import control

        found: list[Any] = [node for node in control.list_nodes(context.obj) if str(node.get("name")) == name]
        if not found:
            raise ValueError(f"a node of the federation was needed, got {name!r}: corolla nodes lists them")
        for node in found:
            control.remove_node(int(node["node-id"]), context.obj)
        console.print(f"{name} is out", highlight=False)


def worker(
    socket: Annotated[Path, typer.Option(help="the Unix socket to listen on, which the node's worker=… names")],
    verbose: Verbose = False,
) -> None:
    """Keep a node's base model open, and answer for its ClientApp, which Flower starts anew for every message."""
    quiet(verbose)
    with exit_codes("the node trains without a worker until it is back"):
        from corolla.client.events import use_json_logs
        from corolla.client.process import pass_over_libraries
        from corolla.client.worker import serve
        from corolla.client.worker import stop as stop_worker

        use_json_logs()
        server = serve(socket, first=pass_over_libraries)
        console.print(f"worker listens on {socket}", highlight=False)
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        while not stopping.wait(1):
            pass
        stop_worker(server, socket)


def doctor(
    server: Annotated[str | None, typer.Option(help="the server's proxy as HOST:PORT")] = None,
    secrets: Annotated[Path | None, typer.Option(help="the node's folder of keys")] = None,
    node_config: Annotated[
        str,
        typer.Option(help="what flower-supernode gets as --node-config, such as 'data=\"/data/train.jsonl\" rank=8'"),
    ] = "",
    base: Annotated[str | None, typer.Option("--base-hash", help="the hash of the federation's base model")] = None,
) -> None:
    """Examine this machine as a node: device, memory, disk, base, data, keys, server, clock. Exits with 1 if unfit."""
    quiet(False)
    with exit_codes():
        from flwr.common.config import parse_config_args

        from corolla.client.doctor import Patient, examine

        node = parse_config_args([node_config]) if node_config else {}
        findings = list(examine(Patient(node, secrets, server, base)))
        for finding in findings:
            mark = "[green]ok[/]  " if finding.fit else "[bold red]no[/]  "
            console.print(f"{mark} {finding.what}: ", end="", highlight=False)
            console.print(finding.found, markup=False, highlight=False, soft_wrap=True)
            if not finding.fit:
                console.print(f"     {finding.cure}", markup=False, highlight=False, soft_wrap=True)
    if not all(finding.fit for finding in findings):
        raise typer.Exit(1)
