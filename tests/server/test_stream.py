"""Replies one by one, through push and pull of messages."""

from flwr.app import Message, RecordDict

from corolla.server import stream
from corolla.server.stream import Stream
from tests.server.clients import fake_grid


class SlowGrid:
    """A grid whose replies are there after so many looks; it counts how many replies are held at once."""

    def __init__(self, looks):
        self.looks, self.asked, self.pushed = dict(looks), [], []

    def push_messages(self, messages):
        self.pushed = [str(m) for m in messages]
        return self.pushed

    def pull_messages(self, ids):
        ids = list(ids)
        assert len(ids) == 1, "one reply at a time"
        self.asked.append(ids[0])
        self.looks[ids[0]] -= 1
        return [f"reply to {ids[0]}"] if self.looks[ids[0]] == 0 else []


def test_replies_come_as_they_are_there_and_each_once(monkeypatch):
    monkeypatch.setattr(stream, "POLL", 0.0)
    grid = SlowGrid({"a": 3, "b": 1, "c": 2})
    assert list(Stream(grid).send_and_receive(["a", "b", "c"])) == ["reply to b", "reply to c", "reply to a"]
    assert grid.asked == ["a", "b", "c", "a", "c", "a"]


def test_after_the_deadline_nobody_is_waited_for(monkeypatch):
    monkeypatch.setattr(stream, "POLL", 0.01)
    grid = SlowGrid({"a": 1, "b": 10**9})
    assert list(Stream(grid).send_and_receive(["a", "b"], timeout=0.05)) == ["reply to a"]


def test_a_message_that_could_not_be_pushed_is_not_waited_for():
    grid = SlowGrid({"a": 1})
    grid.push_messages = lambda messages: ["a", None]
    assert list(Stream(grid).send_and_receive(["a", "b"])) == ["reply to a"]


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
