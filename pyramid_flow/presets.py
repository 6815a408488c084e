"""What the published checkpoints were trained for; a checkpoint's own pyramid.json wins over these values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pyramid_flow.errors import CheckpointError, InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

NEGATIVE_PROMPT = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, extra limbs, "
    "extra digits, misplaced objects, mutated anatomy, monochrome, horror"
)


@dataclass(frozen=True)
class LatentStatistics:
    """Shift and scale of VAE latents: normalised = (z - shift) * scale; a video's first frame has its own."""

    first_shift: float = -0.04
    first_scale: float = 1 / 1.8726
    later_shift: float = -0.2343
    later_scale: float = 1 / 3.0986

    def normalize(self, latents: "Tensor", start: int = 0) -> "Tensor":
        """Return normalised latents [B,C,T,h,w] whose first frame is frame `start` of the video."""
        shift, scale = self._coefficients(latents, start)
        return (latents - shift) * scale

    def denormalize(self, latents: "Tensor", start: int = 0) -> "Tensor":
        """Inverse of `normalize`."""
        shift, scale = self._coefficients(latents, start)
        return latents / scale + shift

    def _coefficients(self, latents: "Tensor", start: int) -> tuple["Tensor", "Tensor"]:
        import torch  # here, so that a preset is read without it

        frames = range(start, start + latents.shape[2])
        shift = [self.later_shift if frame else self.first_shift for frame in frames]
        scale = [self.later_scale if frame else self.first_scale for frame in frames]
        column = (1, 1, -1, 1, 1)
        return torch.tensor(shift).to(latents).view(column), torch.tensor(scale).to(latents).view(column)


Quality = Literal["draft", "standard", "high"]


@dataclass(frozen=True)
class QualityPreset:
    """What a quality spends: steps, as a multiple of the recommended ones, and see `SamplingParams` for the rest."""

    steps: float = 1.0
    skip_last_step: bool = False
    guided_share: float = 1.0


QUALITY_PRESETS: dict[Quality, QualityPreset] = {
    "draft": QualityPreset(steps=0.6, skip_last_step=True, guided_share=0.5),
    "standard": QualityPreset(),
    "high": QualityPreset(steps=1.5),
}
"""standard is the published way; docs/performance.md has what the others gain and cost."""


@dataclass(frozen=True)
class Preset:
    """Trained sizes (height, width) in pixels and greatest length in frames, and the recommended settings.

    The first size and `max_num_frames` are the defaults of a request. Guidance outside its range (least, greatest) is
    noted, not refused.
    """

    sizes: tuple[tuple[int, int], ...] = ((384, 640),)
    max_num_frames: int = 121
    fps: int = 24
    num_inference_steps: tuple[int, ...] = (20, 20, 20)
    video_num_inference_steps: tuple[int, ...] = (10, 10, 10)
    guidance_scale: float = 7.0
    video_guidance_scale: float = 5.0
    image_to_video_guidance_scale: float = 4.0
    guidance_range: tuple[float, float] = (1.0, 15.0)
    video_guidance_range: tuple[float, float] = (1.0, 15.0)
    prompt_suffix: str = ", hyper quality, Ultra HD, 8K"
    negative_prompt: str = NEGATIVE_PROMPT
    statistics: LatentStatistics = field(default_factory=LatentStatistics)

    def updated(self, values: Mapping[str, Any]) -> "Preset":
        """Return the preset with the values of a pyramid.json; an unknown key raises CheckpointError."""
        return replace(self, **_coerced(self, values))

    def at(self, quality: Quality) -> "Preset":
        """Return the preset with the steps of a quality; raises InvalidValueError for an unknown one."""
        if quality not in QUALITY_PRESETS:
            raise InvalidValueError("quality", repr(quality), f"is not one of {', '.join(QUALITY_PRESETS)}")
        factor = QUALITY_PRESETS[quality].steps
        if factor == 1:  # of most rows of a table
            return self
        first, later = (
            tuple(max(1, round(factor * count)) for count in steps)
            for steps in (self.num_inference_steps, self.video_num_inference_steps)
        )
        return replace(self, num_inference_steps=first, video_num_inference_steps=later)

    def later_guidance(self, has_image: bool) -> float:
        """Return the recommended guidance of every unit but the first of text-to-video."""
        return self.image_to_video_guidance_scale if has_image else self.video_guidance_scale


SD3_STATISTICS = LatentStatistics(first_shift=0.1490, first_scale=1 / 1.8415)
_384P = Preset()
_768P = Preset(sizes=((768, 1280),), max_num_frames=241, guidance_range=(7.0, 9.0))
_IMAGE = Preset(sizes=((1024, 1024),), max_num_frames=1)

PRESETS = {
    "miniflux": {"384p": _384P, "768p": _768P, "image": _IMAGE},
    "sd3": {"384p": replace(_384P, statistics=SD3_STATISTICS), "768p": replace(_768P, statistics=SD3_STATISTICS)},
}
"""By family and variant; a variant of another name begins as 384p."""


def _coerced(default: Preset | LatentStatistics, values: Mapping[str, Any]) -> dict[str, Any]:
    """Give JSON values the types of a dataclass's own ones: lists become tuples, objects become dataclasses."""
    known = {f.name for f in fields(default)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(f"pyramid.json holds {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {name: _coerce(name, getattr(default, name), value) for name, value in values.items()}


def _coerce(name: str, default: object, value: object) -> object:
    if isinstance(default, LatentStatistics) and isinstance(value, Mapping):
        return replace(default, **_coerced(default, value))
    if isinstance(default, tuple) and isinstance(value, list) and value:
        pattern = default[0]
        if isinstance(pattern, tuple) or len(value) == len(default):
            return tuple(_coerce(name, pattern, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(default, float) else type(default)):
        raise CheckpointError(f"pyramid.json: {name} is {value!r}, expected something like {default!r}")
    return value


def published_variants(fits: Callable[[Preset], bool]) -> list[str]:
    """Return the published variants that fit, with their family unless each has one of that name."""
    found = {family: [name for name, preset in presets.items() if fits(preset)] for family, presets in PRESETS.items()}
    names = dict.fromkeys(name for fitting in found.values() for name in fitting)
    owners = {name: [family for family, fitting in found.items() if name in fitting] for name in names}
    return [name if len(owners[name]) == len(PRESETS) else f"{name} of {owners[name][0]}" for name in names]
