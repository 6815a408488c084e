"""What rows cost: measured per shape, kept in job.json, and scaled to shapes that were never measured."""

import json
from collections import Counter

import pytest

from pipeline.batch.costs import ASSUMED_FLOPS, Measured, expected_costs, flops_estimate, read_measured, write_measured
from pipeline.request import Shape
from pipeline.rows import RowError
from pipeline.storage.storage import Storage
from pyramid_flow import Checkpoint, Preset
from tests.pipeline.sample_tables import batch, item

PRESET = Preset(sizes=((64, 64), (64, 128)), max_num_frames=25)
SMALL = Shape(64, 64, 9, 2, 2, has_image=False, guided=True)
LONG = SMALL._replace(num_frames=25)


def finished(seconds: dict[str, float], **row: object):
    one = item(PRESET, prompt="a", num_frames=9, num_inference_steps=2, video_num_inference_steps=2)
    return one.with_tensors({}, seconds=seconds, **{"batch_size": 1, **row})


def measured(*items) -> Measured:
    found = Measured()
    found.take(None)
    found.take(batch(*items))
    return found


def test_rows_that_went_through_are_measured():
    failed = finished({"sample": 9.0}, error=RowError(stage="sample", type="OSError", message="why"))
    found = measured(finished({"sample": 1.0, "decode": 2.0}), finished({"sample": 3.0, "decode": 4.0}), failed)
    assert found.means() == {str(SMALL): {"sample": 2.0, "decode": 3.0}}
    assert found.costs().seconds == {"sample": 2.0, "decode": 3.0}
    assert Measured().costs() is None


def test_the_fill_counts_places_in_sampled_batches():
    together = [finished({"sample": 1.0}, batch_size=4) for _ in range(4)]
    assert measured(*together).fill(4) == 1.0
    assert measured(*together, finished({"sample": 1.0})).fill(4) == pytest.approx(5 / 8)
    assert Measured().fill(4) is None


def test_what_was_measured_is_kept_in_the_job_record(tmp_path):
    storage = Storage(str(tmp_path))
    assert read_measured(storage) == {}
    storage.put("job.json", b'{"pixels": {}}')
    assert read_measured(storage) == {}
    write_measured(storage, Measured())
    assert json.loads(storage.get("job.json")) == {"pixels": {}}
    write_measured(storage, measured(finished({"sample": 1.0})))
    other = Measured()
    other.seconds["another shape"]["sample"] = 5.0
    other.rows["another shape"] = 1
    write_measured(storage, other)
    assert read_measured(storage) == {str(SMALL): {"sample": 1.0}, "another shape": {"sample": 5.0}}
    assert json.loads(storage.get("job.json"))["pixels"] == {}


def test_costs_are_means_over_the_rows_of_all_shapes():
    known = {str(SMALL): {"sample": 1.0}, str(LONG): {"sample": 5.0}}
    costs = expected_costs(Counter({SMALL: 3, LONG: 1}), known, lambda shape: pytest.fail("nothing to estimate"))
    assert costs.seconds == {"sample": 2.0}
    assert costs.measured
    assert expected_costs(Counter(), known, lambda shape: {}) is None


def test_a_shape_that_was_never_measured_is_scaled_by_those_that_were():
    estimate = {SMALL: {"sample": 2.0, "decode": 1.0}, LONG: {"sample": 20.0, "decode": 10.0}}.__getitem__
    assumed = expected_costs(Counter({SMALL: 1, LONG: 1}), {}, estimate)
    assert (assumed.seconds, assumed.measured) == ({"sample": 11.0, "decode": 5.5}, False)
    # sampling takes three times what is assumed, decoding half
    scaled = expected_costs(Counter({SMALL: 1, LONG: 1}), {str(SMALL): {"sample": 6.0, "decode": 0.5}}, estimate)
    assert (scaled.seconds, scaled.measured) == ({"sample": 33.0, "decode": 2.75}, True)


def test_the_commonest_shapes_stand_for_many():
    shapes = {SMALL._replace(num_frames=1 + 8 * i): 100 - i for i in range(50)}
    asked = []

    def estimate(shape):
        asked.append(shape)
        return {"sample": 1.0}

    assert expected_costs(Counter(shapes), {}, estimate).seconds == {"sample": 1.0}
    assert asked == list(shapes)[:8]


def test_the_estimate_counts_the_checkpoints_own_operations():
    estimate = flops_estimate(Checkpoint.open("toy"), "cpu", None)
    short, long, unguided = estimate(SMALL), estimate(LONG), estimate(SMALL._replace(guided=False))
    assert set(short) == {"encode", "sample", "decode", "publish"}
    assert long["sample"] > 1.5 * short["sample"] > 0
    assert 1.99 * unguided["sample"] < short["sample"] < 2 * unguided["sample"]  # both branches have one history
    without = flops_estimate(Checkpoint.open("toy"), "cpu", None, cache_gib=0)
    assert without(LONG)["sample"] > 1.1 * long["sample"]
    assert long["decode"] > 2 * short["decode"]
    assert 0 < short["sample"] < 1e12 / ASSUMED_FLOPS["cpu"]
