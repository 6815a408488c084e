"""Training the causal video VAE: its first weights, its losses, and latents of even scale."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_flow.presets import LatentStatistics
from pyramid_flow.training.draws import TrainingDraws
from pyramid_flow.vae.blocks import Downsample, ResnetBlock, SpatialUpsample, TemporalUpsample
from pyramid_flow.vae.model import VAENetwork

NEW_SHARE = 0.3  # of the random part in convolutions that begin as something useful
FIRST_LOGVAR = -4.0
FOREGROUND_DISTANCE = 0.1  # of a pixel in [-1, 1] from the clip's commonest colour
FOREGROUND_REACH = 5  # pixels, around the foreground


@dataclass(frozen=True)
class VAEObjective:
    """What is minimised: weighted L1 + mse_weight x weighted squared error + kl_weight x mean KL of a latent value.

    foreground_weight: how much more pixels count that differ from the clip's commonest colour, with those around them.
    """

    mse_weight: float = 1.0
    kl_weight: float = 1e-4
    foreground_weight: float = 4.0


@dataclass(frozen=True)
class VAELosses:
    """Means over a batch in float32: l1 and mse (both weighted), kl in nats per latent value, and what is minimised."""

    l1: Tensor
    mse: Tensor
    kl: Tensor
    total: Tensor


def vae_losses(vae: VAENetwork, pixels: Tensor, draws: TrainingDraws, objective: VAEObjective) -> VAELosses:
    """Encode pixels [B,3,1+8k,H,W] in [-1,1], sample, decode and compare. Draws, per sample: the posterior's noise."""
    posterior = vae.encode_moments(pixels)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = draws.normal(mean.shape[1:]).to(mean)
    decoded = vae.decode(posterior.sample(noise.to(posterior.mean))).float()
    error = decoded - pixels.to(decoded)
    weights = foreground_weights(pixels.to(decoded), objective.foreground_weight)
    l1, mse = (weights * error.abs()).mean(), (weights * error.square()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return VAELosses(l1, mse, kl, l1 + objective.mse_weight * mse + objective.kl_weight * kl)


def foreground_weights(pixels: Tensor, weight: float) -> Tensor:
    """Return weights [B,1,T,H,W] of mean 1: 1 + weight near what differs from a clip's median colour, 1 elsewhere."""
    median = pixels.flatten(2).median(dim=-1).values[..., None, None, None]
    is_foreground = (pixels - median).abs().amax(dim=1, keepdim=True) > FOREGROUND_DISTANCE
    reach = (1, FOREGROUND_REACH, FOREGROUND_REACH)
    near = F.max_pool3d(is_foreground.to(pixels), reach, stride=1, padding=tuple(side // 2 for side in reach))
    weights = 1 + weight * near
    return weights / weights.mean()


@torch.no_grad()
def initialise_vae(vae: VAENetwork) -> None:
    """Give a VAE its first weights, from torch's generator.

    Convolutions are fan-in normal, and weak at the end of a residual. Those that change the resolution begin as means
    and copies with a share of that, `quant_conv` and `post_quant_conv` as the identity: so images pass from the start.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            module.conv2.conv.weight.mul_(NEW_SHARE)
        elif isinstance(module, Downsample):
            _begin_as(module.conv.conv, _mean_kernel(module.conv.conv))
        elif isinstance(module, SpatialUpsample | TemporalUpsample):
            _begin_as(module.conv.conv, _copy_kernel(module.conv.conv))
    for conv in (vae.quant_conv.conv, vae.post_quant_conv.conv):
        conv.weight.copy_(_copy_kernel(conv))
    _bias(vae.quant_conv.conv).chunk(2)[1].fill_(FIRST_LOGVAR)


def _begin_as(conv: nn.Conv3d, kernel: Tensor) -> None:
    conv.weight.mul_(NEW_SHARE).add_(kernel)


def _mean_kernel(conv: nn.Conv3d) -> Tensor:
    """Return the kernel that takes the mean of each channel, over the pixels or the frames that the strides skip."""
    kernel = torch.zeros_like(conv.weight)
    channels = torch.arange(conv.out_channels)
    if conv.stride[0] == 1:
        kernel[channels, channels, -1] = 1 / kernel[0, 0, 0].numel()
    else:
        kernel[channels, channels, :, kernel.shape[3] // 2, kernel.shape[4] // 2] = 1 / kernel.shape[2]
    return kernel


def _copy_kernel(conv: nn.Conv3d) -> Tensor:
    """Return the kernel that copies each channel of the last frame to as many channels, side by side, as it can."""
    kernel = torch.zeros_like(conv.weight)
    channels = torch.arange(conv.out_channels)
    copies = conv.out_channels // conv.in_channels
    kernel[channels, channels // copies, -1, kernel.shape[3] // 2, kernel.shape[4] // 2] = 1
    return kernel


@torch.no_grad()
def whiten(vae: VAENetwork, latents: Iterable[Tensor]) -> None:
    """Give every channel of the latents mean 0 and variance 1, without changing what is decoded.

    latents: un-normalised, of this VAE, each [B,C,T,h,w]. The scales go into `quant_conv` and `post_quant_conv`.
    """
    values = torch.cat([part.transpose(0, 1).flatten(1).double().cpu() for part in latents], dim=1)
    mean, std = values.mean(dim=1), values.std(dim=1)
    before, after = vae.quant_conv.conv, vae.post_quant_conv.conv
    column = (-1, 1, 1, 1, 1)
    _bias(after).add_(after.weight.flatten(1) @ mean.to(after.weight))
    after.weight.mul_(std.to(after.weight).view(1, *column[:-1]))
    before.weight[: len(mean)].div_(std.to(before.weight).view(column))
    shift, logvar = _bias(before).chunk(2)
    shift.sub_(mean.to(shift)).div_(std.to(shift))
    logvar.sub_(2 * std.log().to(logvar))


def measure_statistics(latents: Iterable[Tensor]) -> LatentStatistics:
    """Return shift and scale of un-normalised latents, each [B,C,T,h,w] from a video's first frame on."""
    parts = [part.double().cpu() for part in latents]
    first = torch.cat([part[:, :, :1].flatten() for part in parts])
    later = torch.cat([part[:, :, 1:].flatten() for part in parts])
    if not len(later):
        later = first
    return LatentStatistics(
        first_shift=float(first.mean()),
        first_scale=float(1 / first.std()),
        later_shift=float(later.mean()),
        later_scale=float(1 / later.std()),
    )


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None  # every convolution of the VAE has one
    return conv.bias
