import json
import logging

import pytest

from corolla.client.events import JsonFormatter, emit, read_event, use_json_logs


def test_what_is_told_is_read_back(capsys):
    line = {"kind": "round", "round": 3, "clients": {"ann": {"rank": 2}}}
    emit(line)
    assert read_event(capsys.readouterr().out.strip()) == line


@pytest.mark.parametrize("text", ["", "INFO: a round", '{"other": 1}', '{"corolla": cut', '["corolla"]'])
def test_other_lines_are_no_events(text):
    assert read_event(text) is None


def test_a_log_line_as_json_has_its_round_and_client():
    record = logging.LogRecord("flwr", 30, "file", 1, "reply of %s", ("ann",), None)
    record.round, record.client = 2, "ann"
    event = json.loads(JsonFormatter().format(record))
    assert event.pop("time").endswith("+00:00")
    assert event == {"corolla": "log", "level": "WARNING", "message": "reply of ann", "round": 2, "client": "ann"}


def test_another_format_is_refused(monkeypatch):
    monkeypatch.setenv("COROLLA_LOG", "xml")
    with pytest.raises(ValueError, match="text or json, got 'xml'"):
        use_json_logs()
