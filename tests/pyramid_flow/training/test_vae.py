"""Training the VAE: it begins by passing images on, learns, and can be given latents of even scale."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_flow import CausalVideoVAE
from pyramid_flow.training import vae as training_vae
from pyramid_flow.training.draws import KeyedRandom
from pyramid_flow.training.vae import (
    VAEObjective,
    foreground_weights,
    initialise_vae,
    measure_statistics,
    vae_losses,
    whiten,
)
from pyramid_flow.vae import blocks
from pyramid_flow.vae.conv import FeatureCache
from tests.pyramid_flow.goldens import tiny_vae


def trainable() -> CausalVideoVAE:
    return deepcopy(tiny_vae()).requires_grad_(True)


def clips(batch: int = 2, frames: int = 9) -> Tensor:
    """Return clips of a bright square on a dark ground that moves right."""
    pixels = torch.full((batch, 3, frames, 32, 32), -0.8)
    for frame in range(frames):
        pixels[:, :, frame, 8:20, 4 + frame : 16 + frame] = torch.tensor([0.9, 0.2, -0.5]).view(3, 1, 1)
    return pixels


def test_it_learns():
    torch.manual_seed(0)
    vae = trainable()
    initialise_vae(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    totals = []
    for step in range(12):
        losses = vae_losses(vae, clips(), KeyedRandom(0, step, [0, 1]), VAEObjective())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < 0.6 * totals[0]


def test_at_first_convolutions_that_change_the_resolution_take_means_and_copy(monkeypatch):
    monkeypatch.setattr(training_vae, "NEW_SHARE", 0.0)
    vae = trainable()
    initialise_vae(vae)
    down, slower = vae.encoder.down_blocks[0].downsamplers[0], vae.encoder.down_blocks[0].temporal_downsamplers[0]
    up, faster = vae.decoder.up_blocks[0].upsamplers[0], vae.decoder.up_blocks[0].temporal_upsamplers[0]
    with torch.no_grad():
        x = torch.randn(1, down.conv.conv.in_channels, 5, 8, 8)
        mean = F.avg_pool2d(F.pad(x[0], (1, 1, 1, 1)), 3, stride=2)
        torch.testing.assert_close(down(x, FeatureCache(None, keep=False))[0], mean)
        steady = x[:, :, :1].expand(-1, -1, 5, -1, -1)
        torch.testing.assert_close(slower(steady, FeatureCache(None, keep=False))[:, :, -1], x[:, :, 0])
        z = torch.randn(1, up.conv.conv.in_channels, 3, 4, 4)
        large = z.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        torch.testing.assert_close(up(z, FeatureCache(None, keep=False)), large)
        long = z.repeat_interleave(2, dim=2)[:, :, 1:]
        torch.testing.assert_close(faster(z, FeatureCache(None, keep=False)), long)


def test_gradients_are_those_of_a_network_that_overwrites_nothing(monkeypatch):
    def gradient() -> Tensor:
        vae = trainable()
        vae_losses(vae, clips(), KeyedRandom(0, 0, [0, 1]), VAEObjective()).total.backward()
        return torch.cat([each.grad.flatten() for each in vae.parameters() if each.grad is not None])

    found = gradient()
    monkeypatch.setattr(blocks, "silu", F.silu)
    assert (found - gradient()).norm() <= 1e-6 * found.norm()


def test_losses_are_what_they_say():
    vae, pixels = trainable(), clips()
    plain = vae_losses(vae, pixels, KeyedRandom(0, 0, [0, 1]), VAEObjective(2.0, 0.5, 0.0))
    posterior = vae.encode_moments(pixels)
    error = vae.decode(posterior.sample(KeyedRandom(0, 0, [0, 1]).normal(posterior.mean.shape[1:]))) - pixels
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    for actual, expected in ((plain.l1, error.abs().mean()), (plain.mse, error.square().mean()), (plain.kl, kl)):
        assert actual.item() == pytest.approx(expected.item(), rel=1e-4)
    assert plain.total.item() == pytest.approx((plain.l1 + 2 * plain.mse + 0.5 * plain.kl).item())


def test_the_foreground_weighs_more():
    weights = foreground_weights(clips(), 4.0)
    assert weights.shape == (2, 1, 9, 32, 32)
    assert weights.mean().item() == pytest.approx(1.0)
    inside, near, outside = weights[0, 0, 0, 12, 8], weights[0, 0, 0, 6, 8], weights[0, 0, 0, 28, 28]
    assert inside == near == pytest.approx(5 * outside.item())
    assert torch.equal(foreground_weights(torch.zeros(1, 3, 1, 8, 8), 4.0), torch.ones(1, 1, 1, 8, 8))


def test_whitening_evens_the_channels_and_changes_no_picture():
    vae = trainable()
    torch.manual_seed(0)
    pixels = torch.rand(4, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode_moments(pixels)
        noise = torch.randn_like(before.mean)
        pictures = vae.decode(before.sample(noise))
        whiten(vae, before.mean.split(2))
        after = vae.encode_moments(pixels)
        torch.testing.assert_close(vae.decode(after.sample(noise)), pictures, rtol=1e-3, atol=1e-4)
    values = after.mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(values.std(dim=1), torch.ones(16), rtol=1e-3, atol=1e-3)


def test_statistics_normalise_first_and_later_frames():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 3, 4, 4, generator=generator)
    latents[:, :, :1] = 2 * latents[:, :, :1] + 1
    latents[:, :, 1:] = 0.5 * latents[:, :, 1:] - 3
    statistics = measure_statistics(latents.split(4))
    normal = statistics.normalize(latents)
    for frames in (normal[:, :, :1], normal[:, :, 1:]):
        assert frames.mean().item() == pytest.approx(0, abs=1e-3)
        assert frames.std().item() == pytest.approx(1, abs=1e-3)
    stills = measure_statistics([latents[:, :, :1]])
    assert (stills.later_shift, stills.later_scale) == (stills.first_shift, stills.first_scale)
