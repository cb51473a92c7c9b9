"""Flower's SuperLink, on a database that gives up a large message quickly.

    python -m corolla.server.superlink …      # takes the arguments of flower-superlink

Debian, and images made of it, build SQLite to overwrite with zeros what it deletes. A message is deleted in one go, and
while a large one is being overwritten other requests wait longer than the 5 s that Flower allows them. So what is
deleted, single clients' adapters among it, stays in the file's free pages until something else takes them.
"""

from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from corolla.client.process import MESSAGES, keep_freed_memory_low

PAGE = 65536
"""Bytes of a page: the largest there is, since a deleted array is followed page by page. For a new file alone."""


def set_up(connection: Any, _record: Any = None) -> None:
    """Before Flower's own settings."""
    connection.execute(f"PRAGMA page_size = {PAGE}")
    connection.execute("PRAGMA secure_delete = OFF")


def main() -> None:
    """The SuperLink."""
    from flwr.superlink.cli import flower_superlink

    keep_freed_memory_low(MESSAGES)
    event.listen(Engine, "connect", set_up)
    flower_superlink()


if __name__ == "__main__":
    main()
