"""PyramidFlowPipeline: a prompt (and an image) in, a video out; a thin bundle of the model's parts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pyramid_flow.checkpoints.checkpoint import Checkpoint, check_dtype, save_checkpoint
from pyramid_flow.checkpoints.diffusers_models import CausalVideoVAE, TransformerModel
from pyramid_flow.errors import InvalidValueError, NonFiniteError
from pyramid_flow.images.fitting import ImageFit
from pyramid_flow.memory.modes import Memory
from pyramid_flow.memory.placement import Placement, check_device
from pyramid_flow.memory.planner import choose_placement
from pyramid_flow.pixels import decode_frames, encode_image, image_latent, image_pixels
from pyramid_flow.presets import QUALITY_PRESETS, Preset, Quality
from pyramid_flow.sampling.noise import NoiseSource, SeededNoise
from pyramid_flow.sampling.params import (
    Guidance,
    GuidanceDecay,
    SamplingParams,
    Share,
    Steps,
)
from pyramid_flow.sampling.sampler import Cache, OnStep, generate_latents
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.text.encoder import TextEncoder
from pyramid_flow.vae.model import LatentDistribution
from pyramid_flow.vae.tile import check_tile

OutputType = Literal["np", "pt", "pil", "latent"]


@dataclass(frozen=True)
class PyramidFlowOutput:
    """Videos of one call.

    frames: uint8 array [B,N,H,W,3] ("np"), uint8 tensor [B,N,3,H,W] ("pt"), a list of images per video ("pil"), or
    normalised latents [B,16,T,H/8,W/8] ("latent").
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]


class PyramidFlowPipeline:
    """The parts of one checkpoint, loaded, the settings it was trained with, and the name of its variant."""

    def __init__(
        self,
        transformer: TransformerModel,
        vae: CausalVideoVAE,
        text_encoder: TextEncoder,
        preset: Preset,
        variant: str,
        schedule: PyramidSchedule | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.preset, self.variant = preset, variant
        self.schedule = schedule or PyramidSchedule()
        self.placement = placement or Placement(transformer.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        variant: str | None = None,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        memory: Memory = "auto",
        lora: str | Sequence[str] = (),
    ) -> "PyramidFlowPipeline":
        """Load a checkpoint folder of the published layout, or the bundled model if path is "toy".

        variant: "384p", "768p", "image" or a folder name; None = the only transformer folder. memory: "full" keeps all
        parts on the device, "offload" a part while it works, "sequential" a layer; "auto" takes the first that fits.
        lora: adapters in the format of peft, each PATH or PATH=WEIGHT. Raises CheckpointError, or InvalidValueError for
        float16 or an unknown mode.
        """
        checkpoint = Checkpoint.open(path, variant, lora)
        placement = choose_placement(checkpoint, torch_dtype, device, memory)
        return cls(
            transformer=placement.place(checkpoint.load_transformer(torch_dtype, "cpu")),
            vae=placement.place(checkpoint.load_vae(torch_dtype, "cpu")),
            text_encoder=placement.place(checkpoint.load_text_encoder(torch_dtype, "cpu")),
            preset=checkpoint.preset,
            variant=checkpoint.variant,
            placement=placement,
        )

    @property
    def device(self) -> torch.device:
        """Where the parts compute."""
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "PyramidFlowPipeline":
        """Bring all parts to a device, a dtype or both, in place, and return the pipeline.

        Weights that were brought to bfloat16 do not get their precision back. Raises InvalidValueError for float16, and
        in any memory mode but full.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            check_dtype(dtype)
        self._check_full("is for parts that stay where they are")
        if device is not None:
            check_device(device)
        parts: tuple[nn.Module, ...] = (self.transformer, self.vae, self.text_encoder)
        for part in parts:
            nn.Module.to(part, device=device, dtype=dtype)  # that of diffusers warns of a dtype that is not given
        self.placement = Placement(self.transformer.device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads, weights in the pipeline's dtype; see `save_checkpoint`.

        Raises CheckpointError for a folder with other contents, InvalidValueError for a schedule of one's own, which
        the layout has no place for, and in any memory mode but full.
        """
        self._check_full("is for weights that are at hand")
        if self.schedule != PyramidSchedule():
            raise InvalidValueError("schedule", self.schedule, "is not the published one, the only one that is saved")
        save_checkpoint(Path(folder), self.variant, self.transformer, self.vae, self.text_encoder, self.preset)

    def _check_full(self, why: str) -> None:
        if self.placement.mode != "full":
            raise InvalidValueError("memory", self.placement.mode, f"is not full, and this {why}")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: Steps | None = None,
        video_num_inference_steps: Steps | None = None,
        guidance_scale: Guidance | None = None,
        video_guidance_scale: Guidance | None = None,
        negative_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        output_type: OutputType = "np",
        on_step: OnStep | None = None,
        image_fit: ImageFit = "crop",
        tile: int | None = None,
        guidance_decay: GuidanceDecay = None,
        min_guidance_scale: Guidance | None = None,
        quality: Quality = "standard",
        skip_last_step: bool | None = None,
        guided_share: Share | None = None,
        cache: Cache = "auto",
    ) -> PyramidFlowOutput:
        """Render one video per prompt, or one still (num_frames 1); None = the checkpoint's preset.

        image: the first frame of every video, see `image_pixels` for image_fit. tile: side in pixels of the
        tiles that frames are decoded in, to save memory; it changes pixels. seed: one per prompt, or one number
        from which prompt i takes seed + i. on_step, cache: see `generate_latents`; guidance, skip_last_step and
        guided_share: see `SamplingParams`; quality: the default of these and of the steps, see `QUALITY_PRESETS`.
        Raises InvalidValueError for values that cannot be rendered, and NonFiniteError if NaN or infinity comes out.
        """
        prompts = _texts("prompt", prompt)
        if not prompts or not all(text.strip() for text in prompts):
            raise InvalidValueError("prompt", prompts, "is empty")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise InvalidValueError("output_type", output_type, "is not one of np, pt, pil, latent")
        params = self._params(
            image is not None,
            quality,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            video_num_inference_steps=video_num_inference_steps,
            guidance_scale=guidance_scale,
            video_guidance_scale=video_guidance_scale,
            guidance_decay=guidance_decay,
            min_guidance_scale=min_guidance_scale,
            skip_last_step=skip_last_step,
            guided_share=guided_share,
        )
        noise = SeededNoise(_seeds(seed, len(prompts)), self.schedule.gamma)
        check_tile(tile)
        pixels = None if image is None else image_pixels(image, params.height, params.width, image_fit)
        latents = self._latents(prompts, pixels, negative_prompt, params, noise, on_step, cache)
        return PyramidFlowOutput(latents if output_type == "latent" else self._frames(latents, output_type, tile))

    def _params(self, has_image: bool, quality: Quality, **given: Any) -> SamplingParams:  # noqa: ANN401 - its fields
        """Return what is given, and for what is None the preset's value."""
        preset = self.preset.at(quality)
        own: dict[str, Any] = {
            "height": preset.sizes[0][0],
            "width": preset.sizes[0][1],
            "num_frames": preset.max_num_frames,
            "num_inference_steps": preset.num_inference_steps,
            "video_num_inference_steps": preset.video_num_inference_steps,
            "guidance_scale": preset.guidance_scale,
            "video_guidance_scale": preset.later_guidance(has_image),
            "skip_last_step": QUALITY_PRESETS[quality].skip_last_step,
            "guided_share": QUALITY_PRESETS[quality].guided_share,
        }
        return SamplingParams(**own | {name: value for name, value in given.items() if value is not None})

    def _latents(
        self,
        prompts: Sequence[str],
        pixels: Tensor | None,
        negative_prompt: str | None,
        params: SamplingParams,
        noise: NoiseSource,
        on_step: OnStep | None,
        cache: Cache,
    ) -> Tensor:
        unwanted = self.preset.negative_prompt if negative_prompt is None else negative_prompt
        with self.placement.working(self.text_encoder):
            text = self.text_encoder([prompt + self.preset.prompt_suffix for prompt in prompts])
            negative = self.text_encoder(_texts("negative_prompt", [unwanted])) if params.guided else None
        first = None
        if pixels is not None:
            with self.placement.working(self.vae):
                posterior = encode_image(self.vae, pixels)
            shape = (len(prompts), *posterior.mean.shape[1:])
            posterior = LatentDistribution(posterior.mean.expand(shape), posterior.logvar.expand(shape))
            first = image_latent(posterior, noise.posterior(shape), self.preset.statistics)
        with self.placement.working(self.transformer):
            latents = generate_latents(
                self.transformer,
                self.schedule,
                text,
                negative,
                params,
                noise,
                image_latent=first,
                cache=cache,
                on_step=on_step,
            )
        if not latents.isfinite().all():
            raise NonFiniteError("the latents are not finite")
        return latents

    def _frames(
        self, latents: Tensor, output_type: OutputType, tile: int | None
    ) -> np.ndarray | Tensor | list[list[Image.Image]]:
        if len(latents):
            with self.placement.working(self.vae):
                frames = torch.cat(list(decode_frames(self.vae, latents, self.preset.statistics, tile=tile)), dim=1)
        else:
            _, _, units, height, width = latents.shape
            frames = torch.empty(0, 8 * units - 7, 8 * height, 8 * width, 3, dtype=torch.uint8)
        if output_type == "pt":
            return frames.permute(0, 1, 4, 2, 3)
        if output_type == "pil":
            return [[Image.fromarray(frame) for frame in video.numpy()] for video in frames]
        return frames.numpy()


def _texts(name: str, given: str | Iterable[str]) -> list[str]:
    texts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidValueError(name, repr(given), "is not text")
    return texts


def _seeds(given: int | Iterable[int], count: int) -> list[int]:
    if isinstance(given, Iterable):
        seeds = list(given)
        if len(seeds) != count:
            raise InvalidValueError("seed", seeds, f"is not one per prompt, of which there are {count}")
        return seeds
    if not isinstance(given, Integral):
        raise InvalidValueError("seed", repr(given), "is neither a whole number nor one per prompt")
    return [given + i for i in range(count)]
