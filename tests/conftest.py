"""Shared by all tests: tiers, time limits, one local Ray cluster and one PostgreSQL server per process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch: processes share the cores
os.environ.setdefault("RAY_worker_niceness", "0")  # else what runs beside a cluster starves its workers

import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cpu_report import CpuReport
from tests.deadline import Deadline
from tests.requirements import PROGRAMS, lacking

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from pipeline.batch.planner import Resources


TIMEOUTS_S = {"slow": 900, "integration": 300}
"""Time limits of the tests beyond the default tier, whose limit is in pyproject.toml."""
NEED_PACKAGES = PROGRAMS.keys()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--last-start", type=float, metavar="TIME", help="start no test after this Unix time; those left out are listed"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuReport())
    if (last_start := config.getoption("--last-start")) is not None:
        config.pluginmanager.register(Deadline(last_start))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the time limit of its tier, and the xdist group that shares its expensive fixtures."""
    for item in items:
        tier = next(filter(item.get_closest_marker, TIMEOUTS_S), None)
        if tier is None:
            wrong = [name for name in NEED_PACKAGES if item.get_closest_marker(name)]
            if wrong:
                raise pytest.UsageError(
                    f"{item.nodeid} needs a Debian package ({wrong[0]}): mark it integration or slow"
                )
        elif not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUTS_S[tier]))
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("cluster"))
        elif item.get_closest_marker("ray"):  # one after another: memory is for two clusters
            item.add_marker(pytest.mark.xdist_group("own cluster"))
        elif tier is not None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to start if a selected test needs a program that is not installed."""
    lines = lacking(marker.name for item in session.items for marker in item.iter_markers())
    if lines:
        raise pytest.UsageError("\n".join(lines))


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Let the tests' processes be interrupted: a shell's background jobs ignore Ctrl-C, and so does what they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path_factory.mktemp("assets")))
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator["Resources"]:
    """Run this process's local Ray cluster; its GPUs exist in name only."""
    from pipeline.batch import runner  # here, so that sessions without Ray tests do not load it
    from pipeline.batch.planner import Resources

    with runner.session(None, Resources(cpus=4, gpus=2)) as resources:
        yield resources


@pytest.fixture(scope="module")  # while it runs, so does an event loop in this thread
def browser() -> Iterator["Browser"]:
    """Run Debian's chromium."""
    from playwright.sync_api import sync_playwright  # here, so that sessions without a browser do not load it

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Run a PostgreSQL server for the session; yields its URL, without a database."""
    [*_, bin_folder] = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [str(bin_folder / program), "-D", str(folder / "data"), *arguments]
        as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    run("initdb", "--auth=trust", "--username=postgres")
    run(
        "pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1", "start"
    )
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """Create an empty PostgreSQL database for one test; returns its URL."""
    import psycopg  # here, so that sessions without a database do not load it

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{postgres_server}/{name}"
