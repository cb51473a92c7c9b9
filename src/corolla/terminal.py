"""What all commands share: one console, quiet libraries, and exit codes that mean something."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours is rich's

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

console = Console()
RunPath = Annotated[Path, typer.Argument(help="the folder of a run, for example runs/latest")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="change one setting, such as run.rounds=5")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show the log, Flower's included")]


LOUD = ("transformers", "trl", "peft", "datasets", "accelerate", "httpx", "torch", "lm_eval", "bitsandbytes")
"""Libraries that give advice."""


def quiet(verbose: bool) -> None:
    """Other libraries' progress and advice off; warnings of ours and of Flower shown."""
    level = logging.INFO if verbose else logging.WARNING
    import flwr.common.logger  # noqa: F401  (it makes the handler that is taken away here)

    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.setLevel(level)
    flower.propagate = True
    logging.basicConfig(
        level=level, format="%(message)s", datefmt="%X", handlers=[RichHandler(console=console, show_path=False)]
    )
    if not verbose:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        warnings.filterwarnings("ignore")
        for name in LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)


def _stop(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(signum).name)


@contextmanager
def exit_codes(cure: str = "go on with --resume") -> Iterator[None]:
    """Errors that a user can mend become one message and exit code 1; an interrupted run exits with 130."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted[/]: what is done is kept; {cure}")
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if logging.getLogger().isEnabledFor(logging.INFO):
            raise
        console.print(
            f"[bold red]error[/] {type(error).__name__}: {escape(str(error))}", soft_wrap=True, highlight=False
        )
        raise typer.Exit(1) from error


def describe_line(line: Any) -> str:
    """A line of metrics.jsonl as one for people, in rich's markup."""
    if line["kind"] == "evaluation":
        from corolla.server.scores import describe, score_of

        found = [("", line["mean"]), *([("; server: ", line["server"])] if "server" in line else [])]
        return f"after round {line['round']}: " + "".join(f"{w}{describe(part, score_of([line]))}" for w, part in found)
    if not line["successful"]:
        return (
            f"[red]round {line['round']} failed[/]: {escape(str(line['update'].get('failed') or line['quarantined']))}"
        )
    losses = [c["train_loss"] for c in line["clients"].values() if "train_loss" in c]
    update = line["update"]
    proof = update["certificate"]
    exact = "exact" if proof["exact"] else f"error {proof['relative_error']:.1%}"
    bad = f", [yellow]quarantined {escape(str(line['quarantined']))}[/]" if line["quarantined"] else ""
    private = f", ε {update['privacy']['epsilon']:.2f}" if "privacy" in update else ""
    return (
        f"round {line['round']}: {len(losses)} clients, train loss {sum(losses) / max(len(losses), 1):.3f}, "
        f"update norm {update['norm']:.2f} of rank {update['merged_rank'] or update['start_rank']} "
        f"({exact}), {line['seconds']:.0f} s{private}{bad}"
    )
