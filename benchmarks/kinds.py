"""Ten rounds of every kind of adapter on the demo's model: what it learns, what it sends, what averaging would lose.

    python -m benchmarks.kinds [KIND …] [--set section.name=value …]

Four clients of rank 16, two families of generated tasks each, the attention of the last eight layers; the learning
rate of every kind is the best of `RATES` by its clients' loss after one round on other data (seed 1), since kinds
differ in it by an order of magnitude. A run that is in runs/kinds already is read, not repeated.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from corolla import simulate
from corolla.adapters import HOSTED, KINDS, LORA
from corolla.client.process import pass_over_libraries
from corolla.server.config import Config
from corolla.server.folder import RunFolder
from corolla.simulations.suite.cells import measure, traffic

OUT = Path("runs/kinds")
RATES = (4e-4, 2e-3, 1e-2, 5e-2, 0.25, 1.25)
COMMON = (
    "data.template='plain'", "data.max_new_tokens=11", "data.tasks_held_out=6", "data.probe=2", "clients.count=4",
    "clients.ranks=[16]", r"adapter.target_modules='.*layers\.2[2-9]\.self_attn\.(q_proj|v_proj)'",
    "adapter.alpha=64", "train.local_steps=4", "train.batch_size=4", "train.schedule='constant'",
    "run.evaluate='never'", "run.keep_checkpoints=1",
)  # fmt: skip
NEEDS = {"allora": ("adapter.alpha=''", "adapter.scaling=1")}


def settings(kind: str, out: Path, rate: float, *more: str) -> Config:
    """The configuration of one run."""
    own = (f"adapter.kind={kind!r}", f"train.learning_rate={rate}", f"run.out={str(out)!r}", *more)
    return Config.load(None, (*COMMON, *NEEDS.get(kind, ()), *own))


def find_rate(kind: str) -> float:
    """The rate whose clients' loss after one round is the lowest, kept in runs/kinds."""
    known = OUT / "rates" / f"{kind}.json"
    kept = json.loads(known.read_text()) if known.is_file() else {}
    losses = {float(rate): loss for rate, loss in kept.items()}
    for rate in sorted(set(RATES) - set(losses)):
        config = settings(kind, OUT / "rates" / f"{kind}-{rate:g}", rate, "run.rounds=1", "run.seed=1", "run.threads=1")
        try:
            clients = simulate(config, overwrite=True).metrics[-1]["clients"].values()
            losses[rate] = statistics.fmean(client["loss_after"] for client in clients)
        except (RuntimeError, KeyError) as error:  # too large a rate ends in a loss that is no number
            print(f"{kind} at {rate:g}: {error}", file=sys.stderr)
            losses[rate] = math.inf
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(losses))
    return min(losses, key=lambda rate: losses[rate])


def run_kind(kind: str, more: tuple[str, ...]) -> str:
    """A row of the table."""
    rate = find_rate(kind)
    config = settings(kind, OUT / kind, rate, "run.rounds=10", "aggregation.noise=true", *more)
    numbers = OUT / kind / "numbers.json"
    if not numbers.is_file():
        run = simulate(config, resume=bool(RunFolder(OUT / kind).rounds()))
        numbers.write_text(json.dumps(measure(run.adapter, config) | traffic(run.metrics)))
    found = json.loads(numbers.read_text())
    rounds = [line for line in RunFolder(OUT / kind).lines() if line["kind"] == "round"]
    methods = [line["noise"]["methods"] for line in rounds]
    name = "parameter-averaging" if kind in KINDS else "fedit"
    noise = [100 * method[name]["relative_error"] for method in methods if "relative_error" in method[name]]
    shown = f"{statistics.fmean(noise):.2g}" if noise else "–"
    proof = max(line["update"]["certificate"]["relative_error"] for line in rounds)
    cells = (
        f"{found['held_out_loss']:.3f}", f"{100 * found['exact_match']:.1f}", f"{found['bytes_up'] / 1024:.1f}",
        f"{found['bytes_down'] / 1024:.1f}", f"{proof:.0e}", shown, f"{rate:g}", f"{time_round(kind, rate, more):.1f}",
    )  # fmt: skip
    return f"| {kind} | {' | '.join(cells)} |"


def time_round(kind: str, rate: float, more: tuple[str, ...]) -> float:
    """Seconds of the second round of a run of its own, without the noise report; kept, as the rest is."""
    known = OUT / "seconds" / f"{kind}.json"
    if not known.is_file():
        run = simulate(settings(kind, OUT / "seconds" / kind, rate, "run.rounds=2", *more), overwrite=True)
        seconds = [line["seconds"] for line in run.metrics if line["kind"] == "round"]
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(seconds[1]))
    return float(json.loads(known.read_text()))


def main() -> None:
    """Prints the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=(LORA, *HOSTED, *KINDS))
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="section.name=value")
    chosen = parser.parse_args()
    pass_over_libraries()
    print("| kind | held-out loss | exact match % | up KiB | down KiB | certificate | averaging % | rate | s a round |")
    print("| --- |" + " ---: |" * 8)
    for kind in chosen.kinds:
        print(run_kind(kind, tuple(chosen.more)), flush=True)


if __name__ == "__main__":
    main()
