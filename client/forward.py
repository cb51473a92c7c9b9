"""A ClientApp's message to the node's worker and back, over a Unix socket. Imports neither torch nor the model's code.

The call is gRPC, `/corolla.Worker/<name>` with the names of `corolla.client.answers`: a stream of frames each way, the
message's and then the node's in the request, the reply's and then the node's state in the answer, each kind ended by an
empty frame.
"""

import json
from collections.abc import Iterable, Iterator

import grpc
from flwr.app import ConfigRecord, Context, RecordDict

from corolla.client.bundle import release
from corolla.client.frames import from_frames, to_frames

SERVICE = "corolla.Worker"
OPTIONS = (("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26))
ANSWER_SECONDS = 2.0
"""How long a worker may take to take the call."""

NODE = "corolla.node"
"""The record beside the node's state that carries its configuration."""


class NoWorker(RuntimeError):
    """No worker listens on the socket; nothing was asked of it."""


class WorkerFailed(RuntimeError):
    """A worker took the request and did not answer it: it raised, or it is gone."""


def forward(name: str, content: RecordDict, context: Context, socket: str) -> RecordDict:
    """The worker's reply; `context.state` becomes what the worker made of it, and `content` is emptied once it is sent.

    Raises NoWorker where nothing listens, WorkerFailed with the worker's own reason where it failed or ended.
    """
    with grpc.insecure_channel(f"unix:{socket}", options=OPTIONS) as channel:  # the socket's owner alone can open it
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise NoWorker(f"a worker was needed at {socket}, got no answer in {ANSWER_SECONDS:g} s") from None
        call = channel.stream_stream(f"/{SERVICE}/{name}")
        try:
            answer = iter(call(_request(content, context)))
            reply = from_frames(part(answer))
            state = from_frames(part(answer))
        except grpc.RpcError as error:
            raise WorkerFailed(_describe(error, socket)) from None
    context.state = state
    return reply


def _request(content: RecordDict, context: Context) -> Iterator[bytes]:
    node = {NODE: ConfigRecord({"config": json.dumps(dict(context.node_config))})}
    yield from to_frames(content)
    yield b""
    release(content)  # gigabytes, perhaps, and the reply is as large
    yield from to_frames(RecordDict({**dict(context.state.items()), **node}))
    yield b""


def part(frames: Iterator[bytes]) -> Iterable[bytes]:
    """The frames up to the next empty one."""
    return iter(lambda: next(frames), b"")


def _describe(error: grpc.RpcError, socket: str) -> str:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.UNKNOWN and details:
        return str(details)
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"the worker at {socket} ended while it was at work ({details}): it is to be started again"
    return f"the worker at {socket} failed: {code.name} {details}"
