"""Databases for the service's tests: a file of SQLite's, and a PostgreSQL server that runs for the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from pipeline.serving.store import Limits, Store
from pipeline.stages.encode import Encode
from tests.pipeline.serving.farm import MODEL, Farm


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.integration, pytest.mark.database])])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/videos.db"
    url: str = request.getfixturevalue("postgres")
    engine = create_engine(url.replace("postgresql", "postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: str, clock: Clock) -> Iterator[Store]:
    store = Store(database, limits=Limits(20, 20, 20), retention_s=100, clock=clock)
    yield store
    store.close()


@pytest.fixture(scope="session")
def encode() -> Encode:
    return Encode(MODEL, "nowhere", frozenset())


@pytest.fixture
def farm(tmp_path: Path, encode: Encode) -> Iterator[Farm]:
    farm = Farm(tmp_path, encode)
    yield farm
    farm.store.close()
