"""Who was running what when a worker died: rows that kill their workers are found, run alone, and ended."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock, Timer
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.rows import Batch, Item
from pipeline.stages import ENCODE, SAMPLE
from pipeline.stages.stage import Stage
from pipeline.storage.redaction import brief

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
SKIPPING = (ENCODE, SAMPLE)
"""Stages that begin nothing new once the job is stopping: decoding and publishing save work that is done."""


class WorkerDied(Exception):
    """A row's worker died each time the row ran alone."""


@dataclass(frozen=True)
class Verdict:
    """How announced rows may run.

    alone: one at a time, with nothing beside them in the process, because a worker died with them; lost: reasons of the
    rows that have used up their attempts; stopping: the job takes no new rows.
    """

    alone: bool
    lost: dict[str, str]
    stopping: bool


@dataclass(frozen=True)
class _Running:
    process: str
    node: str
    alone: bool


@dataclass
class WorkerMonitor:
    """What runs where, told by the workers before and after; lives in an actor outside of them.

    A row announced again while it still runs elsewhere has lost its worker. Deaths count against a row only if it ran
    alone, and never if its node is gone.
    """

    is_alive: Callable[[str], bool]
    max_attempts: int = MAX_ATTEMPTS
    running: dict[tuple[str, str], _Running] = field(default_factory=dict)
    suspects: set[tuple[str, str]] = field(default_factory=set)
    deaths: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[str, str] = field(default_factory=dict)
    stopping: bool = False

    def begin(self, stage: str, rows: Sequence[str], process: str, node: str, *, alone: bool = False) -> Verdict:
        """Announce rows that a process is about to run together; alone: it is one row, and nothing runs beside it."""
        for row in rows:
            self._account(stage, row, process)
        lost = {row: self._reason(row) for row in rows if self._num_deaths(row) >= self.max_attempts}
        suspect = not alone and any((stage, row) in self.suspects for row in rows)
        if not suspect and not lost:
            entry = _Running(process, node, alone)
            self.running |= {(stage, row): entry for row in rows}
        return Verdict(suspect, lost, self.stopping)

    def end(self, stage: str, rows: Sequence[str], process: str) -> None:
        """Say that rows have run to their end, well or not; what another process has taken over runs on."""
        for row in rows:
            entry = self.running.get((stage, row))
            if entry is not None and entry.process == process:
                del self.running[stage, row]

    def blame(self, rows: Sequence[str], reason: str) -> None:
        """Say why a worker is about to end itself."""
        self.reasons |= dict.fromkeys(rows, reason)

    def stop(self) -> None:
        """Take no new rows from now on."""
        self.stopping = True

    def is_idle(self) -> bool:
        """Tell whether no stage runs any row; what a lost node was running waits for another worker."""
        return not any(self.is_alive(node) for node in {entry.node for entry in self.running.values()})

    def _account(self, stage: str, row: str, process: str) -> None:
        earlier = self.running.pop((stage, row), None)
        if earlier is None or earlier.process == process or not self.is_alive(earlier.node):
            return
        self.suspects.add((stage, row))
        if earlier.alone:
            self.deaths[row].append(earlier.node)
        logger.warning("%s: a worker died with row %s", stage, row)

    def _num_deaths(self, row: str) -> int:
        """Return how often its worker died; a node that dies takes its workers first, so each is asked about again."""
        return sum(map(self.is_alive, self.deaths.get(row, ())))

    def _reason(self, row: str) -> str:
        why = self.reasons.get(row, "killed from outside, out of memory, or crashed")
        return f"its worker died {self._num_deaths(row)} times while it ran alone: {why}"


def node_is_alive(node: str) -> bool:
    """Tell whether a node of the cluster is there."""
    return any(info["NodeID"] == node and info["Alive"] for info in ray.nodes())


def start_watch(max_attempts: int) -> Any:  # noqa: ANN401 - Ray's actor handles have no static type
    """Start the job's watch: an actor that takes no resources, on the driver's node, whose loss ends the job anyway."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WorkerMonitor)
    return remote.options(scheduling_strategy=here).remote(node_is_alive, max_attempts)


class Guarded:
    """A stage as a worker runs it: every batch is announced before and after, and has a time limit.

    turns: a lock for each stage in this process, by name; exit_process ends the worker at once; it is an argument for
    tests only.
    """

    def __init__(
        self,
        stage: Stage,
        watch: Any,  # noqa: ANN401 - an actor handle
        node: str,
        row_timeout_s: float | None,
        turns: Mapping[str, Lock],
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        self.stage, self.watch, self.node = stage, watch, node
        self.row_timeout_s, self.turns, self.exit_process = row_timeout_s, turns, exit_process
        self.process = uuid4().hex

    def __call__(self, batch: Batch) -> Batch:
        """Map a batch as its verdict says: together, or row by row, or not at all."""
        with self.turns[self.stage.name]:
            batch, verdict = self._begin(batch, alone=False)
            if not verdict.alone:
                return self._as_told(batch, verdict)
        with ExitStack() as everything:
            for turn in self.turns.values():
                everything.enter_context(turn)
            rows = [self._as_told(*self._begin(batch.only(index), alone=True)) for index in range(len(batch.items))]
        return batch.with_items([row.items[0] for row in rows])

    def _begin(self, batch: Batch, *, alone: bool) -> tuple[Batch, Verdict]:
        """Announce a batch; those of its rows that are lost have failed."""
        verdict: Verdict = ray.get(
            self.watch.begin.remote(self.stage.name, _pending(batch), self.process, self.node, alone=alone)
        )
        if not verdict.lost:
            return batch, verdict
        left = batch.with_items([_without_lost(item, self.stage.name, verdict) for item in batch.items])
        return self._begin(left, alone=alone)

    def _as_told(self, batch: Batch, verdict: Verdict) -> Batch:
        rows = _pending(batch)
        if not rows:
            return batch
        if verdict.stopping and self.stage.name in SKIPPING:
            result = batch.with_items([_skipped(item) for item in batch.items])
        else:
            result = self._limited(batch, rows)
        self.watch.end.remote(self.stage.name, rows, self.process)
        return result

    def _limited(self, batch: Batch, rows: list[str]) -> Batch:
        if self.row_timeout_s is None:
            return self._run(batch, rows)
        seconds = self.row_timeout_s * len(rows)
        timer = Timer(seconds, self._die, (rows, f"{self.stage.name} took more than {seconds:g} s"))
        timer.daemon = True
        timer.start()
        try:
            return self._run(batch, rows)
        finally:
            timer.cancel()

    def _run(self, batch: Batch, rows: list[str]) -> Batch:
        try:
            return self.stage(batch)
        except Exception as error:
            self._die(rows, brief(str(error)))
            raise

    def _die(self, rows: list[str], reason: str) -> None:
        """End this process on purpose: a hung kernel or a poisoned device leaves nothing else."""
        logger.error("%s: ending the worker: %s", self.stage.name, reason)
        ray.get(self.watch.blame.remote(rows, reason))
        self.exit_process(1)


def _pending(batch: Batch) -> list[str]:
    return [item.row.id for item in batch.items if item.is_pending]


def _without_lost(item: Item, stage: str, verdict: Verdict) -> Item:
    reason = verdict.lost.get(item.row.id)
    return item.failed(stage, WorkerDied(reason)) if reason is not None and item.is_pending else item


def _skipped(item: Item) -> Item:
    return Item(item.row.updated(skipped=True)) if item.is_pending else item
