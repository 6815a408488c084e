"""The pipeline: what goes in and out of one call, and that equal inputs give equal videos."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyramid_flow import (
    Checkpoint,
    CheckpointError,
    InvalidValueError,
    NonFiniteError,
    PyramidFlowPipeline,
    PyramidSchedule,
    StepInfo,
)
from pyramid_flow.checkpoints.weight_files import stored_tensors
from pyramid_flow.pixels import decode_frames
from pyramid_flow.presets import PRESETS
from tests.pyramid_flow.goldens import TINY, TINY_MINIFLUX, TINY_SD3, assert_run_equal

SHORT = {"height": 64, "width": 128, "num_frames": 9, "num_inference_steps": 1, "video_num_inference_steps": 1}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe() -> PyramidFlowPipeline:
    return PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX, torch_dtype=torch.float32)


@pytest.fixture(scope="module", params=TINY)
def either(request: pytest.FixtureRequest) -> PyramidFlowPipeline:
    """Return a pipeline of each family, for results that depend on its text encoders, guidance or statistics."""
    if request.param == "miniflux":
        pipe: PyramidFlowPipeline = request.getfixturevalue("pipe")
        return pipe
    return PyramidFlowPipeline.from_pretrained(TINY[request.param], torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def half() -> PyramidFlowPipeline:
    """Return a pipeline in bfloat16, which no test changes."""
    return PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX)


@pytest.fixture(scope="module")
def toy() -> PyramidFlowPipeline:
    return PyramidFlowPipeline.from_pretrained("toy", torch_dtype=torch.float32)


def latents(pipe: PyramidFlowPipeline, prompt: str | list[str] = "a red ball", **options: object) -> Tensor:
    return pipe(prompt, **{**SHORT, "output_type": "latent", **options}).frames


def differ(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() > 1e-2)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_output_types(pipe, num_frames):
    prompts, options = ["a red ball", "a blue cube"], SHORT | {"num_frames": num_frames}
    normalised = pipe(prompts, **options, output_type="latent").frames
    assert (normalised.shape, normalised.dtype) == ((2, 16, 1 + num_frames // 8, 8, 16), torch.float32)
    array = pipe(prompts, **options).frames
    assert isinstance(array, np.ndarray)
    assert (array.shape, array.dtype) == ((2, num_frames, 64, 128, 3), np.uint8)
    expected = torch.cat(list(decode_frames(pipe.vae, normalised, pipe.preset.statistics)), dim=1)
    assert np.array_equal(array, expected.numpy())
    tensor = pipe(prompts, **options, output_type="pt").frames
    assert tensor.dtype == torch.uint8
    assert torch.equal(tensor.permute(0, 1, 3, 4, 2), expected)
    images = pipe(prompts, **options, output_type="pil").frames
    assert [len(video) for video in images] == [num_frames, num_frames]
    assert images[1][-1].size == (128, 64)
    assert np.array_equal(np.array(images[1][-1]), array[1, -1])


def test_the_seed_decides(pipe):
    one = latents(pipe, seed=3)
    torch.manual_seed(99)
    assert torch.equal(latents(pipe, seed=3), one)
    assert differ(latents(pipe, seed=4), one)


def test_prompt_i_takes_seed_plus_i(pipe):
    together = latents(pipe, ["a red ball", "a much longer prompt about a blue cube"], seed=3)
    assert torch.equal(latents(pipe, ["a red ball", "a much longer prompt about a blue cube"], seed=[3, 4]), together)
    assert_run_equal(together[:1], latents(pipe, "a red ball", seed=3))
    assert_run_equal(together[1:], latents(pipe, "a much longer prompt about a blue cube", seed=4))


def test_prompts_and_the_negative_prompt_matter(either):
    base = latents(either)
    assert differ(latents(either, "a blue cube"), base)
    assert differ(latents(either, negative_prompt="something else"), base)
    assert torch.equal(latents(either, negative_prompt=either.preset.negative_prompt), base)
    unguided = latents(either, guidance_scale=0)
    assert torch.equal(latents(either, guidance_scale=0, negative_prompt="something else"), unguided)


def test_only_the_prompt_gets_the_suffix(either):
    seen: list[list[str]] = []
    handle = either.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(list(args[0])))
    try:
        latents(either, ["a", "b"], negative_prompt="c")
    finally:
        handle.remove()
    suffix = either.preset.prompt_suffix
    assert seen == [[f"a{suffix}", f"b{suffix}"], ["c"]]


def test_an_image_is_the_first_frame(either):
    base = latents(either, image=PICTURE)
    assert torch.equal(latents(either, image=PICTURE), base)
    other = latents(either, image=Image.new("RGB", (128, 64), "red"))
    assert differ(other[:, :, :1], base[:, :, :1])
    assert differ(other[:, :, 1:], base[:, :, 1:])
    assert differ(latents(either), base)
    still = latents(either, image=PICTURE, num_frames=1)
    pixels = either.vae.encode_moments(torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None, :, None] / 127.5 - 1)
    mean = either.preset.statistics.normalize(pixels.mean)
    assert (still - mean).abs().max() < 6 * (pixels.std * either.preset.statistics.first_scale).max()


def test_the_first_frame_is_the_image_as_the_vae_sees_it(either):
    still = latents(either, image=PICTURE, num_frames=1)
    [seen] = torch.cat(list(decode_frames(either.vae, still, either.preset.statistics)), dim=1).numpy()
    [video] = either("a red ball", **SHORT, image=PICTURE).frames
    assert np.abs(video[0].astype(int) - seen[0]).max() <= 1
    assert np.abs(video[8].astype(int) - seen[0]).mean() > 1


def test_one_image_serves_all_prompts_and_each_row_samples_its_own_latent(pipe):
    together = latents(pipe, ["a", "b"], image=PICTURE, seed=5)
    assert_run_equal(together[:1], latents(pipe, "a", image=PICTURE, seed=5))
    assert_run_equal(together[1:], latents(pipe, "b", image=PICTURE, seed=6))


def test_images_of_any_size_and_mode_are_fitted(pipe):
    image = Image.new("L", (30, 200), 128)
    assert latents(pipe, image=image).shape == (1, 16, 2, 8, 16)
    assert image.size == (30, 200)


def test_an_image_is_cropped_or_padded(pipe):
    image = Image.new("RGB", (200, 30), "red")
    cropped, padded = (latents(pipe, image=image, image_fit=fit)[:, :, :1] for fit in ("crop", "pad"))
    assert torch.equal(latents(pipe, image=image)[:, :, :1], cropped)
    assert differ(padded, cropped)


def test_frames_are_decoded_in_tiles_if_asked(pipe):
    made = latents(pipe)
    tiled = torch.cat(list(decode_frames(pipe.vae, made, pipe.preset.statistics, tile=32)), dim=1)
    assert np.array_equal(pipe("a red ball", **SHORT, tile=32).frames, tiled.numpy())
    assert not np.array_equal(pipe("a red ball", **SHORT).frames, tiled.numpy())
    for tile in (40, 64.0, "auto"):
        with pytest.raises(InvalidValueError, match=f"tile {tile} is not a positive multiple of 32"):
            pipe("a red ball", **SHORT, tile=tile, on_step=lambda info: pytest.fail("it was sampled"))


def test_guidance_may_decay(pipe):
    decaying = latents(pipe, guidance_scale=7.0, guidance_decay=3.0, min_guidance_scale=1.0)
    assert torch.equal(decaying, latents(pipe, guidance_scale=7.0, video_guidance_scale=4.0))
    least = latents(pipe, guidance_scale=7.0, guidance_decay=6.0)
    assert torch.equal(least, latents(pipe, guidance_scale=7.0, video_guidance_scale=2.0))


def test_latents_that_are_not_finite_are_an_error(pipe):
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(NonFiniteError, match="the latents are not finite"):
            pipe("a", **SHORT)
    finally:
        handle.remove()


def test_frames_that_are_not_finite_are_an_error(pipe, monkeypatch):
    monkeypatch.setattr(pipe.vae, "decode_stream", lambda *_, **__: iter([torch.full((1, 3, 9, 64, 128), torch.inf)]))
    with pytest.raises(NonFiniteError, match="the decoded frames are not finite"):
        pipe("a", **SHORT)


def test_missing_values_come_from_the_preset(toy):
    preset = toy.preset
    counts: dict[tuple[int, int], int] = {}

    def on_step(info: StepInfo) -> Tensor | None:
        counts[info.unit, info.level] = info.num_steps
        height, width = preset.sizes[0]
        assert info.latents.shape[-2:] == (height // 8 >> (2 - info.level), width // 8 >> (2 - info.level))
        assert info.num_units == 1 + preset.max_num_frames // 8
        return torch.tensor([info.unit == 0])

    toy("a", on_step=on_step, output_type="latent")
    first, later = preset.num_inference_steps, preset.video_num_inference_steps
    assert counts == {(0, level): first[level] for level in range(3)} | {(1, 0): later[0]}


def test_default_guidance_after_the_first_unit_depends_on_the_image(either):
    for image, scale in ((None, 5.0), (PICTURE, 4.0)):
        assert torch.equal(latents(either, image=image, video_guidance_scale=scale), latents(either, image=image))
        assert differ(latents(either, image=image, video_guidance_scale=9 - scale), latents(either, image=image))


def test_bfloat16_runs_and_its_latents_are_float32(half):
    assert {part.dtype for part in (half.transformer, half.vae, half.text_encoder.t5)} == {torch.bfloat16}
    frames = latents(half, image=PICTURE)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    assert half("a", **SHORT).frames.shape == (1, 9, 64, 128, 3)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_dropping_all_rows_gives_no_videos(pipe, output_type):
    result = pipe(["a", "b"], **SHORT, output_type=output_type, on_step=lambda info: torch.tensor([False, False]))
    assert len(result.frames) == 0


def test_dropped_rows_are_missing_from_the_result(pipe):
    whole = pipe(["a", "b", "c"], **SHORT).frames
    frames = pipe(["a", "b", "c"], **SHORT, on_step=lambda info: torch.tensor([True, False, True])).frames
    difference = np.abs(frames.astype(int) - whole[[0, 2]])
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= 1e-3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt .* is empty"),
        ("  ", {}, "prompt .* is empty"),
        ([], {}, "prompt .* is empty"),
        (["a", ""], {}, "prompt .* is empty"),
        ("a", {"height": 100}, "height 100 is not a multiple of 64: the nearest are 64 and 128"),
        ("a", {"height": 0}, "height 0"),
        ("a", {"num_frames": 10}, r"num_frames 10 is not 1 \+ 8k: the nearest are 9 and 17"),
        ("a", {"image": PICTURE, "image_fit": "stretch"}, "image_fit stretch is not one of crop, pad"),
        ("a", {"guidance_decay": -1}, "guidance_decay -1 is not between 0 and 30"),
        ("a", {"num_frames": 0}, "num_frames 0"),
        ("a", {"num_inference_steps": 0}, "num_inference_steps 0"),
        ("a", {"guidance_scale": float("nan")}, "guidance_scale nan"),
        ("a", {"seed": -1}, "seed -1"),
        ("a", {"seed": [1, 2]}, "is not one per prompt, of which there are 1"),
        ("a", {"output_type": "mp4"}, "output_type mp4 is not one of np, pt, pil, latent"),
    ],
)
def test_bad_input_is_refused(pipe, prompt, options, message):
    with pytest.raises(InvalidValueError, match=message):
        pipe(prompt, **{**SHORT, **options})


def test_a_misspelt_option_is_refused(pipe):
    with pytest.raises(TypeError, match="num_frame"):
        pipe("a", num_frame=9)


def test_from_pretrained_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        PyramidFlowPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no variant '768p', it has: 384p"):
        PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX, "768p")
    with pytest.raises(InvalidValueError, match="float16"):
        PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX, torch_dtype=torch.float16)


@pytest.mark.parametrize("family", TINY)
def test_from_pretrained_takes_the_preset_of_family_and_variant(family):
    pipe = PyramidFlowPipeline.from_pretrained(TINY[family], torch_dtype=torch.float32)
    assert pipe.preset == PRESETS[family]["384p"]


# Moving


@pytest.mark.parametrize(
    ("path", "arguments"), [(TINY_MINIFLUX, (torch.bfloat16,)), (TINY_SD3, (torch.device("cpu"), torch.bfloat16))]
)
def test_to_changes_every_part_and_gives_what_loading_gives(path, arguments):
    moved = PyramidFlowPipeline.from_pretrained(path, torch_dtype=torch.float32)
    assert (moved.device, moved.dtype) == (torch.device("cpu"), torch.float32)
    assert moved.to(*arguments) is moved
    assert (moved.device, moved.dtype) == (torch.device("cpu"), torch.bfloat16)
    loaded = PyramidFlowPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    still = SHORT | {"num_frames": 1}
    assert np.array_equal(moved("a", **still).frames, loaded("a", **still).frames)


def test_moving_warns_of_nothing(recwarn, caplog):
    PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX).to("cpu").to(torch.float32)
    assert not [each for each in (*recwarn, *caplog.records) if "float32" in str(each)]


@pytest.mark.parametrize("device", ["xpu", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(half, device):
    for call in (lambda: half.to(device), lambda: PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX, device=device)):
        with pytest.raises(InvalidValueError, match=f"device {device} cannot be used here"):
            call()


def test_to_takes_every_part_to_the_device():
    pipe = PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX).to("meta")
    assert pipe.device == torch.device("meta")
    assert {weight.device.type for part in parts(pipe) for weight in part.parameters()} == {"meta"}


@pytest.mark.parametrize("memory", ["offload", "sequential"])
def test_weights_that_come_and_go_are_neither_moved_nor_saved(memory, tmp_path):
    pipe = PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX, memory=memory)
    assert pipe.device == torch.device("cpu")
    for call in (lambda: pipe.to(torch.float32), lambda: pipe.save_pretrained(tmp_path / "saved")):
        with pytest.raises(InvalidValueError, match=f"memory {memory} is not full"):
            call()
    assert not (tmp_path / "saved").exists()


def test_to_float16_is_refused_and_changes_nothing(half):
    for arguments in ((torch.float16,), ("cpu", torch.float16)):
        with pytest.raises(InvalidValueError, match=r"torch\.float16 .* bfloat16 or float32 \(float16 overflows"):
            half.to(*arguments)
    assert {weight.dtype for part in parts(half) for weight in part.parameters()} == {torch.bfloat16}


def parts(pipe: PyramidFlowPipeline) -> tuple[torch.nn.Module, ...]:
    return pipe.transformer, pipe.vae, pipe.text_encoder


# Saving


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stored(path: Path | str) -> dict[str, bytes]:
    """Return the tensors that a fingerprint counts, by folder, name, type and shape."""
    return {
        f"{folder.name} {name} {tensor.dtype} {tensor.shape}": tensor.file.read_bytes()[tensor.start : tensor.stop]
        for folder in Checkpoint.open(path).folders
        for name, tensor in stored_tensors(folder).items()
    }


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(TINY_MINIFLUX, torch.float32), (TINY_SD3, torch.float32), ("toy", torch.bfloat16)],
    ids=["miniflux", "sd3", "toy"],
)
def test_a_saved_pipeline_is_the_same_checkpoint(path, dtype, tmp_path):
    before, folder = PyramidFlowPipeline.from_pretrained(path, torch_dtype=dtype), tmp_path / "new" / "model"
    before.save_pretrained(folder)
    original, saved = Checkpoint.open(path), Checkpoint.open(folder)
    assert stored(folder) == stored(path)
    assert (saved.family, saved.variant, saved.preset) == (original.family, original.variant, original.preset)
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt")]
    saved.check()
    after = PyramidFlowPipeline.from_pretrained(folder, torch_dtype=dtype)
    still = SHORT | {"num_frames": 1}
    assert np.array_equal(after("a red ball", **still).frames, before("a red ball", **still).frames)
    after.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").fingerprint == saved.fingerprint


def test_a_pipeline_in_bfloat16_is_saved_in_bfloat16(half, tmp_path):
    half.save_pretrained(tmp_path)
    folders = Checkpoint.open(tmp_path).folders
    assert {tensor.dtype for folder in folders for tensor in stored_tensors(folder).values()} == {torch.bfloat16}


def test_the_same_checkpoint_is_replaced_and_other_files_stay(tmp_path):
    folder = shutil.copytree(TINY_MINIFLUX, tmp_path / "model")
    (folder / "LICENSE").write_text("as it was")
    (folder / "text_encoder" / "stale.json").write_text("{}")
    pipe = PyramidFlowPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.transformer.proj_out.bias.add_(1)
    pipe.save_pretrained(folder)  # whose files the pipeline's weights may still lie in
    after = PyramidFlowPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert torch.equal(after.transformer.proj_out.bias, pipe.transformer.proj_out.bias)
    assert torch.equal(latents(after), latents(pipe))
    assert (folder / "LICENSE").read_text() == "as it was"
    assert not (folder / "text_encoder" / "stale.json").exists()
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "prepare",
    [
        lambda folder: (folder / "thesis.txt").write_text("years of work"),
        lambda folder: shutil.copytree(TINY_SD3, folder, dirs_exist_ok=True),
        lambda folder: shutil.copytree(
            TINY_MINIFLUX / "diffusion_transformer_384p", folder / "diffusion_transformer_768p"
        ),
        lambda folder: [
            shutil.copytree(TINY_MINIFLUX / "diffusion_transformer_384p", folder / f"diffusion_transformer_{name}")
            for name in ("384p", "768p")
        ],
        lambda folder: [
            shutil.copytree(TINY_MINIFLUX, folder, dirs_exist_ok=True),
            (folder / "causal_video_vae").rename(folder.parent / "shared"),
            (folder / "causal_video_vae").symlink_to(folder.parent / "shared"),
        ],
    ],
    ids=["files", "family", "variant", "variants", "links"],
)
def test_nothing_else_is_written_over(half, prepare, tmp_path):
    prepare(tmp_path)
    before = contents(tmp_path)
    message = "neither empty nor a miniflux checkpoint with the variant 384p alone|holds links"
    with pytest.raises(CheckpointError, match=message):
        half.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_save_that_breaks_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = shutil.copytree(TINY_MINIFLUX, tmp_path / "model")
    before = contents(folder)
    pipe = PyramidFlowPipeline.from_pretrained(folder)
    monkeypatch.setattr(pipe.text_encoder.t5, "save_pretrained", lambda path: shutil.copy(path / "nowhere", path))
    with pytest.raises(FileNotFoundError):
        pipe.save_pretrained(folder)
    assert contents(folder) == before


def test_a_schedule_that_cannot_be_saved_is_refused(tmp_path):
    pipe = PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX)
    pipe.schedule = PyramidSchedule(gamma=0.25)
    with pytest.raises(InvalidValueError, match="the only one that is saved"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
