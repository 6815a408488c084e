"""Pixels: decoded frames of the golden runs, an image's latent, and the statistics of latents."""

import numpy as np
import pytest
import torch
from PIL import Image

from pyramid_flow import LatentStatistics, NonFiniteError, ShapeError
from pyramid_flow.pixels import as_uint8, decode_frames, encode_image, image_latent, image_pixels, one_ahead
from pyramid_flow.presets import PRESETS
from tests.pyramid_flow.goldens import assert_forward_equal, assert_run_equal, randn, tensors, tiny_vae

STATISTICS = LatentStatistics()
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


# Decoding


@pytest.mark.parametrize(("family", "run"), [("miniflux", "t2v_flux"), ("miniflux", "i2v_flux"), ("sd3", "t2v_mmdit")])
@pytest.mark.parametrize("window", [1, 2])
def test_decoded_frames_match_golden(family, run, window):
    data, vae = tensors(run), tiny_vae(family)
    statistics = PRESETS[family]["384p"].statistics
    (frames,) = torch.cat(list(decode_frames(vae, data["latents"], statistics, window=window)), dim=1)
    assert frames.dtype == torch.uint8
    assert frames.shape == data["frames"].shape
    difference = (frames.int() - data["frames"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


def test_decoding_yields_chunks_and_leaves_the_latents_alone():
    latents = randn(2, 16, 4, 4, 6)
    kept = latents.clone()
    chunks = list(decode_frames(tiny_vae(), latents, STATISTICS))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, count, 32, 48, 3) for count in (9, 8, 8)]
    assert torch.equal(latents, kept)
    again = list(decode_frames(tiny_vae(), latents, STATISTICS))
    assert all(torch.equal(one, two) for one, two in zip(chunks, again, strict=True))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_next_item_is_begun_before_one_is_given(count):
    begun = []
    given = one_ahead(begun.append(i) or i for i in range(count))
    for number, item in enumerate(given):
        assert item == number
        assert begun == [*range(min(number + 2, count))]
    assert len(begun) == count


def test_decoding_records_no_gradients():
    latents = randn(1, 16, 1, 2, 2).requires_grad_()
    (frames,) = decode_frames(tiny_vae(), latents, STATISTICS)
    assert not frames.requires_grad
    assert torch.is_grad_enabled()


def test_grey_levels_are_truncated_and_clamped_not_rounded():
    levels = torch.tensor([-5.0, 0, 0.99, 1, 10.5, 10.999, 127.5, 254.99, 255, 300])
    frames = ((levels - 127.5) / 127.5).view(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1)
    expected = [0, 0, 0, 1, 10, 10, 127, 254, 255, 255]
    assert as_uint8(frames.double().float())[0, 0, 0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_frames_that_are_not_finite_are_refused(value):
    frames = randn(1, 3, 2, 6, 5)
    frames[0, 1, 1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="the decoded frames are not finite"):
        as_uint8(frames)


def test_channels_come_last():
    frames = randn(2, 3, 4, 6, 5)
    levels = as_uint8(frames)
    assert levels.shape == (2, 4, 6, 5, 3)
    assert torch.equal(levels[1, 2, 3, 4], as_uint8(frames[1:, :, 2:3, 3:4, 4:])[0, 0, 0, 0])


# Input images


def test_image_latent_matches_golden():
    data = tensors("i2v_flux")
    height, width, _ = data["input_image"].shape
    pixels = image_pixels(Image.fromarray(data["input_image"].numpy()), height, width)
    posterior = encode_image(tiny_vae(), pixels)
    assert_forward_equal(posterior.mean, data["posterior_mean"])
    latent = image_latent(posterior, data["posterior_noise"], STATISTICS)
    assert_run_equal(latent, data["latents"][:, :, :1])


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = image_pixels(PICTURE, 12, 16)
    expected = torch.from_numpy(np.array(PICTURE)).float() / 255 * 2 - 1
    assert pixels.shape == (1, 3, 1, 12, 16)
    assert torch.equal(pixels[0, :, 0].permute(1, 2, 0), expected)
    extremes = image_pixels(Image.fromarray(np.array([[[0, 255, 0]]], dtype=np.uint8)), 1, 1)
    assert extremes.flatten().tolist() == [-1, 1, -1]


def test_posterior_noise_must_fit():
    posterior = encode_image(tiny_vae(), image_pixels(PICTURE, 64, 64))
    with pytest.raises(ShapeError, match=r"noise must have shape \[1, 16, 1, 8, 8\], got \[1, 16, 1, 4, 4\]"):
        image_latent(posterior, randn(1, 16, 1, 4, 4), STATISTICS)


# Statistics


def test_normalising_uses_other_numbers_for_the_first_frame():
    latents = randn(2, 16, 3, 2, 2)
    normalised = STATISTICS.normalize(latents)
    torch.testing.assert_close(normalised[:, :, :1], (latents[:, :, :1] + 0.04) / 1.8726)
    torch.testing.assert_close(normalised[:, :, 1:], (latents[:, :, 1:] + 0.2343) / 3.0986)


def test_denormalising_is_the_inverse_and_neither_changes_its_argument():
    latents = randn(2, 16, 3, 2, 2)
    kept = latents.clone()
    torch.testing.assert_close(STATISTICS.denormalize(STATISTICS.normalize(latents)), latents)
    torch.testing.assert_close(STATISTICS.normalize(STATISTICS.denormalize(latents)), latents)
    assert torch.equal(latents, kept)


@pytest.mark.parametrize("cut", [1, 2])
def test_parts_of_a_video_are_normalised_as_the_whole(cut):
    latents = randn(1, 16, 4, 2, 2)
    for function in (STATISTICS.normalize, STATISTICS.denormalize):
        parts = [function(latents[:, :, :cut]), function(latents[:, :, cut:], start=cut)]
        assert torch.equal(torch.cat(parts, dim=2), function(latents))
