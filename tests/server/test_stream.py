"""Replies one by one, through push and pull of messages."""

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from corolla.server import stream
from corolla.server.stream import Stream
from tests.server.clients import fake_grid
from tests.server.remote import Remote


class SlowGrid:
    """A grid whose replies are there after so many looks; it counts how many replies are held at once.

    A message's id is its node's. `spoilt` are the nodes whose reply it cannot read; what the others reply is of group
    "forged", as a client may write.
    """

    def __init__(self, looks, spoilt=()):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.looks, self.asked, self.spoilt, self.pushed = dict(looks), [], spoilt, {}

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
            self.pushed[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        (message_id,) = ids
        node = int(message_id)
        self.asked.append(node)
        self.looks[node] -= 1
        if self.looks[node]:
            return []
        if node in self.spoilt:
            raise self.spoilt[node]
        reply = Message(RecordDict(), reply_to=self.pushed[message_id])
        reply.metadata.group_id = "forged"
        return [reply]


def messages(*nodes):
    return [Message(RecordDict(), node, "train", group_id=f"1:{node}") for node in nodes]


def nodes(replies):
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_come_as_they_are_there_and_each_once(monkeypatch):
    monkeypatch.setattr(stream, "POLL", 0.0)
    grid = SlowGrid({1: 3, 2: 1, 3: 2})
    replies = list(Stream(grid).send_and_receive(messages(1, 2, 3)))
    assert nodes(replies) == [2, 3, 1]
    assert [reply.metadata.group_id for reply in replies] == ["1:2", "1:3", "1:1"]
    assert grid.asked == [1, 2, 3, 1, 3, 1]


def test_after_the_deadline_nobody_is_waited_for(monkeypatch):
    monkeypatch.setattr(stream, "POLL", 0.01)
    grid = SlowGrid({1: 1, 2: 10**9})
    assert nodes(Stream(grid).send_and_receive(messages(1, 2), timeout=0.05)) == [1]


@pytest.mark.parametrize("sends", [True, False])
def test_what_was_sent_is_let_go_before_the_next_message_is_made(sends):
    made = []

    def one_by_one():
        for node in (1, 2):
            assert not (sends and made and made[-1].content)
            content = RecordDict({"frozen": ArrayRecord({"x": Array("uint8", (1,), "x", b"1")})})
            made.append(Message(content, node, "train", group_id=f"1:{node}"))
            yield made[-1]

    grid = SlowGrid({1: 1, 2: 1})
    assert nodes(Stream(Remote(grid) if sends else grid).send_and_receive(one_by_one())) == [1, 2]
    assert [bool(message.content) for message in made] == [not sends] * 2


def test_a_message_that_could_not_be_pushed_is_not_waited_for():
    grid = SlowGrid({1: 1})
    grid.push_messages, push = (
        lambda sent: push(sent) if sent[0].metadata.dst_node_id == 1 else [None],
        grid.push_messages,
    )
    assert nodes(Stream(grid).send_and_receive(messages(1, 2))) == [1]


@pytest.mark.parametrize(
    "error", [DecodeError("truncated"), KeyError("child"), TypeError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x")]
)
def test_a_reply_that_flower_cannot_read_is_an_error_of_its_client_alone(error):
    broken, sound = Stream(SlowGrid({1: 1, 2: 1}, {1: error})).send_and_receive(messages(1, 2))
    assert broken.has_error()
    assert broken.error.reason.startswith(f"its reply cannot be read: {type(error).__name__}")
    assert (broken.metadata.src_node_id, broken.metadata.group_id) == (1, "1:1")
    assert not sound.has_error()


def test_an_error_of_the_network_is_nobodys_reply():
    grid = SlowGrid({1: 1}, {1: httpx.ConnectError("the SuperLink is away")})
    with pytest.raises(httpx.ConnectError):
        list(Stream(grid).send_and_receive(messages(1)))


def test_a_message_that_answers_nothing_is_nobodys_reply(monkeypatch):
    monkeypatch.setattr(stream, "POLL", 0.01)
    grid = SlowGrid({1: 1})
    pull = grid.pull_messages

    def and_another(ids):
        stray = Message(RecordDict(), 1, "train", group_id="1:1")
        return [stray, *pull(ids)]

    grid.pull_messages = and_another
    assert len(list(Stream(grid).send_and_receive(messages(1)))) == 1


def test_in_this_process_a_client_works_when_its_reply_is_taken():
    grid = fake_grid({"ann": 2, "bob": 3})
    begun = []
    grid._on_message = begun.append
    message = [Message(RecordDict(), node, "query.hello") for node in grid.get_node_ids()]
    replies = iter(Stream(grid).send_and_receive(message))
    assert not begun
    next(replies)
    assert len(begun) == 1
    assert len(list(replies)) == 1
