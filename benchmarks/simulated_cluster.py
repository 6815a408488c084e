"""A job on a cluster, by discrete events: batches in the slots of a plan's pools, one driver, nodes that are lost.

A GPU's time is shared evenly by the stages on it. The driver is one server, first come first served: it takes some
seconds for a batch, and some for each pool that the batch enters. Batches on a node that is lost begin again.
"""

import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, inf
from typing import Any, cast

import simpy

from benchmarks.simulated import Work
from pipeline.batch.planner import Plan, Pool
from pipeline.ledger.ledger import FLUSH_ROWS, FLUSH_SECONDS

Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Nodes:
    """GPUs per node, and how nodes come and go.

    arrive_s: they come evenly within so many seconds; mtbf_h: between two failures of a node; detect_s: until one is
    noticed; spot_per_h: interruptions of a node per hour; notice_s: in which an interrupted node works on as if nothing
    had been said, while its replacement starts; replace_s: until a new node is there; load_s: until it has loaded the
    model.
    """

    gpus: int = 8
    arrive_s: float = 0.0
    mtbf_h: float = inf
    detect_s: float = 60.0
    spot_per_h: float = 0.0
    notice_s: float = 120.0
    replace_s: float = 300.0
    load_s: float = 120.0


@dataclass(frozen=True)
class Overhead:
    """The driver's seconds for a batch, and for each pool that a batch enters."""

    batch_s: float
    pool_s: float


@dataclass(frozen=True)
class Shared:
    """Seconds that a row takes of what all workers share, and a ledger part of its writer."""

    reading: float = 0.0
    object_store: float = 0.0
    storage: float = 0.0
    part: float = 0.0


@dataclass(frozen=True)
class Call:
    """A stage's work on one batch: when it began and ended."""

    stage: str
    began: float
    ended: float


class Station:
    """One server, first come first served."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env, self.free_at, self.asked_s = env, 0.0, 0.0

    def serve(self, seconds: float) -> simpy.Event:
        """Return the event that the work is done."""
        self.free_at = max(self.env.now, self.free_at) + seconds
        self.asked_s += seconds
        return self.env.timeout(self.free_at - self.env.now)

    @property
    def busy_s(self) -> float:
        """Seconds that it has worked until now."""
        return self.asked_s - max(0.0, self.free_at - self.env.now)


class Gpu:
    """A GPU whose time all who work on it share evenly."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env, self.since, self.changes = env, env.now, 0
        self.worked_s = 0.0
        self.left: dict[simpy.Event, float] = {}

    def work(self, seconds: float) -> simpy.Event:
        """Return the event that so much of the GPU's time was had."""
        self._advance()
        done = self.env.event()
        self.left[done] = seconds
        self._await_next()
        return done

    def stop(self) -> None:
        """Do no more; whoever works on it has to leave."""
        self._advance()
        self.changes += 1

    def leave(self, done: simpy.Event) -> float:
        """Take work back, if it is not done; returns the seconds that it would still have taken."""
        return self.left.pop(done, 0.0)

    def busy_s(self) -> float:
        """Return the seconds that it has worked until now."""
        return self.worked_s + (self.env.now - self.since if self.left else 0.0)

    def _advance(self) -> None:
        passed, self.since = self.env.now - self.since, self.env.now
        self.worked_s += passed if self.left else 0.0
        for done in self.left:
            self.left[done] -= passed / len(self.left)

    def _await_next(self) -> None:
        self.changes += 1
        if self.left:
            wait_s = max(0.0, min(self.left.values()) * len(self.left))
            cast(list[Any], self.env.timeout(wait_s, self.changes).callbacks).append(self._finish)

    def _finish(self, timeout: simpy.Event) -> None:
        if timeout.value == self.changes:  # nobody came or left meanwhile
            self._advance()
            for done in [done for done, left in self.left.items() if left < 1e-6]:
                del self.left[done]
                done.succeed()
            self._await_next()


class Worker:
    """A pool actor: its GPU, None = none, whose turn it is at each stage, and the batches that it holds."""

    def __init__(self, env: simpy.Environment, pool: Pool, gpu: Gpu | None) -> None:
        self.gpu = gpu
        self.turns = {spec.name: simpy.Resource(env) for spec in pool.stages}
        self.batches: set[simpy.Process] = set()


class Farm:
    """One job, or shard, on its part of the cluster: `feed` is the process that ends when all batches are through."""

    def __init__(
        self,
        env: simpy.Environment,
        plan: Plan,
        works: Mapping[str, Work],
        batches: Iterable[int],
        overhead: Overhead,
        shared: Shared = Shared(),
        nodes: Nodes = Nodes(),
        spread: float = 0.0,
        seed: int = 0,
        storage: Station | None = None,
    ) -> None:
        """Begin a job.

        works: by stage; batches: their rows; spread: how much a batch's seconds vary, evenly, up and down; storage:
        that of all shards, None = its own.
        """
        self.env, self.plan, self.works = env, plan, works
        self.overhead, self.shared, self.nodes, self.spread = overhead, shared, nodes, spread
        self.random = random.Random(seed)
        self.driver, self.reading, self.object_store, self.ledger = (Station(env) for _ in range(4))
        self.storage = storage or Station(env)
        self.slots = [simpy.Store(env) for _ in plan.pools]
        self.calls: list[Call] = []
        self.finished: list[tuple[float, int]] = []
        self.open_rows, self.num_parts, self.lost_rows = 0, 0, 0
        self.gpus: list[Gpu] = []
        self.wasted_s = 0.0
        self.most_batches = sum(pool.workers * (pool.batches_at_once + 1) for pool in plan.pools)
        self.room = simpy.Container(env, init=self.most_batches)
        for node in range(ceil(plan.num_gpus / nodes.gpus)):
            env.process(self._node(node))
        for pool, slots in zip(plan.pools, self.slots, strict=True):
            if not pool.gpus:
                self._start(pool, slots, [None] * pool.workers)
        env.process(self._write_in_time())
        self.feed = env.process(self._feed(batches))

    def busy_s(self) -> dict[str, float]:
        """Return the seconds that each of what the workers share has worked until now."""
        stations = {"driver": self.driver, "reading": self.reading, "ledger": self.ledger}
        stations |= {"object store": self.object_store, "storage": self.storage}
        return {name: station.busy_s for name, station in stations.items()}

    def gpu_s(self) -> float:
        """Return the seconds that GPUs have worked until now, without those of batches that had to begin again."""
        return sum(gpu.busy_s() for gpu in self.gpus) - self.wasted_s

    def in_use(self, pool: str, since: float) -> float:
        """Return how busy the workers of a pool of one stage have been, as a share of the time since a moment."""
        [workers] = [found.workers for found in self.plan.pools if found.name == pool]
        calls = (call for call in self.calls if call.stage == pool and call.ended > since)
        return sum(call.ended - max(call.began, since) for call in calls) / ((self.env.now - since) * workers)

    def _feed(self, batches: Iterable[int]) -> Steps:
        for rows in batches:
            yield self.room.get(1)
            self.env.process(self._batch(rows))
        yield self.room.get(self.most_batches)

    def _batch(self, rows: int) -> Steps:
        while not (yield from self._attempt(rows)):
            self.lost_rows += rows
        self.finished.append((self.env.now, rows))
        self.room.put(1)
        self.open_rows += rows
        if self.open_rows >= FLUSH_ROWS:
            self._write()

    def _attempt(self, rows: int) -> Generator[simpy.Event, Any, bool]:
        """Take a batch through all pools; return whether its workers lived long enough."""
        spent_s = 0.0
        yield self.reading.serve(rows * self.shared.reading)
        yield self.driver.serve(self.overhead.batch_s)
        for pool, slots in zip(self.plan.pools, self.slots, strict=True):
            yield self.driver.serve(self.overhead.pool_s)
            worker: Worker = yield slots.get()
            worker.batches.add(batch := cast(simpy.Process, self.env.active_process))
            try:
                for spec in pool.stages:
                    with worker.turns[spec.name].request() as turn:
                        yield turn
                        spent_s += yield from self._work(spec.name, worker.gpu, rows)
            except simpy.Interrupt:
                self.wasted_s += spent_s
                return False
            worker.batches.remove(batch)
            slots.put(worker)
        return True

    def _work(self, stage: str, gpu: Gpu | None, rows: int) -> Generator[simpy.Event, Any, float]:
        """Do a stage's work on a batch; return the seconds of a GPU that it took."""
        began, work = self.env.now, self.works.get(stage, Work())
        seconds = work.device_s * rows * self.random.uniform(1 - self.spread, 1 + self.spread)
        done = gpu.work(seconds) if gpu else self.env.timeout(seconds)
        try:
            yield done
            if stage == "encode":
                yield self.object_store.serve(rows * self.shared.object_store)
            if stage == "publish":
                yield self.storage.serve(rows * self.shared.storage)
            yield self.env.timeout(work.host_s * rows)
        except simpy.Interrupt:
            self.wasted_s += seconds - gpu.leave(done) if gpu else 0.0
            raise
        self.calls.append(Call(stage, began, self.env.now))
        return seconds if gpu else 0.0

    def _start(self, pool: Pool, slots: simpy.Store, gpus: Sequence[Gpu | None]) -> list[Worker]:
        """Let workers of a pool begin, one per GPU; slots are taken from all of them in turn."""
        workers = [Worker(self.env, pool, gpu) for gpu in gpus]
        for worker in workers * pool.batches_at_once:
            slots.put(worker)
        return workers

    def _node(self, number: int) -> Steps:
        """A place for a node: one comes, works, is lost and replaced."""
        nodes = self.nodes
        places = range(number * nodes.gpus, min((number + 1) * nodes.gpus, self.plan.num_gpus))
        yield self.env.timeout(self.random.uniform(0, nodes.arrive_s))
        while True:
            gpus = {place: Gpu(self.env) for place in places}
            self.gpus += gpus.values()
            workers = [
                self._start(pool, slots, [gpu for place, gpu in gpus.items() if place < pool.workers])
                for pool, slots in zip(self.plan.pools, self.slots, strict=True)
                if pool.gpus
            ]
            failure_h, spot_h = self._hours_until(1 / nodes.mtbf_h), self._hours_until(nodes.spot_per_h)
            if min(failure_h, spot_h) == inf:
                return
            notice_s = nodes.notice_s if spot_h < failure_h else 0.0
            yield self.env.timeout(3600 * min(failure_h, spot_h) + notice_s)
            for gpu in gpus.values():
                gpu.stop()
            self._lose(list(chain(*workers)))
            unnoticed_s = 0.0 if spot_h < failure_h else nodes.detect_s
            yield self.env.timeout(unnoticed_s + max(0.0, nodes.replace_s - notice_s) + nodes.load_s)

    def _hours_until(self, rate: float) -> float:
        return self.random.expovariate(rate) if rate else inf

    def _lose(self, workers: Sequence[Worker]) -> None:
        for slots in self.slots:
            slots.items[:] = [worker for worker in slots.items if worker not in workers]
        for batch in chain(*(worker.batches for worker in workers)):
            batch.interrupt()

    def _write_in_time(self) -> Steps:
        while True:
            yield self.env.timeout(FLUSH_SECONDS)
            self._write()

    def _write(self) -> None:
        if self.open_rows:
            self.ledger.serve(self.shared.part)
            self.num_parts += 1
            self.open_rows = 0
