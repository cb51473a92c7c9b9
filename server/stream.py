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
from google.protobuf.message import DecodeError

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
        """Replies as they arrive, until all are there or `timeout` seconds are over; each is asked for by itself.

        A reply belongs to the message that it was pulled for: what its sender wrote into it says nothing about that.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        messages = list(messages)
        ids = list(self._grid.push_messages(messages))
        asked = [remove_content_from_message(message) for message in messages]
        waiting = {message_id: message for message_id, message in zip(ids, asked, strict=True) if message_id}
        del messages
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
