"""How many floating-point operations a video takes, by part: counted on the model's own modules, without weights."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, T5Config, T5EncoderModel

from pyramid_flow.checkpoint import Checkpoint
from pyramid_flow.errors import CheckpointError, InvalidValueError
from pyramid_flow.sampling import TEMPORAL_FACTOR, SamplingParams, StepInfo, generate_latents
from pyramid_flow.schedule import PyramidSchedule
from pyramid_flow.text import MAX_TOKENS, POOLED_MAX_TOKENS, TextEmbedding
from pyramid_flow.transformer import PyramidTransformer
from pyramid_flow.vae import CausalVideoVAE, temporal_chunks
from pyramid_flow.vae.model import SCALE, TILE_MULTIPLE
from pyramid_flow.vae.tiling import map_tiles

META = torch.device("meta")

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


class _NoNoise:
    """A NoiseSource of shapes without values."""

    def initial(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), device=META)

    block = posterior = initial


@torch.no_grad()
def render_flops(
    checkpoint: Checkpoint, params: SamplingParams, *, has_image: bool, tile: int | None = None
) -> RenderFlops:
    """Count the operations of rendering one video alone, from the configs of the checkpoint's parts; reads no weights.

    has_image: image-to-video; tile: side in pixels of the VAE decoder's tiles, None = no tiling. Takes a second or two
    whatever the size. Counted is what `torch.utils.flop_counter` counts: matrix products, convolutions and attention.
    They do not depend on dtype, device, attention kernel and the decoder's window.

    Prompts are taken to be as long as T5 gets them, 128 tokens, and CLIP 77. Shorter ones are padded for the encoders,
    but the sampler drops the pads: with 40 tokens it takes 7 % less than `sample` at 384p and 121 frames, 1 % less at
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
    transformer, vae = checkpoint.empty_transformer(), checkpoint.empty_vae()
    image = _image_flops(vae, params) if has_image else 0
    latents = torch.empty(params.latent_shape(1, transformer.latent_channels), device=META)
    return RenderFlops(
        encode=_text_flops(checkpoint, num_prompts=1 + params.guided) + image,
        sample=_sample_flops(transformer, params, has_image),
        decode=_decode_flops(vae, latents, tile),
    )


def _text_flops(checkpoint: Checkpoint, num_prompts: int) -> int:
    layout = checkpoint.text_layout
    t5_config = _read(T5Config.from_pretrained, checkpoint.root / layout.t5)
    clip_configs = [_read(CLIPTextConfig.from_pretrained, checkpoint.root / folder) for folder in layout.clips]
    with META:
        t5 = T5EncoderModel(t5_config).eval()
        clips = nn.ModuleList(layout.clip_class(config) for config in clip_configs).eval()
    with FlopCounterMode(display=False) as counter:
        # Not by TextEncoder: transformers reads the values of a mask that is given.
        t5(input_ids=torch.empty(num_prompts, MAX_TOKENS, dtype=torch.long, device=META))
        for clip in clips:
            clip(input_ids=torch.empty(num_prompts, POOLED_MAX_TOKENS, dtype=torch.long, device=META))
    return _total(counter)


def _image_flops(vae: CausalVideoVAE, params: SamplingParams) -> int:
    with FlopCounterMode(display=False) as counter:
        vae.encode_moments(torch.empty(1, 3, 1, params.height, params.width, device=META))
    return _total(counter)


def _sample_flops(transformer: PyramidTransformer, params: SamplingParams, has_image: bool) -> int:
    num_levels = len(PyramidSchedule().levels)
    params.check(1, num_levels)
    # From unit `num_levels` on (one later where keys and values are kept from the unit before), every unit sees one
    # more frame at level 0 than the last. Tokens grow linearly and attention quadratically, so three units tell all.
    probed = replace(params, num_frames=1 + TEMPORAL_FACTOR * (min(params.num_units, num_levels + 4) - 1))
    costs = _unit_flops(transformer, probed, has_image)
    while costs and len(costs) < params.num_units - has_image:
        costs.append(3 * costs[-1] - 3 * costs[-2] + costs[-3])  # the third difference of a quadratic is 0
    return sum(costs)


def _unit_flops(transformer: PyramidTransformer, params: SamplingParams, has_image: bool) -> list[int]:
    """Count each unit that is sampled, by one evaluation per level and few blocks; shortens the model."""
    if has_image and params.num_units == 1:
        return []
    repeats, schedule = _shorten(transformer), PyramidSchedule()
    counter = FlopCounterMode(display=False)
    costs: dict[int, int] = defaultdict(int)
    last = (params.num_units - 1, len(schedule.levels) - 1)

    def on_step(info: StepInfo) -> Tensor | None:
        # Counted since the last call: what this unit and level need once, and one evaluation.
        whole, evaluation = _take_counts(counter, type(transformer).__name__, repeats)
        costs[info.unit] += whole + (params.steps(info.unit, info.level) - 1) * evaluation
        # Nobody is wanted after the last evaluation: picking the finished rows would take values.
        return torch.zeros(1, dtype=torch.bool) if (info.unit, info.level) == last else None

    one_step = replace(params, num_inference_steps=1, video_num_inference_steps=1)
    text, noise = _text(transformer), _NoNoise()
    image = noise.initial(params.latent_shape(1, transformer.latent_channels))[:, :, :1] if has_image else None
    with counter:
        generate_latents(transformer, schedule, text, text, one_step, noise, image_latent=image, on_step=on_step)
    return [costs[unit] for unit in sorted(costs)]


def _take_counts(counter: FlopCounterMode, name: str, repeats: Mapping[str, int]) -> tuple[int, int]:
    """Reset the counter; return its total and that of the module called `name`, with some of its parts repeated."""
    counts = {module: sum(operations.values()) for module, operations in counter.get_flop_counts().items()}
    counter.flop_counts.clear()
    repeated = sum(times * counts[f"{name}.{part}"] for part, times in repeats.items())
    return counts["Global"] + repeated, counts[name] + repeated


def _shorten(transformer: PyramidTransformer) -> dict[str, int]:
    """Leave the first and the last block of each stack; return for how many others each first one stands.

    The model's very last block is like no other, because only the current frame asks.
    """
    stacks = {name: stack for name, stack in transformer.named_children() if isinstance(stack, nn.ModuleList)}
    removed = {f"{name}.0": len(stack[1:-1]) for name, stack in stacks.items()}
    for stack in stacks.values():
        del stack[1:-1]
    return removed


def _text(transformer: PyramidTransformer) -> TextEmbedding:
    config = transformer.config
    return TextEmbedding(
        tokens=torch.empty(1, MAX_TOKENS, config["joint_attention_dim"], device=META),
        mask=torch.ones(1, MAX_TOKENS, dtype=torch.bool),
        pooled=torch.empty(1, config["pooled_projection_dim"], device=META),
    )


def _decode_flops(vae: CausalVideoVAE, latents: Tensor, tile: int | None) -> int:
    """Count the decoder on one tile of each size, times the number of such tiles."""
    if tile is not None and (tile < TILE_MULTIPLE or tile % TILE_MULTIPLE):
        raise InvalidValueError("tile", tile, f"is not a positive multiple of {TILE_MULTIPLE}")
    sizes: Counter[tuple[int, int]] = Counter()

    def note(part: Tensor) -> Tensor:
        sizes[part.shape[-2], part.shape[-1]] += 1
        return part

    map_tiles(note, latents, (tile // SCALE, tile // SCALE) if tile else None)
    return sum(
        number * _decode_stream_flops(vae, latents[..., :height, :width]) for (height, width), number in sizes.items()
    )


def _decode_stream_flops(vae: CausalVideoVAE, latents: Tensor) -> int:
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
