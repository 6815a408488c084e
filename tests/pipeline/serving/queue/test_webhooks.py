"""Webhooks: a real receiver gets signed messages, which the openai client accepts, and gets them again if it fails."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import web

from pipeline.serving.queue.dispatcher import Dispatcher, DispatchSettings
from pipeline.serving.queue.records import VideoRecord
from pipeline.serving.queue.store import Store
from pipeline.serving.queue.webhooks import ATTEMPTS, Webhook, WebhookError
from pipeline.storage.storage import Storage

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Receiver:
    """A web server that takes messages; answers: the statuses it gives, the last one from then on."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.messages: list[tuple[str, dict[str, str]]] = []

    async def take(self, request: web.Request) -> web.Response:
        self.messages.append((await request.text(), dict(request.headers)))
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Webhook]:
        app = web.Application()
        app.router.add_post("/{tail:.*}", self.take)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            yield Webhook(f"http://127.0.0.1:{port}/hook", SECRET, wait=0.01)
        finally:
            await runner.cleanup()


def ended() -> VideoRecord:
    return VideoRecord(id="video_a", status="completed", completed_at=5.0)


def tell(receiver: Receiver) -> None:
    async def both() -> None:
        async with receiver.running() as webhook:
            await webhook.tell(ended(), int(time.time()))

    asyncio.run(both())


def test_the_openai_client_takes_a_message_for_good():
    import openai  # here, so that sessions without its tests do not load it

    receiver = Receiver(200)
    tell(receiver)
    [(body, headers)] = receiver.messages
    with openai.OpenAI(api_key="none") as client:
        client.webhooks.verify_signature(body, headers, secret=SECRET)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body.replace("video_a", "video_b"), headers, secret=SECRET)
    message = json.loads(body)
    assert (message["type"], message["data"]) == ("video.completed", {"id": "video_a"})


def test_a_receiver_that_fails_is_told_again():
    receiver = Receiver(500, 503, 204)
    tell(receiver)
    assert len(receiver.messages) == 3
    assert len({headers["webhook-id"] for _, headers in receiver.messages}) == 1


@pytest.mark.parametrize("status", [500, 302])
def test_a_receiver_that_always_fails_is_given_up_and_redirects_are_not_followed(status):
    receiver = Receiver(status)
    with pytest.raises(WebhookError, match=str(status)):
        tell(receiver)
    assert len(receiver.messages) == ATTEMPTS


def test_the_dispatcher_tells_each_end_once(tmp_path, monkeypatch):
    store = Store(f"sqlite:///{tmp_path}/videos.db")
    for name in ("a", "b"):
        store.add(VideoRecord(id=name, owner="me", model="toy", given={}, request={}, created_at=1.0))
        store.cancel(name, "me")
    receiver, unannounced, found = Receiver(200), store.unannounced, []

    async def both() -> None:
        loop, is_idle = asyncio.get_running_loop(), asyncio.Event()

        def looked(limit: int) -> object:
            found.append(unannounced(limit))
            if found[-2:] == [[], []]:
                loop.call_soon_threadsafe(is_idle.set)
            return found[-1]

        monkeypatch.setattr(store, "unannounced", looked)
        async with receiver.running() as webhook:
            settings = DispatchSettings(poll_s=0.01)
            dispatcher = Dispatcher(store, Storage(str(tmp_path)), None, settings, webhook)
            task = asyncio.create_task(dispatcher._announce(webhook))
            await asyncio.wait_for(is_idle.wait(), 20)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(both())
    store.close()
    assert sorted(json.loads(body)["data"]["id"] for body, _ in receiver.messages) == ["a", "b"]
