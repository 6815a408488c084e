import hashlib
import io
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.media.provenance import KEY, REQUEST, Signing, SigningError
from pipeline.media.quality import Thresholds
from pipeline.media.still import encode_still
from pipeline.rows import Batch, Item, as_tensor, pack, unpack
from pipeline.stages import FILE, THUMBNAIL
from pipeline.stages import decode as decode_module
from pipeline.stages import model as model_module
from pipeline.stages import sample as sample_module
from pipeline.stages.decode import Decode
from pipeline.stages.encode import Encode
from pipeline.stages.model import ModelConfig
from pipeline.stages.publish import Publish
from pipeline.stages.sample import Sample
from pipeline.tables.images import ImageRoot
from pyramid_flow import Checkpoint, Preset, PyramidFlowPipeline
from pyramid_flow.memory.placement import Placement, free_bytes, process_bytes
from pyramid_flow.parallel.processes import ParallelError
from tests.pipeline.certificates import identity, manifest_of
from tests.pipeline.clip import small_clip
from tests.pipeline.mp4 import black_video, probe, read_frames, read_tags
from tests.pipeline.sample_tables import batch, item, rows

SHAPE = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 2, "video_num_inference_steps": 1}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig("toy", None, "cpu", "float32", threads=1)


@pytest.fixture(scope="module")
def preset() -> Preset:
    return Checkpoint.open("toy").preset


@pytest.fixture(scope="module")
def encode(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Encode:
    return Encode(model, str(tmp_path_factory.mktemp("images")), frozenset())


@pytest.fixture(scope="module")
def sample(model: ModelConfig) -> Sample:
    return Sample(model)


@pytest.fixture(scope="module")
def decode(model: ModelConfig) -> Decode:
    """Return a stage that no test changes."""
    return Decode(model, window=1, tile=None, encoder_threads=1)


@pytest.fixture(scope="module")
def pipe() -> PyramidFlowPipeline:
    return PyramidFlowPipeline.from_pretrained("toy", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def sampled(preset: Preset, encode: Encode, sample: Sample) -> Batch:
    """Return the latents of a red ball with seed 11."""
    return through(batch(item(preset, prompt="a red ball", seed=11, **SHAPE)), encode, sample)


def through(value: Batch, *stages: object) -> Batch:
    """Pass a batch through stages as the farm does: packed in between."""
    for stage in stages:
        value = unpack(pack(stage(value)))  # type: ignore[operator]
    return value


def picture(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 70), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_batch_becomes_videos_with_metadata(preset, encode, sample, decode, tmp_path):
    prompts = ["a red ball", "a much longer prompt about a blue ball on green grass"]
    requests = [item(preset, prompt=prompt, seed=seed, **SHAPE) for seed, prompt in enumerate(prompts)]
    publish = Publish(str(tmp_path), node="here")
    done = through(batch(*requests), encode, sample, decode, publish)
    for one, prompt in zip(done.items, prompts, strict=True):
        row, path = one.row, tmp_path / str(one.row.uri)
        assert row.error is None
        assert one.tensors == {}
        assert row.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row.bytes == path.stat().st_size
        assert path.name == f"{row.id}-{row.sha256[:8]}.mp4"
        info = probe(path)
        assert (info.width, info.height, info.frames, info.fps) == (64, 64, 17, 24)
        tags = read_tags(path)
        assert (tags["prompt"], tags["seed"], tags["render_id"]) == (prompt, str(one.request.seed), row.id)
        assert json.loads(tags["settings"])["num_frames"] == 17
        thumbnail = (tmp_path / str(row.thumbnail_uri)).read_bytes()
        assert Image.open(io.BytesIO(thumbnail)).size == (4 * 64, 64)
        assert set(row.seconds) == {"encode", "sample", "decode", "publish"}
        assert row.batch_size == 2
        assert row.started_at < row.finished_at


def test_an_image_text_model_adds_its_figures(model, preset, encode, sample, tmp_path):
    made = encode(batch(*(item(preset, prompt=prompt, **SHAPE) for prompt in ("a red ball", "blue background"))))
    told = Decode(model, window=1, tile=None, encoder_threads=1, image_text=small_clip(tmp_path))(sample(made))
    for row in rows(told):
        assert row.error is None
        assert -1 < row.text_similarity < 1
        assert 0 < row.aesthetics < 1
    assert len({row.text_similarity for row in rows(told)}) == 2


@pytest.mark.parametrize("image_format", [None, "png", "webp"])
def test_what_is_published_is_signed_if_asked_for(preset, tmp_path, monkeypatch, image_format):
    own = identity()
    monkeypatch.setenv(KEY, own.key)
    facts = {"model": "toy", "model_fingerprint": "0123", "software_version": "1.2"}
    size = SHAPE | ({"num_frames": 1, "image_format": image_format} if image_format else {})
    one = item(preset, prompt="a red ball", seed=5, image="https://host/a.png?secret=1", **size)
    file = encode_still(np.zeros((64, 64, 3), np.uint8), image_format, {}) if image_format else black_video(tmp_path)
    files = {FILE: as_tensor(file), THUMBNAIL: as_tensor(b"strip")}
    publish = Publish(str(tmp_path / "out"), node="here", signing=Signing(own.certificates, facts))
    [row] = rows(publish(batch(one.with_tensors(files))))
    data = (tmp_path / "out" / row.uri).read_bytes()
    assert (row.signed, row.bytes, row.sha256) == (True, len(data), hashlib.sha256(data).hexdigest())
    manifest, _ = manifest_of(data, row.media_type)
    [told] = [each["data"] for each in manifest["assertions"] if each["label"] == REQUEST]
    assert (told["prompt"], told["seed"], told["model_fingerprint"]) == ("a red ball", 5, "0123")
    assert b"secret" not in data


def test_a_publisher_that_cannot_sign_does_not_start(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(SigningError, match="private key must be in"):
        Publish(str(tmp_path), node="here", signing=Signing(identity().certificates, {"software_version": "1"}))


def test_a_video_outlives_an_image_text_model_that_fails(model, sampled, tmp_path, monkeypatch):
    decode = Decode(model, window=1, tile=None, encoder_threads=1, image_text=small_clip(tmp_path))
    monkeypatch.setattr(decode.image_text, "scores", lambda *given: 1 / 0)
    [row] = rows(decode(sampled))
    assert (row.error, row.text_similarity, row.frames) == (None, None, 17)
    assert row.brightness > 0


@pytest.mark.parametrize(("given", "expected"), [(None, "png"), ("png", "png"), ("webp", "webp")])
def test_one_frame_becomes_a_picture_with_its_tags(preset, encode, sample, decode, pipe, tmp_path, given, expected):
    one = item(preset, prompt="a red ball", seed=5, image_format=given, **SHAPE | {"num_frames": 1})
    publish = Publish(str(tmp_path), node="here")
    [done] = through(batch(one), encode, sample, decode, publish).items
    row, path = done.row, tmp_path / str(done.row.uri)
    assert row.error is None
    assert row.uri == f"images/{row.id[:2]}/{row.id}-{row.sha256[:8]}.{expected}"
    assert (row.media_type, row.frames, row.bytes) == (f"image/{expected}", 1, path.stat().st_size)
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert (image.format, image.size) == (expected.upper(), (64, 64))
    [[frame]] = pipe("a red ball", seed=5, **SHAPE | {"num_frames": 1}).frames
    difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - frame)
    assert difference.max() <= 1 if expected == "png" else difference.mean() < 4
    if expected == "png":
        tags = dict(image.text)
        settings = json.loads(tags.pop("settings"))
        assert tags == {"prompt": "a red ball", "negative_prompt": "", "seed": "5", "model": "toy", "render_id": row.id}
        assert "image_uri" not in settings
        assert settings["guidance_scale"] == done.request.guidance_scale
    thumbnail = (tmp_path / str(row.thumbnail_uri)).read_bytes()
    assert Image.open(io.BytesIO(thumbnail)).size == (64, 64)
    assert not (tmp_path / "videos").exists()


def test_the_stages_equal_the_pipeline(preset, encode, sample, pipe):
    one = item(preset, prompt="a red ball", seed=11, **SHAPE)
    two = item(preset, prompt="something else that is longer", seed=12, guidance_scale=4.0, **SHAPE)
    latents = through(batch(one, two), encode, sample).items[0].tensors["latents"]
    expected = pipe("a red ball", seed=11, output_type="latent", **SHAPE).frames
    assert (latents - expected).norm() / expected.norm() <= 1e-5


def test_an_image_row_equals_the_pipeline_and_depends_on_its_image(preset, encode, sample, pipe):
    red, blue = picture((200, 30, 30)), picture((30, 30, 200))
    requests = [item(preset, prompt="it moves", seed=3, image=data, **SHAPE) for data in (red, blue)]
    first, second = (one.tensors["latents"] for one in through(batch(*requests), encode, sample).items)
    image = Image.open(io.BytesIO(red))
    expected = pipe("it moves", image=image, seed=3, output_type="latent", **SHAPE).frames
    assert (first - expected).norm() / expected.norm() <= 1e-5
    assert not torch.allclose(first, second)


def test_an_image_is_read_by_the_url_that_was_given(preset, encode, monkeypatch):
    url, asked = "https://h/a.png?X-Amz-Signature=s3cr3t", []
    monkeypatch.setattr(ImageRoot, "read", lambda self, uri: asked.append(uri) or picture((200, 30, 30)))
    done = encode(batch(item(preset, prompt="it moves", image=url, **SHAPE)))
    assert asked == [url]
    assert "s3cr3t" not in str(rows(done))


def test_an_image_is_brought_to_the_size_as_its_row_says(preset, encode):
    buffer = io.BytesIO()
    Image.new("RGB", (200, 30), "red").save(buffer, "PNG")
    given = {"prompt": "it moves", "image": buffer.getvalue(), **SHAPE}
    crop, pad = (item(preset, image_fit=fit, **given) for fit in ("crop", "pad"))
    cropped, default, padded = (
        one.tensors["posterior.mean"] for one in encode(batch(crop, item(preset, **given), pad)).items
    )
    assert torch.equal(cropped, default)
    assert not torch.allclose(cropped, padded)


def test_rows_of_any_negative_prompt_and_decay_share_a_batch(preset, encode, sample):
    given = [
        {"prompt": "a red ball", "negative_prompt": "blurry", "guidance_decay": 3.0, "min_guidance_scale": 1.0},
        {"prompt": "a blue ball that rolls", "negative_prompt": ""},
        {"prompt": "a green ball", "guidance_decay": 0.5, "guidance_scale": 4.0},
    ]
    items = [item(preset, seed=seed, **SHAPE, **values) for seed, values in enumerate(given)]
    together = through(batch(*items), encode, sample).items
    assert [one.row.batch_size for one in together] == [3, 3, 3]
    for one, row in zip(items, together, strict=True):
        [alone] = through(batch(one), encode, sample).items
        expected = alone.tensors["latents"]
        assert (row.tensors["latents"] - expected).norm() / expected.norm() <= 1e-5
    plain = item(preset, seed=0, prompt="a red ball", **SHAPE)
    [constant] = through(batch(plain), encode, sample).items
    assert not torch.allclose(constant.tensors["latents"], together[0].tensors["latents"], atol=1e-2)


def test_decoded_frames_equal_the_pipeline(sampled, decode, pipe, tmp_path):
    done = through(sampled, decode, Publish(str(tmp_path), node="here"))
    expected = pipe("a red ball", seed=11, **SHAPE).frames[0].astype(int)
    actual = read_frames(tmp_path / str(done.items[0].row.uri)).astype(int)
    assert actual.shape == expected.shape
    # 4:2:0 chroma keeps the mean colour of 2x2 blocks, whatever the noise does to single pixels
    blocks = [frames.reshape(17, 8, 8, 8, 8, 3).mean(axis=(2, 4)) for frames in (actual, expected)]
    assert np.abs(blocks[0] - blocks[1]).mean() < 12


def test_a_bad_image_fails_its_row_only(preset, encode, sample):
    good = item(preset, prompt="fine", image=picture((9, 9, 9)), **SHAPE)
    bad = item(preset, prompt="broken", image=b"not a picture", **SHAPE)
    missing = item(preset, prompt="gone", image="nowhere.png", **SHAPE)
    outside = item(preset, prompt="outside", image="../secret.png", **SHAPE)
    done = rows(through(batch(good, bad, missing, outside), encode, sample))
    assert [row.error is None for row in done] == [True, False, False, False]
    assert all(row.error.stage == "encode" for row in done[1:])
    assert "not in a known picture format" in done[1].error.message
    assert "cannot be read" in done[2].error.message
    assert "outside the image root" in done[3].error.message
    assert done[0].batch_size == 1


def test_a_row_that_breaks_a_batch_fails_alone(preset, encode, sample):
    requests = [item(preset, prompt=prompt, **SHAPE) for prompt in ("one", "two", "three")]
    encoded = encode(batch(*requests))
    broken = Item(encoded.items[1].row, encoded.items[1].tensors | {"text.tokens": torch.zeros(1, 3, 7)})
    done = sample(encoded.with_items([encoded.items[0], broken, encoded.items[2]]))
    assert [row.error is None for row in rows(done)] == [True, False, True]
    assert rows(done)[1].error.stage == "sample"
    assert [row.batch_size for row in rows(done)] == [1, None, 1]


def test_decoding_tries_smaller_tiles_when_memory_runs_out(sampled, decode, monkeypatch):
    tried = []

    def decode_frames(vae, latents, statistics, *, window, tile):
        tried.append(tile)
        if tile != 256:
            raise torch.OutOfMemoryError("out of memory")
        return original(vae, latents, statistics, window=window, tile=None)

    original = decode_module.decode_frames
    monkeypatch.setattr(decode_module, "decode_frames", decode_frames)
    [row] = rows(decode(sampled))
    assert tried == [None, 512, 256]
    assert (row.error, row.tiling) == (None, 256)


@pytest.mark.parametrize("memory", ["offload", "sequential"])
def test_stages_in_every_mode_give_the_same_rows(model, preset, encode, sample, tmp_path, memory):
    other, short = replace(model, memory=memory), SHAPE | {"num_frames": 9, "num_inference_steps": 1}
    requests = [item(preset, prompt="it moves", seed=3, image=picture((200, 30, 30)), **short)]
    results = []
    for config, first, second in (
        (model, encode, sample),
        (other, Encode(other, str(tmp_path), frozenset()), Sample(other)),
    ):
        last = Decode(config, window=1, tile="auto", encoder_threads=1)
        results.append(through(batch(*requests), first, second, last).items)
    for one, two in zip(*results, strict=True):
        assert (two.row.error, two.row.device, two.row.tiling) == (None, "cpu", None)
        assert one.row.latents_sha256 == two.row.latents_sha256
        assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())


def test_the_history_cache_is_planned_while_the_weights_are_where_they_compute(model, preset, encode, monkeypatch):
    stage = Sample(replace(model, memory="offload"))
    working, plan, seen = [False], sample_module.plan_cache, []

    @contextmanager
    def noted(module):
        assert module is stage.transformer
        working[0] = True
        yield
        working[0] = False

    monkeypatch.setattr(stage, "placement", SimpleNamespace(working=noted, device=stage.placement.device))
    monkeypatch.setattr(sample_module, "plan_cache", lambda *a, **b: seen.append(working[0]) or plan(*a, **b))
    stage(encode(batch(*(item(preset, prompt="a ball", seed=seed, **SHAPE) for seed in (1, 2)))))
    assert seen
    assert all(seen)


def test_float32_is_not_rounded_to_tf32(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model.open()
    assert not torch.backends.cudnn.allow_tf32


def test_auto_takes_the_largest_tile_that_fits(model, preset, monkeypatch):
    decode, free = Decode(model, window=1, tile="auto", encoder_threads=1), []
    request = item(preset, prompt="big", **SHAPE).request
    assert decode.tile_for(request) is None  # on a CPU, whatever is free
    decode.placement = Placement(torch.device("meta"))
    needed = {None: 900, 512: 600, 256: 150}
    monkeypatch.setattr(decode, "_activations", lambda height, width, frames, tile: needed[tile])
    monkeypatch.setattr(decode_module, "free_bytes", lambda device: free[-1])
    for available, tile in ((2000, None), (700, 512), (200, 256), (1, 256)):
        free.append(available)
        assert decode.tile_for(request) == tile
    decode.tile = 64
    assert decode.tile_for(request) == 64


def test_what_decoding_takes_is_counted_once_per_size(model, monkeypatch):
    decode, counted, count = Decode(model, window=1, tile="auto", encoder_threads=1), [], decode_module.part_memory
    monkeypatch.setattr(decode_module, "part_memory", lambda *a, **b: counted.append(b["tile"]) or count(*a, **b))
    still, tiled, video = (1, None), (1, 96), (9, None)
    sizes = [decode._activations(128, 128, *given) for given in (still, tiled, video, still, tiled)]
    assert counted == [None, 96, None]
    assert sizes[2] > sizes[0] == sizes[3] > sizes[1] == sizes[4] > 0


def test_one_process_of_all_stages_counts_all_parts(model, monkeypatch):
    given = []
    monkeypatch.setattr(model_module, "choose_placement", lambda *_, **how: given.append(how))
    for together in (False, True):
        replace(model, together=together).placement(Checkpoint.open("toy"), ("vae",))
    assert [how["parts"] for how in given] == [("vae",), None]
    assert [how["available"] for how in given] == [free_bytes, process_bytes]


def test_decoding_that_never_fits_fails_its_row(sampled, decode, monkeypatch):
    def decode_frames(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(decode_module, "decode_frames", decode_frames)
    [row] = rows(decode(sampled))
    assert row.error.type == "OutOfMemoryError"
    assert not row.error.is_own_fault


@pytest.mark.integration
def test_two_processes_sample_what_one_does(model, preset, encode, sample):
    encoded = encode(batch(*(item(preset, prompt="a ball", seed=seed, **SHAPE) for seed in (1, 2))))
    stage = Sample(replace(model, gpus_per_clip=2))
    try:
        together, alone = stage(encoded).items, sample(encoded).items
    finally:
        stage.team.close()
    assert [one.row.cached_levels for one in together] == [one.row.cached_levels for one in alone]
    for one, other in zip(together, alone, strict=True):
        difference = one.tensors["latents"] - other.tensors["latents"]
        assert difference.norm() / other.tensors["latents"].norm() <= 1e-5


@pytest.mark.integration
def test_processes_that_are_out_of_step_are_no_rows_fault(model, preset, encode, monkeypatch):
    def generate_latents(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    stage = Sample(replace(model, gpus_per_clip=2))
    monkeypatch.setattr("pyramid_flow.parallel.processes.generate_latents", generate_latents)
    try:
        with pytest.raises(ParallelError, match="sampling with 1 other processes failed: out of memory"):
            stage(encode(batch(item(preset, prompt="a ball", **SHAPE))))
    finally:
        stage.team.close()


def test_a_budget_of_nothing_means_no_history_cache(model, preset, encode, sample):
    encoded = encode(batch(item(preset, prompt="a ball", **SHAPE)))
    [without], [usual] = (stage(encoded).items for stage in (Sample(replace(model, cache_gib=0)), sample))
    assert (without.row.cached_levels, usual.row.cached_levels) == ([], [0])
    difference = without.tensors["latents"] - usual.tensors["latents"]
    assert difference.norm() / usual.tensors["latents"].norm() <= 1e-5


def test_a_batch_whose_cache_does_not_fit_is_sampled_in_halves(model, preset, encode):
    """A row takes 0.22 MB at level 0 and 0.2 MB at level 1: two rows fit into 0.9 MB, of three only level 0 does."""
    stage = Sample(replace(model, cache_gib=0.9e6 / 2**30))
    items = [item(preset, prompt="a red ball", seed=seed, **SHAPE | {"num_frames": 25}) for seed in range(3)]
    done = stage(encode(batch(*items))).items
    assert [one.row.batch_size for one in done] == [1, 2, 2]
    assert [one.row.cached_levels for one in done] == [[0, 1]] * 3
    assert [one.request.seed for one in done] == [0, 1, 2]


def test_a_row_that_does_not_fit_is_sampled_without_a_history_cache(preset, encode, sample, monkeypatch):
    """And alone: with a cache only rows of one fit here, and the largest one not even by itself."""
    tried = []

    def generate_latents(*arguments, cache, **options):
        seeds = arguments[5].seeds
        tried.append((list(seeds), sorted(cache)))
        if len(seeds) > 1 or (seeds == [2] and cache):
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments, cache=cache, **options)

    original = sample_module.generate_latents
    both = encode(batch(*(item(preset, prompt="a ball", seed=seed, **SHAPE) for seed in (1, 2))))
    expected = rows(sample(both))
    assert [row.cached_levels for row in expected] == [[0]] * 2  # the video is too short for the others
    monkeypatch.setattr(sample_module, "generate_latents", generate_latents)
    done = sample(both).items
    assert tried == [([1, 2], [0]), ([1], [0]), ([2], [0]), ([2], [])]
    assert [one.row.cached_levels for one in done] == [[0], []]
    assert [one.row.batch_size for one in done] == [1, 1]
    assert all("latents" in one.tensors for one in done)


def test_a_poisoned_device_is_no_rows_fault(preset, encode, sample, monkeypatch):
    def generate_latents(*_, **__):
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(sample_module, "generate_latents", generate_latents)
    encoded = encode(batch(item(preset, prompt="x", **SHAPE)))
    with pytest.raises(torch.AcceleratorError):
        sample(encoded)


def test_latents_that_are_not_finite_fail_their_row_only(preset, encode, sample, monkeypatch):
    def generate_latents(*arguments, **options):
        latents = original(*arguments, **options)
        latents[0, 0, 0, 0, 0] = float("nan")
        return latents

    original = sample_module.generate_latents
    monkeypatch.setattr(sample_module, "generate_latents", generate_latents)
    requests = [item(preset, prompt=prompt, **SHAPE) for prompt in ("one", "two")]
    done = rows(sample(encode(batch(*requests))))
    assert [row.error.message if row.error else None for row in done] == ["the latents are not finite", None]
    assert done[0].error.is_own_fault


@pytest.mark.parametrize("num_frames", [1, 9])
def test_frames_that_are_not_finite_fail_their_row(model, preset, encode, sample, monkeypatch, num_frames):
    decode = Decode(model, window=1, tile=None, encoder_threads=1)
    decoded = through(batch(item(preset, prompt="one", **SHAPE | {"num_frames": num_frames})), encode, sample)
    frames = torch.full((1, 3, num_frames, 64, 64), float("nan"))
    monkeypatch.setattr(decode.vae, "decode_stream", lambda *_, **__: iter([frames]))
    [row] = rows(decode(decoded))
    assert (row.error.stage, row.error.message) == ("decode", "the decoded frames are not finite")
    assert row.error.is_own_fault


def test_decoded_rows_carry_figures_and_flags(model, preset, encode, sample):
    scene = {"prompt": "a large red circle moves quickly up on a dark background", "seed": 1}
    video, still = (
        through(batch(item(preset, **scene, num_frames=num_frames)), encode, sample) for num_frames in (17, 1)
    )
    decode = Decode(model, window=1, tile=None, encoder_threads=1)
    [row] = rows(through(video, decode))
    assert (row.flags, row.error) == ([], None)
    assert 0.05 < row.brightness < 0.3
    assert 0.002 < row.motion <= row.max_motion < row.drift < 0.2
    assert row.motion_direction == pytest.approx(90, abs=15)
    [one] = rows(through(still, decode))
    assert (one.motion, one.motion_direction, one.drift, one.flags) == (None, None, None, [])
    assert one.sharpness > 0
    decode.thresholds = Thresholds(black_below=0.3, frozen_below=1.0)
    assert [rows(through(value, decode))[0].flags for value in (video, still)] == [["black", "frozen"], ["black"]]


def test_skipped_rows_pass_through(preset, encode, sample):
    skipped = item(preset, prompt="later", **SHAPE)
    skipped = Item(skipped.row.updated(skipped=True), skipped.tensors)
    assert rows(through(batch(skipped), encode, sample)) == [skipped.row]


def test_failed_rows_pass_through_untouched(encode, sample, decode, tmp_path):
    failed = item(Preset(), prompt="no such size", height=70)
    result = through(
        batch(failed),
        encode,
        sample,
        decode,
        Publish(str(tmp_path), node="here"),
    )
    assert rows(result) == [failed.row]
    assert list(tmp_path.iterdir()) == []


def test_equal_prompts_are_encoded_once(model, preset, tmp_path, monkeypatch):
    encode = Encode(model, str(tmp_path), frozenset())
    seen = []
    original = encode.text_encoder.forward
    monkeypatch.setattr(encode.text_encoder, "forward", lambda prompts: seen.extend(prompts) or original(prompts))
    encode(batch(*(item(preset, prompt="the same", seed=seed, **SHAPE) for seed in range(3))))
    assert sorted(seen) == ["", "the same"]  # the negative prompt, and the prompt


def test_what_is_kept_of_a_prompt_is_without_its_padding(preset, encode):
    [done] = encode(batch(item(preset, prompt="short", **SHAPE))).items
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in done.tensors.items()} == {
        name: tensor.nbytes for name, tensor in done.tensors.items()
    }


def test_unguided_rows_carry_no_negative_prompt(preset, encode, sample):
    done = encode(batch(item(preset, prompt="free", guidance_scale=0, **SHAPE)))
    assert not [name for name in done.items[0].tensors if name.startswith("negative")]
    assert rows(sample(done))[0].error is None


def test_truncated_prompts_are_marked(preset, encode):
    requests = [item(preset, prompt=prompt, **SHAPE) for prompt in ("short", "very " * 60)]
    assert [row.prompt_truncated for row in rows(encode(batch(*requests)))] == [False, True]


def test_an_unwritable_output_fails_the_row_in_publish(sampled, decode, tmp_path):
    (tmp_path / "videos").write_text("a file where a folder must be")
    decoded = through(sampled, decode)
    [row] = rows(Publish(str(tmp_path), node="here")(decoded))
    assert row.error.stage == "publish"
    assert row.uri is None
