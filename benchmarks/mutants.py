"""Mutants: small faults in the source code, each stored as text within a named function.

The committed list was drawn once from an older commit. Because a mutant is applied by its text, it still applies when
lines move. When a refactoring rewrites such a line, edit the entry in the list too. The command draws a new list.
"""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
LIST = ROOT / "benchmarks" / "results" / "mutants.json"
MODULES = (
    "pyramid_flow/sampling/sampler.py",
    "pyramid_flow/transformer/history_cache.py",
    "pyramid_flow/sampling/schedule.py",
    "pyramid_flow/transformer/attention.py",
    "pipeline/request.py",
    "pipeline/tables/worklist.py",
    "pipeline/ledger/ledger.py",
    "pipeline/storage/storage.py",
    "pipeline/batch/quarantine.py",
    "pipeline/serving/queue/store.py",
)
MUTANTS_PER_MODULE = 8
SEED = 0

SWAPS = {
    ast.Compare: {"<": "<=", ">": ">=", "==": "!=", "in": "not in", "is": "is not"},
    ast.BinOp: {"+": "-", "*": "//"},
    ast.AugAssign: {"+=": "-=", "*=": "//="},
    ast.BoolOp: {"and": "or"},
}
"""Operators that replace each other, in both directions."""
NO_FAULTS = {"strict", "use_threads"}
"""Keyword arguments that change no result: `zip(strict=True)` only detects a second fault."""
OPERATOR_TEXT = re.compile(r"not\s+in\b|is\s+not\b|\b(?:in|is|and|or)\b|[^\w\s()#]+")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mutant:
    """One fault, found in a file by the text of its source lines."""

    id: str
    """Name that is unique in the list, for example `schedule-3`."""
    module: str
    """Path of the file from the root of the repository."""
    function: str
    """Qualified name of the function, for example `Store.claim`."""
    operator: str
    """Kind of the edit, for example `comparison`."""
    original: str
    """Source lines before the edit; the indentation of the first is removed from all."""
    occurrence: int
    """Index among the places in the function that have the same text."""
    mutated: str
    """Source lines after the edit."""

    def apply(self, source: str) -> "MutatedSource | None":
        """Return the mutated source of the module, or None if the function no longer has the original lines."""
        lines, count = source.split("\n"), self.original.count("\n") + 1
        starts = [
            start
            for function in self._functions(source)
            for start in places(lines, range(function.lineno, _end(function) + 1), self.original)
        ]
        if self.occurrence >= len(starts):
            return None
        start = starts[self.occurrence]
        indent = " " * _indent(lines[start - 1])
        lines[start - 1 : start - 1 + count] = [indent + line if line else line for line in self.mutated.split("\n")]
        return MutatedSource("\n".join(lines), range(start, start + count))

    def _functions(self, source: str) -> list[Function]:
        """Return the functions with this name; if there is none, the only one with the same last name."""
        found = list(functions(parse(source)))
        exact = [function for name, function in found if name == self.function]
        similar = [function for name, function in found if _last(name) == _last(self.function)]
        return exact or (similar if len(similar) == 1 else [])


@dataclass(frozen=True)
class MutatedSource:
    """A module with one fault."""

    source: str
    """Text of the whole file."""
    lines: range
    """Line numbers of the original lines, from 1."""


@dataclass(frozen=True)
class Edit:
    """Replacement of a part of a source file."""

    operator: str
    """Kind of the edit."""
    start: int
    """Offset of the first byte that is replaced."""
    end: int
    """Offset after the last byte."""
    text: str
    """Replacement."""


class SourceFile:
    """The text of a module with the byte offsets of its syntax nodes."""

    def __init__(self, text: str) -> None:
        self.content = text.encode()
        self.tree = parse(text)
        self.line_starts = [0, *(match.end() for match in re.finditer(rb"\n", self.content))]

    def span(self, node: Any) -> tuple[int, int]:  # noqa: ANN401 - ast.AST does not declare positions
        """Return the byte offsets of a statement or an expression."""
        return (
            self.line_starts[node.lineno - 1] + node.col_offset,
            self.line_starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, start: int, end: int) -> str:
        """Return the text between two byte offsets."""
        return self.content[start:end].decode()

    def edits(self, function: Function) -> Iterator[Edit]:
        """Yield all edits of a function's body."""
        for statement in function.body:
            for node in _mutable_nodes(statement):
                yield from self._edits(node)

    def mutant(self, module: str, name: str, function: Function, edit: Edit) -> Mutant:
        """Describe an edit of a function by the lines before and after it."""
        first, last = (self.content.count(b"\n", 0, offset) + 1 for offset in (edit.start, edit.end))
        lines = self.content.decode().split("\n")
        start = self.line_starts[first - 1]
        end = start + len("\n".join(lines[first - 1 : last]).encode())
        original = _dedent(lines[first - 1 : last])
        changed = (self.text(start, edit.start) + edit.text + self.text(edit.end, end)).split("\n")
        mutated = "\n".join(line[_indent(lines[first - 1]) :] for line in changed)
        occurrence = places(lines, range(function.lineno, _end(function) + 1), original).index(first)
        return Mutant("", module, name, edit.operator, original, occurrence, mutated)

    def edited(self, edit: Edit) -> str:
        """Return the text of the module after an edit."""
        return self.text(0, edit.start) + edit.text + self.text(edit.end, len(self.content))

    def _edits(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.Compare(left=left, comparators=[right]):
                yield from self._swap("comparison", ast.Compare, left, right)
            case ast.BinOp(left=left, right=right):
                yield from self._swap("arithmetic", ast.BinOp, left, right)
            case ast.AugAssign(target=target, value=value):
                yield from self._swap("arithmetic", ast.AugAssign, target, value)
            case ast.BoolOp(values=values):
                for left, right in pairwise(values):
                    yield from self._swap("boolean", ast.BoolOp, left, right)
            case ast.UnaryOp(op=ast.Not()):
                start, _ = self.span(node)
                yield Edit("boolean", start, start + len("not "), "")
            case ast.Constant(value=bool() as flag):
                yield Edit("constant", *self.span(node), str(not flag))
            case ast.Constant(value=int() as number):
                yield Edit("constant", *self.span(node), str(number + 1))
            case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
                yield Edit("return", *self.span(node), "return None")
            case ast.Expr(value=ast.Call()):
                yield Edit("call", *self.span(node), "pass")
            case ast.Call(func=ast.Name(id="min" | "max") as name):
                yield Edit("min and max", *self.span(name), "max" if name.id == "min" else "min")
            case ast.If(test=test) if not _has_own_edit(test):
                start, end = self.span(test)
                yield Edit("condition", start, end, f"not ({self.text(start, end)})")

    def _swap(self, operator: str, kind: type[ast.AST], left: ast.expr, right: ast.expr) -> Iterator[Edit]:
        start, end = self.span(left)[1], self.span(right)[0]
        found = OPERATOR_TEXT.search(self.text(start, end))
        swaps = SWAPS[kind] | {new: old for old, new in SWAPS[kind].items()}
        if found and (text := swaps.get(" ".join(found[0].split()))):
            yield Edit(operator, start + found.start(), start + found.end(), text)


@lru_cache(maxsize=1)  # the mutants of a module follow each other
def parse(text: str) -> ast.Module:
    """Return the syntax tree of a module; it must not be changed."""
    return ast.parse(text)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield all functions below a node, with their qualified names."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, Function | ast.ClassDef):
            name = prefix + child.name
            if isinstance(child, Function):
                yield name, child
            yield from functions(child, f"{name}.")
        else:
            yield from functions(child, prefix)


def places(lines: Sequence[str], within: range, original: str) -> list[int]:
    """Return the numbers of the lines, from 1, at which an indented copy of a text starts."""
    count = original.count("\n") + 1
    starts = within[: len(within) - count + 1]
    return [start for start in starts if _dedent(lines[start - 1 : start - 1 + count]) == original]


def candidates(module: str, text: str) -> Iterator[tuple[Mutant, int]]:
    """Yield the mutants of a module that compile, each with the number of its first line.

    Lines with a comment are left out: comments are reworded more often than code.
    """
    source = SourceFile(text)
    for name, function in functions(source.tree):
        for edit in source.edits(function):
            mutant = source.mutant(module, name, function, edit)
            applied = mutant.apply(text)
            if "#" not in mutant.original and applied and applied.source == source.edited(edit) and compiles(applied):
                yield mutant, applied.lines.start


def compiles(mutated: MutatedSource) -> bool:
    """Tell whether a mutated module is valid Python."""
    try:
        compile(mutated.source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def draw(module: str, text: str, count: int = MUTANTS_PER_MODULE, seed: int = SEED) -> list[Mutant]:
    """Draw mutants of a module, at most one for each line and about equally many of each operator."""
    random, by_operator = Random(f"{seed} {module}"), defaultdict(list)
    for mutant, line in candidates(module, text):
        by_operator[mutant.operator].append((mutant, line))
    for group in by_operator.values():
        random.shuffle(group)
    operators, used, drawn = sorted(by_operator), set[int](), list[Mutant]()
    while len(drawn) < count and any(by_operator.values()):
        random.shuffle(operators)
        for operator in operators:
            group = by_operator[operator] = [pair for pair in by_operator[operator] if pair[1] not in used]
            if group and len(drawn) < count:
                mutant, line = group.pop()
                used.add(line)
                drawn.append(mutant)
    stem = module.rpartition("/")[2].removesuffix(".py")
    return [replace(mutant, id=f"{stem}-{number}") for number, mutant in enumerate(drawn)]


def load() -> list[Mutant]:
    """Return the committed list."""
    return [Mutant(**entry) for entry in json.loads(LIST.read_text())["mutants"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD", help="commit whose source is mutated (%(default)s)")
    arguments = parser.parse_args()
    drawn = [mutant for module in MODULES for mutant in draw(module, _git("show", f"{arguments.commit}:{module}"))]
    for mutant in drawn:
        print(f"{mutant.id:<18}{mutant.operator:<14}{mutant.function}")
    command = shlex.join(["python", "-m", "benchmarks.mutants", *sys.argv[1:]])
    result = {
        "commit": _git("rev-parse", arguments.commit).strip(),
        "command": command,
        "mutants": [asdict(mutant) for mutant in drawn],
    }
    LIST.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _mutable_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those below it, without nested functions, type annotations, texts and log messages."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.JoinedStr():
            return
        case ast.Expr(value=ast.Call(func=func)) if ast.unparse(func).startswith(("logger.", "logging.")):
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.keyword(arg=name) if name in NO_FAULTS:
            return
        case ast.AnnAssign(annotation=skipped) | ast.Assert(msg=skipped):
            pass
        case _:
            skipped = None
    yield node
    for child in ast.iter_child_nodes(node):
        if child is not skipped:
            yield from _mutable_nodes(child)


def _has_own_edit(test: ast.expr) -> bool:
    """Tell whether another operator negates a condition already."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot() | ast.In() | ast.NotIn()]):
            return True
    return False


def _dedent(lines: Sequence[str]) -> str:
    """Join lines after removing the indentation of the first from each."""
    return "\n".join(line[_indent(lines[0]) :] for line in lines)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _end(function: Function) -> int:
    return function.end_lineno or function.lineno


def _last(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    main()
