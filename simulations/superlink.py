"""A Flower app on Flower's Ray engine, through a SuperLink of our own that leaves nothing behind.

The caller forwards log lines and raises. Its child, the owner (this file run as a script), starts `flower-superlink`,
submits the app and waits for the run's status. Under the SuperLink, Flower starts its executor (in a session of its
own, so no process group holds them all), the simulation, and Ray's daemons and actors. The owner is a Linux child
subreaper: whatever loses its parent becomes its child, so killing its descendants until none is left ends them all. The
kernel tells it (PR_SET_PDEATHSIG) when the caller dies, by SIGKILL too.

Two programs in one file, hence its length: the second imports nothing but the standard library and what keeps to it.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from corolla.server.control import Scalar, command, follow_run, stage_app, start_run

_CHILD_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; 1.0 by default
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",  # a log line comes when it is printed
}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_START_SECONDS, _KILL_SECONDS = 120.0, 30.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What an actor's own code raises comes as RayTaskError and is answered as an error reply; the rest is Ray's.
_RAY_FAILURE = re.compile(r"ray\.exceptions\.(?!RayTaskError)\w+")


class EngineError(RuntimeError):
    """A run on a SuperLink that did not complete: its status, the reason and the tail of its log."""


@dataclass(frozen=True)
class Fleet:
    """The number of client nodes, and what one client at work may use of the machine's CPUs and GPUs.

    Clients at work at a time: floor(CPUs / cpus), and no more than floor(GPUs / gpus) if gpus > 0. With gpus = 0.0 Ray
    hides all GPUs from the clients. Raises ValueError for fewer than one node or CPU, or a negative share of a GPU.
    """

    nodes: int
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.cpus < 1 or not self.gpus >= 0:
            raise ValueError(f"a fleet of nodes >= 1, cpus >= 1 and gpus >= 0 was needed, got {self}")


def run_on_superlink(
    serverapp: str,
    clientapp: str,
    run_config: Mapping[str, Scalar],
    fleet: Fleet,
    *,
    environment: Mapping[str, str] = MappingProxyType({}),
    on_line: Callable[[str], None] = print,
) -> None:
    """Nothing, once the run has completed; by then every process and file it made is gone, whatever happened.

    `serverapp` and `clientapp` are references like "corolla.server.app:app" that the children can import;
    `environment` is added to the caller's for all of them. The apps run in the caller's working folder. `on_line` gets
    each line of the ServerApp and the clients as it comes, in the caller's thread, without colours; what it raises
    stops the run.

    Raises EngineError when the run ends as anything but completed, or when its log tells of a lost Ray actor (Flower
    never replaces it, fails each message given to it, and still calls the run completed; the log is a second or two
    late, so the ServerApp may have gone on with error replies); ValueError for a value in `run_config` that is not a
    scalar. One failure cannot be seen from here: Flower calls a ServerApp that raises SystemExit completed.
    """
    _check_machine()
    tail: deque[str] = deque(maxlen=60)
    with tempfile.TemporaryDirectory(prefix="corolla-", dir=_short_folder(), ignore_cleanup_errors=True) as name:
        folder, port = Path(name), _pick_port()
        _stage(folder, port, {"serverapp": serverapp, "clientapp": clientapp}, run_config)
        command = [sys.executable, "-I", __file__, str(os.getpid()), name, str(port), _sizing(fleet)]
        with subprocess.Popen(
            command, env=_child_environment(folder, environment), start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        ) as owner:  # fmt: skip
            try:
                _forward(owner.stdout or (), tail, on_line)
                outcome = _read_outcome(folder, owner.wait())
            finally:
                owner.terminate()
                owner.wait()
                _kill_all(lambda: _marked(name))  # none, unless the owner was killed itself
    if outcome["status"] != "finished:completed":
        raise EngineError(_explain(outcome["status"], outcome["details"], tail or outcome["superlink"].splitlines()))


def _forward(lines: Iterable[str], tail: deque[str], on_line: Callable[[str], None]) -> None:
    """Nothing, at the end of the log. Raises EngineError at a failure of Ray's own."""
    for raw in lines:
        line = _COLOUR.sub("", raw.rstrip("\n"))
        tail.append(line)
        on_line(line)
        if _RAY_FAILURE.match(line):
            raise EngineError(_explain("stopped, as Ray lost a client's process", line, tail))


def _explain(status: str, details: str, tail: "deque[str] | list[str]") -> str:
    """The message of an EngineError."""
    return f"a run that ends as finished:completed was needed, got {status}: {details}\nthe last lines:\n" + "\n".join(
        f"    {line}" for line in tail
    )


def _check_machine() -> None:
    """Nothing. Raises EngineError where the system or a command that a run needs is missing."""
    if sys.platform != "linux":
        raise EngineError(f"Linux was needed to own Ray's processes, got {sys.platform}; use the in-process engine")
    commands = ("flower-superlink", "flower-superexec", "flwr-simulation", "flwr", "ray")
    missing = [name for name in commands if not command(name).exists()]
    if missing:
        raise EngineError(f"{', '.join(missing)} in {command('')} was needed, got none; install corolla[ray]")


def _short_folder() -> str:
    """A folder for temporary folders; Ray's sockets in it must stay under the 108 bytes of a Unix socket's path."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 20 else "/tmp"


def _pick_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sizing(fleet: Fleet) -> str:
    """Flower's names for the fleet, as `flwr run --federation-config` takes them."""
    return (
        f"num-supernodes={fleet.nodes} client-resources-num-cpus={fleet.cpus} "
        f"client-resources-num-gpus={float(fleet.gpus)}"
    )


def _child_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment, our settings over it, `environment` over both; Flower's and Ray's homes in `folder`."""
    merged = {**os.environ, **_CHILD_ENVIRONMENT, "RAY_TMPDIR": str(folder), **environment, "FLWR_HOME": str(folder)}
    merged["PATH"] = os.pathsep.join([str(command("")), merged.get("PATH", os.defpath)])
    for name in ("no_proxy", "NO_PROXY"):  # a proxy must not stand between the SuperLink and its clients
        merged[name] = ",".join(part for part in (merged.get(name), "127.0.0.1", "localhost") if part)
    return merged


def _stage(folder: Path, port: int, components: Mapping[str, str], run_config: Mapping[str, Scalar]) -> None:
    """Nothing; writes the connection and the app."""
    (folder / "config.toml").write_text(f'[superlink.corolla]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    stage_app(folder, components, run_config)


def _read_outcome(folder: Path, code: int) -> dict[str, str]:
    """What the owner of the SuperLink wrote before it ended."""
    try:
        return dict(json.loads((folder / "outcome.json").read_text()))
    except FileNotFoundError:
        return {"status": "lost", "details": f"the SuperLink's owner ended with code {code}", "superlink": ""}


# The rest runs in the owner: one thread, the standard library alone.


def _own(parent: int, folder: Path, port: int, sizing: str) -> None:
    """Nothing; leaves outcome.json for the caller, or no folder at all if it was told to stop or the caller died."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    finished = False
    try:
        if os.getppid() == parent:  # else it died before the kernel was asked
            outcome = _drive(folder, port, sizing)
            outcome["superlink"] = (folder / "superlink.log").read_text(errors="replace")[-6000:]
            (folder / "outcome.json").write_text(json.dumps(outcome))
            finished = True
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_all(_owned)
        if not finished or os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)


def _drive(folder: Path, port: int, sizing: str) -> dict[str, str]:
    """The status and details of the one run, once it has finished or the SuperLink has ended."""
    arguments = ["--insecure", "--simulation", "--isolation", "subprocess", "--disable-runtime-dependency-installation"]
    with (folder / "superlink.log").open("w") as log:
        superlink = subprocess.Popen(
            [command("flower-superlink"), *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=subprocess.STDOUT, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
    try:
        _await_port(superlink, port)
        run_id = start_run(folder / "app", "corolla", "--federation-config", sizing)
        status, details = follow_run(run_id, "corolla", partial(print, flush=True), lambda: superlink.poll() is None)
        return {"status": status, "details": details}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"status": "failed", "details": str(error)}


def _await_port(superlink: "subprocess.Popen[bytes]", port: int) -> None:
    """Nothing, once the SuperLink listens. Raises RuntimeError if it ends or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while superlink.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"a SuperLink on port {port} was needed in {_START_SECONDS} s, got code {superlink.poll()}")


def _prctl(option: int, value: int) -> None:
    """Nothing; sets a process attribute. Raises OSError if the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _owned() -> list[int]:
    """The processes below this one, after reaping those that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return _below([os.getpid()])


# Both programs use the rest.


def _marked(folder: str) -> list[int]:
    """The processes that live with Flower's home in `folder`, and those below them (some of Ray's wipe their marks)."""
    mark = f"FLWR_HOME={folder}".encode()
    marked = [pid for pid, environment in _read_processes("environ") if mark in environment.split(b"\0")]
    return marked + _below(marked)


def _below(roots: list[int]) -> list[int]:
    """The processes that descend from `roots`."""
    children: dict[int, list[int]] = {}
    for pid, stat in _read_processes("stat"):
        parent = int(stat.rpartition(b")")[2].split()[1])  # what stands before is a name, which may hold spaces
        children.setdefault(parent, []).append(pid)
    found, level = [], roots
    while level:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
    return found


def _read_processes(name: str) -> Iterator[tuple[int, bytes]]:
    """Each process that this one may read, with what /proc/PID/`name` holds."""
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes()


def _kill_all(find: Callable[[], list[int]]) -> None:
    """Nothing, once `find` finds no process, or after 30 s (one stuck in the kernel cannot be killed)."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (pids := find()) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    _own(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
