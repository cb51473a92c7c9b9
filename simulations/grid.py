"""A Flower Grid in this process: every message is answered by the ClientApp itself, in the given order.

No Ray and no SuperLink: one process, one open base, errors with their traceback. The ServerApp and the ClientApp are
the ones that are deployed.
"""

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from corolla.server.stream import Stream

log = logging.getLogger(__name__)

RUN_ID, SERVER_NODE = 1, 1
CLIENT_FAILED = 3
"""Flower's code for an exception in a ClientApp."""


class InProcessGrid(Grid):
    """Nodes 1000, 1001, … of one ClientApp, each with its node configuration and its own lasting state.

    `on_message` is called with the kind of each message as it is answered, for progress bars.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any],
        on_message: Callable[[str], None] = lambda kind: None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1
        self._app, self._on_message = client_app, on_message
        self._contexts = {
            1000 + i: Context(RUN_ID, 1000 + i, dict(node), RecordDict(), dict(run_config))
            for i, node in enumerate(nodes)
        }
        self._asked: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Run) -> None:
        """There is one run, and it is set."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes the messages in, and returns the ids to pull the replies by."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        self._count += 1
        message.metadata.__dict__["_message_id"] = f"{self._count}"
        self._asked[message.metadata.message_id] = message
        return message.metadata.message_id

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message=message, context=self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # a client may fail in any way, and the round goes on: as in every Flower engine
            log.warning("client failed:\n%s", traceback.format_exc())
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
        finally:
            self._on_message(message.metadata.message_type)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each given out once: a client works when its reply is pulled."""
        return [self._answer(self._asked.pop(i)) for i in message_ids if i in self._asked]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies as they come, in the order of the messages; no client is begun after `timeout` seconds."""
        return Stream(self).send_and_receive(messages, timeout=timeout)
