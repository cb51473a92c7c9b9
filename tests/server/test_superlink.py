"""A SuperLink's database does not overwrite what it deletes, and Flower's own settings stand beside that."""

from flwr.supercore.sql_mixin import _set_sqlite_pragmas
from sqlalchemy import create_engine, event, text

from corolla.server.superlink import PAGE, set_up


def pragmas(path, *listeners):
    engine = create_engine(f"sqlite:///{path}")
    for listener in listeners:
        event.listen(engine, "connect", listener)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE x (a)"))
        names = ("page_size", "secure_delete", "journal_mode", "busy_timeout")
        return {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in names}


def test_a_new_database_has_large_pages_and_deletes_without_overwriting(tmp_path):
    ours = pragmas(tmp_path / "ours.db", set_up, _set_sqlite_pragmas)
    flowers = pragmas(tmp_path / "flowers.db", _set_sqlite_pragmas)
    assert (ours.pop("page_size"), ours.pop("secure_delete")) == (PAGE, 0)
    assert ours.items() <= flowers.items()


def test_one_made_before_stays_as_it_is(tmp_path):
    before = pragmas(tmp_path / "old.db", _set_sqlite_pragmas)
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    for listener in (set_up, _set_sqlite_pragmas):
        event.listen(engine, "connect", listener)
    with engine.begin() as connection:
        assert connection.execute(text("PRAGMA page_size")).scalar() == before["page_size"]
        connection.execute(text("INSERT INTO x VALUES (1)"))
        assert connection.execute(text("SELECT a FROM x")).scalar() == 1
