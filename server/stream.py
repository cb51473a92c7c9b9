"""A Grid whose replies come one by one, so that a server holds one message at a time and not a round of them."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

POLL = 1.0
"""Seconds between two looks for replies: a round takes minutes."""


class Stream:
    """`grid` with a `send_and_receive` that pushes all messages and yields each reply when it is there.

    Flower's own collects a round's replies in a list first. Everything else is the grid's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, until all are there or `timeout` seconds are over; each is asked for by itself."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        waiting = [message_id for message_id in self._grid.push_messages(messages) if message_id]
        while waiting:
            answered = set()
            for message_id in waiting:
                if time.monotonic() > until:
                    log(30, "the deadline of %g seconds is over: %d replies are missing", timeout, len(waiting))
                    return
                for reply in self._grid.pull_messages([message_id]):
                    answered.add(message_id)
                    yield reply
            waiting = [message_id for message_id in waiting if message_id not in answered]
            if waiting and not answered:
                time.sleep(POLL)
