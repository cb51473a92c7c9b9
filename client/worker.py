"""A process beside a node that keeps the base open and answers for its ClientApp (`corolla worker`).

It listens on a Unix socket in a folder that its user alone can enter, and does one thing at a time: a GPU holds one
training. What it cannot do it answers with the reason, and goes on; what ends it (out of host memory, a driver) ends
the request with an error, and whatever supervises it starts it again.
"""

import json
import os
import stat
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from flwr.app import RecordDict
from flwr.common.logger import log

from corolla.client.answers import ANSWERS, Node
from corolla.client.bundle import release
from corolla.client.events import emit
from corolla.client.forward import NODE, OPTIONS, SERVICE, part
from corolla.client.frames import from_frames, to_frames

LONGEST_PATH = 100
"""A Unix socket's path ends at 108 bytes."""

LAST_SECONDS = 3600.0
"""How long a request at work may take once the worker is told to stop."""

LONGEST_REASON = 600
"""Characters of an error, up to 12 bytes each: gRPC carries it among headers, and drops the answer beyond 8 KB."""


def serve(socket: Path, first: Callable[[], object] = bool) -> grpc.Server:
    """A started server on `socket`; `stop` ends it. The socket and its folder are closed to other users.

    `first` is called before any request is answered; those that come meanwhile wait.

    Raises ValueError for a path that is too long, PermissionError for a folder that others can write to, and
    FileExistsError where another worker listens.
    """
    made = socket.with_name(f".{uuid.uuid4().hex[:8]}")  # gRPC takes this name away when it ends, some time later
    if max(len(str(socket)), len(str(made))) > LONGEST_PATH:
        raise ValueError(f"a socket's path must have at most {LONGEST_PATH} bytes, got {socket}: use a shorter one")
    _prepare(socket)
    one_by_one = ThreadPoolExecutor(1)
    one_by_one.submit(first)
    server = grpc.server(one_by_one, options=OPTIONS, maximum_concurrent_rpcs=8)
    handlers = {name: grpc.stream_stream_rpc_method_handler(_handler(name)) for name in ANSWERS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    before = os.umask(0o177)
    try:
        if not server.add_insecure_port(f"unix:{made}"):
            raise OSError(f"a worker needs the socket {socket}, got none")
        made.rename(socket)
    finally:
        os.umask(before)
    server.start()
    return server


def stop(server: grpc.Server, socket: Path) -> None:
    """Ends a server: what it is at is answered first. Its socket goes at once, for another worker to take its place."""
    ended = server.stop(grace=LAST_SECONDS)
    socket.unlink(missing_ok=True)
    ended.wait()


def _prepare(socket: Path) -> None:
    """The folder, made for this user alone where there is none, without a socket that nobody listens on."""
    folder = socket.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"the folder of {socket} must be this user's and closed to others' writing, got mode "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}: chmod 700 {folder}"
        )
    if not socket.exists():
        return
    with grpc.insecure_channel(f"unix:{socket}") as channel, suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=1)
        raise FileExistsError(f"another worker listens on {socket}: stop it, or give this one another socket")
    socket.unlink()


def _handler(name: str) -> Any:
    def handle(frames: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            content = from_frames(part(frames))
            state = from_frames(part(frames))
            reply = _answer(name, content, state)
        except Exception as error:  # whatever a request runs into is its answer, and the worker goes on
            log(40, "%s failed: %s", name, "".join(traceback.format_exception(error)))
            call.abort(grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}"[:LONGEST_REASON])
        for records in (reply, state):
            yield from to_frames(records)
            yield b""
        for records in (content, reply, state):
            release(records)

    return handle


def _answer(name: str, content: RecordDict, state: RecordDict) -> RecordDict:
    config = json.loads(str(state.config_records[NODE]["config"]))
    del state[NODE]
    began = time.time()
    emit({"kind": "question", "what": name, "client": config.get("name")})
    reply = ANSWERS[name](content, Node(config, state))
    emit({"kind": "answer", "what": name, "client": config.get("name"), "began": began, "ended": time.time()})
    return reply
