"""The count of operations: equal to what a real run is counted to take, and to what is known of the published model."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, T5Config

from pyramid_flow import (
    Checkpoint,
    CheckpointError,
    InvalidValueError,
    PyramidSchedule,
    PyramidTransformer,
    SamplingParams,
    SeededNoise,
    generate_latents,
    render_flops,
)
from pyramid_flow.checkpoints.diffusers_models import TRANSFORMERS
from pyramid_flow.pixels import decode_frames, encode_image
from pyramid_flow.sampling.pyramid import history_level
from tests.pyramid_flow.goldens import TINY, manifest, randn, random_text

DIT = "diffusion_transformer_384p"
PARAMS = SamplingParams(64, 128, 17, (2, 1, 1), (1, 2, 1), guidance_scale=4.0, video_guidance_scale=3.0)


def counted(run: Callable[[], object]) -> int:
    """Count what runs on the CPU. Its fused attention is no kernel that the counter knows, so it is kept from it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def counted_sampling(family: str, transformer: PyramidTransformer, params: SamplingParams, *, has_image: bool) -> int:
    text = random_text([128], family=family)
    image = randn(1, 16, 1, params.height // 8, params.width // 8) if has_image else None
    schedule, noise = PyramidSchedule(), SeededNoise([0])
    return counted(lambda: generate_latents(transformer, schedule, text, text, params, noise, image_latent=image))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: on tensors this small more are slower, and far slower on a machine that is not idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Checkpoint:
    return Checkpoint.open(TINY["miniflux"])


@pytest.fixture(params=TINY)
def either(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint.open(TINY[request.param])


@pytest.fixture
def published(tmp_path: Path) -> Checkpoint:
    """Return the configs of the published checkpoint without its weights."""
    for folder, name in ((DIT, "diffusion_transformer (miniflux)"), ("causal_video_vae", "causal_video_vae")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(manifest(name)["config"]))
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    clip.save_pretrained(tmp_path / "text_encoder")
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    t5.save_pretrained(tmp_path / "text_encoder_2")
    return Checkpoint.open(tmp_path)


# Equal to a counted run


@pytest.mark.parametrize(
    ("num_frames", "has_image", "guidance"),
    [(1, False, 4.0), (17, False, 4.0), (17, True, 4.0), (65, False, 0.0), (65, True, 0.0)],
)
def test_sampling_equals_a_counted_run(either, num_frames, has_image, guidance):
    params = replace(PARAMS, num_frames=num_frames, guidance_scale=guidance)
    transformer = either.load_transformer(torch.float32, "cpu")
    expected = counted_sampling(either.family, transformer, params, has_image=has_image)
    assert render_flops(either, params, has_image=has_image).sample == expected


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("miniflux", {"num_layers": 1, "num_single_layers": 1}),
        ("miniflux", {"num_layers": 3, "num_single_layers": 4}),
        ("sd3", {"num_layers": 1}),
        ("sd3", {"num_layers": 5}),
    ],
)
def test_every_block_is_counted(tmp_path, family, blocks):
    tiny = Checkpoint.open(TINY[family])
    model = TRANSFORMERS[family]
    transformer = model.from_config({**model.load_config(tiny.transformer_folder), **blocks})
    transformer.save_config(tmp_path)
    expected = counted_sampling(family, transformer, PARAMS, has_image=False)
    assert render_flops(replace(tiny, transformer_folder=tmp_path), PARAMS, has_image=False).sample == expected


def test_an_image_alone_leaves_nothing_to_sample(tiny):
    assert render_flops(tiny, replace(PARAMS, num_frames=1), has_image=True).sample == 0


@pytest.mark.parametrize(
    ("num_frames", "tile"), [(1, None), (9, None), (25, None), (1, 64), (17, 64), (25, 96), (9, 128)]
)
def test_decoding_equals_a_counted_run(tiny, num_frames, tile):
    vae, latents = tiny.load_vae(torch.bfloat16, "cpu"), randn(1, 16, 1 + num_frames // 8, 8, 16)
    expected = counted(lambda: list(decode_frames(vae, latents, tiny.preset.statistics, tile=tile)))
    params = replace(PARAMS, num_frames=num_frames)
    assert render_flops(tiny, params, has_image=False, tile=tile).decode == expected


def test_decoding_takes_the_same_in_larger_chunks(tiny):
    vae, latents = tiny.load_vae(torch.bfloat16, "cpu"), randn(1, 16, 3, 8, 16)
    expected = counted(lambda: list(decode_frames(vae, latents, tiny.preset.statistics, window=2)))
    assert render_flops(tiny, PARAMS, has_image=False).decode == expected


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("has_image", [False, True])
def test_encoding_equals_a_counted_run(either, has_image, guidance):
    encoder, vae = either.load_text_encoder(torch.float32, "cpu"), either.load_vae(torch.float32, "cpu")

    def encode() -> None:
        for prompt in ("a red square", "blurry")[: 2 if guidance else 1]:
            encoder([prompt])
        if has_image:
            encode_image(vae, randn(1, 3, 1, PARAMS.height, PARAMS.width))

    params = replace(PARAMS, guidance_scale=guidance)
    assert render_flops(either, params, has_image=has_image).encode == counted(encode)


# What it depends on


def test_each_step_takes_the_same(tiny):
    one, two, four = (
        render_flops(tiny, replace(PARAMS, video_num_inference_steps=(steps, 1, steps)), has_image=True)
        for steps in (1, 2, 4)
    )
    assert four.sample - two.sample == 2 * (two.sample - one.sample) > 0
    assert (four.encode, four.decode) == (one.encode, one.decode)


def test_an_image_saves_the_first_steps(tiny):
    more = replace(PARAMS, num_inference_steps=9)
    text, image = (render_flops(tiny, PARAMS, has_image=has_image).sample for has_image in (False, True))
    assert image < text < render_flops(tiny, more, has_image=False).sample
    assert render_flops(tiny, more, has_image=True).sample == image


def test_guidance_doubles_the_sampling_and_the_prompts(tiny):
    guided, plain = (render_flops(tiny, replace(PARAMS, guidance_scale=scale), has_image=False) for scale in (4.0, 0.0))
    assert (guided.encode, guided.decode) == (2 * plain.encode, plain.decode)
    history = 2 * 32 * 64 * sum(tokens_of_history(unit, level) for unit in range(3) for level in range(3))
    assert guided.sample == 2 * plain.sample - history  # which is embedded once for both branches


def tokens_of_history(unit: int, level: int) -> int:
    """Count those that are not cached, of 64x128 pixels, whose frame has 2 tokens at level 0."""
    cached = max(unit - 1 - level, 0)
    return sum(2 * 4 ** history_level(unit - frame, level) for frame in range(cached, unit))


def test_the_scales_of_a_batch_do_not_matter(tiny):
    batch = replace(PARAMS, guidance_scale=(7.0, 2.0, 5.0), video_guidance_scale=(1.0, 0.0, 3.0))
    assert render_flops(tiny, batch, has_image=False) == render_flops(tiny, PARAMS, has_image=False)


# The published model


@pytest.mark.parametrize(
    ("size", "num_frames", "goal"),
    [((384, 640), 121, 2.25e15), ((768, 1280), 121, 11.8e15), ((768, 1280), 241, 25.3e15)],
)
def test_the_published_model_takes_what_is_known_of_it(published, size, num_frames, goal):
    """Known is what the history cache makes of 3.39, 17.85 and 50.67 PFLOP: both guidance branches, 20 and 10 steps."""
    flops = render_flops(published, SamplingParams(*size, num_frames), has_image=False)
    assert 0.95 * goal < flops.sample < goal
    assert flops.encode < 0.01 * flops.sample
    assert flops.encode < flops.decode < flops.sample


@pytest.mark.integration  # traces a decoder of full size
def test_tiles_of_the_published_model_take_more(published):
    params = SamplingParams(384, 640, 17)
    whole, tiled = (render_flops(published, params, has_image=False, tile=tile).decode for tile in (None, 256))
    assert whole < tiled < 2 * whole


# Errors


@pytest.mark.parametrize("folder", [DIT, "causal_video_vae", "text_encoder", "text_encoder_2"])
def test_a_missing_config_is_named(published, folder):
    (published.root / folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"/{folder} has no config.json"):
        render_flops(published, PARAMS, has_image=False)


def test_a_broken_config_is_named(published):
    (published.transformer_folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"/{DIT}/config.json cannot be read"):
        render_flops(published, PARAMS, has_image=False)


@pytest.mark.parametrize("tile", [8, 100])
def test_a_tile_the_decoder_does_not_take(tiny, tile):
    with pytest.raises(InvalidValueError, match=f"tile {tile} is not a positive multiple of 32"):
        render_flops(tiny, PARAMS, has_image=False, tile=tile)


def test_steps_that_do_not_fit_the_levels(tiny):
    with pytest.raises(InvalidValueError, match="3 levels"):
        render_flops(tiny, replace(PARAMS, num_inference_steps=(1, 1)), has_image=False)
