"""The HTTP dialect: what a client is told of a video, a model, an error."""

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.request import ImageFormat, ResolvedRequest
from pipeline.serving.queue.records import Status, VideoRecord
from pyramid_flow import Preset
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.images.fitting import ImageFit
from pyramid_flow.presets import Quality


class APIError(PyramidFlowError):
    """An answer that is an error: its HTTP status, a code for programs, a message for people, the field at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers)
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

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
    a video; seed_text: the seed for clients whose numbers are exact up to 2^53 only; stage_seconds: of each stage.
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
    seed_text: str
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
    quality: Quality
    skip_last_step: bool
    guided_share: float | tuple[float, ...]
    stage_seconds: dict[str, float] | None
    video_sha256: str | None
    model_fingerprint: str

    @classmethod
    def of(cls, job: VideoRecord, fingerprint: str, position: int | None = None) -> "Video":
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
            seed_text=str(request.seed),
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


class SessionState(BaseModel):
    """Whether the service requires an API key, and who is signed in."""

    object: Literal["session"] = "session"
    requires_key: bool
    signed_in: bool
    owner: str | None


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
