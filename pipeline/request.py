"""RenderRequest: the one schema behind Parquet rows, HTTP bodies and command-line flags, and its resolution."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.storage.redaction import recorded
from pyramid_flow import InvalidValueError, Preset, PyramidFlowError, PyramidSchedule, SamplingParams
from pyramid_flow.images.fitting import ImageFit
from pyramid_flow.presets import QUALITY_PRESETS, Quality, published_variants
from pyramid_flow.sampling.params import (
    MIN_GUIDANCE_SCALE,
    check_guidance,
    check_num_frames,
    check_share,
    check_size,
    check_steps,
)

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_SEED = 2**63 - 1
MAX_COPIES = 1000
MAX_SIDE = 2**14
MAX_NUM_FRAMES = 2**16 + 1
MAX_SHOWN = 80
NUM_LEVELS = len(PyramidSchedule().levels)

ImageFormat = Literal["png", "webp"]
Steps = int | tuple[int, ...]
Share = float | tuple[float, ...]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class RequestError(PyramidFlowError, ValueError):
    """A request breaks a rule; the message names the field, the value and the rule."""


class UntrainedError(RequestError):
    """A request asks for a size or length that the model was not trained for; field: which."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class RenderRequest(BaseModel):
    """One video as the user asks for it; what is left out comes from the checkpoint's preset.

    image: an encoded picture, or a URI below the image root -> image-to-video; image_fit: how it is brought to the
    size, see `image_pixels`. Sizes in pixels, multiples of 64; num_frames = 1 + 8k, 1 = a still, which becomes a file
    of image_format; steps: one count or one per level, lowest first; guidance, skip_last_step and guided_share: see
    `SamplingParams`; quality: the default of steps, skip_last_step and guided_share, see `QUALITY_PRESETS`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    id: str | None = None
    negative_prompt: str | None = None
    image: bytes | str | None = None
    image_fit: ImageFit | None = None
    image_format: ImageFormat | None = None
    height: Annotated[int, Field(le=MAX_SIDE)] | None = None
    width: Annotated[int, Field(le=MAX_SIDE)] | None = None
    num_frames: Annotated[int, Field(le=MAX_NUM_FRAMES)] | None = None
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    num_inference_steps: Steps | None = None
    video_num_inference_steps: Steps | None = None
    guidance_scale: float | None = None
    video_guidance_scale: float | None = None
    guidance_decay: float | None = None
    min_guidance_scale: float | None = None
    quality: Quality | None = None
    skip_last_step: bool | None = None
    guided_share: Share | None = None
    seed: Seed | None = None
    num_videos_per_prompt: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = None

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "RenderRequest":
        """Validate a row's values; raises RequestError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RequestError(_first_message(error)) from error

    @field_validator("*", mode="before")
    @classmethod
    def _no_lookalike(cls, value: Any, info: Any) -> Any:  # noqa: ANN401 - one validator for all types
        """Refuse what would pass for something else: booleans are no numbers, halves of characters are no text."""
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, bool) and info.field_name != "skip_last_step":
                raise InvalidValueError(info.field_name, repr(value), "is a boolean")
            if isinstance(part, str) and not _is_unicode(part):
                raise InvalidValueError(info.field_name, ascii(value), "is not valid Unicode text")
        return value

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise InvalidValueError("prompt", repr(value), "is empty")
        return value

    @field_validator("image")
    @classmethod
    def _some_image(cls, value: bytes | str | None) -> bytes | str | None:
        if value is not None and not value.strip():
            raise InvalidValueError("image", repr(value), "is empty")
        return value

    @field_validator("id")
    @classmethod
    def _plain_id(cls, value: str | None) -> str | None:
        if value is not None and not ID_PATTERN.fullmatch(value):
            rule = "is not made of 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit"
            raise InvalidValueError("id", repr(value), rule)
        return value

    @field_validator("height", "width", "num_frames", "num_inference_steps", "video_num_inference_steps")
    @classmethod
    def _renderable(cls, value: Any, info: Any) -> Any:  # noqa: ANN401 - one validator for several types
        if value is None:
            return None
        if info.field_name == "num_frames":
            check_num_frames(value)
        elif info.field_name in ("height", "width"):
            check_size(info.field_name, value)
        else:
            check_steps(info.field_name, value)
            if isinstance(value, tuple) and len(value) != NUM_LEVELS:
                raise InvalidValueError(info.field_name, list(value), f"is neither one count nor {NUM_LEVELS} counts")
        return value

    @field_validator("guidance_scale", "video_guidance_scale", "guidance_decay", "min_guidance_scale")
    @classmethod
    def _sensible_guidance(cls, value: float | None, info: Any) -> float | None:  # noqa: ANN401
        if value is not None:
            check_guidance(info.field_name, value)
            return value + 0.0  # -0.0 asks for the same as 0.0
        return value

    @field_validator("guided_share")
    @classmethod
    def _some_share(cls, value: Share | None) -> Share | None:
        if value is not None:
            check_share("guided_share", value)
            if isinstance(value, tuple) and len(value) != NUM_LEVELS:
                raise InvalidValueError("guided_share", list(value), f"is neither one share nor {NUM_LEVELS} shares")
            return tuple(share + 0.0 for share in value) if isinstance(value, tuple) else value + 0.0
        return value

    @property
    def content_hash(self) -> str:
        """32 hex digits of a hash over what is asked for: the id of a row that brings none of its own."""
        given = self.model_dump(exclude={"id", "num_videos_per_prompt", "image"}, exclude_none=True)
        if isinstance(self.image, bytes):
            given["image_sha256"] = self.image_sha256
        elif self.image is not None:
            given["image"] = self.image
        return hash_of(given)

    @property
    def image_sha256(self) -> str | None:
        """Hash of the image's bytes, if it came as bytes."""
        return hashlib.sha256(self.image).hexdigest() if isinstance(self.image, bytes) else None

    def resolve(self, preset: Preset, row_id: str, *, allow_untrained: bool = False) -> "ResolvedRequest":
        """Fill in the preset's values; raises UntrainedError for a size or length the model was not trained for.

        image_fit and image_format are left out where they have no effect.
        """
        has_image = self.image is not None
        later = preset.later_guidance(has_image)
        quality = self.quality or "standard"
        preset, effort = preset.at(quality), QUALITY_PRESETS[quality]
        num_frames = self.num_frames or preset.max_num_frames
        resolved = ResolvedRequest(
            id=row_id,
            prompt=self.prompt,
            negative_prompt=preset.negative_prompt if self.negative_prompt is None else self.negative_prompt,
            has_image=has_image,
            image_uri=recorded(self.image) if isinstance(self.image, str) else None,
            image_sha256=self.image_sha256,
            image_fit=(self.image_fit or "crop") if has_image else None,
            image_format=(self.image_format or "png") if num_frames == 1 else None,
            height=self.height or preset.sizes[0][0],
            width=self.width or preset.sizes[0][1],
            num_frames=num_frames,
            fps=self.fps or preset.fps,
            num_inference_steps=self.num_inference_steps or preset.num_inference_steps,
            video_num_inference_steps=self.video_num_inference_steps or preset.video_num_inference_steps,
            guidance_scale=preset.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            video_guidance_scale=later if self.video_guidance_scale is None else self.video_guidance_scale,
            guidance_decay=self.guidance_decay,
            min_guidance_scale=MIN_GUIDANCE_SCALE if self.min_guidance_scale is None else self.min_guidance_scale,
            quality=quality,
            skip_last_step=effort.skip_last_step if self.skip_last_step is None else self.skip_last_step,
            guided_share=effort.guided_share if self.guided_share is None else self.guided_share,
            seed=derived_seed(self.id or self.content_hash) if self.seed is None else self.seed,
        )
        if not allow_untrained:
            _check_trained(resolved, preset)
        return resolved


UNTOLD = {"image_uri"}
"""Fields of a request that files do not tell: a signed URL opens its bucket to whoever has it."""


class ResolvedRequest(BaseModel):
    """A request with every value decided; the picture itself travels beside it.

    image_uri: as records may keep it, without what signs it. image_format: of a still's file; None = an mp4. Fields
    with defaults are lacking in requests that were kept before there were such fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    negative_prompt: str
    has_image: bool
    image_uri: str | None
    image_sha256: str | None
    image_fit: ImageFit | None = None
    image_format: ImageFormat | None = None
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: Steps
    video_num_inference_steps: Steps
    guidance_scale: float
    video_guidance_scale: float
    guidance_decay: float | None = None
    min_guidance_scale: float = MIN_GUIDANCE_SCALE
    quality: Quality = "standard"
    skip_last_step: bool = False
    guided_share: Share = 1.0
    seed: int

    @property
    def media_type(self) -> str:
        """Type of the rendered file, as HTTP has it: image/png, image/webp or video/mp4."""
        return f"image/{self.image_format}" if self.image_format else "video/mp4"

    def warnings(self, preset: Preset) -> list[str]:
        """Return what is legal but outside what the preset recommends."""
        ranges = {"guidance_scale": preset.guidance_range, "video_guidance_scale": preset.video_guidance_range}
        return [
            f"{name} {getattr(self, name):g} is outside the recommended {low:g} to {high:g}"
            for name, (low, high) in ranges.items()
            if not low <= getattr(self, name) <= high
        ]

    def copy_of(self, number: int) -> "ResolvedRequest":
        """Return one of several copies, numbered from 0: id `<id>-<number>` and seed + number."""
        return self.model_copy(update={"id": f"{self.id}-{number}", "seed": (self.seed + number) & MAX_SEED})

    def rerolled(self, number: int) -> "ResolvedRequest":
        """Return the request with the seed of its n-th reroll, which depends on that and its id; 0 = as it is."""
        return self.model_copy(update={"seed": derived_seed(f"{self.id}, reroll {number}")}) if number else self

    @property
    def shape(self) -> "Shape":
        """What rows of one sampling batch have in common."""
        return Shape(
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            num_inference_steps=self.num_inference_steps,
            video_num_inference_steps=self.video_num_inference_steps,
            has_image=self.has_image,
            guided=self.guidance_scale > 0,
            skip_last_step=self.skip_last_step,
            guided_share=self.guided_share,
        )


class Shape(NamedTuple):
    """What decides the work of a row: rows of one shape can be sampled in one batch, and cost the same."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: Steps
    video_num_inference_steps: Steps
    has_image: bool
    guided: bool
    skip_last_step: bool = False
    guided_share: Share = 1.0

    def __str__(self) -> str:
        """Name the shape, such as 640x384, 121 frames, steps 20/20/20 then 10/10/10, image."""
        first, later = (_slashed(steps) for steps in (self.num_inference_steps, self.video_num_inference_steps))
        text = f"{self.width}x{self.height}, {self.num_frames} frames, steps {first} then {later}"
        text += ", last ones skipped" * self.skip_last_step + ", image" * self.has_image
        if self.guided and self.guided_share != 1:
            return f"{text}, guided {_slashed(self.guided_share)}"
        return text + ", unguided" * (not self.guided)

    def sampling_params(self) -> SamplingParams:
        """Return the sampler's parameters for one row of this shape, of whatever guidance."""
        return SamplingParams(
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            num_inference_steps=self.num_inference_steps,
            video_num_inference_steps=self.video_num_inference_steps,
            guidance_scale=float(self.guided),
            video_guidance_scale=float(self.guided),
            skip_last_step=self.skip_last_step,
            guided_share=self.guided_share,
        )


def sampling_params(requests: Sequence[ResolvedRequest]) -> SamplingParams:
    """Return the sampler's parameters for requests of one shape."""
    assert len({request.shape for request in requests}) == 1
    return replace(
        requests[0].shape.sampling_params(),
        guidance_scale=[request.guidance_scale for request in requests],
        video_guidance_scale=[request.video_guidance_scale for request in requests],
        guidance_decay=[request.guidance_decay for request in requests],
        min_guidance_scale=[request.min_guidance_scale for request in requests],
    )


def hash_of(values: dict[str, Any]) -> str:
    """Return 32 hex digits of a hash over values of any type, in canonical JSON."""
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def derived_seed(text: str) -> int:
    """Return a 32-bit seed that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _slashed(values: Steps | Share) -> str:
    return "/".join(map(str, values if isinstance(values, tuple) else (values,) * NUM_LEVELS))


def _check_trained(request: ResolvedRequest, preset: Preset) -> None:
    size = (request.height, request.width)
    if size not in preset.sizes:
        sizes = " or ".join(map(_by, preset.sizes))
        variants = published_variants(lambda other: size in other.sizes)
        raise _untrained("height", f"height x width {_by(size)} is not a trained size, which is {sizes}", variants)
    if request.num_frames > preset.max_num_frames:
        variants = published_variants(lambda other: request.num_frames <= other.max_num_frames)
        most = f"more than the trained {preset.max_num_frames}"
        raise _untrained("num_frames", f"num_frames {request.num_frames} is {most}", variants)


def _untrained(field: str, broken: str, variants: Sequence[str]) -> UntrainedError:
    """Return the error, with the published variants that were trained for what is asked."""
    others = f"; the published variant {' or '.join(variants)} was trained for it" if variants else ""
    return UntrainedError(field, f"{broken}{others}")


def _by(size: tuple[int, int]) -> str:
    height, width = size
    return f"{height}x{width}"


def _first_message(error: ValidationError) -> str:
    """Say field, value and rule of the first violation in one line."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidValueError):
        return f"{cause.field} {_shortened(str(cause.value))} {cause.rule}"
    if first["type"] == "missing":
        return f"{first['loc'][0]} is missing"
    return f"{first['loc'][0]} {_shortened(repr(first['input']))}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _is_unicode(text: str) -> bool:
    """Tell whether a text can be stored; JSON bodies and broken files can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
