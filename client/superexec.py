"""Flower's SuperExec for a node, with ClientApps that start at once.

    python -m corolla.client.superexec …      # takes the arguments of flower-superexec

flower-superexec starts an interpreter for every message, and most of a short request is then its imports. Here a
process that has them all waits, without connections, and forks for each message: what a message leaves behind in its
process goes with it, as with Flower's own. Where it is gone, messages get an interpreter of their own.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from flwr.common.logger import log
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supercore.utils import disable_process_dumping

from corolla.client.process import MESSAGES, keep_freed_memory_low

CLIENT_APP = "flwr-clientapp"
"""What Flower calls the program, and these processes are called."""

PR_SET_DUMPABLE, PR_SET_NAME = 4, 15

RETRY_SECONDS = 1.0


class ForkingExecutor(SubprocessExecutor):
    """Flower's executor of local processes, but that ClientApps are forked by whoever reads `orders`."""

    def __init__(self, orders: IO[str]) -> None:
        self._orders = orders

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Starts the process of a task."""
        if spec.task_type == TaskType.CLIENT_APP:
            try:
                self._orders.write(json.dumps(asdict(spec)) + "\n")
                self._orders.flush()
                return LaunchResult.accepted()
            except (OSError, ValueError) as error:
                log(30, "no process is there to fork from (%s): this message gets an interpreter of its own", error)
                with suppress(OSError):
                    self._orders.close()  # from now on a ValueError
        return super().launch(spec)


def fork_for_each(orders: Iterable[str], run: Any) -> None:
    """A child for every line, in which `run` is called with what it says; returns where there are no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in orders:
        if _fork() == 0:
            os._exit(_call(run, json.loads(line)))


def _fork() -> int:
    """As os.fork, but that it waits where the system has no process or memory left."""
    while True:
        try:
            return os.fork()
        except OSError as error:
            log(40, "a process for a message cannot be made now: %s", error)
            time.sleep(RETRY_SECONDS)


def _call(run: Any, order: dict[str, Any]) -> int:
    """The exit code of `run`."""
    try:
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        run(order)
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_client_app(order: dict[str, Any]) -> None:
    """One message, as `flwr-clientapp` does it."""
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    sys.argv = [CLIENT_APP]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_NAME, CLIENT_APP.encode())
        libc.prctl(PR_SET_DUMPABLE, 1)  # as Flower's own is
    if order["suppress_output"]:
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(silence, stream.fileno())
    run_clientapp(
        runtime_api_address=order["runtime_api_address"],
        token=order["token"],
        insecure=order["insecure"],
        certificates=validate_and_resolve_root_certificates(order["root_certificates_path"], order["insecure"]),
        parent_pid=order["parent_pid"],
        runtime_dependency_install=order["runtime_dependency_install"],
    )


def _wait_and_fork(read: int) -> None:
    """The process that ClientApps are forked from, until SuperExec is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SuperExec's to answer; its end closes the pipe
        signal.signal(number, signal.SIG_IGN)
    disable_process_dumping(strict=False)  # a message's code is of the same user, and tokens pass through here
    keep_freed_memory_low(MESSAGES)
    for name in ("flwr.supernode.runtime.run_clientapp", "corolla.client.app", "grpc"):
        importlib.import_module(name)

    def run(order: dict[str, Any]) -> None:
        orders.close()  # or SuperExec would not see that the waiting process is gone
        run_client_app(order)

    with os.fdopen(read) as orders:
        fork_for_each(orders, run)


def main() -> None:
    """SuperExec, with the process beside it that ClientApps are forked from."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        _wait_and_fork(read)
        os._exit(0)
    os.close(read)
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec import run_superexec

    orders = os.fdopen(write, "w")
    flowers = run_superexec.get_executor

    def get_executor(kind: ExecutorType, *args: Any, **options: Any) -> Any:
        return ForkingExecutor(orders) if kind == ExecutorType.SUBPROCESS else flowers(kind, *args, **options)

    setattr(run_superexec, "get_executor", get_executor)  # noqa: B010
    flower_superexec()


if __name__ == "__main__":
    main()
