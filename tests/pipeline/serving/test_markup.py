"""The page's HTML: what is a video is played, and what is a still is shown."""

import pytest

from pipeline.serving import markup

CARD = {"id": "video_a", "prompt": "a <fox>", "status": "completed", "progress": 100, "size": "64x64"}


@pytest.mark.parametrize(
    ("num_frames", "seconds", "length"), [(1, "0", "still"), (9, "0.3333", "0.333 s"), (121, "5", "5 s")]
)
def test_a_card_says_how_long_a_video_is(num_frames, seconds, length):
    html = markup.gallery([(CARD | {"num_frames": num_frames, "seconds": seconds}, "content?a=1&b=2")])
    assert f"completed, {length}, 64x64" in html
    assert 'src="content?a=1&amp;b=2"' in html
    assert "<fox>" not in html


def test_a_still_is_shown_where_videos_play():
    assert markup.still('a"b') == '<img class="pr-player" src="a&quot;b" alt="">'
    assert markup.player("a", is_whole=True).startswith('<video class="pr-player" src="a"')
