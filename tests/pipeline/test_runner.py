from dataclasses import replace

import pytest

from pipeline.plan import GPU_SHARES, Plan, Pool
from tests.pipeline.simulated import simulated_job
from tests.pipeline.tables import write_table

SHAPE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.mark.ray
@pytest.mark.parametrize("fused", [False, True])
def test_pools_take_whole_gpus_or_shares_of_them(cluster, tmp_path, fused):
    table = write_table(tmp_path / "in.parquet", [{"prompt": f"{i}", **SHAPE} for i in range(6)])
    job = simulated_job(table, tmp_path / "out", batch_size=1)
    again = simulated_job(table, tmp_path / "again", batch_size=1)
    specs = [spec for pool in job.plan.pools for spec in pool.stages]
    if fused:
        pools = [Pool(tuple(specs), workers=2, cpus=0, gpus=1.0)]
    else:
        paired = {"encode": False, "sample": True}
        pools = [
            Pool((spec,), workers=2, cpus=0, gpus=GPU_SHARES[spec.name], paired=paired[spec.name]) for spec in specs
        ]
    plan = Plan(tuple(pools), batch_size=1, devices=2)
    for one in (job, again):  # the first leaves no place taken
        replace(one, plan=plan).execute(lambda batch: None)
        assert one.view()["status"].to_pylist() == ["succeeded"] * 6
