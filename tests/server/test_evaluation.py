"""An evaluation takes in the numbers of those who were asked, once, and names everybody else."""

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from corolla.server.evaluation import OpenEvaluation


def reply(client, content=None, error=None):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    asked = Message(RecordDict({"x": ConfigRecord({})}), 1, "evaluate", group_id=f"3:{client}")
    metrics = RecordDict({"metrics": MetricRecord(content or {"examples": 2.0, "held_out_loss": 1.5})})
    found = Message(Error(0, error), reply_to=asked) if error else Message(metrics, reply_to=asked)
    found.metadata.group_id = f"3:{client}"
    return found


def test_who_was_asked_is_heard_and_who_has_no_numbers_is_named():
    opened = OpenEvaluation(["bob", "ann", "cleo", "dan"])
    replies = [reply("bob"), reply("ann", {"examples": -1.0}), reply("cleo", error="no memory"), reply("eve")]
    found, failed = opened.collect(replies, 60)
    assert found == {"bob": {"examples": 2.0, "held_out_loss": 1.5}}
    assert list(failed) == ["ann", "cleo", "dan", "eve"]
    assert failed["dan"] == "no reply within 60 s"
    assert "no memory" in failed["cleo"]
    assert "must have been asked for" in failed["eve"]


def test_after_it_is_closed_nothing_more_is_taken_in():
    opened = OpenEvaluation(["ann"])
    opened.collect([reply("ann")], 60)
    found, failed = opened.collect([reply("ann")], 60)
    assert not found
    assert "must have been asked for" in failed["ann"]
