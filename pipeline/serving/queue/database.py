"""Connections to the service's database: a file of SQLite's, or a PostgreSQL server."""

import json
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from pyramid_flow.errors import PyramidFlowError

FORMS = "sqlite:///FILE or postgresql://USER@HOST/NAME"
OPTIONS: dict[str, Any] = {"hide_parameters": True, "json_serializer": partial(json.dumps, ensure_ascii=False)}
"""Prompts stay out of error messages, and take their own length."""

BUSY_TIMEOUT_S = 30
CACHE_KIB = 256
"""Pages that each of a process's connections keeps; SQLite's own 2 MiB would look like a leak while a table grows."""


class DatabaseError(PyramidFlowError):
    """The database cannot be used as it was asked for."""


def connect(url: str) -> Engine:
    """Return the engine for an SQLAlchemy URL; transactions of its option `reads=True` take no lock for writing.

    Raises DatabaseError for a URL of another kind.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise DatabaseError(f"the database URL has not the form {FORMS}") from error
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise DatabaseError("an SQLite database must be a file: sqlite:///videos.db")
        engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, **OPTIONS)
        event.listen(engine, "connect", _write_ahead)
        event.listen(engine, "begin", _begin)
        return engine
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, **OPTIONS)
    raise DatabaseError(f"a database is {FORMS}, not {parsed.drivername}")


def _write_ahead(connection: Any, _record: object) -> None:  # noqa: ANN401 - of sqlite3
    connection.isolation_level = None  # this module says when a transaction begins
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")


def _begin(connection: Connection) -> None:
    """Take the lock at once for what writes: a transaction that reads first could not get it later."""
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
