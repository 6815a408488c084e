"""How many floating-point operations a video takes, by part: from the shapes of the model's own modules."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyramid_flow.checkpoints.checkpoint import Checkpoint
from pyramid_flow.errors import CheckpointError
from pyramid_flow.sampling.params import SamplingParams
from pyramid_flow.sampling.pyramid import history_level
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.text.embedding import MAX_TOKENS, POOLED_MAX_TOKENS
from pyramid_flow.transformer.history_cache import cached_frames
from pyramid_flow.transformer.layers import Modulation
from pyramid_flow.transformer.model import PyramidTransformer
from pyramid_flow.transformer.tokens import PrefixLayout, frame_tokens, prefix_layout
from pyramid_flow.vae.model import SCALE, VAENetwork, temporal_chunks
from pyramid_flow.vae.tile import check_tile
from pyramid_flow.vae.tiling import map_tiles

META = torch.device("meta")
LEVELS = range(len(PyramidSchedule().levels))

T = TypeVar("T")


@dataclass(frozen=True)
class RenderFlops:
    """Floating-point operations of one video, two per multiply-add.

    encode: text encoders and, for an input image, VAE encoder. sample: transformer over all units, levels, steps and
    guidance branches. decode: VAE decoder over all latent frames.
    """

    encode: int
    sample: int
    decode: int


@torch.no_grad()
def render_flops(
    checkpoint: Checkpoint,
    params: SamplingParams,
    *,
    has_image: bool,
    tile: int | None = None,
    cached: Collection[int] = LEVELS,
) -> RenderFlops:
    """Count the operations of rendering one video alone, from the configs of the checkpoint's parts; reads no weights.

    has_image: image-to-video; tile: side in pixels of the VAE decoder's tiles, None = no tiling; cached: levels with a
    history cache. Takes a second or two whatever the size. Counted is what `torch.utils.flop_counter` counts: matrix
    products, convolutions and attention, in half precision: in float32 the decoder trades a third of its products for
    sums. They do not depend on device, attention kernel and the decoder's window.

    Prompts are taken to be as long as T5 gets them, 128 tokens, and CLIP 77. Shorter ones are padded for the encoders,
    but the sampler drops the pads: with 40 tokens it takes 3 % less than `sample` at 384p and 121 frames, 1 % less at
    768p and 241. The negative prompt is counted for every guided video although a worker encodes it once.

    checkpoint: one that `Checkpoint.check` accepts. Raises CheckpointError if a config cannot be read and
    InvalidValueError for a tile that the VAE does not take or steps that do not fit the levels.
    """
    guidance = float(params.guided)
    params = replace(  # one row, whatever its scales
        params,
        guidance_scale=guidance,
        video_guidance_scale=guidance,
        guidance_decay=None,
        min_guidance_scale=guidance,
    )
    transformer, vae = checkpoint.empty_transformer(), checkpoint.empty_vae().to(torch.bfloat16)
    image = _image_flops(vae, params) if has_image else 0
    latents = torch.empty(params.latent_shape(1, transformer.latent_channels), device=META)
    return RenderFlops(
        encode=_text_flops(checkpoint, num_prompts=1 + params.guided) + image,
        sample=sum(sampling_flops(transformer, params, has_image=has_image, cached=cached)),
        decode=_decode_flops(vae, latents, tile),
    )


def _text_flops(checkpoint: Checkpoint, num_prompts: int) -> int:
    # Here, because they are slow to import.
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    layout = checkpoint.text_layout
    clip_class = CLIPTextModelWithProjection if layout.projects_pooled else CLIPTextModel
    t5_config = _read(T5Config.from_pretrained, checkpoint.root / layout.t5)
    clip_configs = [_read(CLIPTextConfig.from_pretrained, checkpoint.root / folder) for folder in layout.clips]
    with META:
        t5 = T5EncoderModel(t5_config).eval()
        clips = nn.ModuleList(clip_class(config) for config in clip_configs).eval()
    with FlopCounterMode(display=False) as counter:
        # Not by TextEncoder: transformers reads the values of a mask that is given.
        t5(input_ids=torch.empty(num_prompts, MAX_TOKENS, dtype=torch.long, device=META))
        for clip in clips:
            clip(input_ids=torch.empty(num_prompts, POOLED_MAX_TOKENS, dtype=torch.long, device=META))
    return _total(counter)


def _image_flops(vae: VAENetwork, params: SamplingParams) -> int:
    with FlopCounterMode(display=False) as counter:
        vae.encode_moments(torch.empty(1, 3, 1, params.height, params.width, device=META))
    return _total(counter)


def sampling_flops(
    transformer: PyramidTransformer,
    params: SamplingParams,
    *,
    has_image: bool,
    text_tokens: int = MAX_TOKENS,
    cached: Collection[int] = LEVELS,
) -> list[int]:
    """Count what the transformer does for one video at each level, from its shapes alone.

    text_tokens: of every prompt, whose embedding counts at level 0; cached: levels with a history cache.
    """
    schedule, units = PyramidSchedule(), range(int(has_image), params.num_units)
    params.check(1, len(schedule.levels))
    flops = [0] * len(schedule.levels)
    if units:
        flops[0] = _prompt_flops(transformer, text_tokens) * (1 + params.guided)
    for unit, level in product(units, schedule.levels):
        shapes = clip_shapes(params, unit, level.index, len(schedule.levels))
        num_cached = cached_frames(unit, level.index) if level.index in cached else 0
        rows = sum(1 + step.guided for step in params.steps(unit, level))
        layout = prefix_layout(shapes, text_tokens, num_cached)
        flops[level.index] += rows * _evaluation_flops(transformer, layout, frame_tokens(shapes)[-1])
        flops[level.index] += _embedding_flops(transformer, shapes[num_cached:-1])
        if unit <= 1:  # later ones have the timesteps of unit 1
            flops[level.index] += rows * _conditioning_flops(transformer)
    return flops


def _evaluation_flops(transformer: PyramidTransformer, layout: PrefixLayout, num_current: int) -> int:
    """Count one evaluation of one row: all blocks but the last for all tokens, the last one for the current frame's.

    A block of width D takes 24 D^2 per token (keys and values 4 of it), and attention 4 D per query and key.
    """
    dim, full = int(transformer.proj_out.in_features), layout.num_queries
    blocks = len(transformer.blocks) - 1
    pairs = sum(queries * end for queries, end in zip(layout.query_lengths, layout.key_ends, strict=True))
    linear = 24 * dim**2 * blocks * full + 4 * dim**2 * full + 20 * dim**2 * num_current
    attention = 4 * dim * (blocks * pairs + num_current * layout.key_ends[-1])
    in_and_out = 2 * 2 * transformer.proj_out.weight.numel() * num_current
    return linear + attention + in_and_out


def _embedding_flops(transformer: PyramidTransformer, shapes: Sequence[tuple[int, int, int]]) -> int:
    """Count the embedding of clips, whose patches have as many values as the output's."""
    return 2 * transformer.proj_out.weight.numel() * sum(frame_tokens(shapes))


def _conditioning_flops(transformer: PyramidTransformer) -> int:
    """Count what one timestep and prompt take: its embedding and all modulations."""
    modulations = [module for module in transformer.modules() if isinstance(module, Modulation)]
    linear = [each.linear for each in modulations] + _linears(transformer.time_text_embed.timestep_embedder)
    return sum(2 * each.weight.numel() for each in linear)


def _prompt_flops(transformer: PyramidTransformer, text_tokens: int) -> int:
    pooled = sum(2 * each.weight.numel() for each in _linears(transformer.time_text_embed.text_embedder))
    return pooled + 2 * transformer.context_embedder.weight.numel() * text_tokens


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


def clip_shapes(params: SamplingParams, unit: int, level: int, num_levels: int) -> list[tuple[int, int, int]]:
    """Return the clips of a unit at a level, the current frame last, as `position_ids` takes them."""
    *_, height, width = params.latent_shape(1, 1)
    held = [*(history_level(unit - frame, level) for frame in range(unit)), level]
    halvings = [num_levels - 1 - each for each in held]
    return [(1, height >> halving, width >> halving) for halving in halvings]


def _decode_flops(vae: VAENetwork, latents: Tensor, tile: int | None) -> int:
    """Count the decoder on one tile of each size, times the number of such tiles."""
    check_tile(tile)
    sizes: Counter[tuple[int, int]] = Counter()

    def note(part: Tensor) -> Tensor:
        sizes[part.shape[-2], part.shape[-1]] += 1
        return part

    map_tiles(note, latents, (tile // SCALE, tile // SCALE) if tile else None)
    return sum(
        number * _decode_stream_flops(vae, latents[..., :height, :width]) for (height, width), number in sizes.items()
    )


def _decode_stream_flops(vae: VAENetwork, latents: Tensor) -> int:
    """Count the decoder on the first and the second chunk of a video; all later ones equal the second."""
    first, *later = temporal_chunks(latents, window=1)
    with FlopCounterMode(display=False) as counter:
        _, state = vae.decode_chunk(first, None)
        once = _total(counter)
        if later:
            vae.decode_chunk(later[0], state)
    return once + (_total(counter) - once) * len(later)


def _total(counter: FlopCounterMode) -> int:
    flops: int = counter.get_total_flops()
    return flops


def _read(load: Callable[..., T], folder: Path) -> T:
    file = folder / "config.json"
    if not file.is_file():  # transformers would take the defaults
        raise CheckpointError(f"{folder} has no config.json")
    try:
        return load(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
