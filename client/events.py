"""What a server and its clients say of themselves: one JSON object a line, with the round and the client if any.

A line of metrics.jsonl goes to the ServerApp's log as it is written, so that whoever can read the log (`flwr log`)
can follow the run from another machine; COROLLA_LOG=json makes the other lines of Flower's logger JSON too.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

MARK = "corolla"
"""The key that tells our lines from others, in place of `kind`."""


def emit(line: Mapping[str, Any]) -> None:
    """Prints an event; `kind` is what it tells of."""
    rest = {name: value for name, value in line.items() if name != "kind"}
    print(json.dumps({MARK: line["kind"], **rest}), flush=True)


def read_event(text: str) -> dict[str, Any] | None:
    """The event in a line of a log, None where the line is none."""
    if not (text.startswith("{") and f'"{MARK}"' in text):
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return {"kind": event.pop(MARK), **event} if isinstance(event, dict) and MARK in event else None


class JsonFormatter(logging.Formatter):
    """A record as JSON: time, level and message, with its round and client."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event: dict[str, Any] = {MARK: "log", "time": when, "level": record.levelname, "message": record.getMessage()}
        event |= {name: getattr(record, name) for name in ("round", "client") if hasattr(record, name)}
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event)


def use_json_logs() -> None:
    """Makes Flower's logger write JSON where COROLLA_LOG asks for it. Raises ValueError for another value of it."""
    chosen = os.environ.get("COROLLA_LOG", "text")
    if chosen not in ("text", "json"):
        raise ValueError(f"COROLLA_LOG must be text or json, got {chosen!r}")
    if chosen == "json":
        import flwr.common.logger  # noqa: F401  (it makes the handlers)

        for handler in logging.getLogger("flwr").handlers:
            handler.setFormatter(JsonFormatter())
