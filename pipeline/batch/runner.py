"""From a plan to one streaming Ray Data Dataset; yields its output, the metadata of finished batches."""

import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from pipeline.batch.planner import Node, Plan, PlanError, Pool, Resources, StageSpec
from pipeline.batch.quarantine import MAX_ATTEMPTS, Guarded, start_watch
from pipeline.monitoring.logs import log_as_json
from pipeline.monitoring.metrics import QueueMetrics, StageMetrics
from pipeline.rows import Batch, pack, unpack
from pipeline.stages import PUBLISH
from pipeline.stages.stage import Stage
from pipeline.tables.batching import read_batches, read_units
from pipeline.tables.readers import InputPart
from pipeline.tables.worklist import PartWork, RowRules, Worklist

READ_TASKS = 2
READ_CPUS = 0.25
MIN_LOGICAL_CPUS = 4
POLL_S = 0.5
CLOSE_S = 5.0


@dataclass(frozen=True)
class RetryLimits:
    """When a row is given up: deaths of its worker while it ran alone, and seconds per stage (None = no limit)."""

    max_attempts: int = MAX_ATTEMPTS
    row_timeout_s: float | None = None


class Worker:
    """A pool actor: the stages of its pool, told nothing but packed batches.

    With overlap it is called in several threads at once, whose batches take turns at each stage.
    """

    def __init__(self, pool: Pool, watch: Any, limits: RetryLimits) -> None:  # noqa: ANN401 - an actor handle
        node = ray.get_runtime_context().get_node_id()
        log_as_json(node=node)
        self.metrics = StageMetrics()
        turns = {spec.name: threading.Lock() for spec in pool.stages}
        self.stages = [Guarded(_made(spec, node), watch, node, limits.row_timeout_s, turns) for spec in pool.stages]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Map a block of packed batches."""
        return _table([self._through(batch) for batch in _batches(table)])

    def _through(self, batch: Batch) -> Batch:
        for guarded in self.stages:
            before, batch = batch, guarded(batch)
            self.metrics.count(guarded.stage.name, before, batch)
        return batch


def _made(spec: StageSpec, node: str) -> Stage:
    place = {"node": node} if spec.name == PUBLISH else {}
    return spec.stage(**spec.arguments, **place)


class Rendering:
    """A running Dataset over a worklist: iterate over what it finishes, and stop it."""

    def __init__(self, worklist: Worklist, plan: Plan, rules: RowRules, limits: RetryLimits) -> None:
        self.watch = start_watch(limits.max_attempts)
        self.dataset = build(worklist, plan, rules, self.watch, limits)
        self.metrics = QueueMetrics(worklist.num_rows)

    def stop(self) -> None:
        """Let no further row begin; what has begun goes on."""
        self.watch.stop.remote()

    def is_idle(self) -> bool:
        """Tell whether no stage runs any row."""
        return bool(ray.get(self.watch.is_idle.remote()))

    def __iter__(self) -> Iterator[Batch | None]:
        """Yield every finished batch, and None while nothing arrives; raises an error of the Dataset.

        The Dataset is consumed in a thread of its own, so that the caller stays free to write its ledger, show
        progress and take signals. Whoever leaves the loop early ends the Dataset.
        """
        arrived: queue.Queue[pa.Table | Exception | None] = queue.Queue()
        left = threading.Event()
        consumer = threading.Thread(target=self._consume, args=(arrived, left), name="dataset", daemon=True)
        consumer.start()
        try:
            while True:
                try:
                    result = arrived.get(timeout=POLL_S)
                except queue.Empty:
                    yield None
                    continue
                if result is None:
                    return
                if isinstance(result, Exception):
                    raise result
                for batch in _batches(result):
                    self.metrics.finished(len(batch))
                    yield batch
        finally:
            left.set()
            consumer.join(CLOSE_S)

    def _consume(self, arrived: "queue.Queue[pa.Table | Exception | None]", left: threading.Event) -> None:
        try:
            for table in self.dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                arrived.put(table)
                if left.is_set():
                    break
            arrived.put(None)
        except Exception as error:  # noqa: BLE001 - raised in the iterating thread
            arrived.put(error)


def build(
    worklist: Worklist,
    plan: Plan,
    rules: RowRules,
    watch: Any,  # noqa: ANN401 - an actor handle
    limits: RetryLimits,
) -> "ray.data.Dataset":
    """Return the lazy Dataset: read and batch -> one row per sampling batch -> the stages in order.

    The input is read by our own tasks rather than `read_parquet`, because every row must be known by its position.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # a long clip is no failure
    context.enable_progress_bars = False
    context.raise_original_map_exception = True

    units = [_describe(unit) for unit in read_units(worklist.part_works())]
    dataset: ray.data.Dataset = ray.data.from_items(units, override_num_blocks=len(units))
    dataset = dataset.map_batches(
        _read,  # type: ignore[arg-type]
        fn_args=(rules, plan.batch_size),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=min(READ_TASKS, len(units))),
        num_cpus=READ_CPUS,
    ).repartition(target_num_rows_per_block=1)
    for pool in plan.pools:
        dataset = dataset.map_batches(
            Worker,
            fn_constructor_args=(pool, watch, limits),
            batch_size=1,  # Ray wants a number where GPUs are asked for
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=pool.workers,
                max_concurrent_calls_per_actor=pool.batches_at_once,
                enable_true_multi_threading=pool.overlap,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            label_selector=dict(pool.labels),
        )
    return dataset


def _describe(unit: list[PartWork]) -> dict[str, Any]:
    return {"works": [{**asdict(work.part), "fates": work.fates} for work in unit]}


def _read(table: pa.Table, rules: RowRules, batch_size: int) -> Iterator[pa.Table]:
    for record in table.to_pylist():
        works = [PartWork(fates=work.pop("fates"), part=InputPart(**work)) for work in record["works"]]
        for batch in read_batches(works, rules, batch_size):
            yield _table([batch])


def _table(batches: list[Batch]) -> pa.Table:
    return pa.Table.from_pylist([pack(batch) for batch in batches])


def _batches(table: pa.Table) -> Iterator[Batch]:
    for record in table.to_pylist():
        yield unpack(record)


def _node(info: Mapping[str, Any]) -> Node:
    offered = info["Resources"]
    return Node(int(offered.get("CPU", 0)), int(offered.get("GPU", 0)), info["Labels"])


@contextmanager
def session(address: str | None, resources: Resources | None = None) -> Iterator[Resources]:
    """Connect to a Ray cluster, or start one on this machine, and yield what it offers; always disconnects.

    address: one that is running, such as "auto"; None = a cluster of the job's own with the given resources. Raises
    PlanError if there is no cluster at the address.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if resources is not None:
        # Logical CPUs only place tasks; with very few, the tasks around the stages could not be placed.
        cpus = max(resources.cpus, MIN_LOGICAL_CPUS)
        options |= {"num_cpus": cpus, "num_gpus": resources.gpus, "include_dashboard": False}
    try:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its messages are about Ray Data's own actors
        ray.init(address=address or "local", **options)
    except ConnectionError as error:
        raise PlanError(f"there is no Ray cluster at {address}: {error}") from error
    except SystemExit as error:  # with its number, Ray's answer to SIGTERM meanwhile
        raise SystemExit(128 + int(error.code or 0)) from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised; the session's log files have all
    try:
        nodes = tuple(_node(info) for info in ray.nodes() if info["Alive"])
        yield Resources(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), nodes)
    finally:
        ray.shutdown()
