"""The CPU seconds of a test run: per folder, and the default tests that exceed their budget."""

import os
from collections import Counter
from collections.abc import Generator

import psutil
import pytest

BUDGET_S = 5.0
"""CPU seconds that a default test may use."""
SLOWER_TIERS = ("integration", "slow")
PROPERTY = "cpu_s"


class CpuReport:
    """Measures the CPU time of every test, in whichever xdist worker it runs, and prints the sums at the end."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self.seconds: dict[str, float] = {}
        self.over_budget: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._start_s = cpu_seconds(item)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            # a killed process takes the time it has used out of the later sum
            report.user_properties.append((PROPERTY, max(0.0, cpu_seconds(item) - self._start_s)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = dict(report.user_properties).get(PROPERTY)
        if seconds is None:
            return
        self.seconds[report.nodeid] = seconds
        if seconds > BUDGET_S and not any(tier in report.keywords for tier in SLOWER_TIERS):
            self.over_budget.append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.seconds:
            return
        folders: Counter[str] = Counter()
        for test, seconds in self.seconds.items():
            folders[os.path.dirname(test.partition("::")[0])] += seconds
        terminalreporter.section(f"CPU seconds per folder: {folders.total():.0f} in all")
        for folder, seconds in sorted(folders.items()):
            terminalreporter.line(f"{seconds:8.1f}  {folder}")
        if self.over_budget:
            terminalreporter.section(f"default tests over their budget of {BUDGET_S:g} CPU seconds")
            for test in sorted(self.over_budget, key=self.seconds.__getitem__, reverse=True):
                terminalreporter.line(f"{self.seconds[test]:8.1f}  {test}")


def cpu_seconds(item: pytest.Item) -> float:
    """Return the CPU time so far of this process and its ended children; of running ones too beyond the default tier.

    Reading the process table takes milliseconds, which thousands of unit tests should not pay.
    """
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    if item.get_closest_marker("ray") or any(map(item.get_closest_marker, SLOWER_TIERS)):
        for process in psutil.Process().children(recursive=True):
            try:
                used = process.cpu_times()
            except psutil.Error:  # ended meanwhile
                continue
            total += used.user + used.system + used.children_user + used.children_system
    return total
