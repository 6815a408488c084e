"""Videos keep their frames, sizes and tags; nothing is left behind when writing fails."""

import io
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from pipeline.media.video import MAX_TAG_BYTES, THUMBNAIL_WIDTH, ThumbnailStrip, VideoError, VideoWriter
from pyramid_flow.errors import InvalidValueError, ShapeError
from tests.pipeline.mp4 import probe, read_frames, read_tags


def moving_gradient(num_frames=9, height=64, width=128):
    """Smooth frames, each a little brighter, so that a codec keeps them well: uint8 [n, height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        np.stack([x * 150 / width + 4 * t, y * 150 / height + 4 * t, 200 - x * 0 - 4 * t], -1)
        for t in range(num_frames)
    ]
    return np.stack(planes).astype(np.uint8)


def write(path, frames, chunks=1, **options):
    settings = {"height": frames.shape[1], "width": frames.shape[2], "fps": 24} | options
    with VideoWriter(path, **settings) as writer:
        for chunk in np.array_split(frames, chunks):
            writer.write(chunk)
    return path


def boxes(data):
    """Names of an mp4's top-level boxes, in order."""
    names, at = [], 0
    while at < len(data):
        names.append(data[at + 4 : at + 8].decode())
        at += int.from_bytes(data[at : at + 4])
    return names


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (34, 66), (384, 640)])
def test_frames_survive_within_codec_tolerance(tmp_path, height, width):
    frames = moving_gradient(5, height, width)
    back = read_frames(write(tmp_path / "a.mp4", frames))
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 2


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 130, 90)])
def test_colours_are_not_shifted(tmp_path, colour):
    frames = np.full((3, 32, 32, 3), colour, np.uint8)
    assert np.abs(read_frames(write(tmp_path / "a.mp4", frames)).astype(int) - colour).max() <= 3


def test_streamed_in_chunks_equals_written_at_once_byte_for_byte(tmp_path):
    frames = moving_gradient()
    whole = write(tmp_path / "whole.mp4", frames, tags={"prompt": "a"}).read_bytes()
    assert write(tmp_path / "chunks.mp4", frames, chunks=4, tags={"prompt": "a"}).read_bytes() == whole
    assert write(tmp_path / "strided.mp4", frames[::-1][::-1], tags={"prompt": "a"}).read_bytes() == whole


def test_equal_frames_give_equal_bytes_also_with_two_threads(tmp_path):
    first, second = (write(tmp_path / f"{name}.mp4", moving_gradient(), threads=2).read_bytes() for name in "ab")
    assert first == second


def test_the_file_does_not_name_the_version_that_muxed_it(tmp_path):
    assert b"Lavf" not in write(tmp_path / "a.mp4", moving_gradient()).read_bytes()


def test_empty_chunks_change_nothing(tmp_path):
    frames = moving_gradient(1)
    assert probe(write(tmp_path / "a.mp4", frames, chunks=3)).frames == 1


@pytest.mark.parametrize("fps", [8, 24, 24000 / 1001, 0.5])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_probe_tells_what_was_written(tmp_path, fps, num_frames):
    info = probe(write(tmp_path / "a.mp4", moving_gradient(num_frames), fps=fps))
    assert (info.width, info.height, info.frames) == (128, 64, num_frames)
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    assert info.fps == pytest.approx(fps, rel=1e-6)


def test_index_lies_before_the_pictures(tmp_path):
    names = boxes(write(tmp_path / "a.mp4", moving_gradient()).read_bytes())
    assert names.index("moov") < names.index("mdat")


@pytest.mark.parametrize(
    "value",
    [
        "a red ball",
        "he said \"no\"; $(touch x) `touch y` & | > z 'quoted'",
        "first line\nsecond = line; # no comment\r\n[STREAM]\nseed=9\n\n",
        "back\\slash \\n \\",
        "  blanks around  ",
        "Ünïcödé 日本語 🎬 e\u0301",
        "\n  Stream #0:0: Video: vp9, rgb24, 7x7",
        "word " * 2000,
    ],
)
def test_tags_read_back(tmp_path, value):
    tags = {
        "prompt": value,
        "seed": "42",
        "model": "toy",
        "id": "0f-1",
        "guidance_scale": "5.0",
        "title": "t",
        "comment": "c",
    }
    path = write(tmp_path / "a.mp4", moving_gradient(2), tags=tags)
    assert read_tags(path) == tags
    assert probe(path).codec == "h264"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4"]


def test_tags_show_in_what_ffmpeg_prints(tmp_path):
    path = write(tmp_path / "a.mp4", moving_gradient(2), tags={"prompt": "a red ball", "pyramid_id": "0f"})
    printed = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, check=False
    ).stderr.decode()
    assert "a red ball" in printed
    assert "pyramid_id" in printed


def test_what_a_tag_cannot_hold_is_replaced_or_cut_at_a_character(tmp_path):
    tags = {"long": "日" * MAX_TAG_BYTES, "odd": "a\0b\ud800c", "empty": ""}
    back = read_tags(write(tmp_path / "a.mp4", moving_gradient(2), tags=tags))
    assert back == {"long": "日" * (MAX_TAG_BYTES // 3), "odd": "a\N{REPLACEMENT CHARACTER}b?c"}


@pytest.mark.parametrize("key", ["", "Prompt", "a=b", "a b", "encoder", "creation_time", "-y", "ü"])
def test_unfit_tag_keys_are_refused(tmp_path, key):
    with pytest.raises(InvalidValueError, match="tag"):
        VideoWriter(tmp_path / "a.mp4", width=64, height=64, fps=24, tags={key: "x"})


@pytest.mark.parametrize("name", ["-y.mp4", "http:x.mp4", "a%03d.mp4", "with 'blank'.mp4", "日本.mp4"])
def test_names_mean_nothing_to_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert probe(write(Path(name), moving_gradient(2))).frames == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_exception_removes_the_partial_file_and_ends_ffmpeg(tmp_path):
    processes = []

    def interrupted():
        with VideoWriter(tmp_path / "a.mp4", width=128, height=64, fps=24) as writer:
            writer.write(moving_gradient())
            processes.append(writer._process)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert processes[0].returncode is not None
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_file(tmp_path):
    path = write(tmp_path / "a.mp4", moving_gradient())
    before = path.read_bytes()
    with pytest.raises(ShapeError):
        write(path, moving_gradient(3), width=64)
    assert path.read_bytes() == before


def test_what_ffmpeg_says_is_in_the_error(tmp_path):
    with pytest.raises(VideoError, match="No such file or directory"):
        write(tmp_path / "absent" / "a.mp4", moving_gradient())


def test_a_killed_ffmpeg_is_an_error_and_leaves_nothing(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", width=128, height=64, fps=24) as writer:
        writer.write(moving_gradient())
        writer._process.kill()
        writer._process.wait()
        with pytest.raises(VideoError, match="status -9"):
            writer.write(moving_gradient(100))
        with pytest.raises(VideoError, match="status -9"):
            writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_without_frames_is_an_error(tmp_path):
    with pytest.raises(VideoError, match="no frames"), VideoWriter(tmp_path / "a.mp4", width=128, height=64, fps=24):
        pass
    assert list(tmp_path.iterdir()) == []


def test_writing_outside_the_with_block_is_an_error(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", width=128, height=64, fps=24)
    with pytest.raises(VideoError, match="not open"):
        writer.write(moving_gradient())
    with writer:
        writer.write(moving_gradient())
    writer.close()
    writer.abort()
    with pytest.raises(VideoError, match="not open"):
        writer.write(moving_gradient())
    assert probe(tmp_path / "a.mp4").frames == 9


@pytest.mark.parametrize(
    "wrong", [{"width": 63}, {"height": 0}, {"fps": 0}, {"fps": float("nan")}, {"threads": 0}, {"crf": 52}]
)
def test_settings_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        VideoWriter(tmp_path / "a.mp4", **{"width": 64, "height": 64, "fps": 24} | wrong)


@pytest.mark.parametrize("shape", [(2, 128, 64, 3), (64, 128, 3), (2, 64, 128, 4), (2, 3, 64, 128)])
def test_chunks_of_another_shape_are_refused(tmp_path, shape):
    with (
        pytest.raises(ShapeError, match=r"\[n, 64, 128, 3\]"),
        VideoWriter(tmp_path / "a.mp4", width=128, height=64, fps=24) as writer,
    ):
        writer.write(np.zeros(shape, np.uint8))


def test_floats_are_refused(tmp_path):
    with (
        pytest.raises(InvalidValueError, match="uint8"),
        VideoWriter(tmp_path / "a.mp4", width=128, height=64, fps=24) as writer,
    ):
        writer.write(np.zeros((1, 64, 128, 3), np.float32))


@pytest.mark.parametrize("read", [probe, read_frames, read_tags])
def test_reading_what_is_no_video_is_an_error(tmp_path, read):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4"):
        read(tmp_path / "text.mp4")
    with pytest.raises(VideoError, match="No such file"):
        read(tmp_path / "absent.mp4")


def test_a_cut_off_video_is_an_error(tmp_path):
    path = write(tmp_path / "a.mp4", moving_gradient(30))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(VideoError):
        probe(path)


@pytest.mark.parametrize(("num_frames", "shown"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (17, [0, 5, 11, 16])])
@pytest.mark.parametrize("chunk", [1, 5, 17])
def test_strip_holds_evenly_spaced_frames(num_frames, shown, chunk):
    frames = (
        np.full((num_frames, 32, 48, 3), 0, np.uint8)
        + (np.arange(num_frames) * 15).astype(np.uint8)[:, None, None, None]
    )
    strip = ThumbnailStrip(num_frames)
    for start in range(0, num_frames, chunk):
        strip.add(frames[start : start + chunk])
    image = np.asarray(Image.open(io.BytesIO(strip.webp())).convert("RGB")).astype(int)
    assert image.shape == (32, 48 * len(shown), 3)
    assert np.abs(image[16, 24::48, 0] - np.array(shown) * 15).max() <= 3


def test_strip_is_brought_down_to_its_width():
    strip = ThumbnailStrip(4)
    strip.add(moving_gradient(4, 384, 640))
    image = Image.open(io.BytesIO(strip.webp()))
    assert (image.format, image.size) == ("WEBP", (4 * THUMBNAIL_WIDTH, 154))


def test_strip_refuses_nothing_and_nonsense():
    with pytest.raises(VideoError, match="at least one frame"):
        ThumbnailStrip(4).webp()
    with pytest.raises(InvalidValueError, match="num_frames"):
        ThumbnailStrip(0)
    with pytest.raises(ShapeError):
        ThumbnailStrip(4).add(np.zeros((2, 3, 32, 32), np.uint8))
