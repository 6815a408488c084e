"""Whatever is killed, and however the store fails: every row ends in the ledger once, with the file it names."""

import hashlib
import logging
import os
import secrets
from collections import defaultdict
from random import Random

import pytest

from pipeline.ledger import ledger
from pipeline.storage.storage import Storage
from tests.chaos.cluster import ray_cluster
from tests.chaos.driver import TABLE, write_settings
from tests.chaos.losses import Losses, renders_of
from tests.chaos.monkey import Monkey
from tests.chaos.scenario import (
    Scenario,
    bad_ids,
    draw_lives,
    fine_ids,
    ids_by_prompt,
    killer_ids,
    table_rows,
    video_bytes,
)
from tests.chaos.stages import read_log
from tests.pipeline.sample_tables import write_table

logger = logging.getLogger(__name__)

pytest_plugins = ["tests.pipeline.s3_server"]

LARGE = Scenario(
    rows=280,
    killers=3,
    bad=12,
    duplicates=5,
    nodes=2,
    samplers=3,
    lives=3,
    blows=5,
    targets=("worker", "node"),
    faults=60,
)
SMALL = Scenario(
    rows=36,
    killers=1,
    bad=2,
    duplicates=2,
    samplers=2,
    lives=2,
    blows=1,
    targets=("worker",),
    faults=30,
    max_attempts=2,
    sample_s=(1.0, 2.0),  # so that rows are left when a driver that waited for the store is to die
    flush_rows=4,
    flush_seconds=1.0,
)
NODE = {"num_cpus": 1, "num_gpus": 1}
SEED = int(os.environ.get("CHAOS_SEED", secrets.randbelow(10_000)))
"""Another one each time; that of a failure is in its output."""


def outcomes(scenario, rows):
    """Return what must be in the ledger: status and type of error of every id."""
    expected = dict.fromkeys(fine_ids(scenario), ("succeeded", None))
    expected |= dict.fromkeys(killer_ids(scenario), ("failed", "WorkerDied"))
    expected |= dict.fromkeys(bad_ids(scenario), ("failed", "RequestError"))
    return expected | {f"{row['id']}-dup1": ("succeeded", None) for row in rows[-scenario.duplicates :]}


def check_ledger(storage, scenario, rows):
    view = ledger.read(storage).to_pylist()
    assert len(view) == len({row["id"] for row in view})
    found = {row["id"]: (row["status"], row["error_type"]) for row in view}
    assert found == outcomes(scenario, rows)
    seeds = ids_by_prompt(rows, "fine")
    for row in view:
        if row["status"] == "succeeded":
            video = storage.get(row["uri"])
            assert hashlib.sha256(video).hexdigest() == row["sha256"]
            original = row["duplicate_of"] or row["id"]
            assert video == video_bytes(original, seeds[original])
            assert storage.get(row["thumbnail_uri"]) == b"strip of " + video


def check_renders(folder, monkey, kept, scenario):
    """Check that every render of a row after its first has a cause, and that no innocent row ran out of attempts."""
    renders = renders_of(read_log(folder / "samples"))
    arrived = defaultdict(list)
    for record in read_log(folder / "arrivals"):
        for row in record["rows"]:
            arrived[row].append(record["at"])
    losses = Losses(renders, arrived, kept)
    found = [losses.by_blow(struck) for struck in monkey.struck]
    found += [loss for row in killer_ids(scenario) for loss in losses.by_killer(row)]
    found.sort(key=lambda loss: loss.begin)
    start = found[0].begin
    for loss in found:
        logger.info("%6.1f s: %s put %d rows at stake", loss.begin - start, loss.what, len(loss.rows))
    innocent = {row: renders[row] for row in fine_ids(scenario)}
    extra = sum(len(renders) - 1 for renders in innocent.values())
    bound = sum(len(loss.rows.intersection(innocent)) for loss in found)
    logger.info("%d extra renders of %d rows, at most %d can be explained", extra, len(innocent), bound)
    assert not [pair for pair in losses.unexplained(found) if pair[0].row in innocent]
    assert extra <= bound


def drawn_lives(scenario, seed):
    lives = draw_lives(scenario, seed)
    for blows in lives:
        logger.info("a life: %s", blows)
        # so no innocent row can be hit as often as would end it
        assert sum(blow.target != "driver" for blow in blows) <= scenario.max_attempts - 1
    return lives


def run_chaos(scenario, seed, folder, store, bucket, timeout_s):
    logger.info("CHAOS_SEED=%d repeats this", seed)
    lives = drawn_lives(scenario, seed)
    rows = table_rows(scenario, seed)
    write_table(folder / TABLE, rows)
    (folder / "workers").mkdir()
    output = f"s3://{bucket}/out"
    storage = Storage(output)
    kept = {}
    with ray_cluster(folder / "cluster.log", num_cpus=4, num_gpus=0 if scenario.nodes else 1) as nodes:
        write_settings(folder, nodes.address, output, scenario)
        for _ in range(scenario.nodes):
            nodes.add(**NODE)
        monkey = Monkey(folder, nodes, NODE, store, scenario.faults, Random(f"monkey {seed}"))
        for blows in lives:
            code = monkey.live(blows, timeout_s)
            if blows and blows[-1].target == "driver":
                assert code == -9
                kept[monkey.struck[-1].victim] = ledger.read(storage, ["id"])["id"].to_pylist()
            else:
                assert code == 0, (folder / "driver.log").read_text()[-3000:]
    assert len(monkey.struck) == sum(map(len, lives))
    logger.info(
        "%d faults of the store, for %d requests that never came", scenario.faults - monkey.faults, store.pending()
    )
    store.faults.clear()
    check_ledger(storage, scenario, rows)
    check_renders(folder, monkey, kept, scenario)


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.timeout(500)
def test_rows_survive_a_killed_worker_and_a_killed_driver(tmp_path, s3, bucket, caplog):
    caplog.set_level(logging.INFO)
    run_chaos(SMALL, SEED, tmp_path, s3, bucket, timeout_s=200)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_rows_survive_killed_workers_nodes_and_drivers(tmp_path, s3, bucket, caplog):
    caplog.set_level(logging.INFO)
    run_chaos(LARGE, SEED, tmp_path, s3, bucket, timeout_s=600)
