"""Logs of worker processes: a JSON object per line on stderr, which Ray keeps in a file for each of them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

_fields: ContextVar[Mapping[str, object]] = ContextVar("fields")


def log_as_json(**fields: str) -> None:
    """Write this process's log as JSON, with these fields in each line."""
    handler = logging.StreamHandler()
    handler.addFilter(with_fields)
    handler.setFormatter(JsonFormatter("%(asctime)s%(levelname)s%(name)s%(message)s", static_fields=fields))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


@contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Put fields into each line that is written meanwhile, also in tasks and by `asyncio.to_thread`."""
    token = _fields.set({**_fields.get({}), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def with_fields(record: logging.LogRecord) -> bool:
    """Put the fields of what is worked on into a record."""
    vars(record).update(_fields.get({}))
    return True
