"""The way of a reply's bytes: Flower's own HttpGrid on a SuperLink that is one object in this process.

A client's message is deflated into objects, checked as the SuperLink's store checks them, pulled and inflated by the
code that a deployed ServerApp runs. What a client may do to its objects, it does between the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.error_pb2 import Error
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse, PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_all_nested_objects,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

RUN_ID = 1

FIRST_NODE = 1000


@dataclass
class Parcel:
    """A reply as it leaves a client: its objects, children first, by their hash; the last is the message itself.

    `metadata` is what the SuperLink reads beside them. They need not agree.
    """

    objects: dict[str, bytes]
    metadata: ProtoMessage

    @property
    def root(self) -> str:
        return list(self.objects)[-1]

    def replaced(self, name: str, content: bytes) -> "Parcel":
        """The same with another content of one object, and the hashes that follow from it all the way up."""
        names, objects = {}, {}
        for old, known in self.objects.items():
            changed = content if old == name else known
            for before, after in names.items():
                changed = changed.replace(before.encode(), after.encode())
            names[old] = get_object_id(changed)
            objects[names[old]] = changed
        if len(objects) < len(self.objects):
            raise ValueError("two objects became one")
        return Parcel(objects, self.metadata)


def parcel_of(message: Message) -> Parcel:
    """The message as Flower's client would send it."""
    objects = {name: value.deflate() for name, value in get_all_nested_objects(message).items()}
    return Parcel(objects, message_to_proto(remove_content_from_message(message)))


Client = Callable[[Message], Parcel]


class SuperLink:
    """What HttpGrid asks of the Runtime API. A client answers when its reply is asked for; a reply is given once."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        self.clients, self.objects, self.waiting = clients, {}, {}

    def GetNodes(self, request) -> GetNodesResponse:
        return GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.clients])

    def PushMessages(self, request) -> PushAppMessagesResponse:
        missing = []
        for proto, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            self.waiting[proto.metadata.message_id] = [node.object_id for node in iterate_object_tree(tree)]
            missing += self.waiting[proto.metadata.message_id]
        ids = [proto.metadata.message_id for proto in request.messages_list]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=missing, session_id="s")

    def PushObject(self, request) -> PushObjectResponse:
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PullMessages(self, request) -> PullAppMessagesResponse:
        (message_id,) = request.message_ids
        if message_id not in self.waiting:
            return self._gone(message_id)
        contents = {name: self.objects[name] for name in self.waiting.pop(message_id)}
        message = inflate_object_from_contents(message_id, contents)
        message.metadata.__dict__["_message_id"] = message_id
        parcel = self.clients[message.metadata.dst_node_id](message)
        for name, content in parcel.objects.items():
            try:
                validate_object_content(content)
            except UnexpectedObjectContentError:
                continue  # the SuperLink refuses it, and the ServerApp will not find it
            if name == get_object_id(content):
                self.objects[name] = content
        parcel.metadata.metadata.message_id = parcel.root
        tree = ObjectTree(object_id=parcel.root, children=[ObjectTree(object_id=n) for n in list(parcel.objects)[:-1]])
        return PullAppMessagesResponse(messages_list=[parcel.metadata], message_object_trees=[tree])

    def _gone(self, message_id: str) -> PullAppMessagesResponse:
        """As Flower's: an error of the SuperLink's own, of no group and of no client."""
        metadata = ProtoMetadata(
            run_id=RUN_ID,
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=message_id,
            message_type="system",
            created_at=2e9,
            ttl=1.0,
        )
        proto = ProtoMessage(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="unavailable"))
        parcel = parcel_of(message_from_proto(proto))
        self.objects |= parcel.objects
        proto.metadata.message_id = parcel.root
        return PullAppMessagesResponse(messages_list=[proto], message_object_trees=[ObjectTree(object_id=parcel.root)])

    def PullObject(self, request) -> PullObjectResponse:
        found = request.object_id in self.objects
        return PullObjectResponse(
            object_found=found, object_available=found, object_content=self.objects.get(request.object_id, b"")
        )

    def ConfirmMessageReceived(self, request) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()


def grid_of(clients: Mapping[int, Client]) -> HttpGrid:
    """Flower's grid, connected to these clients by node id."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SUPERLINK_NODE_ID, 1
    grid = HttpGrid(token="none")
    grid._client = SuperLink(clients)
    grid.set_run(Run.create_empty(RUN_ID))
    return grid
