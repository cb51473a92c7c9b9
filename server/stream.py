"""A Grid whose replies come one by one, so that a server holds one message at a time and not a round of them."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError

from corolla.client.bundle import release

POLL = 1.0
"""Seconds between two looks for replies: a round takes minutes."""

UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    DecodeError,
)
"""What Flower's grid raises while it makes a message of a client's bytes. Errors of the network are none of these."""


class Stream:
    """`grid` with a `send_and_receive` that pushes all messages and yields each reply when it is there.

    Flower's own collects a round's replies in a list first, so that one that it cannot read costs the round: here it
    becomes an error reply of its client. Everything else is the grid's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Pushes all messages; replies as they arrive, until all are there or `timeout` seconds are over.

        Each is asked for by itself. A reply belongs to the message that it was pulled for: what its sender wrote into
        it says nothing about that.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        return self._replies(dict(self._push(messages)), until, timeout)

    def _replies(self, waiting: dict[str, Message], until: float, timeout: float | None) -> Iterator[Message]:
        while waiting:
            answered = set()
            for message_id, message in waiting.items():
                if time.monotonic() > until:
                    log(30, "the deadline of %g seconds is over: %d replies are missing", timeout, len(waiting))
                    return
                for reply in self._pull(message_id, message):
                    answered.add(message_id)
                    yield reply
            waiting = {message_id: message for message_id, message in waiting.items() if message_id not in answered}
            if waiting and not answered:
                time.sleep(POLL)

    def _push(self, messages: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """Pushes one after another, for a server to hold one at a time: the ids, and what is left of the messages.

        What was sent elsewhere is emptied, so no two messages may share a record.
        """
        for message in messages:
            ids = list(self._grid.push_messages([message]))
            asked = remove_content_from_message(message)
            yield from ((message_id, asked) for message_id in ids if message_id)
            if isinstance(self._grid, HttpGrid) and message.has_content():
                release(message.content)  # it was sent; grids within a process hand out the message itself

    def _pull(self, message_id: str, message: Message) -> Iterator[Message]:
        try:
            replies = list(self._grid.pull_messages([message_id]))
        except UNREADABLE as error:
            log(30, "a reply of node %d cannot be read", message.metadata.dst_node_id, exc_info=True)
            unreadable = f"its reply cannot be read: {type(error).__name__}: {error}"
            replies = [Message(Error(ErrorCode.UNKNOWN, unreadable), reply_to=message)]
        for reply in replies:
            if reply.metadata.reply_to_message_id != message_id:
                log(30, "a message that answers nothing is left out, got one of node %d", reply.metadata.src_node_id)
                continue
            reply.metadata.group_id = message.metadata.group_id
            yield reply
