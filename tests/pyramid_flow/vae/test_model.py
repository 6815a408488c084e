"""The causal video VAE: parity with the golden data, and what chunks, tiles and explicit state promise."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pyramid_flow import CausalVideoVAE, Checkpoint
from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.toy.world import draw_scene
from pyramid_flow.vae import model
from pyramid_flow.vae.blocks import FrameGroupNorm
from pyramid_flow.vae.conv import CausalConv3d, FeatureCache
from pyramid_flow.vae.model import LatentDistribution, temporal_chunks
from pyramid_flow.vae.tiling import blend, map_tiles, tile_origins
from tests.pyramid_flow.plain_vae import PlainDecoder

GOLDEN = Path(__file__).parents[2] / "golden"
CHECKPOINT = GOLDEN / "checkpoints" / "tiny-miniflux" / "causal_video_vae"
MANIFEST = json.loads((GOLDEN / "official_checkpoint_manifest.json").read_text())["causal_video_vae"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae() -> CausalVideoVAE:
    return CausalVideoVAE.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "goldens" / "vae.safetensors")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(distribution: LatentDistribution) -> Tensor:
    return torch.cat([distribution.mean, distribution.logvar], dim=1)


def assert_equal_within(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


# Parity


@pytest.mark.parametrize(
    ("latents", "expected", "options"),
    [
        ("latent", "decoded", {}),
        ("latent", "decoded_chunk1", {"window": 1}),
        ("latent", "decoded_chunk2", {"window": 2}),
        ("latent", "decoded_tiled32", {"window": 1, "tile": 32}),
        ("latent_image", "decoded_image", {}),
        ("latent_image", "decoded_image", {"window": 1}),
    ],
)
def test_decode_matches_golden(vae, golden, latents, expected, options):
    assert_equal_within(vae.decode(golden[latents], **options), golden[expected])


@pytest.mark.parametrize(
    ("pixels", "expected", "options"),
    [
        ("image", "image.moments", {}),
        ("image", "image.moments_tiled32", {"tile": 32}),
        ("video", "video.moments", {}),
        ("video", "video.moments_chunk8", {"window": 8}),
    ],
)
def test_encode_matches_golden(vae, golden, pixels, expected, options):
    assert_equal_within(moments(vae.encode_moments(golden[pixels], **options)), golden[expected])


@pytest.mark.parametrize(
    ("channels", "layers", "shape", "tile"),
    [
        ((8, 16, 12, 20), (2, 1, 2, 1), (2, 16, 4, 2, 3), None),
        ((16, 8, 8, 16), (1, 2, 1, 2), (1, 16, 3, 3, 2), None),
        ((12, 8, 16, 8), (1, 1, 2, 1), (1, 16, 3, 5, 2), 32),
        ((8, 12, 12, 16), (1, 2, 1, 1), (1, 16, 2, 5, 5), 32),
    ],
)
def test_decoding_equals_the_plain_algorithm(channels, layers, shape, tile):
    torch.manual_seed(0)
    vae = CausalVideoVAE(
        encoder_block_out_channels=(8,) * 4,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=channels,
        decoder_layers_per_block=layers,
        decoder_norm_num_groups=4,
    ).eval()
    latents = noise(*shape)
    expected = PlainDecoder(vae).decode(latents, 1, tile)
    assert_equal_within(PlainDecoder(vae).decode(latents, None, tile), expected)
    for window in (1, 2, None):
        assert_equal_within(vae.decode(latents, window=window, tile=tile), expected)


def test_sums_over_large_frames_keep_their_digits():
    norm = FrameGroupNorm(32, 32)
    x = noise(1, 32, 1, 200, 200) + 3
    expected = norm.double()(x.double())
    assert_equal_within(norm.float()(x).double(), expected, 3e-7)


def test_half_precision_decodes_as_the_plain_algorithm_does(golden):
    vae = CausalVideoVAE.from_pretrained(CHECKPOINT, torch_dtype=torch.bfloat16)
    latents = golden["latent"].bfloat16()
    exact = golden["decoded"]
    ours, plain = (frames.float() - exact for frames in (vae.decode(latents), PlainDecoder(vae).decode(latents, None)))
    assert ours.abs().mean() < 1.2 * plain.abs().mean()


@pytest.mark.parametrize("num_latents", [1, 2, 3])
def test_gradients_are_those_of_the_plain_algorithm(vae, num_latents):
    latents = noise(1, 16, num_latents, 2, 3)
    parameters = {name: each for name, each in vae.named_parameters() if name.startswith(("decoder", "post_quant"))}

    def gradients(decode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = latents.clone().requires_grad_()
        return list(torch.autograd.grad(decode(leaf).square().mean(), [leaf, *parameters.values()]))

    with torch.enable_grad():
        pairs = zip(gradients(vae.decode), gradients(lambda x: PlainDecoder(vae).decode(x, None)), strict=True)
    for ours, expected in pairs:
        assert_equal_within(ours, expected)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("counts", [[1], [3], [1, 2, 2], [1, 4], [3, 2, 2], [5, 4]])
def test_a_convolution_of_chunks_is_one_conv3d(stride, counts):
    torch.manual_seed(0)
    layer = CausalConv3d(3, 4, stride=stride)
    x = noise(2, 3, sum(counts), 5, 7)
    expected = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), layer.conv.weight, layer.conv.bias, stride)
    cache = FeatureCache(None, keep=True)
    assert_equal_within(torch.cat([layer(chunk, cache) for chunk in x.split(counts, dim=2)], dim=2), expected)


def test_default_model_is_the_published_one():
    with torch.device("meta"):
        full = CausalVideoVAE()
    shapes = {name: list(tensor.shape) for name, tensor in full.state_dict().items()}
    assert shapes == {name: shape for name, (shape, _) in MANIFEST["tensors"].items()}
    assert sum(parameter.numel() for parameter in full.parameters()) == MANIFEST["parameters"]
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in full.config.items()}
    published = {key: value for key, value in MANIFEST["config"].items() if not key.startswith("_")}
    assert {key: value for key, value in config.items() if not key.startswith("_")} == published


def test_published_folder_loads_strictly_and_silently(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        _, info = CausalVideoVAE.from_pretrained(CHECKPOINT, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_saved_model_loads_again(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    again = CausalVideoVAE.from_pretrained(tmp_path)
    assert dict(again.state_dict()).keys() == dict(vae.state_dict()).keys()
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in again.state_dict().items())


# Time


@pytest.mark.parametrize(
    ("counts", "tile"), [([1] * 5, None), ([2, 3], None), ([3, 1, 1], None), ([1, 4], 32), ([2, 1, 2], 32)]
)
def test_decoding_in_any_chunks_equals_decoding_at_once(vae, counts, tile):
    latents = noise(1, 16, 5, 2, 5 if tile else 3)
    frames = list(vae.decode_stream(iter(latents.split(counts, dim=2)), tile=tile))
    assert [part.shape[2] for part in frames] == [8 * counts[0] - 7, *(8 * count for count in counts[1:])]
    assert_equal_within(torch.cat(frames, dim=2), vae.decode(latents, tile=tile))


@pytest.mark.parametrize(("chunks", "is_kept"), [(list, False), (iter, True)])
def test_nothing_is_remembered_of_a_still_after_which_no_chunk_comes(vae, monkeypatch, chunks, is_kept):
    states, run = [], model._run_chunk

    def noted(*arguments, **options):
        frames, state = run(*arguments, **options)
        states.append(state)
        return frames, state

    monkeypatch.setattr(model, "_run_chunk", noted)
    list(vae.decode_stream(chunks([noise(1, 16, 1, 2, 3)])))
    assert [any(state.features) for state in states] == [is_kept]


@pytest.mark.parametrize(("window", "tile"), [(8, None), (24, None), (16, 32)])
def test_encoding_in_chunks_equals_encoding_at_once(vae, window, tile):
    pixels = noise(2, 3, 33, 8, 40 if tile else 16)
    whole = vae.encode_moments(pixels, tile=tile)
    assert_equal_within(moments(vae.encode_moments(pixels, window=window, tile=tile)), moments(whole))


def test_decoding_a_prefix_gives_the_prefix(vae):
    latents = noise(1, 16, 4, 2, 3)
    frames = vae.decode(latents)
    assert frames.shape == (1, 3, 25, 16, 24)
    for count in (1, 2, 3):
        assert_equal_within(vae.decode(latents[:, :, :count]), frames[:, :, : 8 * count - 7])


@pytest.mark.parametrize(("frame", "first_latent"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_latents_look_only_backwards(vae, frame, first_latent):
    pixels = noise(1, 3, 25, 16, 16)
    changed = pixels.clone()
    changed[:, :, frame] += 1
    before, after = (moments(vae.encode_moments(each)) for each in (pixels, changed))
    differs = (before != after).flatten(3).any(-1).any(1)[0]
    assert differs.nonzero()[0].item() == first_latent


@pytest.mark.parametrize(("latent", "first_frame"), [(0, 0), (1, 1), (2, 9), (3, 17)])
def test_frames_look_only_backwards(vae, latent, first_frame):
    latents = noise(1, 16, 4, 2, 2)
    changed = latents.clone()
    changed[:, :, latent] += 1
    differs = (vae.decode(latents) != vae.decode(changed)).flatten(3).any(-1).any(1)[0]
    assert differs.nonzero()[0].item() == first_frame


def test_a_still_image_is_frame_zero_of_a_video(vae):
    pixels = noise(1, 3, 9, 16, 24)
    still = vae.encode_moments(pixels[:, :, :1])
    assert_equal_within(moments(still), moments(vae.encode_moments(pixels))[:, :, :1])


@pytest.mark.parametrize(
    ("num_frames", "window", "counts"),
    [
        (16, 1, [2] + [1] * 14),
        (16, 2, [3] + [2] * 6 + [1]),
        (16, 15, [16]),
        (3, 8, [3]),
        (1, 1, [1]),
        (5, None, [5]),
    ],
)
def test_temporal_chunks(num_frames, window, counts):
    latents = noise(1, 16, num_frames, 1, 1)
    chunks = list(temporal_chunks(latents, window))
    assert [chunk.shape[2] for chunk in chunks] == counts
    assert torch.equal(torch.cat(chunks, dim=2), latents)


# State


def test_a_batch_equals_its_rows(vae):
    latents = noise(3, 16, 3, 2, 2)
    rows = [vae.decode(row[None], window=1) for row in latents]
    assert_equal_within(vae.decode(latents, window=1), torch.cat(rows))


@pytest.mark.parametrize("tile", [None, 32])
def test_a_state_can_be_used_again(vae, tile):
    latents = noise(1, 16, 3, 2, 5 if tile else 3)
    _, state = vae.decode_chunk(latents[:, :, :1], None, tile=tile)
    kept = [feature.clone() for features in state.features for feature in features.values()]
    once, _ = vae.decode_chunk(latents[:, :, 1:], state, tile=tile)
    again, _ = vae.decode_chunk(latents[:, :, 1:], state, tile=tile)
    assert torch.equal(once, again)
    for feature, before in zip((f for features in state.features for f in features.values()), kept, strict=True):
        assert torch.equal(feature, before)


def test_two_videos_share_one_vae(vae):
    first, second = noise(1, 16, 3, 2, 2, seed=1), noise(1, 16, 3, 3, 2, seed=2)
    alone = [list(vae.decode_stream(temporal_chunks(latents, 1))) for latents in (first, second)]
    streams = [vae.decode_stream(temporal_chunks(latents, 1)) for latents in (first, second)]
    for *expected, (one, two) in zip(*alone, zip(*streams, strict=True), strict=True):
        assert torch.equal(one, expected[0])
        assert torch.equal(two, expected[1])


@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_a_state_holds_two_frames_per_convolution_and_nothing_else(vae, num_latents):
    _, state = vae.decode_chunk(noise(1, 16, num_latents, 2, 2), None)
    convolutions = [module for module in vae.decoder.modules() if getattr(module, "kernel_size", None) == (3, 3, 3)]
    (features,) = state.features
    assert [feature.shape[2] for feature in features.values()] == [2] * len(convolutions)
    assert all(feature.untyped_storage().nbytes() == feature.nbytes for feature in features.values())


def test_inputs_are_never_modified(vae):
    latents, pixels = noise(1, 16, 3, 2, 5), noise(1, 3, 17, 8, 40)
    kept = latents.clone(), pixels.clone()
    for tile in (None, 32):
        vae.decode(latents, window=1, tile=tile)
        vae.encode_moments(pixels, window=8, tile=tile)
    assert torch.equal(latents, kept[0])
    assert torch.equal(pixels, kept[1])


def test_results_have_the_dtype_of_the_parameters(golden):
    vae = CausalVideoVAE.from_pretrained(CHECKPOINT, torch_dtype=torch.bfloat16)
    frames, state = vae.decode_chunk(golden["latent"], None, tile=32)
    assert frames.dtype == torch.bfloat16
    assert {feature.dtype for features in state.features for feature in features.values()} == {torch.bfloat16}
    assert (frames - golden["decoded_tiled32"]).abs().mean() < 0.05
    assert vae.encode_moments(golden["image"]).mean.dtype == torch.bfloat16


# Tiles


@pytest.mark.parametrize(
    ("size", "tile", "origins"), [(80, 32, [0, 24, 48, 72]), (48, 32, [0, 24]), (160, 32, [*range(0, 160, 24)])]
)
def test_tile_origins(size, tile, origins):
    assert list(tile_origins(size, tile)) == origins


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 16), (7, 50), (25, 24), (13, 13), (49, 31)])
def test_tiles_of_an_exact_function_join_exactly(height, width):
    x = noise(2, 3, height, width)
    assert_equal_within(map_tiles(lambda tile: 2 * tile, x, (16, 16)), 2 * x)
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    upsampled = map_tiles(lambda tile: tile.repeat_interleave(2, -1).repeat_interleave(2, -2), x, (16, 32))
    assert_equal_within(upsampled, doubled)


def test_blend_fades_linearly():
    before, after = torch.zeros(1, 6), torch.ones(1, 8)
    expected = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(blend(before, after, 4, dim=-1), expected)
    assert torch.equal(blend(before, after[:, :2], 4, dim=-1), torch.tensor([[0.0, 0.5]]))
    assert torch.equal(blend(before.T, after.T, 4, dim=-2), expected.T)


def test_a_frame_within_one_tile_is_not_tiled(vae):
    latents = noise(1, 16, 2, 4, 2)
    assert torch.equal(vae.decode(latents, tile=32), vae.decode(latents))


def border_step(frames: Tensor, tile: int) -> float:
    """Return the mean step between pixels across the borders of tiles over that between all others."""
    across, others = [], []
    for rows in (frames, frames.mT):
        steps = rows.diff(dim=-1).abs()
        is_border = torch.zeros(steps.shape[-1], dtype=torch.bool)
        is_border[torch.tensor(tile_origins(rows.shape[-1], tile)[1:]) - 1] = True
        across.append(steps[..., is_border].mean())
        others.append(steps[..., ~is_border].mean())
    return float(sum(across) / sum(others))


@pytest.mark.integration
@pytest.mark.parametrize("tile", [64, 128])
def test_tiles_leave_no_seam(tile):
    """Measured are 0.75 and 1.2 of what it is without tiles; with no blending 4.6 and 10.5."""
    vae = Checkpoint.open("toy").load_vae(torch.float32, "cpu")
    scenes = [draw_scene(random.Random(seed), ("large",)).render(1, 256) for seed in range(3)]
    pixels = torch.stack([torch.from_numpy(scene) for scene in scenes]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    latents = vae.encode_moments(pixels).mean
    whole, tiled = (border_step(vae.decode(latents, tile=side), tile) for side in (None, tile))
    assert tiled <= 1.5 * whole


# The posterior


def test_distribution_clamps_only_the_deviation():
    distribution = LatentDistribution(mean=torch.full((1, 2), 3.0), logvar=torch.tensor([[-100.0, 100.0]]))
    expected = torch.exp(torch.tensor([[-15.0, 10.0]]))
    assert torch.equal(distribution.std, expected)
    assert torch.equal(distribution.sample(torch.ones(1, 2)), 3 + expected)
    assert distribution.logvar.tolist() == [[-100.0, 100.0]]
    with pytest.raises(ShapeError, match=r"noise must have shape \[1, 2\], got \[2\]"):
        distribution.sample(torch.ones(2))


# Errors

BAD_CALLS: list[tuple[Callable[[CausalVideoVAE], object], type[Exception], str]] = [
    (lambda vae: vae.decode(noise(1, 8, 1, 2, 2)), ShapeError, r"\[B, 16, T, h, w\], got \[1, 8, 1, 2, 2\]"),
    (lambda vae: vae.decode(noise(16, 1, 2, 2)), ShapeError, r"got \[16, 1, 2, 2\]"),
    (lambda vae: vae.decode(noise(1, 16, 0, 2, 2)), ShapeError, "latents"),
    (lambda vae: vae.decode(noise(1, 16, 2, 2, 2), window=0), InvalidValueError, "window 0"),
    (lambda vae: vae.decode(noise(1, 16, 1, 2, 2), tile=40), InvalidValueError, "tile 40 .* multiple of 32"),
    (lambda vae: vae.decode(noise(1, 16, 1, 2, 2), tile=0), InvalidValueError, "tile 0"),
    (lambda vae: vae.encode_moments(noise(1, 4, 1, 8, 8)), ShapeError, r"\[B, 3, 1\+8k, H, W\], got \[1, 4, 1, 8, 8\]"),
    (lambda vae: vae.encode_moments(noise(3, 8, 8)), ShapeError, "pixels"),
    (lambda vae: vae.encode_moments(noise(1, 3, 8, 8, 8)), InvalidValueError, r"num_frames 8 is not 1 \+"),
    (lambda vae: vae.encode_moments(noise(1, 3, 1, 12, 8)), InvalidValueError, "height 12 is not a .*multiple of 8"),
    (lambda vae: vae.encode_moments(noise(1, 3, 1, 8, 20)), InvalidValueError, "width 20 is not a .*multiple of 8"),
    (lambda vae: vae.encode_moments(noise(1, 3, 9, 8, 8), window=4), InvalidValueError, "window 4 .* multiple of 8"),
    (lambda vae: vae.encode_moments(noise(1, 3, 9, 8, 8), window=0), InvalidValueError, "window 0"),
    (lambda vae: vae.encode_moments(noise(1, 3, 1, 8, 8), tile=16), InvalidValueError, "tile 16"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_input_is_refused(vae, call, error, message):
    with pytest.raises(error, match=message):
        call(vae)


def test_a_chunk_must_fit_its_state(vae):
    _, state = vae.decode_chunk(noise(1, 16, 1, 6, 5), None, tile=32)
    with pytest.raises(ShapeError, match=r"\[1, 16, T, 6, 5\], got \[1, 16, 1, 6, 6\]"):
        vae.decode_chunk(noise(1, 16, 1, 6, 6), state, tile=32)
    with pytest.raises(InvalidValueError, match="tile None is not 32"):
        vae.decode_chunk(noise(1, 16, 1, 6, 5), state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interpolate", True),
        ("add_post_quant_conv", False),
        ("encoder_double_z", False),
        ("encoder_type", "vae_conv"),
        ("decoder_act_fn", "gelu"),
        ("downsample_scale", 4),
        ("decoder_in_channels", 8),
        ("encoder_down_block_types", ("DownEncoderBlock2D",) * 4),
        ("decoder_up_block_types", ("UpDecoderBlockCausal3D",) * 3),
        ("encoder_block_dropout", (0.0, 0.1, 0.0, 0.0)),
        ("encoder_temporal_down_sample", (True, True, False, False)),
        ("decoder_spatial_up_sample", (True, True, True, True)),
        ("decoder_layers_per_block", (2, 2, 2)),
    ],
)
def test_unsupported_configs_are_refused(key, value):
    with torch.device("meta"), pytest.raises(InvalidValueError, match=f"{key} .* is not supported"):
        CausalVideoVAE(**{key: value})


def test_an_unknown_key_is_refused():
    with pytest.raises(TypeError, match="interpolation"):
        CausalVideoVAE(interpolation=True)
