"""The web page: static files that any replica sends, under a policy that lets them load nothing else."""

from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from pipeline.serving.http.access import Service

FOLDER = Path(__file__).parents[1] / "page"


class PageFiles(StaticFiles):
    """The page's files; media_origin: where else pictures and videos may come from."""

    def __init__(self, media_origin: str | None) -> None:
        super().__init__(directory=FOLDER)
        media = " ".join(filter(None, ("'self'", "blob:", media_origin)))
        policy = (
            "default-src 'self'",
            f"img-src {media}",
            f"media-src {media}",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
        # a browser asks for the files each time, and is answered 304 unless they are of another version
        self.headers = {"Cache-Control": "no-cache", "Content-Security-Policy": "; ".join(policy)}

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return the answer for a file."""
        response = await super().get_response(path, scope)
        response.headers.update(self.headers)
        return response


def add_page(app: FastAPI, service: Service) -> None:
    """Let an app send the page at `/` and its files below `/static`."""
    url = service.storage.signed_url("probe", 1) if service.redirects else None
    files = PageFiles(None if url is None else "{0.scheme}://{0.netloc}".format(urlsplit(url)))

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", files)
