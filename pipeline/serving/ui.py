"""The page in Gradio: two forms, a player, and the gallery of one's own videos."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from pipeline.serving import markup
from pipeline.serving.client import COOKIE, Fields, ServiceError, VideosClient
from pipeline.serving.forms import IMAGE, Form, Values, asked, filled, form, offered

PAGE_LENGTH = 12
WATCH_S, REFRESH_S = 1.0, 3.0
"""How often a video that is being made is looked at, and the gallery while it holds one."""
UPLOAD_S = 3600
"""How long uploaded pictures are kept here; the service has copies of its own."""

Cursors = tuple[str, ...]
"""The last video of each page of the gallery before the one that is shown."""


class Page:
    """The page over a client of the API, which is called with the key in the asker's cookie.

    A video that is shown while it is made is looked at again and again: nothing depends on a connection that stays, so
    a phone may sleep meanwhile. shown: id of the video in the player; playing: it, and which of its files.
    """

    def __init__(self, client: VideosClient) -> None:
        self.client = client
        with gr.Blocks(title="pyramid-render", analytics_enabled=False, delete_cache=(UPLOAD_S, UPLOAD_S)) as blocks:
            self.shown, self.playing, self.cursors, self.last = gr.State(""), gr.State(""), gr.State(()), gr.State("")
            self.watch, self.refresh = gr.Timer(WATCH_S, active=False), gr.Timer(REFRESH_S, active=False)
            self._place()
            self._connect_viewer()
            self._connect_gallery()
            forms = [*self.text.values(), *self.image.values()]
            self._on(blocks.load, self.load, None, [self.head, *forms, *self.viewer, *self.gallery])
            self._on(self.use.click, self.use_settings, [self.shown], forms)
        self.blocks = blocks.queue(api_open=False, default_concurrency_limit=None)

    def _place(self) -> None:
        self.head = _html(markup.head(is_signed_in=False))
        with gr.Row():
            with gr.Column():
                with gr.Tab("Text to video"):
                    self.text = form(from_image=False)
                    self.make_from_text = gr.Button("Make video", variant="primary")
                with gr.Tab("Image to video"):
                    self.image = form(from_image=True)
                    self.make_from_image = gr.Button("Make video", variant="primary")
            with gr.Column():
                self.player, self.status = _html(markup.NO_VIDEO), _html()
                with gr.Row(visible=False) as self.actions:
                    self.cancel = gr.Button("Cancel", variant="stop", min_width=80)
                    self.use = gr.Button("Reuse", min_width=80)
                    self.delete = gr.Button("Delete", min_width=80)
                with gr.Accordion("Settings", open=False, visible=False) as self.details:
                    self.settings = gr.Code(language="json", show_label=False, interactive=False)
        _html(markup.TITLE)
        self.cards = _html(js_on_load=markup.ON_CARD)
        with gr.Row():
            self.newer, self.older = gr.Button("Newer", visible=False), gr.Button("Older", visible=False)

    def _connect_viewer(self) -> None:
        self.viewer = [self.shown, self.playing, self.watch, self.player, self.status]
        self.viewer += [self.actions, self.cancel, self.details, self.settings]
        self.gallery = [self.cards, self.cursors, self.last, self.refresh, self.newer, self.older]
        both, seen = [*self.viewer, *self.gallery], [self.shown, self.playing, self.cursors]
        self._on(self.make_from_text.click, self.create_from_text, {*self.text.values()}, both)
        self._on(self.make_from_image.click, self.create_from_image, {*self.image.values()}, both)
        self._on(self.watch.tick, self.look_again, seen, both)
        self._on(self.cancel.click, self.cancel_shown, seen, both)
        self._on(self.delete.click, self.delete_shown, [self.shown], both)
        self._on(self.cards.select, self.select, None, self.viewer)

    def _connect_gallery(self) -> None:
        self._on(self.refresh.tick, self.list_again, [self.cursors], self.gallery)
        self._on(self.older.click, self.list_older, [self.cursors, self.last], self.gallery)
        self._on(self.newer.click, self.list_newer, [self.cursors], self.gallery)

    @staticmethod
    def _on(event: Callable[..., Any], handler: Callable[..., Any], inputs: Any, outputs: Any) -> None:  # noqa: ANN401 - as Gradio's
        event(handler, inputs, outputs, show_progress="hidden", api_visibility="private")

    async def load(self, request: gr.Request) -> Values:
        """Fill the forms with what the model can do, list one's videos, and show the newest that is being made."""
        key = _key(request)
        with _told():
            model = await self.client.model(key)
            listed = await self.client.list(key, PAGE_LENGTH, None)
            values = await self._listed(key, listed, ()) | offered(self.text, model) | offered(self.image, model)
            going = next((video for video in listed["data"] if not markup.has_ended(video)), None)
            if going:
                values |= await self._viewed(key, going, "")
        return values | {self.head: markup.head(is_signed_in=key is not None)}

    async def create_from_text(self, values: Values, request: gr.Request) -> Values:
        """Ask for a video of a prompt."""
        return await self._create(_key(request), self.text, values)

    async def create_from_image(self, values: Values, request: gr.Request) -> Values:
        """Ask for a video that goes on from a picture."""
        if values[self.image[IMAGE]] is None:
            raise gr.Error("choose a picture first", print_exception=False)
        return await self._create(_key(request), self.image, values)

    async def _create(self, key: str | None, fields: Form, values: Values) -> Values:
        with _told():
            video = await self.client.create(key, *asked(fields, values))
            return await self._viewed(key, video, "") | await self._list(key, ())

    async def select(self, event: gr.EventData, request: gr.Request) -> Values:
        """Show a video of the gallery."""
        key = _key(request)
        with _told():
            return await self._viewed(key, await self.client.retrieve(key, event.id), "")

    async def look_again(self, shown: str, playing: str, cursors: Cursors, request: gr.Request) -> Values:
        """Show how far a video is, and list it as soon as it has ended."""
        key = _key(request)
        try:
            video = await self.client.retrieve(key, shown)
            values = await self._viewed(key, video, playing)
            return values | (await self._list(key, cursors) if markup.has_ended(video) else {})
        except ServiceError as error:  # of which a message each second would tell no more
            return {self.status: markup.trouble(str(error))}

    async def cancel_shown(self, shown: str, playing: str, cursors: Cursors, request: gr.Request) -> Values:
        """End the video that is shown."""
        key = _key(request)
        with _told():
            video = await self.client.cancel(key, shown)
            return await self._viewed(key, video, playing) | await self._list(key, cursors)

    async def delete_shown(self, shown: str, request: gr.Request) -> Values:
        """Forget the video that is shown."""
        key = _key(request)
        with _told():
            await self.client.delete(key, shown)
            values = await self._list(key, ())
        hidden = gr.update(visible=False)
        nothing = {self.shown: "", self.playing: "", self.player: markup.NO_VIDEO, self.status: ""}
        return values | nothing | {self.watch: gr.Timer(active=False), self.actions: hidden, self.details: hidden}

    async def use_settings(self, shown: str, request: gr.Request) -> Values:
        """Fill the forms with the settings of the video that is shown."""
        with _told():
            video = await self.client.retrieve(_key(request), shown)
        return filled(self.text, video) | filled(self.image, video)

    async def list_again(self, cursors: Cursors, request: gr.Request) -> Values:
        """List the same page of one's videos as they stand."""
        with _told():
            return await self._list(_key(request), cursors)

    async def list_older(self, cursors: Cursors, last: str, request: gr.Request) -> Values:
        """List the next page of one's videos."""
        return await self.list_again((*cursors, last), request)

    async def list_newer(self, cursors: Cursors, request: gr.Request) -> Values:
        """List the page before."""
        return await self.list_again(cursors[:-1], request)

    async def _list(self, key: str | None, cursors: Cursors) -> Values:
        listed = await self.client.list(key, PAGE_LENGTH, cursors[-1] if cursors else None)
        return await self._listed(key, listed, cursors)

    async def _listed(self, key: str | None, listed: Fields, cursors: Cursors) -> Values:
        videos = listed["data"]
        thumbnails = await asyncio.gather(*(self._thumbnail(key, video) for video in videos))
        return {
            self.cards: markup.gallery(list(zip(videos, thumbnails, strict=True))),
            self.cursors: cursors,
            self.last: listed["last_id"] or "",
            self.refresh: gr.Timer(active=not all(map(markup.has_ended, videos))),
            self.newer: gr.update(visible=bool(cursors)),
            self.older: gr.update(visible=listed["has_more"]),
        }

    async def _thumbnail(self, key: str | None, video: Fields) -> str | None:
        if video["status"] != "completed":
            return None
        return (await self.client.links(key, video["id"]))["thumbnail"]

    async def _viewed(self, key: str | None, video: Fields, playing: str) -> Values:
        """Show a video; the player is left alone if it plays the right file."""
        has_ended = markup.has_ended(video)
        values: Values = {
            self.status: markup.status(video, time.time()),
            self.watch: gr.Timer(active=not has_ended),
            self.cancel: gr.update(visible=not has_ended),
        }
        is_still = bool(video["image_format"])
        file = {"in_progress": None if is_still else "stream", "completed": "video"}.get(video["status"])
        if playing == f"{video['id']} {file}":
            return values
        link = (await self.client.links(key, video["id"]))[file] if file else None
        return values | {
            self.shown: video["id"],
            self.playing: f"{video['id']} {file}",
            self.player: _shown(link, is_still=is_still, is_whole=has_ended),
            self.actions: gr.update(visible=True),
            self.details: gr.update(visible=True),
            self.settings: markup.settings(video),
        }


def _shown(link: str | None, *, is_still: bool, is_whole: bool) -> str:
    if link is None:
        return markup.NO_VIDEO
    return markup.still(link) if is_still else markup.player(link, is_whole=is_whole)


_html = partial(gr.HTML, apply_default_css=False)


@contextmanager
def _told() -> Iterator[None]:
    """Show to the asker what the service refuses."""
    try:
        yield
    except ServiceError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error


def _key(request: gr.Request) -> str | None:
    key: str | None = request.cookies.get(COOKIE)
    return key
