"""The HTTP dialect: what a client may ask for."""

import base64
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.request import MAX_NUM_FRAMES, RenderRequest, RequestError, UntrainedError
from pipeline.rows import plain_text
from pipeline.serving.http.schemas import APIError
from pipeline.serving.queue.records import ID_PREFIX, PRIORITIES, VideoRecord
from pipeline.storage.faults import StorageError
from pipeline.storage.urls import is_web
from pipeline.tables.image_download import ImageError
from pipeline.tables.images import NO_IMAGES, ImageRoot
from pyramid_flow import InvalidValueError, Preset
from pyramid_flow.images.decoding import open_image
from pyramid_flow.sampling.params import TEMPORAL_FACTOR

ID_BYTES = 16
"""Random bytes of a video's id: 22 url-safe characters."""

REQUEST_FIELDS = frozenset(RenderRequest.model_fields) - {"image"}
OWN_FIELDS = frozenset({"model", "seconds", "size", "input_reference", "image_reference", "priority"})
DATA_URL = "data:image/"
MAX_PROMPT = 10_000
"""Characters; encoders read some hundred."""

MAX_PIXELS = 16 * 2**20
"""Pixels of a picture; many people's pictures are decoded on one machine."""

MAX_DRAWN_SEED = 2**53 - 1
"""Largest seed that the service draws: JavaScript rounds larger numbers, and asks for another video with them."""

REFERENCES = frozenset({"input_reference", "image_reference"})
TEXTS = frozenset({"prompt", "negative_prompt"})
"""Fields that may be empty; any other empty value counts as absent."""

_decoding = threading.BoundedSemaphore(2)
"""A picture takes hundreds of MB while it is decoded."""


class Remix(BaseModel):
    """What a remix asks for."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class NewVideo:
    """A video that is asked for: the request with its picture, and how urgent it is."""

    request: RenderRequest
    priority: int

    def job(self, preset: Preset, **values: Any) -> VideoRecord:  # noqa: ANN401 - columns
        """Return the job, with every value decided."""
        content_id = self.request.id or self.request.content_hash
        try:
            resolved = self.request.resolve(preset, content_id)
        except UntrainedError as error:
            raise invalid(str(error), error.field) from error
        return VideoRecord(
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

    fields: of a form, where every value is text, or of JSON; upload: `input_reference`;
    images: fetches `image_reference` if it is a URL.
    """
    known = {name: value for name, value in fields.items() if value is not None and (value != "" or name in TEXTS)}
    for name in known.keys() - REQUEST_FIELDS - OWN_FIELDS:
        raise APIError(400, "unknown_parameter", f"there is no field {name[:80]!r}", plain_text(name[:80]))
    if known.get("model", model) != model:
        asked = str(known["model"])[:80]
        raise APIError(404, "model_not_found", f"there is no model {asked!r}, there is {model!r}", "model")
    priority = PRIORITIES.get(str(known.get("priority", "interactive")))
    if priority is None:
        raise invalid(f"priority {str(known['priority'])[:80]!r} is not one of {', '.join(PRIORITIES)}", "priority")
    values = {name: value for name, value in known.items() if name in REQUEST_FIELDS}
    if values.get("num_videos_per_prompt") not in (None, 1, "1"):
        raise invalid("num_videos_per_prompt is more than 1: ask for each video by itself", "num_videos_per_prompt")
    values |= _size(known, preset) | _length(known, preset)
    image = _image(known, upload, images)
    return NewVideo(_request({"seed": secrets.randbelow(MAX_DRAWN_SEED + 1), **values} | image), priority)


def remixed(job: VideoRecord, prompt: str, image: bytes | None) -> NewVideo:
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


def _size(fields: Mapping[str, Any], preset: Preset) -> dict[str, int]:
    size = fields.get("size")
    if size is None:
        return {}
    if "height" in fields or "width" in fields:
        raise invalid("size is given together with height or width", "size")
    sizes = {f"{width}x{height}": {"height": height, "width": width} for height, width in preset.sizes}
    if str(size) not in sizes:
        raise invalid(f"size {str(size)[:40]!r} is not one of this model's: {', '.join(sizes)}", "size")
    return sizes[str(size)]


def _length(fields: Mapping[str, Any], preset: Preset) -> dict[str, int]:
    """Return the number of frames 1 + 8k that is nearest to what `seconds` asks for."""
    seconds = fields.get("seconds")
    if seconds is None:
        return {}
    if "num_frames" in fields:
        raise invalid("seconds is given together with num_frames", "seconds")
    try:
        fps = float(fields.get("fps", preset.fps))
        count = float(seconds) * fps
    except (TypeError, ValueError, OverflowError):
        fps, count = preset.fps, nan
    most = (preset.max_num_frames - 1) / fps if fps > 0 else 0.0
    num_frames = 1 + TEMPORAL_FACTOR * round((count - 1) / TEMPORAL_FACTOR) if 0 < count < MAX_NUM_FRAMES else 0
    if not 0 < num_frames <= preset.max_num_frames:
        raise invalid(f"seconds {str(seconds)[:40]!r} is not a number above 0 and up to {most:.4g}", "seconds")
    return {"num_frames": num_frames}


def _image(fields: Mapping[str, Any], upload: bytes | None, images: ImageRoot) -> dict[str, bytes]:
    """Return the picture that a video starts from, which is decoded to see that it is one."""
    given = {name: fields[name] for name in REFERENCES & fields.keys()}
    if len(given) + (upload is not None) > 1:
        raise invalid("give one picture: input_reference or image_reference", "image_reference")
    if upload is not None:
        return {"image": _decodable(upload, "input_reference")}
    for name, reference in given.items():
        return {"image": _decodable(_referenced(reference, name, images), name)}
    return {}


def _decodable(data: bytes, name: str) -> bytes:
    try:
        with _decoding:
            open_image(data, MAX_PIXELS)
    except InvalidValueError as error:
        raise invalid(str(error), name) from error
    return data


def _referenced(reference: object, name: str, images: ImageRoot) -> bytes:
    """Return the picture that a data: URL holds, or the web server of an allowed host."""
    if isinstance(reference, Mapping):
        reference = reference.get("image_url")
    if isinstance(reference, str) and reference.startswith(DATA_URL):
        return _from_data_url(reference, name)
    if not isinstance(reference, str) or not is_web(reference):
        raise invalid(f"{name} is neither a file nor a data:image/... nor an http(s) URL", name)
    try:
        return images.read(reference)
    except (RequestError, ImageError, StorageError) as error:
        raise invalid(str(error), name) from error


def _from_data_url(url: str, name: str) -> bytes:
    _, separator, payload = url.partition(";base64,")
    try:
        return base64.b64decode(payload if separator else "!", validate=True)
    except ValueError as error:  # binascii.Error, or not ASCII
        raise invalid(f"{name} is not in base64", name) from error
