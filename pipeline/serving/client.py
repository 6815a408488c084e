"""The page's way to the service: the Videos API as one key, by HTTP."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from aiohttp import ClientError, ClientSession, ClientTimeout, FormData

from pyramid_flow.errors import PyramidFlowError

COOKIE = "pyramid_render_key"
"""Holds a visitor's API key in the browser."""

TIMEOUT_S = 60.0
BELIEVED_S = 60.0
"""How long a key is taken as good that the service has accepted."""

UNAUTHORIZED = 401

Fields = dict[str, Any]
"""An object of the API's answers."""


class ServiceError(PyramidFlowError):
    """The service refused a call, or did not answer; status: as HTTP has it, None = no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class VideosClient:
    """Calls the API at a URL as whoever's key is given; None = without a key."""

    url: str
    accepted: dict[str, float] = field(default_factory=dict, repr=False)

    async def accepts(self, key: str) -> bool:
        """Say whether a key is good."""
        now = time.monotonic()
        if now < self.accepted.get(key, 0.0):
            return True
        if not key.isprintable():  # what no header can hold
            return False
        try:
            await self.model(key)
        except ServiceError as error:
            if error.status == UNAUTHORIZED:
                self.accepted.pop(key, None)
                return False
            raise
        self.accepted[key] = now + BELIEVED_S
        return True

    async def model(self, key: str | None) -> Fields:
        """Return the model that is served."""
        answer = await self._call("GET", "/models", key)
        model: Fields = answer["data"][0]
        return model

    async def create(self, key: str | None, fields: Mapping[str, str], image: bytes | None = None) -> Fields:
        """Ask for a video."""
        form = FormData(dict(fields))
        if image is not None:
            form.add_field("input_reference", image, filename="image")
        return await self._call("POST", "/videos", key, data=form)

    async def retrieve(self, key: str | None, video_id: str) -> Fields:
        """Return a video as it stands."""
        return await self._call("GET", _path(video_id), key)

    async def list(self, key: str | None, limit: int, after: str | None) -> Fields:
        """Return a page of one's own videos, newest first."""
        query = {"limit": str(limit)} | ({"after": after} if after else {})
        return await self._call("GET", "/videos", key, params=query)

    async def links(self, key: str | None, video_id: str) -> dict[str, str]:
        """Return signed URLs of a video's files, relative to the service."""
        return await self._call("POST", f"{_path(video_id)}/links", key)

    async def cancel(self, key: str | None, video_id: str) -> Fields:
        """End a video that is not finished."""
        return await self._call("POST", f"{_path(video_id)}/cancel", key)

    async def delete(self, key: str | None, video_id: str) -> None:
        """Forget a video with its files."""
        await self._call("DELETE", _path(video_id), key)

    async def _call(self, method: str, path: str, key: str | None, **options: Any) -> Fields:  # noqa: ANN401 - aiohttp's
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            async with (
                ClientSession(timeout=ClientTimeout(TIMEOUT_S), headers=headers) as session,
                session.request(method, f"{self.url}/v1{path}", allow_redirects=False, **options) as answer,
            ):
                body: Fields = await answer.json()
        except (ClientError, TimeoutError, ValueError) as error:
            raise ServiceError("the service does not answer: try again in a moment") from error
        if answer.status >= 400:
            raise ServiceError(_message(body), answer.status)
        return body


def _path(video_id: str) -> str:
    return f"/videos/{quote(video_id, safe='')}"


def _message(body: Fields) -> str:
    error = body.get("error", {})
    return str(error.get("message", "the service failed; its log says why"))
