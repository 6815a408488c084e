"""Frames to mp4: a streaming writer with container tags, and strips of thumbnails.

ffmpeg is the one that imageio-ffmpeg ships or finds. Its own writer is not used: it neither looks at ffmpeg's exit
status nor keeps what it says on stderr.
"""

import io
import logging
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import Image

from pyramid_flow.errors import InvalidValueError, PyramidFlowError, ShapeError

logger = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]

MAX_TAG_BYTES = 16384
"""A container tag longer than this many UTF-8 bytes is cut to it, at a character."""

THUMBNAIL_FRAMES = 4
"""Frames in a thumbnail strip."""

THUMBNAIL_WIDTH = 256
"""Greatest width of one frame in a thumbnail strip, in pixels."""

EXACT = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact")
"""What makes ffmpeg write the same bytes each time."""

FINISHED = ("-movflags", "+faststart+use_metadata_tags")
"""A finished mp4: it can be played before all of it has come, and keeps its tags."""

_CONTAINER_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time"})
_SCALE = "flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
_TO_BT709 = (
    f"scale=out_color_matrix=bt709:out_range=tv:{_SCALE},format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)


class VideoError(PyramidFlowError):
    """ffmpeg failed, and the message holds its last lines; or a writer or strip was used out of order."""


class VideoWriter:
    """Context manager that streams frames through ffmpeg into an H.264, yuv420p, +faststart mp4.

    The file grows under a hidden name beside `path` and gets its name only when it is whole; an exception inside the
    `with` block, or a failing ffmpeg, leaves nothing behind and an older file at `path` as it was. Equal frames, tags
    and settings (`threads` among them) give equal bytes on one version of ffmpeg.

    Args:
        path: Where the video will lie; its folder must exist.
        width, height: Pixels, even.
        fps: Frames per second, 0.1 to 1000.
        tags: Container tags, see `read_tags`. Keys are lower-case names (a-z, 0-9, _), not those of the container
            itself (encoder, creation_time, major_brand, ...). Values keep every character but NUL (becomes U+FFFD) and
            lone surrogates (become "?"); they are cut after `MAX_TAG_BYTES`; empty ones are not stored.
        threads: Encoder threads, at least 1.
        crf: x264's constant rate factor, 0 (lossless) to 51.

    Raises:
        InvalidValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        fps: float,
        tags: Mapping[str, str] | None = None,
        threads: int = 1,
        crf: int = 18,
    ) -> None:
        _check_settings(width, height, fps, threads, crf)
        self.path = Path(path)
        self.width, self.height = width, height
        self.num_frames = 0
        self._partial = self.path.with_name(f".{secrets.token_hex(8)}.mp4.part")
        self._command = _encode_command(
            self._partial, f"{width}x{height}", fps, tag_arguments(tags or {}), threads, crf
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        # a file takes stderr without a reader thread, and a group of its own keeps the terminal's ctrl-c from ffmpeg
        self._log = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, process_group=0
            )
        except OSError as error:
            self._log.close()
            raise VideoError(f"cannot start ffmpeg: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: Frames) -> None:
        """Hands a chunk to ffmpeg; blocks while ffmpeg is behind.

        Args:
            frames: uint8 RGB, [n, height, width, 3], any n.

        Raises:
            ShapeError: The chunk has another shape.
            InvalidValueError: The chunk is not uint8.
            VideoError: The writer is not open, or ffmpeg ended early.
        """
        if self._process is None:
            raise VideoError(f"{self.path}: the writer is not open; use it in a with block")
        check_frames(frames, self.height, self.width)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(np.ascontiguousarray(frames).data)
        except BrokenPipeError as error:
            raise self._failure(self._process.wait()) from error
        self.num_frames += len(frames)

    def close(self) -> None:
        """Finishes the file and gives it its name; does nothing on a closed writer.

        Raises:
            VideoError: No frame was written, or ffmpeg failed; nothing is left of the file then.
        """
        if self._process is None:
            return
        try:
            if self.num_frames == 0:
                raise VideoError(f"{self.path}: no frames were written")
            self._finish(self._process)
        except BaseException:
            self.abort()
            raise
        self._release()

    def abort(self) -> None:
        """Kills ffmpeg and removes the partial file; does nothing on a closed writer."""
        if self._process is None:
            return
        self._process.kill()
        _close_pipe(self._process)
        self._process.wait()
        self._partial.unlink(missing_ok=True)
        self._release()

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        _close_pipe(process)
        if status := process.wait():
            raise self._failure(status)
        try:
            self._partial.replace(self.path)
        except OSError as error:
            raise VideoError(f"{self.path}: cannot give the finished video its name: {error}") from error

    def _failure(self, status: int) -> VideoError:
        assert self._log is not None
        self._log.seek(0)
        return VideoError(f"{self.path}: ffmpeg failed with status {status}: {last_lines(self._log.read())}")

    def _release(self) -> None:
        assert self._log is not None
        self._log.close()
        self._process = None


class ThumbnailStrip:
    """Picks evenly spaced frames, first and last among them, while chunks stream by.

    num_seen: frames that have come so far.

    Args:
        num_frames: Frames of the whole video, at least 1.
        count: Frames of the strip; a shorter video gives all of its frames.

    Raises:
        InvalidValueError: `num_frames` or `count` is below 1.
    """

    def __init__(self, num_frames: int, count: int = THUMBNAIL_FRAMES) -> None:
        for field, value in (("num_frames", num_frames), ("count", count)):
            if value < 1:
                raise InvalidValueError(field, value, "is below 1")
        self._wanted = evenly_spaced(num_frames, count)
        self.num_seen = 0
        self._thumbnails: list[Image.Image] = []

    def add(self, frames: Frames) -> None:
        """Takes the next chunk: uint8 RGB, [n, height, width, 3], of one size for the whole video.

        Raises:
            ShapeError: The chunk has another shape.
            InvalidValueError: The chunk is not uint8.
        """
        check_frames(frames)
        self._thumbnails += [_thumbnail(frame) for i, frame in enumerate(frames, self.num_seen) if i in self._wanted]
        self.num_seen += len(frames)

    def webp(self) -> bytes:
        """Returns the frames collected so far side by side as WebP, each at most `THUMBNAIL_WIDTH` pixels wide.

        Raises:
            VideoError: No frame has come yet.
        """
        if not self._thumbnails:
            raise VideoError("a thumbnail strip needs at least one frame")
        buffer = io.BytesIO()
        _side_by_side(self._thumbnails).save(buffer, "WEBP", quality=82, method=4)
        return buffer.getvalue()


def evenly_spaced(num_frames: int, count: int) -> frozenset[int]:
    """Return the numbers of at most so many frames, first and last among them."""
    return frozenset(np.linspace(0, num_frames - 1, count).round().astype(int).tolist())


def _thumbnail(frame: Frames) -> Image.Image:
    height, width = frame.shape[:2]
    scale = min(1.0, THUMBNAIL_WIDTH / width)
    size = (round(width * scale), max(1, round(height * scale)))
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for column, image in enumerate(images):
        strip.paste(image, (column * width, 0))
    return strip


def _check_settings(width: int, height: int, fps: float, threads: int, crf: int) -> None:
    for field, value in (("width", width), ("height", height)):
        if value < 2 or value % 2:
            raise InvalidValueError(field, value, "is not a positive even number, as yuv420p needs")
    if not 0.1 <= fps <= 1000:
        raise InvalidValueError("fps", fps, "is outside 0.1..1000")
    if threads < 1:
        raise InvalidValueError("threads", threads, "is below 1")
    if not 0 <= crf <= 51:
        raise InvalidValueError("crf", crf, "is outside 0..51")


def check_frames(frames: Frames, height: int | None = None, width: int | None = None) -> None:
    expected = (height or frames.shape[1], width or frames.shape[2], 3) if frames.ndim == 4 else ()
    if frames.ndim != 4 or frames.shape[1:] != expected:
        raise ShapeError("frames", f"[n, {height or 'height'}, {width or 'width'}, 3]", frames.shape)
    if frames.dtype != np.uint8:
        raise InvalidValueError("frames", frames.dtype, "is not uint8")


def _encode_command(path: Path, size: str, fps: float, tags: Sequence[str], threads: int, crf: int) -> list[str]:
    return [*encoding(size, fps, threads, crf), *FINISHED, *tags, "-f", "mp4", _file_url(path)]


def encoding(size: str, fps: float, threads: int, crf: int) -> list[str]:
    """Return ffmpeg's arguments from raw RGB frames on stdin to H.264, all but those of the container."""
    rate = Fraction(fps).limit_denominator(10000)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(rate), "-i", "pipe:0"]
    encode = ["-vf", _TO_BT709, "-c:v", "libx264", "-crf", str(crf), "-threads", str(threads), "-filter_threads", "1"]
    return [*ffmpeg(), *source, "-an", *encode, *EXACT]


def ffmpeg() -> list[str]:
    """Return the command and what it shall say: warnings only."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostats", "-v", "warning"]


def tag_arguments(tags: Mapping[str, str]) -> list[str]:
    """Return ffmpeg's arguments for container tags, see `VideoWriter`."""
    for key in tags:
        if key in _CONTAINER_TAGS or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", key):
            raise InvalidValueError("tag", repr(key), "is not a free name of a-z, 0-9 and _")
    return [word for key, value in tags.items() for word in ("-metadata", f"{key}={tag_value(value)}")]


def tag_value(value: str) -> str:
    """Return what is stored of a tag's value, see `VideoWriter`."""
    encoded = value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    if len(encoded) > MAX_TAG_BYTES:
        logger.warning("a container tag of %d bytes is cut to %d", len(encoded), MAX_TAG_BYTES)
    return encoded[:MAX_TAG_BYTES].decode("utf-8", "ignore")


def _close_pipe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # ffmpeg ended first: its status and its last lines tell why
        process.stdin.close()


def _file_url(path: str | os.PathLike[str]) -> str:
    # "file:" keeps ffmpeg from reading an option, a protocol or a pattern into the name
    return f"file:{os.fspath(path)}"


def last_lines(log: bytes, count: int = 5) -> str:
    """Return the end of what ffmpeg said, on one line."""
    lines = [line.strip() for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "it said nothing"
