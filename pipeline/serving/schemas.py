"""The HTTP dialect: what a client may ask for, and what it is told of a video."""

import base64
import binascii
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import nan
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.faults import StorageError
from pipeline.fetch import ImageError, is_web
from pipeline.images import ImageRoot
from pipeline.request import MAX_NUM_FRAMES, MAX_SEED, ImageFormat, RenderRequest, RequestError, ResolvedRequest
from pipeline.serving.tables import ID_PREFIX, Job, Priority, Status
from pyramid_flow import InvalidValueError, Preset
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.pixels import ImageFit, open_image
from pyramid_flow.sampling import TEMPORAL_FACTOR

ID_BYTES = 16
"""Random bytes of a video's id: 22 url-safe characters."""

PRIORITIES = {"interactive": Priority.INTERACTIVE, "batch": Priority.BATCH}
REQUEST_FIELDS = frozenset(RenderRequest.model_fields) - {"image"}
OWN_FIELDS = frozenset({"model", "seconds", "size", "input_reference", "image_reference", "priority"})
DATA_URL = "data:image/"
NO_IMAGES = ImageRoot("/nonexistent")
"""No folder, and no web server: pictures come with their requests."""
MAX_PROMPT = 10_000
"""Characters; encoders read some hundred."""


class APIError(PyramidFlowError):
    """An answer that is an error: its HTTP status, a code for programs, a message for people, the field at fault."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, object]:
        """The error as the dialect has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"code": self.code, "message": self.message, "param": self.param, "type": kind}}


class ErrorDetail(BaseModel):
    """What is said of an error."""

    code: str
    message: str
    param: str | None
    type: Literal["invalid_request_error", "server_error"]


class ErrorBody(BaseModel):
    """The body of an answer that is an error."""

    error: ErrorDetail


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class Video(BaseModel):
    """A video as the dialect shows it, and what else is known of it.

    progress: percent; position: how many are taken before it, while it waits; image_format: of a still's file, None for
    a video; stage_seconds: of each stage.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    negative_prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: VideoError | None
    position: int | None
    content_id: str
    seed: int
    num_frames: int
    fps: int
    image_fit: ImageFit | None
    image_format: ImageFormat | None
    num_inference_steps: int | tuple[int, ...]
    video_num_inference_steps: int | tuple[int, ...]
    guidance_scale: float
    video_guidance_scale: float
    guidance_decay: float | None
    min_guidance_scale: float
    stage_seconds: dict[str, float] | None
    video_sha256: str | None
    model_fingerprint: str

    @classmethod
    def of(cls, job: Job, fingerprint: str, position: int | None = None) -> "Video":
        """Show a job."""
        request, result = ResolvedRequest.model_validate(job.request), job.result or {}
        failed = job.status == Status.FAILED
        return cls(
            **request.model_dump(include=set(cls.model_fields) - {"id"}),
            id=job.id,
            model=job.model,
            status=Status(job.status),
            progress=job.progress,
            created_at=int(job.created_at),
            completed_at=None if job.completed_at is None else int(job.completed_at),
            expires_at=None if job.expires_at is None else int(job.expires_at),
            seconds=f"{(request.num_frames - 1) / request.fps:.4g}",
            size=f"{request.width}x{request.height}",
            remixed_from_video_id=job.remixed_from,
            error=VideoError(code=job.error_code or "", message=job.error_message or "") if failed else None,
            position=position,
            content_id=request.id,
            stage_seconds=result.get("seconds"),
            video_sha256=result.get("sha256"),
            model_fingerprint=fingerprint,
        )


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    """What is said of a video that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class FileLinks(BaseModel):
    """Relative URLs of a video's files that work without a key, for some minutes."""

    video: str
    thumbnail: str
    spritesheet: str
    stream: str


class Model(BaseModel):
    """The model that is served: its trained sizes (WIDTHxHEIGHT) and greatest length, and its own settings.

    The first size and `max_num_frames` are the defaults of a request.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "pyramid-render"
    fingerprint: str
    sizes: list[str]
    max_num_frames: int
    fps: int
    num_inference_steps: tuple[int, ...]
    video_num_inference_steps: tuple[int, ...]
    guidance_scale: float
    video_guidance_scale: float
    image_to_video_guidance_scale: float
    negative_prompt: str

    @classmethod
    def of(cls, preset: Preset, **values: str) -> "Model":
        """Show a model with its preset."""
        facts = {name: value for name, value in asdict(preset).items() if name in cls.model_fields}
        sizes = [f"{width}x{height}" for height, width in preset.sizes]
        return cls.model_validate(facts | {"sizes": sizes} | values)


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Remix(BaseModel):
    """What a remix asks for."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class NewVideo:
    """A video that is asked for: the request with its picture, and how urgent it is."""

    request: RenderRequest
    priority: int

    def job(self, preset: Preset, **values: Any) -> Job:  # noqa: ANN401 - columns
        """Return the job, with every value decided."""
        content_id = self.request.id or self.request.content_hash
        try:
            resolved = self.request.resolve(preset, content_id)
        except RequestError as error:
            raise invalid(str(error)) from error
        return Job(
            id=new_id(),
            given=self.request.model_dump(mode="json", exclude={"image"}, exclude_none=True),
            request=resolved.model_dump(mode="json"),
            shape=str(resolved.shape),
            priority=self.priority,
            **values,
        )


def new_id() -> str:
    """Draw the id of a video."""
    return f"{ID_PREFIX}{secrets.token_urlsafe(ID_BYTES)}"


def invalid(message: str, param: str | None = None) -> APIError:
    """Return the error for a request that breaks a rule."""
    return APIError(400, "invalid_value", message, param)


def new_video(
    fields: Mapping[str, Any], upload: bytes | None, preset: Preset, model: str, images: ImageRoot = NO_IMAGES
) -> NewVideo:
    """Read the fields of a create call; a seed is drawn if none is given. Raises APIError.

    fields: of a form, where every value is text and lists are called `name[]`, or of JSON; upload: `input_reference`;
    images: fetches `image_reference` if it is a URL.
    """
    known = {name.removesuffix("[]"): value for name, value in fields.items() if value is not None}
    for name in known.keys() - REQUEST_FIELDS - OWN_FIELDS:
        raise APIError(400, "unknown_parameter", f"there is no field {name!r}", name)
    if known.get("model", model) != model:
        raise APIError(404, "model_not_found", f"there is no model {known['model']!r}, there is {model!r}", "model")
    priority = PRIORITIES.get(str(known.get("priority", "interactive")))
    if priority is None:
        raise invalid(f"priority {known['priority']!r} is not one of {', '.join(PRIORITIES)}", "priority")
    values = {name: value for name, value in known.items() if name in REQUEST_FIELDS}
    if values.get("num_videos_per_prompt") not in (None, 1, "1"):
        raise invalid("num_videos_per_prompt is more than 1: ask for each video by itself", "num_videos_per_prompt")
    values |= _size(known) | _length(known, preset)
    image = _image(known, upload, images)
    return NewVideo(_request({"seed": secrets.randbelow(MAX_SEED + 1), **values} | image), priority)


def remixed(job: Job, prompt: str, image: bytes | None) -> NewVideo:
    """Return the request of a job with another prompt, the same seed and image."""
    given = {name: value for name, value in job.given.items() if name != "id"} | {"seed": job.request["seed"]}
    return NewVideo(_request(given | {"prompt": prompt} | ({"image": image} if image else {})), job.priority)


def _request(values: dict[str, Any]) -> RenderRequest:
    for name in ("prompt", "negative_prompt"):
        if isinstance(values.get(name), str) and len(values[name]) > MAX_PROMPT:
            raise invalid(f"{name} has {len(values[name])} characters, more than {MAX_PROMPT}", name)
    try:
        return RenderRequest.parse(values)
    except RequestError as error:
        raise invalid(str(error), str(error).partition(" ")[0]) from error


def _size(fields: Mapping[str, Any]) -> dict[str, int]:
    size = fields.get("size")
    if size is None:
        return {}
    if "height" in fields or "width" in fields:
        raise invalid("size is given together with height or width", "size")
    width, _, height = str(size).partition("x")
    if not (width.isdecimal() and height.isdecimal() and max(len(width), len(height)) <= 5):
        raise invalid(f"size {str(size)[:40]!r} is not WIDTHxHEIGHT in pixels", "size")
    return {"width": int(width), "height": int(height)}


def _length(fields: Mapping[str, Any], preset: Preset) -> dict[str, int]:
    """Return the number of frames 1 + 8k that is nearest to what `seconds` asks for."""
    seconds = fields.get("seconds")
    if seconds is None:
        return {}
    if "num_frames" in fields:
        raise invalid("seconds is given together with num_frames", "seconds")
    try:
        count = float(seconds) * float(fields.get("fps", preset.fps))
    except (TypeError, ValueError, OverflowError):
        count = nan
    if not 0 < count <= MAX_NUM_FRAMES:
        raise invalid(f"seconds {str(seconds)[:40]!r} is not a number above 0", "seconds")
    return {"num_frames": 1 + TEMPORAL_FACTOR * round((count - 1) / TEMPORAL_FACTOR)}


def _image(fields: Mapping[str, Any], upload: bytes | None, images: ImageRoot) -> dict[str, bytes]:
    """Return the picture that a video starts from, which is decoded to see that it is one."""
    if "input_reference" in fields:
        raise invalid("input_reference is not a file", "input_reference")
    reference = fields.get("image_reference")
    if reference is not None and upload is not None:
        raise invalid("image_reference is given together with input_reference", "image_reference")
    if reference is None and upload is None:
        return {}
    data = upload if upload is not None else _referenced(reference, images)
    try:
        open_image(data)
    except InvalidValueError as error:
        raise invalid(str(error), "input_reference" if upload is not None else "image_reference") from error
    return {"image": data}


def _referenced(reference: object, images: ImageRoot) -> bytes:
    """Return the picture that a data: URL holds, or the web server of an allowed host."""
    if isinstance(reference, Mapping):
        reference = reference.get("image_url")
    if isinstance(reference, str) and reference.startswith(DATA_URL):
        return _from_data_url(reference)
    if not isinstance(reference, str) or not is_web(reference):
        raise invalid("image_reference is neither a data:image/... nor an http(s) URL", "image_reference")
    try:
        return images.read(reference)
    except (RequestError, ImageError, StorageError) as error:
        raise invalid(str(error), "image_reference") from error


def _from_data_url(url: str) -> bytes:
    _, separator, payload = url.partition(";base64,")
    try:
        return base64.b64decode(payload if separator else "!", validate=True)
    except binascii.Error as error:
        raise invalid("image_reference is not in base64", "image_reference") from error
