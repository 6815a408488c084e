"""How many faults do the tests notice? Runs the tests that cover each mutant of a committed list.

The tests run in a copy of a tree's HEAD. Coverage data with test contexts, measured at that commit, name the tests of
each line: `pytest --cov --cov-context=test`. A mutant is killed if a test fails or hangs; a test that also fails
without the mutant does not count. Results are appended to a .jsonl file next to the output, so a stopped run resumes.
"""

import argparse
import ast
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from coverage import CoverageData

from benchmarks.mutants import MODULES, ROOT, Mutant, MutatedSource, load
from benchmarks.tree_copy import TreeCopy

MAX_TESTS = 400
"""Tests of a tier that run for one mutant."""
MAX_RUNS = 2
"""Runs of a tier for one mutant: after the time limit, or a test that also fails without it, one more continues."""
NUM_SANITY_TESTS = 5
PHASES = ("|setup", "|run", "|teardown")
COST_LIMITS_S = (0.1, 1.0, 10.0)
COLUMNS = ("default", "other", "timeout", "survived", "uncovered", "gone")


@dataclass(frozen=True)
class Result:
    """What the tests made of one mutant."""

    commit: str
    """Commit of the tree."""
    id: str
    """Mutant, as in the list."""
    module: str
    """Path of the mutated file."""
    status: str
    """killed, timeout (a kill, too), survived, uncovered or gone."""
    tier: str = ""
    """Tier of the killing test: default or other."""
    killer: str = ""
    """Killing test, or the exit status of pytest if no test ran."""
    num_tests: dict[str, int] = field(default_factory=dict)
    """Tests that cover the mutant, by tier."""
    num_not_run: int = 0
    """Tests of a survivor that limits left out."""
    seconds: float = 0.0
    """Duration of all its test runs."""


@dataclass
class Examiner:
    """Runs the tests that cover a mutant, until one fails."""

    tree: TreeCopy
    commit: str
    tiers: Mapping[str, str]
    """Tier of every test of the tree."""
    durations: Mapping[str, float]
    """Seconds of each test; a missing test is cheap."""
    reliable: set[str] = field(default_factory=set)
    """Tests that passed without a mutant."""
    unreliable: set[str] = field(default_factory=set)
    """Tests that failed without a mutant."""

    def examine(self, mutant: Mutant, contexts: Mapping[int, Iterable[str]]) -> Result:
        """Run the tests of both tiers; contexts: coverage contexts by line of the mutant's module."""
        source, started = self.tree.source(mutant.module), time.monotonic()
        mutated = mutant.apply(source)
        if mutated is None:
            return Result(self.commit, mutant.id, mutant.module, "gone")
        tests = select_tests(covering(contexts, source, mutated.lines), self.tiers)
        counts = dict(Counter(self.tiers[test] for test in tests))
        status, tier, killer, num_not_run = "survived" if tests else "uncovered", "", "", 0
        for tier in ("default", "other"):
            ordered = order(
                [test for test in tests if self.tiers[test] == tier], mutant.module, self.durations, self.unreliable
            )
            kill, killer, left = self._kill(ordered[:MAX_TESTS], mutant.module, mutated)
            if kill:
                status, num_not_run = kill, 0
                break
            num_not_run += left + len(ordered[MAX_TESTS:])
        seconds = round(time.monotonic() - started, 1)
        tier = tier if killer else ""
        return Result(self.commit, mutant.id, mutant.module, status, tier, killer, counts, num_not_run, seconds)

    def _kill(self, tests: Sequence[str], module: str, mutated: MutatedSource) -> tuple[str, str, int]:
        """Return killed or timeout, or an empty text; the killing test; and the number of tests that did not run."""
        num_runs = 0
        while tests and num_runs < MAX_RUNS:
            run = self.tree.run(tests, module, mutated)
            started = run.ids("started") or tests[:1]
            if run.passed:
                return "", "", 0
            if run.exit_status is not None and not run.ids("failed"):
                return "killed", f"pytest exit status {run.exit_status}", 0
            suspect = (run.ids("failed") or started[-1:])[0]
            rest = [test for test in tests if test not in started]
            if run.exit_status is None and suspect != started[0]:
                tests, num_runs = [suspect, *rest], num_runs + 1  # not a hang yet: the tests before it used the time
            elif self._passes(suspect):
                return "timeout" if run.exit_status is None else "killed", suspect, 0
            else:
                tests, num_runs = rest, num_runs + 1  # else slow tests that never pass here would take hours
        return "", "", len(tests)

    def _passes(self, test: str) -> bool:
        """Tell whether a test passes without a mutant."""
        if test not in self.reliable | self.unreliable:
            (self.reliable if self.tree.run([test]).passed else self.unreliable).add(test)
        return test in self.reliable


def line_contexts(files: Sequence[Path], module: str) -> dict[int, set[str]]:
    """Return the coverage contexts of each line of a module; files may hold paths of any tree."""
    found: dict[int, set[str]] = {}
    for file in files:
        data = CoverageData(str(file))
        data.read()
        for name in data.measured_files():
            if name.replace("\\", "/").endswith(f"/{module}"):
                for line, contexts in data.contexts_by_lineno(name).items():
                    found.setdefault(line, set()).update(contexts)
    return found


def covering(contexts: Mapping[int, Iterable[str]], source: str, lines: range) -> set[str]:
    """Return the contexts of a mutant's lines, or those of their statement: not every line of a statement is traced."""
    for candidates in (lines, _statement(source, lines)):
        found = {context for line in candidates for context in contexts.get(line, ()) if context}
        if found:
            return found
    return set()


def select_tests(contexts: Iterable[str], tiers: Mapping[str, str]) -> list[str]:
    """Return the existing tests of some contexts, in the order of the collection.

    A context is a test id, with a phase in pytest's own process, and with an xdist group under `--dist loadgroup`.
    """
    wanted = set[str]()
    for context in contexts:
        test = next((context.removesuffix(phase) for phase in PHASES if context.endswith(phase)), context)
        wanted |= {test, test.rpartition("@")[0]}
    return [test for test in tiers if test in wanted]


def order(tests: Iterable[str], module: str, durations: Mapping[str, float], excluded: Iterable[str] = ()) -> list[str]:
    """Put cheap tests first, then those of the module's own test file; the tests of a file stay together."""
    own, skipped = f"/test_{Path(module).stem}.py::", set(excluded)

    def key(test: str) -> tuple[int, bool, str]:
        cost = sum(durations.get(test, 0.0) >= limit for limit in COST_LIMITS_S)
        return cost, own not in test, test.partition("::")[0]

    return sorted((test for test in tests if test not in skipped), key=key)


def read_durations(files: Iterable[Path]) -> dict[str, float]:
    """Read the seconds of each test from the output of `pytest --durations=0`."""
    found: defaultdict[str, float] = defaultdict(float)
    for file in files:
        for line in file.read_text(errors="replace").splitlines():
            if match := re.fullmatch(r"(\d+\.\d+)s (?:call|setup|teardown) +(\S.*)", line):
                for test in {match[2], match[2].rpartition("@")[0]}:  # the latter without an xdist group
                    found[test] += float(match[1])
    return dict(found)


def summary(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """Count the results of each module and of all."""
    rows: dict[str, Counter[str]] = {}
    for result in results:
        for name in (result.module, "all"):
            row = rows.setdefault(name, Counter())
            row[result.tier if result.tier else result.status] += 1
            row["timeout"] += result.status == "timeout"
    ordered = [*(name for name in rows if name != "all"), *(["all"] if rows else [])]
    return {name: {column: rows[name][column] for column in COLUMNS} | _share(rows[name]) for name in ordered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coverage", type=Path, action="append", required=True, help="coverage data with contexts")
    parser.add_argument("--tree", type=Path, default=ROOT, help="git checkout whose HEAD is tested (this one)")
    parser.add_argument("--durations", type=Path, action="append", default=[], help="output of pytest --durations=0")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds for a test run, without waits for a core (%(default)s)",
    )
    parser.add_argument("--only", nargs="+", default=[], help="ids of the mutants to run (all)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "mutation_sample.json")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in load() if not arguments.only or mutant.id in arguments.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the tests that run, too
    with tempfile.TemporaryDirectory() as folder:
        results = examine(mutants, arguments, TreeCopy(arguments.tree, Path(folder), arguments.timeout))
    rows = summary(results)
    print(f"{'':<30}" + "".join(f"{column:>11}" for column in (*COLUMNS, "killed")))
    for name, row in rows.items():
        print(f"{name:<30}" + "".join(f"{row[column]:>11}" for column in COLUMNS) + f"{row['share_killed']:>11.0%}")
    print("default, other: tier of the killing test; timeout: kills, of the two before, by a test that hangs")
    write(arguments.output, results, rows)


def examine(mutants: Sequence[Mutant], arguments: argparse.Namespace, tree: TreeCopy) -> list[Result]:
    """Examine the mutants that the results file lacks; returns all results in the order of the list."""
    commit = _git("rev-parse", "HEAD", cwd=arguments.tree)
    file = arguments.output.with_suffix(".jsonl")
    known = {result.id: result for result in read_results(file) if result.commit == commit}
    contexts = cache(lambda module: line_contexts(arguments.coverage, module))
    examiner = Examiner(tree, commit, tree.tests(), read_durations(arguments.durations))
    examiner.reliable |= {result.killer for result in known.values() if "::" in result.killer}
    check_unmutated(examiner, [test for module in MODULES for line in contexts(module).values() for test in line])
    for number, mutant in enumerate(mutants, start=1):
        if mutant.id not in known:
            result = known[mutant.id] = examiner.examine(mutant, contexts(mutant.module))
            with file.open("a") as log:
                log.write(json.dumps(asdict(result)) + "\n")
            by = f" by {result.tier}: {result.killer}" if result.tier else ""
            print(f"{number}/{len(mutants)} {mutant.id} {result.status}{by} ({result.seconds:.0f} s)", flush=True)
    for test in sorted(examiner.unreliable):
        print(f"does not count, fails without a mutant: {test}")
    return [known[mutant.id] for mutant in mutants]


def check_unmutated(examiner: Examiner, contexts: Iterable[str]) -> None:
    """Stop unless a few of the covering tests pass without a mutant."""
    default = [test for test in select_tests(contexts, examiner.tiers) if examiner.tiers[test] == "default"]
    by_file: dict[str, str] = {}
    for test in order(default, "", examiner.durations):
        by_file.setdefault(test.partition("::")[0], test)
    run = examiner.tree.run(list(by_file.values())[:NUM_SANITY_TESTS])
    if run.exit_status != 0:
        raise SystemExit(f"the tests do not pass without a mutant: {examiner.tree.output_tail()}")


def read_results(file: Path) -> Iterator[Result]:
    """Yield the results of earlier runs."""
    if file.exists():
        yield from (Result(**json.loads(line)) for line in file.read_text().splitlines())


def write(output: Path, results: Sequence[Result], rows: Mapping[str, object]) -> None:
    """Write the results file."""
    from benchmarks.report import machine  # loads torch, which the tests of this module do not need

    command = shlex.join(["python", "-m", "benchmarks.mutation_sample", *sys.argv[1:]])
    figures = {"modules": rows, "mutants": [asdict(result) for result in results]}
    result = {"commit": results[0].commit, "command": command, "machine": machine(), "figures": figures}
    output.write_text(json.dumps(result, indent=2) + "\n")


def _share(row: Mapping[str, int]) -> dict[str, float]:
    num_killed = row["default"] + row["other"]
    return {"share_killed": round(num_killed / max(1, num_killed + row["survived"] + row["uncovered"]), 3)}


def _statement(source: str, lines: range) -> range:
    """Return the lines of the innermost statement around some lines, of a compound one only its header."""
    found = lines
    for node in ast.walk(ast.parse(source)):  # breadth first: the innermost comes last
        if isinstance(node, ast.stmt) and node.lineno <= lines.start and lines[-1] <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            found = range(node.lineno, body[0].lineno if body else (node.end_lineno or 0) + 1)
    return found


def _git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
