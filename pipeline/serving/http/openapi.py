"""The interface's OpenAPI description: what FastAPI cannot see, which is bodies that are read by hand, and errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipeline.request import RenderRequest
from pipeline.serving.http.parsing import REQUEST_FIELDS, Remix
from pipeline.serving.http.schemas import ErrorBody
from pipeline.serving.queue.records import PRIORITIES
from pyramid_flow import Preset
from pyramid_flow.sampling.params import TEMPORAL_FACTOR

Schema = dict[str, Any]
Responses = dict[int | str, Schema]

ERROR: Schema = {"$ref": "#/components/schemas/ErrorBody"}
FILE: Schema = {"type": "string", "format": "binary"}
REFERENCE: Schema = {"description": "URL of a picture: data:, or of an allowed host", "type": ["string", "object"]}
POLLED: Responses = {
    200: {
        "headers": {
            "openai-poll-after-ms": {
                "description": "When to ask again, unless the video has ended",
                "schema": {"type": "integer"},
            }
        }
    }
}


def errors(*statuses: int) -> Responses:
    """Return what is said of answers that are errors."""
    return {status: {"model": ErrorBody} for status in statuses}


def file(*media_types: str) -> Responses:
    """Return what is said of an answer that is a file, of one of some types."""
    return {200: {"content": {media_type: {"schema": FILE} for media_type in media_types}}}


def description(app: FastAPI, preset: Preset, model: str) -> Schema:
    """Return the description of an interface that serves a model."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    operations = {(path, method): each for path, methods in found["paths"].items() for method, each in methods.items()}
    for operation in operations.values():
        operation["responses"].pop("422", None)  # a value that is wrong is answered 400
        for status, response in operation["responses"].items():
            if status != "200":  # whatever the type of a good answer
                response["content"] = {"application/json": {"schema": ERROR}}
    for name in ("HTTPValidationError", "ValidationError"):
        found["components"]["schemas"].pop(name)
    fields = _fields(preset, model)
    for path in ("/v1/videos", "/v1/videos/sync"):
        operations[path, "post"]["requestBody"] = _body(fields, ["prompt"], {"input_reference": FILE})
    prompt = Remix.model_json_schema()
    operations["/v1/videos/{video_id}/remix", "post"]["requestBody"] = _body(prompt["properties"], prompt["required"])
    operations["/v1/session", "post"]["requestBody"] = _body({"api_key": {"type": "string"}}, ["api_key"])
    return found


def _fields(preset: Preset, model: str) -> Schema:
    request: Schema = RenderRequest.model_json_schema()["properties"]
    sizes = [f"{width}x{height}" for height, width in preset.sizes]
    lengths = list(range(1, preset.max_num_frames + 1, TEMPORAL_FACTOR))
    return {name: schema for name, schema in request.items() if name in REQUEST_FIELDS} | {
        "model": {"enum": [model]},
        "size": {"description": "WIDTHxHEIGHT, instead of both", "enum": sizes},
        "num_frames": {"enum": lengths},
        "seconds": {"description": "The nearest number of frames, instead of it", "type": ["number", "string"]},
        "image_reference": REFERENCE,
        "input_reference": REFERENCE,
        "priority": {"enum": list(PRIORITIES)},
        "num_videos_per_prompt": {"enum": [1]},
    }


def _body(properties: Schema, required: list[str], files: Schema | None = None) -> Schema:
    """Return a body of fields, which is JSON or a form; files: further fields of a form with files."""

    def of(more: Schema) -> Schema:
        fields = {"type": "object", "properties": properties | more, "required": required}
        return {"schema": fields | {"additionalProperties": False}}

    kinds = {"multipart/form-data": of(files or {}), "application/x-www-form-urlencoded": of({})}
    return {"required": True, "content": {"application/json": of({}), **kinds}}
