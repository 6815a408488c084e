"""The causal video VAE: frames to latents and back, whole, in temporal chunks or in spatial tiles."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.memory.placement import execution_device
from pyramid_flow.vae.blocks import Decoder, Encoder
from pyramid_flow.vae.conv import CausalConv3d, FeatureCache, Features
from pyramid_flow.vae.tile import check_tile
from pyramid_flow.vae.tiling import map_tiles

SCALE = 8
"""Pixels per latent along height, along width, and, after the first frame, along time."""

HOST = torch.device("cpu")

LOGVAR_RANGE = (-30.0, 20.0)

Network = Callable[[Tensor, FeatureCache], Tensor]


@dataclass(frozen=True)
class LatentDistribution:
    """The posterior of the encoder, one Gaussian per latent value.

    mean, logvar: [B,16,1+k,H/8,W/8], not normalised; logvar as it leaves the network, not clamped.
    """

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """exp(logvar / 2), with logvar clamped to [-30, 20]."""
        return torch.exp(0.5 * self.logvar.clamp(*LOGVAR_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise of the same shape; ShapeError if it has another."""
        if noise.shape != self.mean.shape:
            raise ShapeError("noise", str(list(self.mean.shape)), tuple(noise.shape))
        return self.mean + self.std * noise


@dataclass(frozen=True)
class VAEState:
    """What the chunks of a video leave behind for its next chunk; never changed once made.

    features: one entry per tile in row-major order (one in all without tiling), see `conv.Features`. Those of tiles
    wait in host memory: together they are larger than what a tile takes while it works.
    batch_and_size: (B, H, W) of the chunks.  tile_sides: of a tile before and after the network; None without tiling.
    """

    features: tuple[Features, ...]
    batch_and_size: tuple[int, int, int]
    tile_sides: tuple[int, int] | None


def temporal_chunks(latents: Tensor, window: int | None) -> Iterator[Tensor]:
    """Split [B,C,T,H,W] in time into views: first `window` + 1 frames, then `window` each, the remainder last.

    16 latents become 2,1,1,...,1 for window 1 and 3,2,...,2,1 for window 2; None keeps all frames together.
    Raises InvalidValueError unless window >= 1.
    """
    if window is not None and window < 1:
        raise InvalidValueError("window", window, "is not at least 1")
    num_frames = latents.shape[2]
    later = range(window + 1, num_frames, window) if window else ()
    return (latents[:, :, start:stop] for start, stop in pairwise([0, *later, num_frames]))


class VAENetwork(nn.Module):
    """Causal video autoencoder: 1 + 8k frames of H x W pixels <-> 1 + k latents of 16 x H/8 x W/8.

    Latent 0 stands for frame 0 alone, latent i for frames 8i-7 to 8i, and both directions look only backwards in time.
    The model holds parameters and nothing else, so any number of videos can pass through it at once: what a video's
    next chunk needs travels in a `VAEState`. Inputs are cast to the device and dtype of the parameters; for inference
    call under `torch.no_grad()`.

    The constructor takes the keys of the published config. `sample_size` and `scaling_factor` belong to that format
    but mean nothing here: latents go in and come out un-normalised. Raises InvalidValueError for a variant that the
    published model does not use and this class does not implement.
    """

    class_name: ClassVar[str] = "CausalVideoVAE"
    """Name of the public class, which a checkpoint's config.json has as `_class_name`."""

    def __init__(
        self,
        encoder_in_channels: int = 3,
        encoder_out_channels: int = 16,
        encoder_layers_per_block: Sequence[int] = (2, 2, 2, 2),
        encoder_down_block_types: Sequence[str] = ("DownEncoderBlockCausal3D",) * 4,
        encoder_block_out_channels: Sequence[int] = (128, 256, 512, 512),
        encoder_spatial_down_sample: Sequence[bool] = (True, True, True, False),
        encoder_temporal_down_sample: Sequence[bool] = (True, True, True, False),
        encoder_block_dropout: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        encoder_act_fn: str = "silu",
        encoder_norm_num_groups: int = 32,
        encoder_double_z: bool = True,
        encoder_type: str = "causal_vae_conv",
        decoder_in_channels: int = 16,
        decoder_out_channels: int = 3,
        decoder_layers_per_block: Sequence[int] = (3, 3, 3, 3),
        decoder_up_block_types: Sequence[str] = ("UpDecoderBlockCausal3D",) * 4,
        decoder_block_out_channels: Sequence[int] = (128, 256, 512, 512),
        decoder_spatial_up_sample: Sequence[bool] = (True, True, True, False),
        decoder_temporal_up_sample: Sequence[bool] = (True, True, True, False),
        decoder_block_dropout: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        decoder_act_fn: str = "silu",
        decoder_norm_num_groups: int = 32,
        decoder_type: str = "causal_vae_conv",
        sample_size: int = 256,
        scaling_factor: float = 0.18215,
        add_post_quant_conv: bool = True,
        interpolate: bool = False,
        downsample_scale: int = 8,
    ) -> None:
        check_config(locals())
        super().__init__()
        self.in_channels, self.latent_channels = encoder_in_channels, decoder_in_channels
        moments = 2 * encoder_out_channels
        self.encoder = Encoder(
            encoder_in_channels,
            moments,
            encoder_block_out_channels,
            encoder_layers_per_block,
            encoder_norm_num_groups,
            encoder_spatial_down_sample,
            encoder_temporal_down_sample,
        )
        self.quant_conv = CausalConv3d(moments, moments, kernel_size=1)
        self.post_quant_conv = CausalConv3d(decoder_in_channels, decoder_in_channels, kernel_size=1)
        self.decoder = Decoder(
            decoder_in_channels,
            decoder_out_channels,
            decoder_block_out_channels,
            decoder_layers_per_block,
            decoder_norm_num_groups,
            decoder_spatial_up_sample,
            decoder_temporal_up_sample,
        )

    @property
    def device(self) -> torch.device:
        """Where it computes, wherever its weights rest."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of its weights."""
        return next(self.parameters()).dtype

    def encode_moments(
        self, pixels: Tensor, *, window: int | None = None, tile: int | None = None
    ) -> LatentDistribution:
        """Encode pixels [B,3,1+8k,H,W] in [-1,1] to the distribution of their latents [B,16,1+k,H/8,W/8].

        window: pixel frames that pass through the encoder at once, a multiple of 8; equal to None (all) within
        rounding. tile: side of a spatial tile in pixels, a multiple of 32; bounds memory but is not exact.
        Raises ShapeError or InvalidValueError for anything else.
        """
        self._check_pixels(pixels)
        if window is not None:
            _check_multiple("window", window, SCALE)
        check_tile(tile)
        sides = (tile, tile // SCALE) if tile else None
        mean, logvar = _run_whole(self._encoder_network, self._cast(pixels), window, sides).chunk(2, dim=1)
        return LatentDistribution(mean, logvar)

    def decode(self, latents: Tensor, *, window: int | None = None, tile: int | None = None) -> Tensor:
        """Decode latents [B,16,T,h,w], un-normalised, to pixels [B,3,1+8(T-1),8h,8w], about [-1,1] but not clamped.

        window: latents that pass through the decoder at once, see `temporal_chunks`; equal to None (all) within
        rounding. tile: side of a spatial tile in pixels, a multiple of 32; bounds memory but is not exact.
        Raises ShapeError or InvalidValueError for anything else.
        """
        self._check_latents(latents)
        sides = _decoder_sides(tile)
        return _run_whole(self._decoder_network, self._cast(latents), window, sides)

    def decode_stream(self, chunks: Iterable[Tensor], *, tile: int | None = None) -> Iterator[Tensor]:
        """Decode consecutive chunks of one video's latents, each as soon as it comes; see `decode_chunk`.

        Memory is that of a chunk, whatever the length of the video; nothing is remembered of the last one of a list.
        Raises as `decode_chunk` does.
        """
        last = len(chunks) if isinstance(chunks, Sized) else None
        state = None
        for number, latents in enumerate(chunks, start=1):
            frames, state = self._next_chunk(latents, state, tile, keep=number != last)
            yield frames

    def decode_chunk(
        self, latents: Tensor, state: VAEState | None, *, tile: int | None = None
    ) -> tuple[Tensor, VAEState]:
        """Decode the next latents [B,16,T,h,w], un-normalised, of one video; returns pixels and the next state.

        state: None for the first chunk, which gives 1+8(T-1) frames; then the one returned with the chunk before,
        and 8T frames come. The pixels equal those of `decode` within rounding, and the given state stays valid.
        tile: as in `decode`, the same for all chunks of a video.
        Raises ShapeError or InvalidValueError for anything else.
        """
        kept = state and replace(state, features=tuple(dict(features) for features in state.features))
        return self._next_chunk(latents, kept, tile)

    def _next_chunk(
        self, latents: Tensor, state: VAEState | None, tile: int | None, *, keep: bool = True
    ) -> tuple[Tensor, VAEState]:
        """Do what `decode_chunk` does, and let go of what the state holds as soon as it has been used."""
        self._check_latents(latents)
        sides = _decoder_sides(tile)
        _check_state(state, latents, sides)
        return _run_chunk(self._decoder_network, self._cast(latents), state, sides, keep=keep)

    def _encoder_network(self, pixels: Tensor, cache: FeatureCache) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(pixels, cache), cache)
        return moments

    def _decoder_network(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        frames: Tensor = self.decoder(self.post_quant_conv(latents, cache), cache)
        return frames

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=torch.channels_last_3d)

    def _check_pixels(self, pixels: Tensor) -> None:
        _check_shape("pixels", pixels, self.in_channels, "1+8k, H, W")
        if pixels.shape[2] % SCALE != 1:
            raise InvalidValueError("num_frames", pixels.shape[2], f"is not 1 + a multiple of {SCALE}")
        _check_multiple("height", pixels.shape[3], SCALE)
        _check_multiple("width", pixels.shape[4], SCALE)

    def _check_latents(self, latents: Tensor) -> None:
        _check_shape("latents", latents, self.latent_channels, "T, h, w")


def _run_chunk(
    network: Network, x: Tensor, state: VAEState | None, sides: tuple[int, int] | None, *, keep: bool = True
) -> tuple[Tensor, VAEState]:
    """Pass a video's next chunk [B,C,T,H,W] through the network, tile by tile; `sides` as in `map_tiles`.

    The features of the given state are used up. Unless `keep`, no next chunk is expected and the new state is useless.
    """
    past = iter(state.features) if state else None
    features: list[Features] = []

    def run(part: Tensor) -> Tensor:
        given = next(past) if past else None
        cache = FeatureCache(_moved(given, x.device) if given and sides else given, keep=keep)
        out = network(part, cache)
        features.append(_moved(cache.features, HOST) if sides else cache.features)
        return out

    out = map_tiles(run, x, sides)
    return out, VAEState(tuple(features), _batch_and_size(x), sides)


def _moved(features: Features, device: torch.device) -> Features:
    return {conv: feature.to(device) for conv, feature in features.items()}


def _run_whole(network: Network, x: Tensor, window: int | None, sides: tuple[int, int] | None) -> Tensor:
    """Pass a whole video [B,C,T,H,W] through the network in temporal chunks."""
    chunks = list(temporal_chunks(x, window))
    state, outputs = None, []
    for num_done, chunk in enumerate(chunks, start=1):
        output, state = _run_chunk(network, chunk, state, sides, keep=num_done < len(chunks))
        outputs.append(output)
    return torch.cat(outputs, dim=2)


def _batch_and_size(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[3], x.shape[4]


def _decoder_sides(tile: int | None) -> tuple[int, int] | None:
    check_tile(tile)
    return (tile // SCALE, tile) if tile else None


def _check_multiple(field: str, value: int, unit: int) -> None:
    if not isinstance(value, int) or value < unit or value % unit:
        raise InvalidValueError(field, value, f"is not a positive multiple of {unit}")


def _check_shape(name: str, x: Tensor, channels: int, rest: str) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ShapeError(name, f"[B, {channels}, {rest}]", tuple(x.shape))


def _check_state(state: VAEState | None, latents: Tensor, sides: tuple[int, int] | None) -> None:
    if state is None:
        return
    if state.batch_and_size != _batch_and_size(latents):
        batch, height, width = state.batch_and_size
        raise ShapeError("latents", f"[{batch}, {latents.shape[1]}, T, {height}, {width}]", tuple(latents.shape))
    if state.tile_sides != sides:
        before, now = (each and each[1] for each in (state.tile_sides, sides))
        raise InvalidValueError("tile", now, f"is not {before}, with which the video began")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise InvalidValueError for values of the published config's keys that nothing here implements."""
    supported = {
        "encoder_type": "causal_vae_conv",
        "decoder_type": "causal_vae_conv",
        "encoder_act_fn": "silu",
        "decoder_act_fn": "silu",
        "encoder_double_z": True,
        "add_post_quant_conv": True,
        "interpolate": False,
        "downsample_scale": SCALE,
        "decoder_in_channels": config["encoder_out_channels"],
    }
    for key, value in supported.items():
        if config[key] != value:
            raise InvalidValueError(key, config[key], f"is not supported, it must be {value!r}")
    _check_blocks(config, "encoder", "down")
    _check_blocks(config, "decoder", "up")


def _check_blocks(config: Mapping[str, Any], side: str, way: str) -> None:
    num_blocks = len(config[f"{side}_block_out_channels"])
    block_type = f"{way.title()}{side.title()}BlockCausal3D"
    doublings = SCALE.bit_length() - 1
    rules: dict[str, tuple[Callable[[list[Any]], bool], str]] = {
        f"{side}_layers_per_block": (lambda layers: all(number > 0 for number in layers), "all positive"),
        f"{side}_{way}_block_types": (lambda types: set(types) == {block_type}, f"all {block_type!r}"),
        f"{side}_block_dropout": (lambda rates: not any(rates), "all 0"),
        f"{side}_spatial_{way}_sample": (lambda flags: sum(flags) == doublings, f"true {doublings} times"),
        f"{side}_temporal_{way}_sample": (lambda flags: sum(flags) == doublings, f"true {doublings} times"),
    }
    for key, (holds, rule) in rules.items():
        if len(config[key]) != num_blocks or not holds(config[key]):
            raise InvalidValueError(key, config[key], f"is not supported, it must be {num_blocks} values, {rule}")
