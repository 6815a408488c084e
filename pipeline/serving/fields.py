"""The fields of a request's body, which is a form or JSON; it is read after the key was checked, and not for ever."""

import asyncio
import json
import re
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from pipeline.serving.schemas import APIError

MAX_BODY_BYTES = 25 * 2**20
MAX_FIELDS = 64
BODY_TIMEOUT_S = 60.0
NESTED = re.compile(r"(?P<name>\w+)\[(?P<key>\w+)\]")
"""How the client writes a value of an object into a form."""


async def body_fields(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields of a form or a JSON object, and the uploaded picture."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
                async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_BODY_BYTES) as form:
                    return await _form_fields(form)
            body = await request.body()
    except TimeoutError as error:
        raise APIError(408, "request_timeout", f"the body did not come within {BODY_TIMEOUT_S:g} s") from error
    try:
        fields = await run_in_threadpool(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise APIError(400, "invalid_body", "the body is neither a form nor JSON") from error
    if not isinstance(fields, dict):
        raise APIError(400, "invalid_body", "the body is no JSON object")
    return fields, None


async def _form_fields(form: FormData) -> tuple[dict[str, Any], bytes | None]:
    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    upload = None
    for name in form:
        values = form.getlist(name)
        if isinstance(values[0], UploadFile):
            if name != "input_reference":
                raise APIError(400, "unknown_parameter", f"there is no file {name!r}", name)
            upload = await values[0].read()
        elif name.endswith("[]"):
            fields[name] = values
        elif match := NESTED.fullmatch(name):
            nested.setdefault(match["name"], {})[match["key"]] = values[0]
        elif len(values) > 1:
            raise APIError(400, "invalid_value", f"{name} is given {len(values)} times", name)
        else:
            fields[name] = values[0]
    for name in nested.keys() & fields.keys():
        raise APIError(400, "invalid_value", f"{name} is given as a text and as an object", name)
    fields |= nested
    return fields, upload
