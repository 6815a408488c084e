"""The reports of a test run: CPU seconds and tests over budget, and tests left out after a deadline."""

import time

import pytest

from tests import cpu_report
from tests.cpu_report import CpuReport
from tests.deadline import Deadline

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_it(number):
    sum(range(1_000_000))

@pytest.mark.slow
def test_slow():
    sum(range(1_000_000))
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # loading what is installed takes seconds
    pytester.makeini("[pytest]\nmarkers = slow")
    pytester.makepyfile(test_some=TESTS)
    return pytester


def test_the_cpu_seconds_of_each_folder_and_of_tests_over_budget_are_shown(suite, monkeypatch):
    monkeypatch.setattr(cpu_report, "BUDGET_S", 1e-9)
    report = CpuReport()
    output = suite.runpytest_inprocess(plugins=[report]).stdout.str()
    assert "CPU seconds per folder" in output
    assert report.over_budget == ["test_some.py::test_it[1]", "test_some.py::test_it[2]"]
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert len(report.seconds) == 3


def test_no_test_starts_after_the_deadline_and_those_left_out_are_listed(suite):
    result = suite.runpytest_inprocess(plugins=[Deadline(time.time() - 1)])
    result.assert_outcomes()
    result.stdout.fnmatch_lines(["*left out, for lack of time: 3 tests*", "  test_some.py::test_it?1?"])


def test_all_tests_start_before_the_deadline(suite):
    result = suite.runpytest_inprocess(plugins=[Deadline(time.time() + 3600)])
    result.assert_outcomes(passed=3)
    result.stdout.no_fnmatch_line("*left out*")
