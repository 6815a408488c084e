"""Databases for the service's tests: a file of SQLite's, and a PostgreSQL server that runs for the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.serving.queue.store import QueueLimits, Store
from tests.pipeline.serving.farm import Farm, Models
from tests.pipeline.serving.running import Running, run, service_in


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.integration, pytest.mark.database])])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/videos.db"
    return str(request.getfixturevalue("postgres"))


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
    store = Store(database, limits=QueueLimits(20, 20, 20), retention_s=100, clock=clock)
    yield store
    store.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    """Yield a farm whose videos are drawn, not rendered."""
    farm = Farm(tmp_path)
    yield farm
    farm.store.close()


@pytest.fixture
def rendering_farm(tmp_path: Path, models: Models) -> Iterator[Farm]:
    """Yield a farm with the real stages."""
    farm = Farm(tmp_path, models)
    yield farm
    farm.store.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """Run an interface that answers on a port; a worker is played by hand."""
    with run(service_in(tmp_path, QueueLimits(max_queued=50, max_per_minute=50))) as running:
        yield running
