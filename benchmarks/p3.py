"""Ten clients, ten instruction tasks of P3, ten ranks: held-out loss by task, for four methods and for nobody.

    python -m benchmarks.p3 FOLDER [--out runs/p3]

FOLDER has <task>.train.jsonl and <task>.eval.jsonl with "instruction" and "output" in every line, a task a client in
the order of their names. Those of docs/results.md are from the t0_train_50k sample in github yizhongw/self-instruct.
A run that is complete is read, not made again.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from corolla.simulations.alone import by_group
from corolla.simulations.simulate import Run, Watch, simulate

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
METHODS = {"flora": RANKS, "warm": RANKS, "fedit": (16,), "zero-padding": RANKS}

MOST_HELD_OUT = 12
"""Held-out examples of a task: ten clients alone answer all of them."""

SETTINGS: dict[str, Any] = {
    "data.prompt": "instruction",
    "data.completion": "output",
    "data.group": "task",
    "data.partition_column": "task",
    "data.template": "plain",
    "data.max_new_tokens": 0,
    "data.probe": 2,
    "adapter.target_modules": "all-linear",
    "train.learning_rate": 2e-3,
    "train.local_steps": 3,
    "train.batch_size": 6,
    "run.rounds": 3,
    "run.threads": 1,
    "run.keep_replies": True,
}


def union(folder: Path, out: Path, kind: str) -> Path:
    """One file of all tasks' lines of this kind, each with its task's name; of those held out the first ones.

    Raises FileNotFoundError for none.
    """
    files = sorted(folder.glob(f"*.{kind}.jsonl"))
    if len(files) != len(RANKS):
        raise FileNotFoundError(f"{folder} must hold {len(RANKS)} files *.{kind}.jsonl, got {len(files)}")
    most = MOST_HELD_OUT if kind == "eval" else None
    rows = [
        {**json.loads(line), "task": file.name.split(".")[0]} for file in files for line in islice(file.open(), most)
    ]
    target = out / f"{kind}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def run_method(method: str, files: dict[str, Path], out: Path) -> Run:
    """The run of one method; the first also trains every client alone."""
    folder = out / method
    if (folder / "adapter").exists() and (method != "flora" or (folder / "comparison.json").exists()):
        return Run(folder)
    settings = SETTINGS | {
        "data.train": str(files["train"]),
        "data.held_out": str(files["eval"]),
        "aggregation.method": method,
        "clients.count": len(RANKS),
        "clients.ranks": list(METHODS[method]),
        "run.alone": method == "flora",
    }
    with Progress() as bar:
        task = bar.add_task(method, total=None)
        return simulate(
            {},
            overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()],
            out=folder,
            overwrite=True,
            watch=Watch(lambda kind: bar.update(task, advance=1, description=f"{method}: {kind}")),
        )


def columns(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """Column -> task -> held-out loss in nats per answer token."""
    first = runs["flora"]
    if first.comparison is None:
        raise ValueError("the run of flora must have trained the clients alone, got no comparison.json")
    alone = {client: by_task for client, by_task in first.comparison.columns.items() if client.startswith("client-")}
    tasks = first.comparison.groups
    found = {
        "base": dict(first.comparison.columns["base"]),
        "alone, own task": {task: alone[client][task] for client, task in zip(sorted(alone), tasks, strict=True)},
        "alone, mean of ten": {task: sum(c[task] for c in alone.values()) / len(alone) for task in tasks},
    }
    for method, run in runs.items():
        last = [line for line in run.metrics if line["kind"] == "evaluation"][-1]
        found[method] = by_group(last["clients"].values(), "held_out_loss")
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    tasks = sorted(found["base"])
    rows = [f"| task | rank | {' | '.join(found)} |", f"| --- |{' ---: |' * (len(found) + 1)}"]
    for task, rank in zip(tasks, RANKS, strict=True):
        rows.append(f"| {task} | {rank} | {' | '.join(f'{column[task]:.2f}' for column in found.values())} |")
    means = (sum(column.values()) / len(column) for column in found.values())
    rows.append(f"| mean | | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(rows)


def main(folder: Path, out: Annotated[Path, typer.Option()] = Path("runs/p3")) -> None:
    """Runs what is not there yet and prints the table, with tokens and seconds of every method."""
    files = {kind: union(folder, out, kind) for kind in ("train", "eval")}
    runs = {method: run_method(method, files, out) for method in METHODS}
    print(table(columns(runs)))
    for method, run in runs.items():
        rounds = [line for line in run.metrics if line["kind"] == "round"]
        tokens = sum(client["tokens"] for line in rounds for client in line["clients"].values())
        print(f"{method}: {tokens:,.0f} training tokens, {sum(line['seconds'] for line in rounds):.0f} s in rounds")


if __name__ == "__main__":
    typer.run(main)
