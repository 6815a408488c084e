"""Fragments play one after another, as far as they have come; joined they are the video, with the same pictures."""

import numpy as np
import pytest

from pipeline.media.fragments import BLOCK, encode_fragment, join_fragments, padded
from pipeline.media.video import VideoError
from tests.pipeline.media.test_video import boxes, moving_gradient
from tests.pipeline.mp4 import probe, read_frames, read_tags

LENGTHS = (1, 8, 8, 8)
FRAMES = moving_gradient(sum(LENGTHS))


def fragments(fps=24):
    starts = np.cumsum((0, *LENGTHS))
    return [
        encode_fragment(FRAMES[start : start + count], index, int(start), fps)
        for index, (start, count) in enumerate(zip(starts, LENGTHS, strict=False))
    ]


@pytest.mark.parametrize("fps", [7, 24, 30])
def test_fragments_in_order_are_a_video_at_every_moment(tmp_path, fps):
    made = fragments(fps)
    for count in range(1, len(made) + 1):
        path = tmp_path / f"{count}.mp4"
        path.write_bytes(b"".join(map(padded, made[:count])))
        expected = FRAMES[: sum(LENGTHS[:count])]
        back = read_frames(path)
        assert back.shape == expected.shape
        assert np.abs(back.astype(int) - expected).mean() < 2
    assert probe(path).fps == fps


def test_only_the_first_fragment_has_a_head():
    made = fragments()
    assert boxes(made[0]) == ["ftyp", "moov", "moof", "mdat"]
    assert [boxes(fragment) for fragment in made[1:]] == [["moof", "mdat"]] * 3


@pytest.mark.parametrize("size", [0, 1, BLOCK - 9, BLOCK - 8, BLOCK - 7, BLOCK, 3 * BLOCK + 5])
def test_padding_fills_whole_blocks(size):
    found = padded(bytes(size))
    assert len(found) % BLOCK == 0
    assert len(found) - size <= BLOCK + 8
    assert int.from_bytes(found[size : size + 4]) == len(found) - size


def test_equal_frames_give_equal_fragments():
    assert fragments() == fragments()


def test_joined_fragments_have_the_same_pictures_and_tags(tmp_path):
    made = fragments()
    whole, joined = tmp_path / "whole.mp4", tmp_path / "joined.mp4"
    whole.write_bytes(b"".join(made))
    joined.write_bytes(join_fragments(made, {"prompt": "a fox"}))
    np.testing.assert_array_equal(read_frames(joined), read_frames(whole))
    assert read_tags(joined)["prompt"] == "a fox"
    names = boxes(joined.read_bytes())
    assert names.index("moov") < names.index("mdat")
    assert "moof" not in names


def test_what_is_no_video_cannot_be_joined():
    with pytest.raises(VideoError, match="ffmpeg failed"):
        join_fragments([b"nonsense"], {})
