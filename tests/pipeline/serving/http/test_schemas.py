"""What is shown of a job."""

from pipeline.serving.http.parsing import new_video
from pipeline.serving.http.schemas import Video
from pipeline.serving.queue.records import Status, VideoRecord
from pyramid_flow import Preset

PRESET = Preset(sizes=((384, 640), (64, 64)))


def job(**fields: object) -> VideoRecord:
    asked = new_video({"prompt": "a fox", **fields}, None, PRESET, "toy")
    return asked.job(PRESET, owner="me", model="toy", created_at=12.7)


def test_a_job_is_shown_with_every_value_decided():
    made = job(seed=5, size="64x64", num_frames=33)
    made.status, made.progress, made.result = Status.COMPLETED, 100, {"sha256": "ab", "seconds": {"sample": 2.0}}
    shown = Video.of(made, "f00d", position=None).model_dump(mode="json")
    assert shown["object"] == "video"
    assert (shown["size"], shown["seconds"], shown["created_at"]) == ("64x64", "1.333", 12)
    assert (shown["seed"], shown["fps"], shown["guidance_scale"]) == (5, 24, 7.0)
    assert (shown["video_sha256"], shown["stage_seconds"], shown["model_fingerprint"]) == (
        "ab",
        {"sample": 2.0},
        "f00d",
    )
    assert shown["error"] is None
    assert shown["content_id"] == made.request["id"]
    assert (shown["image_format"], shown["guidance_decay"], shown["min_guidance_scale"]) == (None, None, 2)
    still = job(num_frames=1, guidance_decay=1)
    still.status, still.progress = Status.QUEUED, 0
    shown = Video.of(still, "f00d").model_dump(mode="json")
    assert (shown["image_format"], shown["guidance_decay"], shown["seconds"]) == ("png", 1, "0")


def test_a_job_of_before_there_were_pictures_is_shown():
    made = job(num_frames=1)
    made.status, made.progress = Status.QUEUED, 0
    made.request = {name: value for name, value in made.request.items() if not name.startswith("image_f")}
    assert Video.of(made, "f00d").image_format is None
