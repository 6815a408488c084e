"""The mutation sample: its list against the current source, the choice of tests, and what counts as a kill."""

from collections import Counter

import pytest
from coverage import CoverageData

from benchmarks.mutants import MODULES, MUTANTS_PER_MODULE, ROOT, Mutant, compiles, draw, load
from benchmarks.mutation_sample import (
    Examiner,
    Result,
    covering,
    line_contexts,
    order,
    read_durations,
    select_tests,
    summary,
)
from benchmarks.tree_copy import TestRun

MAX_GONE = 8
SOURCE = """\
class Box:
    def size(self, n):
        if n < 0:
            return max(
                n,
                0,
            )
        if n < 0:
            return 1
        return n
"""
MUTANT = Mutant("box-0", "box.py", "Box.size", "comparison", "if n < 0:", 1, "if n <= 0:")


class FakeTree:
    """Answers test runs: by default a test passes; `mutated` and `unmutated` name other outcomes."""

    def __init__(self, mutated=None, unmutated=None):
        self.outcomes = {True: mutated or {}, False: unmutated or {}}

    def source(self, module):
        return SOURCE

    def run(self, tests, module="", mutated=None):
        events = []
        for test in tests:
            events.append({"started": test})
            outcome = self.outcomes[mutated is not None].get(test)
            if outcome == "fails":
                return TestRun(1, (*events, {"failed": test}))
            if outcome == "hangs" or (outcome == "is slow" and len(events) > 1):
                return TestRun(None, tuple(events))
        return TestRun(0, tuple(events))


def test_mutants_compile_and_apply_to_this_tree():
    mutants = load()
    applied = {mutant.id: mutant.apply((ROOT / mutant.module).read_text()) for mutant in mutants}
    gone = [name for name, mutated in applied.items() if mutated is None]
    # the list was drawn before these modules were parts of others
    moved = {
        "pipeline/ledger/job_records.py": "pipeline/ledger/ledger.py",
        "pipeline/storage/filesystems.py": "pipeline/storage/storage.py",
    }
    modules = Counter(moved.get(mutant.module, mutant.module) for mutant in mutants)
    assert modules == dict.fromkeys(MODULES, MUTANTS_PER_MODULE)
    assert len(applied) == len(mutants)
    assert all(compiles(mutated) for mutated in applied.values() if mutated)
    assert len(gone) <= MAX_GONE, f"edit these entries of benchmarks/results/mutants.json: {gone}"


def test_apply_finds_the_occurrence_when_lines_and_classes_move():
    moved = "import os\n\n\n" + SOURCE.replace("Box", "Crate").replace("\n", "\n    ").replace(
        "class", "if os:\n    class"
    )
    for source, first in ((SOURCE, 8), (moved, 12)):
        mutated = MUTANT.apply(source)
        assert mutated.lines == range(first, first + 1)
        assert mutated.source.count("<=") == 1
        assert compiles(mutated)


@pytest.mark.parametrize("source", [SOURCE.replace("n < 0", "n < 1"), SOURCE.replace("size", "area"), ""])
def test_apply_returns_none_for_a_lost_place(source):
    assert MUTANT.apply(source) is None


def test_draw_is_reproducible_and_edits_one_place():
    drawn = draw("box.py", SOURCE, 5, seed=3)
    assert drawn == draw("box.py", SOURCE, 5, seed=3)
    assert len({mutant.apply(SOURCE).source for mutant in drawn} - {SOURCE}) == 5


def test_tests_are_selected_from_coverage_data(tmp_path):
    data = CoverageData(str(tmp_path / "data"))
    for context, lines in {
        "": [1, 2],
        "tests/test_box.py::test_a[x|y]|run": [3, 4],
        "tests/test_box.py::test_b|setup": [4],
        "tests/test_ray.py::test_c@cluster": [4],  # a child process under xdist
        "tests/test_box.py::test_removed|run": [4],
    }.items():
        data.set_context(context)
        data.add_lines({"/other/tree/pipeline/box.py": lines, "/other/tree/pipeline/toolbox.py": [7]})
    data.write()
    contexts = line_contexts([tmp_path / "data"], "pipeline/box.py")
    tiers = {
        f"tests/{test}": "default"
        for test in ("test_ray.py::test_c", "test_box.py::test_b", "test_box.py::test_a[x|y]")
    }
    assert select_tests(covering(contexts, SOURCE, range(3, 4)), tiers) == ["tests/test_box.py::test_a[x|y]"]
    assert select_tests(covering(contexts, SOURCE, range(5, 6)), tiers) == list(tiers)  # line 5 continues line 4
    assert covering(contexts, SOURCE, range(9, 10)) == set()


def test_cheap_tests_and_the_own_test_file_come_first(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "20.00s call     tests/test_box.py::test_slow\n0.20s setup    tests/test_a.py::test_a@group\nother\n"
    )
    tests = [
        "tests/test_a.py::test_a",
        "tests/test_b.py::test_b",
        "tests/test_box.py::test_slow",
        "tests/test_box.py::test_x",
    ]
    durations = read_durations([log])
    assert order(tests, "box.py", durations) == [tests[3], tests[1], tests[0], tests[2]]


@pytest.mark.parametrize(
    ("tree", "status", "tier", "killer"),
    [
        (FakeTree(), "survived", "", ""),
        (FakeTree({"b": "fails"}), "killed", "default", "b"),
        (FakeTree({"c": "fails"}), "killed", "other", "c"),
        (FakeTree({"b": "hangs"}), "timeout", "default", "b"),
        (FakeTree({"b": "is slow"}), "survived", "", ""),
        (FakeTree({"b": "fails"}, {"b": "fails"}), "survived", "", ""),
        (FakeTree({"a": "fails", "b": "fails"}, {"a": "fails"}), "killed", "default", "b"),
    ],
)
def test_a_mutant_is_killed_only_by_a_test_that_passes_without_it(tree, status, tier, killer):
    examiner = Examiner(tree, "c0ffee", {"a": "default", "b": "default", "c": "other"}, {})
    result = examiner.examine(MUTANT, {8: ["a|run", "b", "c|run"]})
    assert (result.status, result.tier, result.killer) == (status, tier, killer)


def test_summary_counts_kills_by_tier():
    results = [
        Result("", "1", "box.py", "killed", "default"),
        Result("", "2", "box.py", "timeout", "other"),
        Result("", "3", "box.py", "uncovered"),
        Result("", "4", "hat.py", "gone"),
    ]
    counts = {"default": 1, "other": 1, "timeout": 1, "survived": 0, "uncovered": 1, "gone": 1, "share_killed": 0.667}
    assert summary(results)["all"] == counts
