"""Webhooks: the end of each video is told to one URL, signed as the Standard Webhooks specification has it."""

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession, ClientTimeout
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pipeline.serving.queue.records import VideoRecord

TIMEOUT_S = 10.0
ATTEMPTS = 5


class WebhookError(Exception):
    """The receiver did not take a message."""


@dataclass(frozen=True)
class Webhook:
    """Where ends are told, and the secret that messages are signed with.

    wait: seconds until the second attempt at most, which double from one to the next.
    """

    url: str
    secret: str = field(repr=False)
    wait: float = 1.0

    def headers(self, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers that go with a message: HMAC-SHA256 over id, time and body."""
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        return {
            "Content-Type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
        }

    async def tell(self, job: VideoRecord, timestamp: int) -> None:
        """Tell the end of a job; raises WebhookError after `ATTEMPTS` attempts. Redirects are not followed."""
        message = {
            "id": f"evt_{job.id}",
            "object": "event",
            "type": f"video.{job.status}",
            "created_at": int(job.completed_at or 0),
            "data": {"id": job.id},
        }
        body = json.dumps(message).encode()
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((WebhookError, ClientError, TimeoutError)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=self.wait, max=60),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await self._post(body, self.headers(str(message["id"]), timestamp, body))

    async def _post(self, body: bytes, headers: dict[str, str]) -> None:
        async with (
            ClientSession(timeout=ClientTimeout(TIMEOUT_S)) as session,
            session.post(self.url, data=body, headers=headers, allow_redirects=False) as answer,
        ):
            if not 200 <= answer.status < 300:
                raise WebhookError(f"the webhook's receiver answered {answer.status}")
