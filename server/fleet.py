"""Which clients there are: Flower's node ids are random, so every node is asked who it is."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from corolla.client.protocol import HELLO, Coordinates, Hello
from corolla.server.validation import Rejected, check_hello, reason_of

T = TypeVar("T", bound=Any)


class Fleet:
    """The clients by name, with their nodes. `base_hash` may be left open: then it is what most nodes have.

    `coordinates` are those of most of the first nodes with that base, None before there are any.
    """

    def __init__(self, settings: str, base_hash: str, deadline: float) -> None:
        self.settings, self.base_hash, self.deadline = settings, base_hash, deadline
        self.clients: dict[str, Hello] = {}
        self.coordinates: Coordinates | None = None
        self.refused: dict[str, str] = {}
        self._nodes: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    def node(self, client_id: str) -> int:
        """The node id of a client."""
        return self._nodes[client_id]

    def refresh(self, grid: Grid, wanted: int, fits: Callable[[Hello], None] = lambda hello: None) -> None:
        """Waits (until the deadline) for `wanted` nodes, and asks those not known yet who they are.

        `fits` raises Rejected for a client that the run cannot take in. A node that is gone is forgotten; one that
        cannot take part is in `refused` with its reason.
        """
        nodes = set(self._wait(grid, wanted))
        self._nodes = {client: node for client, node in self._nodes.items() if node in nodes}
        unknown = sorted(nodes - set(self._nodes.values()))
        asked = [
            Message(
                RecordDict({"settings": ConfigRecord({"json": self.settings})}),
                dst_node_id=node,
                message_type=HELLO,
                group_id=f"hello:{node}",
            )
            for node in unknown
        ]
        if asked:
            self._admit(grid.send_and_receive(asked, timeout=self.deadline), fits)
        self.clients = {client: self.clients[client] for client in sorted(self._nodes)}

    def _wait(self, grid: Grid, wanted: int) -> list[int]:
        until = time.monotonic() + self.deadline
        while len(nodes := list(grid.get_node_ids())) < wanted and time.monotonic() < until:
            log(20, "Waiting for nodes: %d of %d are there", len(nodes), wanted)
            time.sleep(1)
        return nodes

    def _admit(self, replies: Iterable[Message], fits: Callable[[Hello], None]) -> None:
        hellos: list[tuple[int, Hello]] = []
        for reply in replies:
            node = reply.metadata.group_id.removeprefix("hello:")
            try:
                if reply.has_error():
                    raise Rejected(reply.error.reason or f"error {reply.error.code}")
                if str(reply.metadata.src_node_id) != node:
                    raise Rejected(f"node {reply.metadata.src_node_id} answered in its place")
                hellos.append((int(node), Hello.unpack(reply.content)))
            except ValueError as error:
                self._refuse(f"node {node}", str(error))
        self.base_hash = self.base_hash or _most_common((hello.base_hash for _, hello in hellos), "")
        self.coordinates = self.coordinates or _most_common(
            (hello.coordinates for _, hello in hellos if hello.base_hash == self.base_hash), None
        )
        known = _common_shapes(hello for _, hello in hellos if hello.base_hash == self.base_hash) | self._shapes
        for node_id, hello in sorted(hellos, key=lambda pair: (pair[1].client_id.casefold(), pair[0])):
            try:
                check_hello(hello, self.base_hash, known)
                fits(hello)
                if hello.client_id.casefold() in {name.casefold() for name in self._nodes}:
                    raise Rejected("a client's name must be its own, got one that another node has already")
            except Rejected as error:
                self._refuse(hello.client_id, str(error))
                continue
            for who in (hello.client_id, f"node {node_id}"):  # what kept it out before does so no longer
                self.refused.pop(who, None)
            self._nodes[hello.client_id], self.clients[hello.client_id] = node_id, hello
            self._shapes |= {**hello.shapes, **hello.heads}

    def _refuse(self, who: str, reason: str) -> None:
        who, reason = reason_of(who), reason_of(reason)
        log(30, "%s is refused: %s", who, reason)
        self.refused[who] = reason


def _common_shapes(hellos: Iterable[Hello]) -> dict[str, tuple[int, int]]:
    """Each module's shape as most clients have it: one client that is wrong must not speak for all."""
    found: dict[str, list[tuple[int, int]]] = {}
    for hello in hellos:
        for module, shape in {**hello.shapes, **hello.heads}.items():
            found.setdefault(module, []).append(shape)
    return {module: _most_common(shapes, shapes[0]) for module, shapes in found.items()}


def _most_common(values: Iterable[T], default: T) -> T:
    counted = Counter(values)
    return min(counted, key=lambda value: (-counted[value], value)) if counted else default
