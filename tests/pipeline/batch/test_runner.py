import signal
import sys
from dataclasses import replace

import pytest
import ray

from pipeline.batch.planner import ENCODER_SHARE, SAMPLER_SHARE, Plan, Pool
from pipeline.batch.runner import session
from tests.pipeline.sample_tables import write_table
from tests.pipeline.simulated import simulated_job

SHAPE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.parametrize("fused", [False, True])
def test_pools_take_whole_gpus_or_shares_of_them(cluster, tmp_path, fused):
    table = write_table(tmp_path / "in.parquet", [{"prompt": f"{i}", **SHAPE} for i in range(6)])
    job = simulated_job(table, tmp_path / "out", batch_size=1)
    specs = [spec for pool in job.plan.pools for spec in pool.stages]
    if fused:
        pools = [Pool(tuple(specs), workers=2, cpus=0, gpus=1.0)]
    else:
        encode, sample = specs
        pools = [
            Pool((encode,), workers=2, cpus=0, gpus=ENCODER_SHARE),
            Pool((sample,), workers=2, cpus=0, gpus=SAMPLER_SHARE, overlap=True),
        ]
    replace(job, plan=Plan(tuple(pools), batch_size=1)).execute(lambda batch: None)
    assert job.view()["status"].to_pylist() == ["succeeded"] * 6


def test_sigterm_while_ray_starts_ends_the_command_with_143(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended, session(None):
        pytest.fail("there is no session")
    assert ended.value.code == 143
