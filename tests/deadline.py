"""A time after which no further test starts, for runs that must end by then; those left out are listed."""

import time

import pytest


class Deadline:
    """Passes over the tests that would start too late; an interrupted run lists what it did not finish, too."""

    def __init__(self, last_start: float) -> None:
        self.last_start = last_start
        self.unfinished: dict[str, None] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.unfinished = dict.fromkeys(item.nodeid for item in session.items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        return True if time.time() > self.last_start else None  # True: no other plugin runs the test

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.unfinished.pop(nodeid, None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unfinished:
            terminalreporter.section(f"left out, for lack of time: {len(self.unfinished)} tests")
            for test in self.unfinished:
                terminalreporter.line(f"  {test}")
