"""What a client asks for: what is understood of a form or of JSON, and what is refused.

The rules for a request's fields are tested in test_request; here, those of the dialect.
"""

import base64
import io
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread

import pytest
from PIL import Image

from pipeline.serving.http.parsing import new_id, new_video, remixed
from pipeline.serving.http.schemas import APIError
from pipeline.serving.queue.records import Priority
from pipeline.tables.images import ImageRoot
from pyramid_flow import Preset

PRESET = Preset(sizes=((384, 640), (64, 64)))


def png(mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (20, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def asked(upload: bytes | None = None, **fields: object):
    return new_video({"prompt": "a fox", **fields}, upload, PRESET, "toy")


def test_a_form_of_text_is_understood():
    video = asked(
        size="64x64", seconds="5", seed="7", guidance_scale="3.5", model="toy", priority="batch", negative_prompt="mist"
    )
    request = video.request
    assert (request.width, request.height, request.num_frames) == (64, 64, 121)
    assert (request.seed, request.guidance_scale, request.negative_prompt) == (7, 3.5, "mist")
    assert video.priority == Priority.BATCH
    request = asked(image_fit="pad", image_format="webp", guidance_decay="0.5", min_guidance_scale="1").request
    assert (request.image_fit, request.image_format) == ("pad", "webp")
    assert (request.guidance_decay, request.min_guidance_scale) == (0.5, 1)
    form = asked(**{"quality": "draft", "skip_last_step": "false", "guided_share": ["1", "0.5", "0"]}).request
    assert (form.quality, form.skip_last_step, form.guided_share) == ("draft", False, (1, 0.5, 0))


def test_lists_of_forms_hold_texts():
    form = new_video({"prompt": "a", "num_inference_steps": ["3", "2", "1"]}, None, PRESET, "toy")
    json = new_video({"prompt": "a", "num_inference_steps": [3, 2, 1]}, None, PRESET, "toy")
    assert form.request.num_inference_steps == json.request.num_inference_steps == (3, 2, 1)


@pytest.mark.parametrize(
    ("seconds", "num_frames"), [("5", 121), (5, 121), ("0.1", 1), ("1", 25), ("5.1", 121), ("1.4", 33)]
)
def test_seconds_become_the_nearest_length(seconds, num_frames):
    assert asked(seconds=seconds).request.num_frames == num_frames


def test_a_seed_is_drawn_if_none_is_given():
    assert asked().request.seed != asked().request.seed


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"colour": "red"}, "colour", "no field 'colour'"),
        ({"prompt": " "}, "prompt", "prompt ' ' is empty"),
        ({"prompt": "a" * 10_001}, "prompt", "10001 characters, more than 10000"),
        ({"negative_prompt": "a" * 10_001}, "negative_prompt", "10001 characters, more than 10000"),
        ({"size": "640"}, "size", "'640' is not one of this model's: 640x384, 64x64"),
        ({"size": "128x128"}, "size", "'128x128' is not one of this model's: 640x384, 64x64"),
        ({"size": ["64x64"]}, "size", "is not one of this model's"),
        ({"width": "700"}, "width", "not a multiple of 64: the nearest are 640 and 704"),
        ({"size": "64x64", "width": 64}, "size", "together"),
        ({"seconds": "soon"}, "seconds", "not a number"),
        ({"seconds": "10"}, "seconds", "'10' is not a number above 0 and up to 5"),
        ({"seconds": "nan"}, "seconds", "not a number"),
        ({"seconds": "5", "num_frames": "121"}, "seconds", "together"),
        ({"seconds": [5]}, "seconds", "not a number"),
        ({"seconds": 10**400}, "seconds", "not a number"),
        ({"num_frames": "100"}, "num_frames", "the nearest are 97 and 105"),
        ({"priority": "now"}, "priority", "interactive, batch"),
        ({"priority": ["now"]}, "priority", "interactive, batch"),
        ({"num_videos_per_prompt": 3}, "num_videos_per_prompt", "by itself"),
        (
            {"image_reference": "http://example.com/a.png"},
            "image_reference",
            "host 'example.com', which is",
        ),
        ({"input_reference": "a.png"}, "input_reference", "neither a file nor"),
        ({"image_reference": "data:image/png;base64,\u00e4"}, "image_reference", "base64"),
        ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference", "data:image"),
        ({"image_reference": "file:///etc/passwd"}, "image_reference", "data:image"),
        ({"image_reference": "../secret.png"}, "image_reference", "data:image"),
        ({"image_reference": 7}, "image_reference", "data:image"),
        ({"image_reference": "data:image/png;base64,***"}, "image_reference", "base64"),
        ({"image_reference": "data:image/png;base64,aGVsbG8="}, "image_reference", "picture format"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_the_field(fields, param, message):
    with pytest.raises(APIError, match=message) as caught:
        asked(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert caught.value.body["error"]["code"]


def test_another_model_is_not_found():
    with pytest.raises(APIError, match="no model 'sora'") as caught:
        asked(model="sora")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"width": 128, "height": 128}, "height", "128x128 is not a trained size, which is 384x640 or 64x64"),
        ({"num_frames": 129}, "num_frames", "129 is more than the trained 121"),
    ],
)
def test_an_untrained_size_or_length_is_refused_without_flags_of_the_command_line(fields, param, message):
    with pytest.raises(APIError, match=message) as caught:
        asked(**fields).job(PRESET, owner="me", model="toy", created_at=0.0)
    assert caught.value.param == param
    assert "--" not in caught.value.message


def test_empty_fields_count_as_absent():
    request = asked(seed="", size="", seconds="", negative_prompt="").request
    assert (request.height, request.num_frames, request.negative_prompt) == (None, None, "")
    assert request.seed is not None


def test_drawn_seeds_are_exact_in_javascript():
    seeds = [asked().request.seed for _ in range(200)]
    assert max(seeds) < 2**53
    assert max(seeds) > 2**51
    assert asked(seed=2**63 - 1).request.seed == 2**63 - 1


def test_pictures_come_as_uploads_or_data_urls():
    data = png("LA")
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for video in (asked(upload=data), asked(image_reference=url), asked(input_reference={"image_url": url})):
        assert video.request.image == data
    with pytest.raises(APIError, match="give one picture"):
        asked(upload=data, image_reference=url)
    with pytest.raises(APIError, match="picture format"):
        asked(upload=b"#!/bin/sh")


def test_ids_are_random_and_of_the_dialects_form():
    assert len({new_id() for _ in range(100)}) == 100
    assert len(new_id()) == len("video_") + 22


def test_a_remix_keeps_everything_but_the_prompt():
    data = png()
    job = asked(upload=data, num_frames=33, id="mine").job(PRESET, owner="me", model="toy", created_at=0.0)
    again = remixed(job, "a wolf", data).request
    assert (again.prompt, again.num_frames, again.seed) == ("a wolf", 33, job.request["seed"])
    assert again.image == data
    assert again.id is None


def test_a_picture_of_an_allowed_host_is_fetched_and_no_private_address_asked():
    class Pictures(SimpleHTTPRequestHandler):
        def do_GET(self):
            data = png("RGB")
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with HTTPServer(("127.0.0.1", 0), Pictures) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        fields, hosts = {"prompt": "a fox", "image_reference": url}, frozenset({"127.0.0.1"})
        with pytest.raises(APIError, match="public") as caught:
            new_video(fields, None, PRESET, "toy", ImageRoot("/nonexistent", hosts))
        assert caught.value.param == "image_reference"
        images = ImageRoot("/nonexistent", hosts, is_public=lambda _: True)
        assert new_video(fields, None, PRESET, "toy", images).request.image == png("RGB")
        thread.join()
