"""What tests share: one local Ray cluster per session."""

from collections.abc import Iterator

import pytest

from pipeline.plan import Resources
from tests.requirements import lacking


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to start if a selected test needs a program that is not there."""
    lines = lacking(marker.name for item in items for marker in item.iter_markers())
    if lines:
        raise pytest.UsageError("\n".join(lines))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Resources]:
    """Run the session's local Ray cluster; its GPUs are there in name only."""
    from pipeline import runner  # here, so that sessions without Ray tests do not load it

    with runner.session(None, Resources(cpus=4, gpus=2)) as resources:
        yield resources
