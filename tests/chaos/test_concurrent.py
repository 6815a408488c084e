"""What others do to an output beside its job: workers that outlived their driver, and a compaction."""

import hashlib
from dataclasses import replace

import pytest

from pipeline.batch import job as job_module
from pipeline.batch.planner import Pool, StageSpec
from pipeline.ledger import ledger
from pipeline.ledger.compact import compact
from pipeline.rows import as_tensor
from pipeline.stages import FILE, THUMBNAIL
from pipeline.stages.publish import Publish
from pipeline.stages.stage import Stage
from pipeline.tables.batching import read_rows
from tests.chaos.inprocess import InProcess
from tests.chaos.scenario import SHAPE, video_bytes
from tests.pipeline.sample_tables import write_table
from tests.pipeline.simulated import simulated_job

ROWS = 24


class Decode(Stage):
    """Makes a video from a row's id and seed."""

    name = "decode"

    def process(self, items):
        return [item.with_tensors(files(video_bytes(item.row.id, item.request.seed))) for item in items]


def files(video):
    return {FILE: as_tensor(video), THUMBNAIL: as_tensor(b"strip of " + video)}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Return a job whose stages run in this process and really publish."""
    monkeypatch.setattr(job_module.runner, "Rendering", InProcess)
    rows = [{"prompt": "fine", "id": f"row{number:02d}", "seed": number, **SHAPE} for number in range(ROWS)]
    job = simulated_job(write_table(tmp_path / "in.parquet", rows), tmp_path / "out")
    stages = (StageSpec(Decode, {}), StageSpec(Publish, {"output": job.storage.uri}))
    pools = (*job.plan.pools, Pool(stages, workers=1, cpus=0, gpus=0))
    return replace(job, plan=replace(job.plan, pools=pools), flush_rows=1)


def published_again(job, index, video):
    """Publish another render of a row of the input as a worker would that knows of nothing else; return the row."""
    [part] = job.worklist.parts
    [(_, batch)] = read_rows(part, job.rules, [index])
    stage = Publish(job.storage.uri, "another node")
    [item] = stage(batch.with_items([batch.items[0].with_tensors(files(video))])).items
    assert item.row.error is None
    return item.row


def check_files(storage, view):
    for row in view.to_pylist():
        assert hashlib.sha256(storage.get(row["uri"])).hexdigest() == row["sha256"]
        assert storage.exists(row["thumbnail_uri"])


@pytest.mark.parametrize("same", [True, False], ids=["same bytes", "other bytes"])
def test_a_zombie_publisher_changes_nothing(job, same):
    job.execute(lambda batch: None)
    view, names = ledger.read(job.storage), job.storage.list("videos")
    assert len(names) == ROWS
    row = published_again(job, 7, video_bytes("row07", 7) if same else b"another video")
    assert (row.uri in names) == same
    assert ledger.read(job.storage).equals(view)
    check_files(job.storage, view)
    assert job.pending().num_rows == 0


def test_compact_during_a_running_shard_changes_nothing(job):
    first, second = (
        replace(job, run=f"{job.run}{number}", worklist=job.worklist.shard(number, 2), shard=f"{number}-of-2")
        for number in (1, 2)
    )
    first.execute(lambda batch: None)
    expected = len(ledger.read(job.storage))
    assert 0 < expected < ROWS
    replaced = []

    def compact_now(batch):
        nonlocal expected
        replaced.append(compact(job.storage).replaced)
        expected += len(batch)
        assert len(ledger.read(job.storage, ["id"])) == expected

    second.execute(compact_now)
    assert replaced[0] > 1  # the parts of the first shard
    compact(job.storage)
    view = ledger.read(job.storage)
    assert sorted(view["id"].to_pylist()) == [f"row{number:02d}" for number in range(ROWS)]
    assert set(view["status"].to_pylist()) == {"succeeded"}
    check_files(job.storage, view)
