"""What the page shows of videos, as HTML."""

import json
from collections.abc import Sequence
from html import escape

from pipeline.serving.client import Fields
from pipeline.serving.tables import Status

SETTINGS = (
    "prompt",
    "negative_prompt",
    "model",
    "size",
    "num_frames",
    "fps",
    "image_fit",
    "image_format",
    "num_inference_steps",
    "video_num_inference_steps",
    "guidance_scale",
    "video_guidance_scale",
    "guidance_decay",
    "min_guidance_scale",
    "quality",
    "skip_last_step",
    "guided_share",
    "seed",
)
NO_VIDEO = '<div class="pr-player">The video plays here while it is made.</div>'
TITLE = '<h2 class="pr-title">Your videos</h2>'
NO_VIDEOS = '<p class="pr-note">No videos yet.</p>'
SIGN_OUT = '<form method="post" action="sign-out"><button>Sign out</button></form>'
ON_CARD = """
element.addEventListener('click', event => {
    const card = event.target.closest('[data-id]');
    if (!card) return;
    trigger('select', {id: card.dataset.id});
    document.querySelector('.pr-player').scrollIntoView({behavior: 'smooth', block: 'nearest'});
});
"""
CSS = """
.gradio-container .html-container { padding: 0; }
.pr-head { display: flex; justify-content: space-between; align-items: center; margin: 0.5rem 0; }
.pr-head h1 { font-size: 1.5rem; font-weight: 600; }
.pr-head button { cursor: pointer; text-decoration: underline; }
.pr-title { font-size: 1.2rem; font-weight: 600; }
.pr-player {
    aspect-ratio: 16 / 10; width: 100%; display: flex; align-items: center; justify-content: center;
    border-radius: var(--block-radius); background: var(--background-fill-secondary);
    color: var(--body-text-color-subdued);
}
video.pr-player, img.pr-player { background: black; object-fit: contain; }
.pr-bar { height: 0.5rem; overflow: hidden; border-radius: 0.25rem; background: var(--border-color-primary); }
.pr-bar div { height: 100%; background: var(--color-accent); }
.pr-status p { margin: 0.2rem 0; overflow-wrap: anywhere; }
.pr-status .pr-error { color: var(--error-text-color); }
.pr-note { color: var(--body-text-color-subdued); }
.pr-gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.75rem; }
.pr-card {
    display: flex; flex-direction: column; padding: 0; overflow: hidden; text-align: left; cursor: pointer;
    border: 1px solid var(--border-color-primary); border-radius: var(--block-radius);
    background: var(--block-background-fill); color: var(--body-text-color);
}
.pr-card:hover, .pr-card:focus-visible { border-color: var(--color-accent); }
.pr-card img, .pr-card .pr-blank { width: 100%; aspect-ratio: 16 / 10; object-fit: cover; }
.pr-card .pr-blank { display: flex; align-items: center; justify-content: center; font-size: 1.4rem;
    background: var(--background-fill-secondary); color: var(--body-text-color-subdued); }
.pr-card span { padding: 0.3rem 0.6rem; }
.pr-card .pr-prompt { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden;
    padding-bottom: 0; font-size: var(--text-sm); }
.pr-card .pr-state { font-size: var(--text-xs); color: var(--body-text-color-subdued); }
"""

SIGN_IN = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pyramid-render</title>
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { min-height: 90vh; display: grid; place-items: center; margin: 1rem; }
form { display: grid; gap: 0.75rem; width: min(22rem, 100%); }
h1 { font-size: 1.4rem; margin: 0; }
input, button { font: inherit; padding: 0.6rem; border-radius: 0.4rem; border: 1px solid gray; }
button { background: #ea580c; border-color: #ea580c; color: white; cursor: pointer; }
p { margin: 0; color: #dc2626; }
</style>
</head>
<body>
<form method="post">
<h1>pyramid-render</h1>
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
%s
<button>Sign in</button>
</form>
</body>
</html>
"""


def sign_in(error: str | None = None) -> str:
    """Return the form that asks for a key, with what was wrong."""
    return SIGN_IN.replace("%s", f'<p role="alert">{escape(error)}</p>' if error else "")


def head(*, is_signed_in: bool) -> str:
    """Return the page's head line, with a way out for whoever came in with a key."""
    return f'<header class="pr-head"><h1>pyramid-render</h1>{SIGN_OUT if is_signed_in else ""}</header>'


def has_ended(video: Fields) -> bool:
    """Say whether nothing happens to a video any more."""
    return Status(video["status"]).is_end


def status(video: Fields, now: float) -> str:
    """Say how far a video is; now: seconds since 1970."""
    if video["status"] == "failed":
        return _status(f'<p class="pr-error">It failed: {escape(video["error"]["message"])}</p>')
    if video["status"] == "completed":
        return _status(f"<p>Made in {video['completed_at'] - video['created_at']} s, seed {video['seed']}</p>")
    if video["status"] == "cancelled":
        return _status("<p>Cancelled</p>")
    percent, seconds = video["progress"], max(0, round(now - video["created_at"]))
    text = f"{_waiting(video)}, since {seconds} s" if video["status"] == "queued" else f"{percent} % after {seconds} s"
    bar = (
        f'<div class="pr-bar" role="progressbar" aria-valuenow="{percent}"><div style="width: {percent}%"></div></div>'
    )
    return _status(f"{bar}<p>{text}</p>")


def trouble(message: str) -> str:
    """Say what is wrong."""
    return _status(f'<p class="pr-error">{escape(message)}</p>')


def player(url: str, *, is_whole: bool) -> str:
    """Play a video, again and again if it is whole."""
    return (
        f'<video class="pr-player" src="{escape(url)}" controls autoplay muted playsinline '
        f"{'loop' if is_whole else ''}></video>"
    )


def still(url: str) -> str:
    """Show a still in place of the player."""
    return f'<img class="pr-player" src="{escape(url)}" alt="">'


def gallery(videos: Sequence[tuple[Fields, str | None]]) -> str:
    """Show videos with the URLs of their thumbnails."""
    if not videos:
        return NO_VIDEOS
    return f'<div class="pr-gallery">{"".join(_card(video, url) for video, url in videos)}</div>'


def settings(video: Fields) -> str:
    """Return the settings of a video as JSON: what a create call needs for the same video, but for its picture."""
    return json.dumps({name: video[name] for name in SETTINGS}, indent=2, ensure_ascii=False)


def _status(inner: str) -> str:
    return f'<div class="pr-status" role="status">{inner}</div>'


def _waiting(video: Fields) -> str:
    return f"Waiting, {video['position']} before it" if video["position"] else "Next in the queue"


def _card(video: Fields, thumbnail: str | None) -> str:
    states = {"queued": "…", "in_progress": f"{video['progress']} %", "failed": "!", "cancelled": "×"}
    blank = f'<div class="pr-blank">{states.get(video["status"], "")}</div>'
    picture = f'<img src="{escape(thumbnail)}" alt="" loading="lazy">' if thumbnail else blank
    prompt, state = escape(video["prompt"]), video["status"].replace("_", " ")
    length = "still" if video["num_frames"] == 1 else f"{float(video['seconds']):.3g} s"
    return (
        f'<button class="pr-card" data-id="{escape(video["id"])}" data-status="{video["status"]}" title="{prompt}">'
        f'{picture}<span class="pr-prompt">{prompt}</span>'
        f'<span class="pr-state">{state}, {length}, {video["size"]}</span></button>'
    )
