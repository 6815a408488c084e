"""The simulation against the small runs in benchmarks/results/."""

import copy
import json

import pytest

from benchmarks.calibration import TOLERANCE, Comparison, calibration, check, overhead_of
from benchmarks.report import RESULTS


@pytest.fixture(scope="module")
def measured():
    return [json.loads((RESULTS / f"{name}.json").read_text())["figures"] for name in ("scale", "pipeline_utilisation")]


def test_no_small_run_differs_by_more_than_it_may(measured):
    found = calibration(*measured)
    assert {row.use for row in found} == {"calibration", "check"}
    assert max(abs(row.difference) for row in found) <= TOLERANCE


def test_what_the_driver_takes_comes_from_the_longest_runs_alone(measured):
    scale, _ = copy.deepcopy(measured)
    for run in scale["pipeline"]:
        if run["rows"] == 1000:
            run["ms_per_row"] = 0.0
    assert overhead_of(scale["pipeline"]) == overhead_of(measured[0]["pipeline"])


def test_a_run_that_differs_by_too_much_ends_the_program(monkeypatch):
    rows = [Comparison(f"{measured} videos", "check", "videos", measured, 100.0) for measured in (92.0, 90.0)]
    monkeypatch.setattr("benchmarks.calibration.calibration", lambda scale, stages: rows)
    with pytest.raises(SystemExit, match=r"by more than 10% from: 90\.0 videos"):
        check({}, {})
