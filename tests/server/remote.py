"""A grid to elsewhere, as a SuperLink's: what it is given travels as a copy."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid


class Remote(HttpGrid):
    """`grid`, with every message copied on its way."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:  # twice, as Flower's does
            assert message.has_content()
        return self.grid.push_messages([self._copy(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def _copy(self, message: Message) -> Message:
        content = recorddict_from_proto(recorddict_to_proto(message.content))
        data = message.metadata
        return Message(content, data.dst_node_id, data.message_type, group_id=data.group_id, ttl=data.ttl)
