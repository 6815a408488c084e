"""The fields of a request's body, which is a form or JSON. It is read after the request was admitted, within limits."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from pipeline.rows import plain_text
from pipeline.serving.http.schemas import APIError

MAX_BODY_BYTES = 25 * 2**20
MAX_URLENCODED_BYTES = 2**18
"""Of a form without a file: percent signs are decoded to some 80 times their size."""

MAX_FIELDS = 64
MAX_MARKS = 2**16
"""Characters of JSON that may separate values, those inside of texts included. Prompts have room, and 60,000 values
take milliseconds and a few MB; JSON of 6 MB with nothing but values would take seconds and hundreds of MB."""

BODY_TIMEOUT_S = 60.0
URLENCODED = "application/x-www-form-urlencoded"
PICTURE = "input_reference"
"""Name of the one file of a form."""

NESTED = re.compile(r"(?P<name>\w+)\[(?P<key>\w+)\]")
"""How the client writes a value of an object into a form."""


async def body_fields(request: Request, max_bytes: int = MAX_BODY_BYTES) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields of a form or a JSON object, and the uploaded picture.

    The body is parsed in a thread, so that the event loop answers others meanwhile. `name[]` of a form is a list.

    Raises:
        APIError: The body does not arrive in time, is neither a form nor JSON, or exceeds a limit.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    body = await _read(request, min(max_bytes, MAX_URLENCODED_BYTES) if kind == URLENCODED else max_bytes)
    return await run_in_threadpool(_parse, kind, content_type, body)


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise APIError(413, "body_too_large", f"the body is larger than {max_bytes} bytes")
    except TimeoutError as error:
        raise APIError(408, "request_timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from error
    return bytes(body)


def _parse(kind: str, content_type: str, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    if kind == "multipart/form-data":
        return _form_fields(*_multipart(content_type, body))
    if kind == URLENCODED:
        return _form_fields(_urlencoded(body), {})
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > MAX_MARKS:
        raise APIError(400, "invalid_body", f"the body has more than {MAX_MARKS} values")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise APIError(400, "invalid_body", "the body is neither a form nor JSON") from error
    if not isinstance(fields, dict):
        raise APIError(400, "invalid_body", "the body is not a JSON object")
    if len(fields) > MAX_FIELDS:
        raise APIError(400, "invalid_body", f"the body has more than {MAX_FIELDS} fields")
    for name, value in fields.items():
        if not _is_flat(value):
            name = plain_text(name[:80])
            raise APIError(400, "invalid_value", f"{name!r} is nested, or has more than {MAX_FIELDS} values", name)
    return fields, None


def _is_flat(value: object) -> bool:
    """Whether a value is a single one, or a short list or object of single ones."""
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return len(values) <= MAX_FIELDS and not any(isinstance(each, (dict, list)) for each in values)


def _form_fields(
    texts: Mapping[str, list[str]], files: Mapping[str, list[bytes]]
) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields of a form, of which `name[]` is a list and `name[key]` an object, and the uploaded picture."""
    single: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for name, values in texts.items():
        if name.endswith("[]"):
            lists[name.removesuffix("[]")] = values
        elif match := NESTED.fullmatch(name):
            objects.setdefault(match["name"], {})[match["key"]] = values[0]
        elif len(values) > 1:
            raise APIError(400, "invalid_value", f"{name[:80]} is given {len(values)} times", name[:80])
        else:
            single[name] = values[0]
    fields = single | lists | objects
    if len(fields) < len(single) + len(lists) + len(objects):
        [name, *_] = (single.keys() & (lists.keys() | objects.keys())) | (lists.keys() & objects.keys())
        raise APIError(400, "invalid_value", f"{name[:80]} is given in two forms", name[:80])
    for name in files.keys() - {PICTURE}:
        raise APIError(400, "unknown_parameter", f"there is no file {name[:80]!r}", name[:80])
    pictures = files.get(PICTURE, [])
    if len(pictures) > 1:
        raise APIError(400, "invalid_value", f"{PICTURE} is given {len(pictures)} times", PICTURE)
    return fields, pictures[0] if pictures else None


def _urlencoded(body: bytes) -> dict[str, list[str]]:
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise APIError(400, "invalid_body", f"the form cannot be read, or has more than {MAX_FIELDS} fields") from error
    texts: dict[str, list[str]] = {}
    for name, value in pairs:
        texts.setdefault(name, []).append(value)
    return texts


def _multipart(content_type: str, body: bytes) -> tuple[dict[str, list[str]], dict[str, list[bytes]]]:
    """Return the texts and the files of a form by their names."""
    texts: dict[str, list[str]] = {}
    files: dict[str, list[bytes]] = {}
    num_fields = 0

    def add(values: dict[str, list[Any]], name: bytes | None, value: object) -> None:
        nonlocal num_fields
        num_fields += 1
        if num_fields > MAX_FIELDS:
            raise APIError(400, "invalid_body", f"the form has more than {MAX_FIELDS} fields")
        values.setdefault((name or b"").decode(), []).append(value)

    def on_field(field: Field) -> None:
        add(texts, field.field_name, (field.value or b"").decode())

    def on_file(file: File) -> None:
        with file.file_object as content:
            content.seek(0)
            add(files, file.field_name, content.read())

    in_memory = {"MAX_MEMORY_FILE_SIZE": MAX_BODY_BYTES}
    try:
        parser = create_form_parser({"Content-Type": content_type.encode()}, on_field, on_file, in_memory)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise APIError(400, "invalid_body", "the form cannot be read") from error
    return texts, files
