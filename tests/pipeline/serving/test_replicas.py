"""A replica of a stage: what it keeps of a batch."""

import asyncio
import ctypes

import psutil
import pyarrow as pa
import pytest

from pipeline.batch.planner import StageSpec
from pipeline.rows import Batch, Item, RenderRow, pack, unpack
from pipeline.stages.stage import Stage

FREED_BYTES = 96 * 2**20


class Littering(Stage):
    """Leaves small things between the large ones that it has done with."""

    name = "litter"

    def process(self, items):
        chunks = [bytearray(2**16) for _ in range(FREED_BYTES // 2**16)]
        self.stay = chunks[::16]
        return list(items)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc_trim is glibc's: nothing can be given back without it"
)
def test_what_a_batch_took_is_given_back_after_it(monkeypatch):
    from pipeline.serving import replicas as worker  # here, so that sessions without it do not load Ray Serve

    monkeypatch.setattr(worker, "log_as_json", lambda **fields: None)
    replica = worker.StageReplica(StageSpec(Littering, {}), render_s=60)
    packed = pack(Batch((Item(RenderRow(id="x", position="x")),), pa.table({"own": ["x"]})))
    before = psutil.Process().memory_info().rss
    assert len(unpack(asyncio.run(replica(packed)))) == 1
    assert psutil.Process().memory_info().rss - before < FREED_BYTES / 2
