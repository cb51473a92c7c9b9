"""What a federation of real processes costs (Linux, with nginx).

    python -m benchmarks.deployment requests|soak|large|large-in-memory [GB]

The processes are those of tests/deploy, the commands of docker/compose.yml on loopback. `requests` takes about three
minutes on two cores, `soak` half an hour. `large` sends an adapter of so many gigabytes (0.5) there and back twice,
with the SuperLink's database on or off; all processes together take some twenty times that in memory.
"""

import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from corolla.adapters.source import DEMO, find_base
from corolla.client.config import client_name
from corolla.client.events import read_event
from tests.deploy.federation import Federation, as_simulated, begin, done_rounds, federation
from tests.tiny import tiny_tokenizer, write_tiny_model

MIB = 2**20
CONSOLE = Console(width=140)


@contextmanager
def serving(
    model: Path, clients: int, worker: bool = True, rank: int = 0, database: bool = True
) -> Iterator[Federation]:
    """A federation of so many clients, with or without workers; `rank` is theirs instead of compose.yml's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with federation(folder, model, folder, clients) as found:
            if not database:
                command = found.services["superlink"]["command"]
                command[:] = [word for word in command if not word.startswith("--database")]
            found.start_server()
            for k in range(1, clients + 1):
                config = as_simulated(k) if worker else {**as_simulated(k), " worker=": " unused="}
                config |= {f" rank={2**k}": f" rank={rank}"} if rank else {}
                found.start_client(k, config, worker)
            yield found


def ended(live: Federation) -> bool:
    """Whether the latest run has ended. Raises RuntimeError where it did not complete."""
    status = live.status()
    if status.startswith("finished") and status != "finished:completed":
        raise RuntimeError(f"a run must complete, got {status}: {live.log('serverapp')[-3000:]}")
    return status == "finished:completed"


class Watch:
    """When lines of a log were written, by looking every few milliseconds."""

    def __init__(self, path: Path, *marks: str) -> None:
        self.times: dict[str, list[float]] = {mark: [] for mark in marks}
        self._path, self._stop = path, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        with self._path.open() as file:
            file.seek(0, 2)
            while not self._stop.wait(0.005):
                for line in file:
                    for mark, times in self.times.items():
                        if mark in line:
                            times.append(time.time())

    def stop(self) -> None:
        """Ends the looking."""
        self._stop.set()
        self._thread.join()


def requests() -> None:
    """From a SuperNode's receipt of a train message to its reply's departure, with a worker and without."""
    model = str(find_base(DEMO).folder / str(find_base(DEMO).gguf))
    table = Table("seconds, rounds 2 to 6", "to the start of work", "of work", "whole request")
    whole = {}
    for worker in (True, False):
        with serving(Path(model), 1, worker) as live:
            watch = Watch(live.folder / "node-1.log", "Receiving: train message", "Sending: train message")
            begin(live, Path(model), "timed", **{"run.keep_replies": False,
                "run.rounds": 6, "clients.count": 1, "clients.ranks": [8],
                "run.evaluate": "never", "train.local_steps": 1, "data.tasks_train": 64})  # fmt: skip
            live.wait_for("the run's end", lambda live=live: ended(live), 600)
            watch.stop()
            received, sent = (times[1:] for times in watch.times.values())
            whole[worker] = [b - a for a, b in zip(received, sent, strict=True)]
            events = [e for line in live.log("worker-1").splitlines() if (e := read_event(line))]
            work = [e for e in events if e["kind"] == "answer" and e["what"] == "train"][1:]
            start = [e["began"] - at for e, at in zip(work, received, strict=False)]
            took = [e["ended"] - e["began"] for e in work]
            table.add_row("worker" if worker else "no worker", *(_spread(x) for x in (start, took, whole[worker])))
    CONSOLE.print(table)
    CONSOLE.print(f"ratio: {statistics.median(whole[False]) / statistics.median(whole[True]):.1f}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


def memory(live: Federation) -> dict[str, float]:
    """MiB of each service, and of the ServerApp that a run has; a ClientApp lives for one message and is left out."""
    found = {}
    for service, process in live.running.items():
        own = psutil.Process(process.pid)
        found[service] = own.memory_info().rss / MIB
        for child in own.children(recursive=True):
            try:
                if any("flwr-serverapp" in word for word in child.cmdline()[:2]):
                    found["a run's ServerApp"] = child.memory_info().rss / MIB
                elif service == "proxy":
                    found[service] += child.memory_info().rss / MIB
            except psutil.NoSuchProcess:
                continue
    return found


def soak(rounds: int = 300, clients: int = 2) -> None:
    """Memory of every process that stays, over a long run of the tiny model."""
    with tempfile.TemporaryDirectory() as name:
        model = write_tiny_model(Path(name))
        with serving(model, clients) as live:
            folder = begin(live, model, "soak", **{"run.keep_replies": False,
                "run.rounds": rounds, "clients.count": clients,
                "run.evaluate": "never", "train.local_steps": 1})  # fmt: skip
            samples: list[dict[str, float]] = []
            began = time.monotonic()
            while len(samples) < rounds:
                done = len(done_rounds(folder))
                if done > len(samples):
                    samples += [memory(live)] * (done - len(samples))
                    if done % 20 == 0:
                        print(done, {k: round(v) for k, v in samples[-1].items()}, flush=True)
                elif time.monotonic() - began > 60 * rounds:
                    raise TimeoutError(f"{rounds} rounds were needed, got {done}")
                time.sleep(0.3)
            seconds = time.monotonic() - began
            live.wait_for("the run's end", lambda: ended(live))
            lost = sum(len(line["quarantined"]) for line in done_rounds(folder))
    fifth = max(1, rounds // 5)
    table = Table("MiB, median of rounds", f"{fifth}–{2 * fifth}", f"{rounds - fifth}–{rounds}", "growth", "a round")
    for service in sorted(samples[-2]):
        early, late = (
            statistics.median(s[service] for s in part if service in s)
            for part in (samples[fifth : 2 * fifth], samples[-fifth:])
        )
        growth = late - early
        a_round = 1024 * growth / (rounds - 2 * fifth)
        table.add_row(service, f"{early:.1f}", f"{late:.1f}", f"{growth:+.1f}", f"{a_round:+.1f} KiB")
    CONSOLE.print(table, f"{rounds} rounds of {clients} clients, {seconds / rounds:.1f} s each, {lost} replies lost")


def large(gigabytes: float = 0.5, database: bool = True) -> None:
    """One adapter of this size up and down through a SuperLink; the peak of each process, over the message's size."""
    width = rank = 2048
    layers = round(gigabytes * 1e9 / (2 * 4 * rank * 2 * width))
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "wide"
        config = LlamaConfig(
            vocab_size=264, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=257, pad_token_id=256,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        with serving(model, 1, rank=rank, database=database) as live:
            peaks = Peaks(live)
            folder = begin(live, model, "large", **{"run.keep_replies": False,
                "run.rounds": 2, "clients.count": 1, "clients.ranks": [rank],
                "run.evaluate": "never", "train.local_steps": 1, "train.optimizer": "sgd", "run.deadline": 1500,
                "run.largest_message": 2 * gigabytes,
                "adapter.target_modules": ["q_proj", "o_proj"], "adapter.scaling": 0.01,
                "aggregation.method": "fedit"})  # fmt: skip

            live.wait_for("the ServerApp", lambda: live.children("serverapp", "flwr-serverapp"))

            def over() -> bool:  # by the run's own files: every question to the SuperLink would slow it down
                return len(done_rounds(folder)) == 2 or not live.children("serverapp", "flwr-serverapp")

            live.wait_for("two rounds", over, 2400)
            peaks.stop()
            lines = done_rounds(folder)
            if len(lines) < 2:
                CONSOLE.print(live.log("serverapp")[-3000:], markup=False)
    for line in lines:
        told = line["clients"].get(client_name(0), {})
        CONSOLE.print(f"round {line['round']}: {line['seconds']:.0f} s, up {told.get('bytes_up', 0) / 1e9:.2f} GB, "
                      f"down {told.get('bytes_down', 0) / 1e9:.2f} GB, left out {line['quarantined']}")  # fmt: skip
    size = max(max(c["bytes_up"], c["bytes_down"]) for line in lines for c in line["clients"].values())
    table = Table("process", "peak GB", "over the message")
    for process, peak in sorted(peaks.peaks.items()):
        table.add_row(process, f"{peak / 1e9:.2f}", f"{peak / size:.2f}")
    CONSOLE.print(table)


class Peaks:
    """The most that each process of a federation held (VmHWM)."""

    def __init__(self, live: Federation) -> None:
        self.peaks: dict[str, float] = {}
        self._live, self._stop = live, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            for service, process in list(self._live.running.items()):
                try:
                    own = psutil.Process(process.pid)
                    self._note(service, own)
                    for child in own.children(recursive=True):
                        name = child.name()
                        self._note(name if name.startswith("flwr-") else service, child)
                except (psutil.Error, OSError):
                    continue

    def _note(self, name: str, process: psutil.Process) -> None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+)", status):
            self.peaks[name] = max(self.peaks.get(name, 0), 1024 * int(found[1]))

    def stop(self) -> None:
        """Ends the looking."""
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    known = {
        "requests": requests, "soak": soak, "large": large, "large-in-memory": partial(large, database=False)
    }  # fmt: skip
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"what to measure must be one of {', '.join(known)}, got {sys.argv[1:]}")
    known[sys.argv[1]](*map(float, sys.argv[2:]))
